"""The methods, one paper per file; names of `base`, their common parts, stand here too."""

import importlib
from typing import Any

_BASE = ("METHODS", "Fitted", "Inputs", "Method", "get")


def __getattr__(name: str) -> Any:
    """On first use: `settings`, which `--help` reads, needs no NumPy."""
    if name not in _BASE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.base"), name)
