"""Two classes of feature vectors from soft labels that are often wrong.

Expectation maximisation for two Gaussians with one covariance: the maximisation is linear
discriminant analysis (Fisher 1936) with soft labels, the expectation its posterior. Features are
whitened once, after which both steps are a mean and a dot product.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

RANK = 64  # principal components that are kept
_LEAST = 1e-3  # of a class's share


class Whitened(NamedTuple):
    """Features f as z = (f - mean) @ axes, of mean 0 and covariance I."""

    z: Float[Array, "n r"]
    mean: Float[Array, "c"]
    axes: Float[Array, "c r"]


class Discriminant(NamedTuple):
    """The logit of a feature vector f is weights @ f + offset."""

    weights: Float[Array, "c"]
    offset: Float[Array, ""]


def whitened(features: Float[Array, "n c"]) -> Whitened:
    """The first principal components, each with variance 1."""
    mean = features.mean(0)
    centred = features - mean
    values, vectors = jnp.linalg.eigh(centred.T @ centred / len(features))
    values, vectors = values[-RANK:], vectors[:, -RANK:]
    axes = vectors / jnp.sqrt(jnp.maximum(values, 1e-6 * values[-1]))
    return Whitened(centred @ axes, mean, axes)


def separated(
    features: Whitened, share: Float[Array, "n"], steps: int
) -> tuple[Discriminant, Float[Array, "n"]]:
    """The discriminant after `steps` maximisations with an expectation after each, and the last
    expectation: the probability of the first class for each vector.

    share: that probability before the first step.
    """
    z, mean, axes = features

    def step(_: Int[Array, ""], state: tuple[Discriminant, Array]) -> tuple[Discriminant, Array]:
        found = _maximised(z, state[1])
        return found, jax.nn.sigmoid(z @ found.weights + found.offset)

    nothing = Discriminant(jnp.zeros(z.shape[1]), jnp.zeros(()))
    (weights, offset), share = lax.fori_loop(0, steps, step, (nothing, share))
    weights = axes @ weights
    return Discriminant(weights, offset - mean @ weights), share


def _maximised(z: Float[Array, "n r"], share: Float[Array, "n"]) -> Discriminant:
    """Linear discriminant analysis of whitened vectors.

    With mean 0 and covariance I over all, and p the share of the first class, whose mean is m: the
    other mean is -o m, o = p / (1 - p) the odds, the covariance within is I - o m m', and its
    inverse times the difference of the means is m / ((1 - p) (1 - o m'm)) (Sherman and Morrison).
    """
    p = jnp.clip(share.mean(), _LEAST, 1 - _LEAST)
    odds = p / (1 - p)
    m = share @ z / (p * len(z))
    length = m @ m
    gain = 1 / ((1 - p) * jnp.maximum(1 - odds * length, _LEAST))
    return Discriminant(gain * m, jnp.log(odds) - gain * length * (1 - odds) / 2)
