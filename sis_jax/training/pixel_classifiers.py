"""Ensembles of small classifiers of single pixels, without ever holding a whole hypercolumn map.

The networks of DatasetGAN (Zhang et al. 2021, section 3.2): linear, ReLU, batch normalisation,
twice; then linear. Without hidden layers: the read-out of LinearGAN (Xu and Zheng 2021). A
hypercolumn is all feature maps enlarged to the image's size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from sis_jax.ops.resize import linear_matrix

Layers = list[tuple[Any, Any]]  # (weight Float[e i o], bias Float[e o]) of every layer, e members
EPSILON = 1e-5  # of batch normalisation
INITIAL = 0.02  # deviation of the first weights
CHUNK = 50  # steps between two signs of life
STRIP = 2**16  # pixels of an image that are labelled at a time


def hidden_widths(classes: int) -> tuple[int, int]:
    """Widths of the two hidden layers: 128 and 32 below 32 classes, else 256 and 128."""
    return (128, 32) if classes < 32 else (256, 128)


def hypercolumns(
    features: tuple[Float[Array, "b _ _ _"], ...], at: Int[Array, "b p"], size: int
) -> Float[Array, "b p d"]:
    """Hypercolumns of single pixels, by bilinear interpolation (half-pixel centres).

    at: row * size + column of each pixel in an image of size x size.
    """
    return jnp.concatenate([_read(x.astype(jnp.float32), at, size) for x in features], axis=-1)


def _read(x: Float[Array, "b r s c"], at: Int[Array, "b p"], size: int) -> Float[Array, "b p c"]:
    """One map at pixels of a finer (or equal) grid; four neighbours, edges repeated."""
    b, rows, columns, c = x.shape
    flat = x.reshape(b, rows * columns, c)
    if rows == columns == size:
        return jnp.take_along_axis(flat, at[..., None], axis=1)
    total = jnp.zeros(())
    for row, down in _neighbours(at // size, rows, size):
        for column, right in _neighbours(at % size, columns, size):
            picked = jnp.take_along_axis(flat, (row * columns + column)[..., None], axis=1)
            total = total + (down * right)[..., None] * picked
    return total


def _neighbours(at: Any, cells: int, size: int) -> list[tuple[Any, Any]]:
    """(index, weight) of the two neighbours of positions; NumPy or JAX, as `at` is."""
    lib = np if isinstance(at, np.ndarray) else jnp
    where = lib.clip((at + 0.5) * (cells / size) - 0.5, 0, cells - 1)
    low = lib.floor(where).astype(np.int32)
    part = where - low
    return [(low, 1 - part), (lib.minimum(low + 1, cells - 1), part)]


# training


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters: AdamW with a cosine; hidden: widths of the hidden layers."""

    hidden: tuple[int, ...]
    steps: int
    batch: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.0

    def optimizer(self) -> optax.GradientTransformation:
        rate = optax.cosine_decay_schedule(self.learning_rate, self.steps)
        return optax.adamw(rate, weight_decay=self.weight_decay)


