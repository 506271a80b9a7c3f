"""TorchScript archives (`torch.jit.save`), as OpenAI published CLIP; only data.pkl is read.

Its modules are objects of classes that the archive's program defines; here each is a record of its
attributes, so the program is not even decompressed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from sis_jax.checkpoints.arrays import TENSORS
from sis_jax.checkpoints.unpickle import Name, Record, Refused, record

_CLASS = re.compile(r"__torch__(?:\.\w{1,200}){1,30}")
_LISTS = {
    f"torch.jit._pickle.{name}"
    for name in (
        "build_intlist",
        "build_doublelist",
        "build_boollist",
        "build_tensorlist",
        "restore_type_tag",
    )
}
_MAX_MODULES = 4096
_MAX_NAME = 400


class _Names(Mapping[str, Name]):
    """The names of tensors; every class of the archive's own program is a record."""

    def __getitem__(self, name: str) -> Name:
        if name in TENSORS:
            return TENSORS[name]
        if name in _LISTS or _CLASS.fullmatch(name):
            return Name(name, record(name))
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(TENSORS)

    def __len__(self) -> int:
        return len(TENSORS)


NAMES: Mapping[str, Name] = _Names()


def is_module(value: Any) -> bool:
    """True for an object of a class of the archive's program."""
    return isinstance(value, Record) and value.name.startswith("__torch__.")


def state_dict(root: Record) -> dict[str, Any]:
    """Everything that is no module, by its dotted name; bounded, without recursion."""
    found: dict[str, Any] = {}
    waiting: list[tuple[str, Record]] = [("", root)]
    modules = 0
    while waiting:
        prefix, module = waiting.pop()
        modules += 1
        state = module.state if isinstance(module.state, dict) else {}
        if modules + len(waiting) + len(state) > _MAX_MODULES or len(prefix) > _MAX_NAME:
            raise Refused(
                "its modules contain each other in a circle, or are more than any network has"
            )
        for key, value in state.items():
            name = f"{prefix}{str(key)[: _MAX_NAME + 1]}"
            if is_module(value):
                waiting.append((f"{name}.", value))
            else:
                found[name] = value
    return found
