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


class Discriminant(NamedTuple):
    """The logit of a feature vector f is weights @ f + offset."""

    weights: Float[Array, "c"]
    offset: Float[Array, ""]


def separated(features: Float[Array, "n c"], share: Float[Array, "n"], steps: int) -> Discriminant:
    """The discriminant after `steps` maximisations, with an expectation between two of them.

    share: probability of the first class for each vector, of the first expectation.
    """
    mean, axes = _whitening(features)
    z = (features - mean) @ axes

    def step(_: Int[Array, ""], share: Array) -> Array:
        weights, offset = _maximised(z, share)
        return jax.nn.sigmoid(z @ weights + offset)

    weights, offset = _maximised(z, lax.fori_loop(0, steps - 1, step, share))
    weights = axes @ weights
    return Discriminant(weights, offset - mean @ weights)


def _whitening(
    features: Float[Array, "n c"],
) -> tuple[Float[Array, "c"], Float[Array, "c r"]]:
    """Mean, and the axes on which the first principal components have variance 1."""
    mean = features.mean(0)
    centred = features - mean
    values, vectors = jnp.linalg.eigh(centred.T @ centred / len(features))
    values, vectors = values[-RANK:], vectors[:, -RANK:]
    return mean, vectors / jnp.sqrt(jnp.maximum(values, 1e-6 * values[-1]))


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