def train(
    x: Float[Any, "n d"],
    y: Int[Any, "n"],
    weight: Float[Any, "n"],
    seen: Float[Any, "e n"],
    classes: int,
    recipe: Recipe,
    seed: int = 0,
    tick: Callable[[int, float], None] = lambda steps, loss: None,
) -> Layers:
    """Train all members at once; returns their layers with normalisation folded in.

    x: standardised features. y: class, 0..classes - 1. weight: of each point in the loss. seen: how
        often each member is shown each point. Members share minibatches, and differ in their first
        weights and in `seen`. tick: called with the number of steps and the mean loss.
    """
    rng = np.random.default_rng(seed)
    sizes, steps, batch = (x.shape[1], *recipe.hidden, classes), recipe.steps, recipe.batch
    layers = [
        (
            jnp.asarray(INITIAL * rng.standard_normal((len(seen), i, o)), jnp.float32),
            jnp.zeros((len(seen), o)),
        )
        for i, o in itertools.pairwise(sizes)
    ]
    state = (layers, recipe.optimizer().init(layers))
    data = tuple(jnp.asarray(a) for a in (x, y, weight, seen))
    order = np.concatenate([rng.permutation(len(x)) for _ in range(-(-steps * batch // len(x)))])[
        : steps * batch
    ]
    order = order.reshape(steps, batch).astype(np.int32)
    for start in range(0, steps, CHUNK):
        state, losses = _steps(state, data, order[start : start + CHUNK], recipe)
        tick(len(losses), float(losses.mean()))
    return _folded(state[0], data[0], data[3])


@partial(jax.jit, static_argnames=("recipe",), donate_argnums=(0,))
def _steps(state: Any, data: Any, order: Int[Array, "s b"], recipe: Recipe) -> tuple[Any, Array]:
    """Some steps of every member; loss per step, mean over members."""
    optimiser, (x, y, weight, seen) = recipe.optimizer(), data

    def loss(layers: Layers, rows: Array) -> Array:
        losses = jax.vmap(_loss, (0, None, None, None, 0))(
            layers, x[rows], y[rows], weight[rows], seen[:, rows]
        )
        # Members do not share weights: the gradient of the sum is every member's own
        return losses.sum()

    def step(state: Any, rows: Array) -> tuple[Any, Array]:
        layers, moments = state
        value, gradient = jax.value_and_grad(loss)(layers, rows)
        updates, moments = optimiser.update(gradient, moments, layers)
        return (optax.apply_updates(layers, updates), moments), value / len(seen)

    return jax.lax.scan(step, state, order)


def _loss(layers: Layers, x: Array, y: Array, weight: Array, seen: Array) -> Array:
    """One member's cross-entropy on a minibatch, of the points it is shown."""
    for i, (w, b) in enumerate(layers):
        x = x @ w + b
        if i + 1 < len(layers):
            x = jax.nn.relu(x)
            mean, scale = _moments(x, seen)
            x = (x - mean) * scale
    wrong = optax.softmax_cross_entropy_with_integer_labels(x, y)
    return (wrong * weight * seen).sum() / jnp.maximum((weight * seen).sum(), 1e-6)


def _moments(x: Float[Array, "n h"], seen: Float[Array, "n"]) -> tuple[Array, Array]:
    """Mean and 1 / deviation of each unit over the points seen."""
    share = seen / jnp.maximum(seen.sum(), 1e-6)
    mean = share @ x
    return mean, jax.lax.rsqrt(share @ jnp.square(x - mean) + EPSILON)


@jax.jit
def _folded(layers: Layers, x: Float[Array, "n d"], seen: Float[Array, "e n"]) -> Layers:
    """Layers without normalisation: its moments go into the next layer's weights."""

    def member(arguments: tuple[Layers, Array]) -> Layers:
        own, shown = arguments
        y, folded = x, []
        for i, (w, b) in enumerate(own):
            if i:
                mean, scale = _moments(y, shown)
                w, b = w * scale[:, None], b - (mean * scale) @ w
            folded.append((w, b))
            y = jax.nn.relu(y @ w + b)
        return folded

    return jax.lax.map(member, (layers, seen))


# application


def logits(layers: Layers, x: Float[Any, "n d"]) -> Float[Array, "e n k"]:
    """Every member's class scores of points."""
    y = jnp.einsum("nd,edo->eno", x, layers[0][0]) + layers[0][1][:, None]
    return _deeper(layers[1:], y)


def _deeper(layers: Layers, y: Float[Array, "e *n h"]) -> Float[Array, "e *n k"]:
    for w, b in layers:
        flat = jax.nn.relu(y).reshape(y.shape[0], -1, y.shape[-1])
        y = (flat @ w + b[:, None]).reshape(*y.shape[:-1], w.shape[-1])
    return y


def label_maps(
    layers: Layers, features: tuple[Float[Array, "b _ _ _"], ...], size: int, majority: bool = False
) -> tuple[UInt8[Array, "b h w"], Float[Array, "b h w"]]:
    """Class of every pixel and confidence; features square, `size` pixels at most.

    The first layer is applied to every map at its own size and its result enlarged, which is equal
    because enlarging is linear. Images, members and strips of columns take turns: flat memory.
    Class: the largest mean probability, or with `majority` the most votes. Confidence: 1 minus the
    Jensen-Shannon divergence H(mean p) - mean H(p) over log min(members, classes).
    """
    members, classes = layers[-1][1].shape
    sizes = sorted({x.shape[1] for x in features})
    by_size = {
        r: jnp.concatenate([x.astype(jnp.float32) for x in features if x.shape[1] == r], axis=-1)
        for r in sizes
    }
    turns = _turns(layers, features, members if len(layers) == 1 else 1)
    strips = next(n for n in range(max(1, size**2 // STRIP), size + 1) if size % n == 0)

    def of_one(maps: dict[int, Array]) -> tuple[Array, Array]:
        fine = maps.pop(size).swapaxes(0, 1).reshape(size * size, -1) if size in maps else None
        columns = jnp.asarray(_matrices(maps, size))

        def turn(
            total: tuple[Array, Array, Array], own: Any
        ) -> tuple[tuple[Array, Array, Array], None]:
            first, bias, deeper = own
            rows = _rows(maps, first, size)

            def strip(columns: Array, fine: Array | None) -> tuple[Array, Array, Array]:
                y = (columns @ rows).reshape(len(columns) * size, -1)
                y = y + (0.0 if fine is None else fine @ first[size])
                y = jnp.moveaxis(y.reshape(len(y), *bias.shape), 1, 0) + bias[:, None]
                score = jax.nn.log_softmax(_deeper(deeper, y), axis=-1)
                p = jnp.exp(score)
                votes = (
                    jax.nn.one_hot(jnp.argmax(score, axis=-1), classes).sum(0)
                    if majority
                    else jnp.zeros((y.shape[1], classes))
                )
                return p.sum(0), (p * score).sum((0, -1)), votes

            if strips == 1:
                p, score, votes = strip(columns, fine)
            else:
                parts = jax.tree.map(
                    lambda a: a.reshape(strips, len(a) // strips, a.shape[-1]), (columns, fine)
                )
                found = jax.lax.map(lambda part: strip(*part), parts)
                p, score, votes = (a.reshape(size * size, *a.shape[2:]) for a in found)
            return (total[0] + p, total[1] - score, total[2] + votes), None

        empty = jnp.zeros((size * size, classes))
        (p, entropy, votes), _ = jax.lax.scan(turn, (empty, empty[:, 0], empty), turns)
        return _verdict(p / members, entropy / members, votes, members, size)

    return jax.lax.map(of_one, by_size)


def _turns(
    layers: Layers, features: tuple[Array, ...], group: int
) -> tuple[dict[int, Array], Array, Layers]:
    """The layers, `group` members at a time along a new first axis; the first one by map size."""
    (weight, bias), at, rows = layers[0], 0, {}
    for x in features:
        rows.setdefault(x.shape[1], []).append(weight[:, at : at + x.shape[-1]])
        at += x.shape[-1]

    def split(a: Array) -> Array:
        return a.reshape(a.shape[0] // group, group, *a.shape[1:])

    joined = {
        size: jnp.moveaxis(split(jnp.concatenate(parts, axis=1)), 1, 2)
        for size, parts in rows.items()
    }
    first = {size: w.reshape(*w.shape[:2], -1) for size, w in joined.items()}
    return first, split(bias), jax.tree.map(split, layers[1:])


def _matrices(maps: dict[int, Any], size: int) -> Float[np.ndarray, "size r"]:
    """What enlarges one axis of each map bilinearly to `size`, side by side."""
    matrices = [linear_matrix(r, size).astype(np.float32) for r in maps]
    return np.concatenate([np.zeros((size, 0), np.float32), *matrices], axis=1)


def _rows(
    maps: dict[int, Float[Array, "_ _ _"]], weight: dict[int, Float[Array, "_ o"]], size: int
) -> Float[Array, "r q"]:
    """(map x weight) of each map, enlarged bilinearly along its rows, q = size x o; the columns of
    all maps below each other: `_matrices` enlarges these and adds the maps up.
    """
    width = next(iter(weight.values())).shape[1]
    found: list[Any] = [jnp.zeros((size, 0, width))]
    for r, x in maps.items():
        own = (x.reshape(r * r, -1) @ weight[r]).reshape(r, -1)
        found.append((linear_matrix(r, size).astype(np.float32) @ own).reshape(size, r, -1))
    rows = jnp.concatenate(found, axis=1).swapaxes(0, 1)
    return rows.reshape(-1, size * width)


def _verdict(
    p: Array, entropy: Array, votes: Array, members: int, size: int
) -> tuple[Array, Array]:
    """Label and confidence from mean probability, mean entropy and votes, column by column."""
    divergence = -(p * jnp.log(jnp.maximum(p, 1e-30))).sum(-1) - entropy
    label = jnp.argmax(votes + 0.5 * p, axis=-1).astype(jnp.uint8)  # without votes p alone decides
    confidence = jnp.clip(1 - divergence / np.log(max(min(members, p.shape[-1]), 2)), 0, 1)
    return label.reshape(size, size).T, confidence.reshape(size, size).T
