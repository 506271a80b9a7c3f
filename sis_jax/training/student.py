"""One training step of a student, as pure functions of one device's share of a batch.

Loss: mean cross-entropy over pixels that are not ignored, optionally weighted by the teacher's
    confidence, and with soft targets from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, UInt8

from sis_jax.models.students import to_float
from sis_jax.ops.student_augment import (
    IGNORE,
    NONE,
    Augmentation,
    appearance,
    geometry,
    other_backgrounds,
    soften,
    warp,
)
from sis_jax.parallel import pmean, psum, step_key
from sis_jax.training.trees import descended, join, split

State = dict[str, Any]  # a pytree of arrays only


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of a run, fixed at compile time.

    optimizer: "adam" adds weight_decay to the gradient, "adamw" decouples it. schedule: "poly" (1 -
        t / T)^0.9, or "cosine" after a warm-up. weighting: exponent of the confidence, 0 = none.
        soft: soft targets. ema: decay of the averaged network, 0 = none. side: resolution in
        pixels. backbone_rate: of a pretrained backbone, as a share of `learning_rate`.
    """

    steps: int = 2000
    batch: int = 32
    side: int = 128
    learning_rate: float = 1e-3
    backbone_rate: float = 0.3
    weight_decay: float = 1e-2
    optimizer: str = "adamw"
    schedule: str = "cosine"
    weighting: float = 0.5
    soft: bool = False
    ema: float = 0.999
    augmentation: Augmentation = NONE
    dtype: str = "float32"


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """The optimiser and schedule of a recipe; a network's `backbone` learns slower."""

    def one(rate: float) -> optax.GradientTransformation:
        if recipe.optimizer == "adam":
            decay = optax.add_decayed_weights(recipe.weight_decay)
            return optax.chain(decay, optax.adam(_schedule(recipe, rate)))
        return optax.adamw(_schedule(recipe, rate), weight_decay=recipe.weight_decay)

    rates = {"new": recipe.learning_rate, "backbone": recipe.learning_rate * recipe.backbone_rate}
    return optax.multi_transform(
        {part: one(rate) for part, rate in rates.items()},
        lambda params: {name: name if name == "backbone" else "new" for name in params},
    )


def _schedule(recipe: Recipe, rate: float) -> optax.Schedule:
    if recipe.schedule == "poly":
        return optax.polynomial_schedule(rate, 0.0, 0.9, recipe.steps)
    warm = max(recipe.steps // 20, 1)
    return optax.warmup_cosine_decay_schedule(0.0, rate, warm, max(recipe.steps, warm + 1))


def new_state(network: nnx.Module, recipe: Recipe) -> tuple[Any, State]:
    """(structure, state) at the start of a run from this network."""
    graph, params, statistics = split(network)
    state = {
        "params": params,
        "statistics": statistics,
        "ema": jax.tree.map(jnp.array, params),
        "optimizer": optimizer(recipe).init(params),
        "step": jnp.zeros((), jnp.int32),
    }
    return graph, state


def cross_entropy(
    logits: Float[Array, "n h w k"],
    masks: UInt8[Array, "n h w"],
    certainty: Float[Array, "n h w"],
    recipe: Recipe,
) -> tuple[Array, Array]:
    """(sum of weighted losses, sum of weights) over the pixels that are not ignored."""
    valid = (masks != IGNORE).astype(jnp.float32)
    k = logits.shape[-1]
    target = jax.nn.one_hot(jnp.where(masks == IGNORE, 0, masks), k)
    if recipe.soft:  # confidence 1 is a hard label, 0 a uniform one
        target = certainty[..., None] * target + (1 - certainty[..., None]) / k
    weight = valid * (jnp.maximum(certainty, 1e-3) ** recipe.weighting if recipe.weighting else 1.0)
    loss = -(target * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(-1)
    return (loss * weight).sum(), weight.sum()


def forward(
    graph: Any, params: dict, statistics: dict, x: Array, recipe: Recipe
) -> tuple[Array, dict]:
    """(logits, statistics after the batch)."""
    tape: dict = {}
    logits = join(graph, params, statistics)(x.astype(recipe.dtype), tape)
    return logits, _with_statistics(statistics, tape)


def _with_statistics(statistics: dict, tape: dict, momentum: float = 0.1) -> dict:
    """Running statistics moved towards those of the batch."""
    out = jax.tree.map(lambda a: a, statistics)
    for name, (mean, var) in tape.items():
        node = out
        for key in name.split("."):
            node = node[int(key) if key.isdigit() else key]
        for key, value in (("mean", mean), ("var", var)):
            node[key] = (1 - momentum) * node[key] + momentum * value
    return out


def updated(state: State, grads: Any, statistics: dict, recipe: Recipe) -> State:
    """The state after a step with these gradients of this device."""
    params, held = descended(optimizer(recipe), pmean(grads), state["optimizer"], state["params"])
    # A fixed decay would remember the random start of a short run.
    decay = jnp.minimum(recipe.ema, (1.0 + state["step"]) / (10.0 + state["step"]))
    ema = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state["ema"], params)
    after = {"params": params, "statistics": statistics, "ema": ema, "optimizer": held}
    return after | {"step": state["step"] + 1}


def _shown(
    key: Array, images: Array, masks: Array, certainty: Array, recipe: Recipe
) -> tuple[Array, Array, Array]:
    """(varied images, masks, confidence 0..1) of a labelled batch at the recipe's size."""
    a, n = recipe.augmentation, len(images)
    maps, mirrored = geometry(jax.random.fold_in(key, 0), n, a)
    x, y, confidence = warp(
        to_float(images),
        masks,
        certainty.astype(jnp.float32) / 255,
        maps,
        mirrored,
        recipe.side,
        a.swap,
    )
    if a.background:
        x = other_backgrounds(
            jax.random.fold_in(key, 2), x, soften((y != 0).astype(jnp.float32)), a.background
        )
    return (appearance(jax.random.fold_in(key, 1), x, a) if a != NONE else x), y, confidence


def _labelled_loss(
    graph: Any, params: dict, statistics: dict, batch: tuple, recipe: Recipe
) -> tuple[Array, dict, Array]:
    """(mean loss, statistics after it, share of pixels labelled as in the mask)."""
    x, y, confidence = batch
    logits, statistics = forward(graph, params, statistics, x, recipe)
    total, weight = cross_entropy(logits, y, confidence, recipe)
    hit = psum(((logits.argmax(-1) == y) & (y != IGNORE)).sum()) / jnp.maximum(
        psum((y != IGNORE).sum()), 1
    )
    return total / jnp.maximum(pmean(weight), 1e-6), statistics, hit


def train_step(
    state: State,
    key: Array,
    images: Array,
    masks: Array,
    certainty: Array,
    *,
    graph: Any,
    recipe: Recipe,
) -> tuple[State, dict[str, Array]]:
    """One step on images uint8[n h w 3], masks of channels and certainty uint8[n h w], 255 = 1."""
    batch = _shown(step_key(key), images, masks, certainty, recipe)

    def loss(params: dict) -> tuple[Array, tuple]:
        value, statistics, hit = _labelled_loss(graph, params, state["statistics"], batch, recipe)
        return value, (statistics, hit)

    (value, (statistics, hit)), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
    return updated(state, grads, statistics, recipe), {"loss": pmean(value), "accuracy": hit}
