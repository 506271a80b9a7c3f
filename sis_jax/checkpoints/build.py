"""Arrays to modules, by `nnx.eval_shape`: nothing is drawn, all faults come at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from sis_jax.types import Info, SisError

Module = TypeVar("Module", bound=nnx.Module)
_SHOWN = 12


def shapes_of(make: Callable[[], nnx.Module]) -> dict[str, tuple[int, ...]]:
    """Our names and shapes of everything the module stores."""
    _, state = nnx.split(nnx.eval_shape(make))
    return {_name(path): tuple(leaf.shape) for path, leaf in nnx.to_flat_state(state)}


def faults(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Why `arrays` are not the parameters of a module with these shapes; empty if they are."""
    found = [
        f"missing: {key}, model has {list(shapes[key])}"
        for key in sorted(shapes.keys() - arrays.keys())
    ]
    found += [
        f"surplus: {key}, file has {list(arrays[key].shape)}"
        for key in sorted(arrays.keys() - shapes.keys())
    ]
    for key in sorted(shapes.keys() & arrays.keys()):
        value = arrays[key]
        if value.shape != shapes[key]:
            found.append(
                f"shape: {key}, file has {list(value.shape)}, model has {list(shapes[key])}"
            )
        elif value.dtype.kind != "f":
            found.append(f"type: {key}, file has {value.dtype}, model has float32")
        elif not np.isfinite(value).all():
            found.append(
                f"numbers: {key} holds {int((~np.isfinite(value)).sum())} NaN or infinite numbers"
            )
    return found


def refuse(what: str, found: list[str]) -> None:
    """Raise all faults in one error, or return where there are none."""
    if found:
        more = f" ... and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise SisError(
            f"{what} does not fit the network ({len(found)} faults): "
            + "; ".join(found[:_SHOWN])
            + more
        )


def checked(
    arrays: Mapping[str, np.ndarray], wrong: list[str], make: Callable[[], nnx.Module], what: str
) -> dict[str, np.ndarray]:
    """`arrays` as float32 where they are the parameters of `make()`; SisError that lists every
    fault, those found before, `wrong`, first.
    """
    refuse(what, wrong + faults(arrays, shapes_of(make)))
    return {key: np.array(value, np.float32, order="C") for key, value in arrays.items()}


def build(
    make: Callable[[], Module], arrays: Mapping[str, np.ndarray], what: str, info: Info,
    *, emptied: bool = False,
) -> Module:  # fmt: skip
    """The module `make()` with the numbers of `arrays` as float32; `what` names them in errors.

    emptied: take them out of `arrays`, a dict, one by one: a large network is never held twice.
    """
    graph, state = nnx.split(nnx.eval_shape(make))
    flat = nnx.to_flat_state(state)
    refuse(what, faults(arrays, {_name(path): tuple(leaf.shape) for path, leaf in flat}))
    take: Callable[[str], np.ndarray] = getattr(arrays, "pop" if emptied else "__getitem__")
    values = [jax.device_put(np.asarray(take(_name(path)), np.float32)) for path, _ in flat]
    filled = [(path, leaf.replace(value)) for (path, leaf), value in zip(flat, values)]
    module = nnx.merge(graph, nnx.from_flat_state(filled))
    # nnx.Module declares no such attribute; every network here has it.
    setattr(module, "info", info)  # noqa: B010
    return module


def arrays_of(module: nnx.Module) -> dict[str, np.ndarray]:
    """Everything a module stores, under our names, as NumPy arrays: the inverse of `build`."""
    _, state = nnx.split(module)
    return {
        _name(path): np.asarray(jax.device_get(leaf[...]))
        for path, leaf in nnx.to_flat_state(state)
    }


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
