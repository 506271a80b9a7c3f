"""One step of self-training: photos, the soft masks that a teacher gave them, pasted foregrounds.

Loss: cross-entropy with the teacher's probabilities. Some photos stand before the background of
another one (`composite`): DACS (Tranheden et al. 2021) mixes classes of a labelled and an
unlabelled image; here both layers are photos, the foreground is one whose outline is reliable, and
the background resembles its edge in colour, where a network taught by clusters is wrong.
There every pixel counts; elsewhere as much as the teacher is confident, |1 - 2 p|.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from sis_jax.models.students import to_float
from sis_jax.ops.student_augment import Augmentation, appearance, geometry, warp_planes
from sis_jax.parallel import batch_size, own_images, pmean, step_key
from sis_jax.training.student import Recipe, State, forward, updated

# Photos vary by themselves, and are framed as those the student will be given; a few come much
# larger, smaller or tilted.
VIEWS = Augmentation(
    scale=0.35, shift=0.1, turn=15.0, brightness=0.25, contrast=0.35, saturation=0.4, hue=10.0,
    grey=0.05, blur=1.0, noise=0.06, peaked=True,
)  # fmt: skip
RECOLOURED, DARKENED = 0.3, 0.1  # shares of the pasted backgrounds


def composite(
    photos: Float[Array, "n h w 3"],
    target: Float[Array, "n h w k"],
    backgrounds: Float[Array, "n h w 3"],
    pasted: Float[Array, "n"],
) -> tuple[Float[Array, "n h w 3"], Float[Array, "n h w k"]]:
    """Photos before other backgrounds where `pasted` is 1; channel 0 of `target` is the background.

    The cut is a little inside the foreground: alpha = clip(2.5 (p - 0.5) + 0.3). The labels of
    a pasted photo are alpha itself, what is seen of the foreground, not the teacher's prediction.
    """
    front = 1 - target[..., :1]
    alpha = jnp.clip(2.5 * (front - 0.5) + 0.3, 0, 1)
    classes = target[..., 1:] / jnp.maximum(front, 1e-6) * alpha
    labels = jnp.concatenate([1 - alpha, classes], -1)
    on = pasted[:, None, None, None]
    mixed = alpha * photos + (1 - alpha) * backgrounds
    return photos + on * (mixed - photos), target + on * (labels - target)


def hard_backgrounds(
    key: Array, backgrounds: Float[Array, "n h w 3"], edge: Float[Array, "n 3"]
) -> Float[Array, "n h w 3"]:
    """Backgrounds to paste, mirrored and upside down half of the time, some made harder: moved to
    the colour of the foreground's edge, or darkened.

    The teacher calls few dark backgrounds behind dark hair background, so almost none can be taken
    from photos as they are.
    """
    n = len(backgrounds)
    whole = batch_size(n)
    u = own_images(jax.random.uniform(key, (5, whole, 1, 1, 1)), n, axis=1)
    x = jnp.where(u[0] < 0.5, backgrounds[:, :, ::-1], backgrounds)
    x = jnp.where(u[1] < 0.5, x[:, ::-1], x)
    shade = jax.random.fold_in(key, 1)
    near = jax.random.uniform(shade, (whole, 1, 1, 3), minval=-0.2, maxval=0.2)
    near = own_images(near, n)
    contrast = 0.2 + 0.8 * u[2]
    alike = edge[:, None, None] + near + contrast * (x - x.mean((1, 2), keepdims=True))
    dark = (x + 1) * (0.05 + 0.45 * u[3]) - 1
    x = jnp.where(u[4] < RECOLOURED, alike, jnp.where(u[4] > 1 - DARKENED, dark, x))
    return jnp.clip(x, -1, 1)


def view(
    key: Array,
    photos: UInt8[Array, "n h w 3"],
    target: UInt8[Array, "n h w k"],
    backgrounds: UInt8[Array, "n h w 3"],
    pasted: Float[Array, "n"],
    edge: UInt8[Array, "n 3"],
    recipe: Recipe,
) -> tuple[Float[Array, "n r r 3"], Float[Array, "n r r k"]]:
    """(what the network sees, what it should answer)."""
    a, n = recipe.augmentation, len(photos)
    q = target.astype(jnp.float32)
    q = q / jnp.maximum(q.sum(-1, keepdims=True), 1e-6)
    colour = edge.astype(jnp.float32) / 127.5 - 1
    behind = hard_backgrounds(jax.random.fold_in(key, 3), to_float(backgrounds), colour)
    x, q = composite(to_float(photos), q, behind, pasted)
    maps, mirrored = geometry(jax.random.fold_in(key, 0), n, a)
    seen = warp_planes(jnp.concatenate([x, q], -1), maps, recipe.side)
    x, q = seen[..., :3], seen[..., 3:]
    if a.swap:  # a left hand is a right hand in the mirror
        q = jnp.where(mirrored[:, None, None, None] > 0, q[..., jnp.asarray(a.swap)], q)
    return appearance(jax.random.fold_in(key, 1), x, a), q


def self_training_step(
    state: State,
    key: Array,
    photos: UInt8[Array, "n h w 3"],
    target: UInt8[Array, "n h w k"],
    backgrounds: UInt8[Array, "n h w 3"],
    pasted: Float[Array, "n"],
    edge: UInt8[Array, "n 3"],
    *,
    graph: Any,
    recipe: Recipe,
) -> tuple[State, dict[str, Array]]:
    """One step. target: the teacher's probabilities, 255 = 1. backgrounds: what to put behind each
    photo where `pasted` is 1. edge: the mean colour of each photo's foreground near its boundary.
    """
    x, q = view(step_key(key), photos, target, backgrounds, pasted, edge, recipe)
    weight = jnp.where(pasted[:, None, None] > 0, 1.0, jnp.abs(1 - 2 * q[..., 0]))

    def loss(params: dict) -> tuple[Array, dict]:
        logits, statistics = forward(graph, params, state["statistics"], x, recipe)
        losses = -(q * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(-1)
        return (weight * losses).mean() / jnp.maximum(pmean(weight.mean()), 1e-6), statistics

    (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
    return updated(state, grads, statistics, recipe), {"loss": pmean(value)}
