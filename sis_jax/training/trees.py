"""Networks as trees of arrays, and a step of an optimiser on them."""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx


def split(network: nnx.Module) -> tuple[Any, dict, dict]:
    """(structure, trained parameters, other arrays); the last two as plain nested dicts."""
    graph, params, rest = nnx.split(network, nnx.Param, ...)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def join(graph: Any, params: dict, rest: dict) -> Any:
    """The network again."""
    return nnx.merge(graph, jax.tree.map(lambda a: a, _merged(params, rest)))


def _merged(a: dict, b: dict) -> dict:
    out = dict(a)
    for key, value in b.items():
        out[key] = _merged(out[key], value) if isinstance(value, dict) and key in out else value
    return out


def descended(
    optimiser: optax.GradientTransformation, grads: Any, held: optax.OptState, params: Any
) -> tuple[Any, optax.OptState]:
    """(parameters, optimiser's state) after a step along the gradients."""
    updates, held = optimiser.update(grads, held, params)
    return optax.apply_updates(params, updates), held
