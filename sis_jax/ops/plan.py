"""How many samples go through a network at a time: the one place that decides it.

The answer follows from the function, the shapes of its arguments and the platform, never from the
number of samples or devices, so that bytes do not either. Memory is counted on the jaxpr: the
largest sum of arrays that live at one moment, within a factor of two of XLA's `memory_analysis()`.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jaxtyping import PyTree

from sis_jax.types import SisError

try:
    import resource
except ImportError:  # Windows
    resource = None

CPU_ROWS = 16
ACCELERATOR_ROWS = 256
# Bytes that one device's block may hold beside the weights. The programs of the default generator
# stay below it at 16 samples; on a CPU larger blocks are not faster, they only leave the caches.
CPU_BYTES = 512 * 2**20
ACCELERATOR_BYTES = 4 * 2**30
SLACK = 1.25  # of the refusal: the allocator's own share
_LOOPS = ("scan", "while")
_FREE = ("broadcast_in_dim", "iota", "reshape")  # XLA never stores the results of these


def rows_at_once(
    body: Callable[..., Any], in_axes: tuple[int | None, ...], arguments: tuple[Any, ...],
    platform: str, most: int | None = None, **static: Hashable,
) -> tuple[int, int]:  # fmt: skip
    """(samples per device at a time for a body of `parallel.map_devices`, bytes that so many need).

    arguments: a pytree per entry of in_axes; where that is 0, a row per sample. platform: "cpu",
        "gpu" or "tpu". most: upper bound in place of 16 on a CPU, 256 elsewhere. Returns `most`, or
        the largest power of two within the platform's bound.
    """
    leaves, structure = jax.tree.flatten(arguments)
    kinds = (jax.dtypes.canonicalize_dtype(getattr(a, "dtype", np.float32)) for a in leaves)
    shapes = tuple((np.shape(a), kind) for a, kind in zip(leaves, kinds))
    rows = most or (CPU_ROWS if platform == "cpu" else ACCELERATOR_ROWS)
    room = CPU_BYTES if platform == "cpu" else ACCELERATOR_BYTES
    return _planned(body, in_axes, structure, shapes, rows, room, tuple(sorted(static.items())))


@lru_cache(maxsize=256)
def _planned(body, in_axes, structure, shapes, rows, room, static) -> tuple[int, int]:
    given = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*s) for s in shapes])
    cut = tuple(
        jax.tree.map(lambda a: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype), argument)
        if axis == 0
        else argument
        for axis, argument in zip(in_axes, given, strict=True)
    )
    needed = bytes_of(partial(body, **dict(static)), *cut)
    if needed <= room:
        return rows, needed
    fitting = min(rows, 2 ** max(0, int(math.log2(max(room * rows / needed, 1)))))
    return fitting, -(-needed * fitting // rows)


def devices_at_once(needed: int, devices: Sequence[Any]) -> Sequence[Any]:
    """As many of `devices` as may work at a time where a block needs `needed` bytes.

    Those of a CPU share its memory and cores; how many work does not change a byte.
    """
    if devices[0].platform != "cpu":
        return devices
    return devices[: max(1, CPU_BYTES * len(devices) // max(needed, 1))]


def bytes_of(body: Callable[..., Any], *arguments: Any) -> int:
    """Bytes that `body(*arguments)` needs beside its arguments, results included."""
    closed = jax.make_jaxpr(body)(*arguments)
    return _peak(closed.jaxpr, [True] * len(closed.jaxpr.outvars))


def size_of(tree: PyTree) -> int:
    """Bytes of all arrays."""
    return sum(np.size(a) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def check_room(
    needed: int, devices: Sequence[Any], what: str, smaller: str = "a generator of lower resolution"
) -> None:
    """SisError where `needed` bytes on each of `devices` are more than there are."""
    cpu = devices[0].platform == "cpu"
    total, there = needed * SLACK * (len(devices) if cpu else 1), memory_there(devices[0])
    if there is not None and total > there:
        cure = "take a machine or device with more"
        if cpu and len(devices) > 1:
            cure = "set XLA_FLAGS=--xla_force_host_platform_device_count=1"
        raise SisError(
            f"{what} needs about {total / 1e9:.1f} GB of memory and {there / 1e9:.1f} GB are "
            f"free: {cure}, or take {smaller}"
        )


def memory_there(device: Any) -> int | None:
    """Bytes that one more computation on `device` can have, None where nobody knows."""
    if device.platform != "cpu":
        facts = device.memory_stats() or {}
        return facts["bytes_limit"] - facts["bytes_in_use"] if "bytes_limit" in facts else None
    known = Path("/proc/meminfo")
    if not known.exists():
        return None
    facts = dict(line.split(":") for line in known.read_text().splitlines())
    return 1024 * int(facts["MemAvailable"].split()[0])


def give_back() -> None:
    """Return freed memory to the system, which glibc keeps (`runs/machine.py`)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def memory_held() -> int:
    """The most bytes that this process has held at a time; 0 where the system does not tell."""
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _peak(jaxpr: core.Jaxpr, wanted: Sequence[bool]) -> int:
    """Largest number of bytes alive at one equation, from the last one back; arguments count 0."""
    given = {*jaxpr.invars, *jaxpr.constvars}

    def kept(variables: Sequence[Any]) -> set[Any]:
        return {v for v in variables if not isinstance(v, core.Literal) and v not in given}

    alive = kept([v for v, w in zip(jaxpr.outvars, wanted) if w])
    free: set[Any] = {v for e in jaxpr.eqns if e.primitive.name in _FREE for v in e.outvars}
    peak = sum(map(_size, alive))
    for equation in reversed(jaxpr.eqns):
        used = [v in alive for v in equation.outvars]
        if not any(used):
            continue
        alive |= kept(equation.invars)
        here = sum(_size(v) for v in alive - free)
        peak = max(peak, here + _inner(equation, used))
        alive -= set(equation.outvars)
    return peak


def _inner(equation: Any, used: list[bool]) -> int:
    """Bytes inside an equation that holds functions of its own, beside its results."""
    functions: list[Any] = [
        getattr(f, "jaxpr", f)
        for value in equation.params.values()
        for f in (value if isinstance(value, tuple | list) else (value,))
        if isinstance(f, core.ClosedJaxpr | core.Jaxpr)
    ]
    if equation.primitive.name in _LOOPS:  # a round's results are copied into the loop's
        return max((_peak(f, [True] * len(f.outvars)) for f in functions), default=0)
    own = sum(_size(v) for v, u in zip(equation.outvars, used) if u)
    return max((max(0, _peak(f, used) - own) for f in functions), default=0)


def _size(variable: Any) -> int:
    aval = variable.aval
    return math.prod(getattr(aval, "shape", ())) * getattr(
        getattr(aval, "dtype", None), "itemsize", 4
    )
