"""Class-conditional generators behind the one protocol: which class a latent stands for.

A conditional generator's z has one more number, N(0, 1) like the others; its quantile picks the
class. So z ~ N(0, 1) of `gen.z_dim` numbers gets every class equally often, and no method has to
know about classes. `gen.with_classes(...)` narrows the choice.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array, Float

from sis_jax.types import UsageError


def one_hot(chance: Float[Array, "n"], classes: tuple[int, ...], count: int) -> Float[Array, "n c"]:
    """Labels for normal numbers: each of `classes` (empty: of all `count`) equally likely."""
    chosen = jnp.asarray(classes or range(count))
    index = jnp.clip(
        jnp.floor(ndtr(chance.astype(jnp.float32)) * len(chosen)), 0, len(chosen) - 1
    ).astype(jnp.int32)
    return jax.nn.one_hot(chosen[index], count)


def check_classes(classes: int | Iterable[int] | None, count: int) -> tuple[int, ...]:
    """`classes` as a tuple (None: empty, all); UsageError for classes that the generator lacks."""
    if classes is None:
        return ()
    chosen = (classes,) if isinstance(classes, int) else tuple(classes)
    if not count:
        raise UsageError("this generator has no classes to choose from: leave classes out")
    for c in chosen:
        if isinstance(c, bool) or not isinstance(c, int) or not 0 <= c < count:
            raise UsageError(
                f"there is no class {c!r}: this generator has {count}, give integers from 0 "
                f"to {count - 1}"
            )
    if not chosen:
        raise UsageError(f"classes is empty: give integers from 0 to {count - 1}, or None for all")
    return chosen


def check_labels(labels: object, n: int, count: int) -> jax.Array:
    """`labels` as an array [n, count]; UsageError for any other shape, or without classes."""
    if not count:
        raise UsageError("this generator has no classes: leave labels out")
    rows = jnp.asarray(labels, jnp.float32)
    if rows.shape != (n, count):
        raise UsageError(
            f"labels must be one-hot rows of {count}, [{n}, {count}] here, got {list(rows.shape)}"
        )
    return rows
