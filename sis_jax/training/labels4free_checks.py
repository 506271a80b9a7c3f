"""Labels4Free's decisions without labels: the stage of backgrounds, the best checkpoint."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sis_jax.models.alpha import Params, background_generator, flat_taps, stages
from sis_jax.models.stylegan2 import StyleGAN2
from sis_jax.ops.sampling import collect, map_samples, sample_seeds
from sis_jax.ops.selection import BORDER_RATIO, frame
from sis_jax.training.labels4free import draw, mask, masked

# taken off the score of masks with a wrong background: below 0 then, as separation and
# stability are at most 1
WRONG_SIDE = 1.0
WRONG = (
    "The background is not at the frame of the images, or the masks separate features less than a "
    "box in the middle would: they are probably wrong; give another --seed."
)
COLLAPSED = 0.02  # masks with less than this share in one class do not count


def find_stage(gen: StyleGAN2, truncation: float, n: int = 64) -> str:
    """The stage whose zeroing leaves the background and removes the object: frame concordance minus
    layout correlation.

    Frame: between the mean colours of an image's frame and of its background's, by Lin's
        concordance. Layout: between the pixels of the two, colour means taken out.
    """
    scores = {}
    for stage in stages(gen.resolution):
        shared = (background_generator(gen, stage),)
        found = [
            np.concatenate(x)
            for x in zip(
                *map_samples(
                    gen, sample_seeds(0, n), background_facts, truncation=truncation, shared=shared
                )
            )
        ]
        scores[stage] = concordance(found[0], found[1]) - float(found[2].mean())
    return max(scores, key=scores.__getitem__)


def concordance(a: Float[np.ndarray, "n c"], b: Float[np.ndarray, "n c"]) -> float:
    """Lin's coefficient (1989), mean of the columns: 1 where a = b."""
    together = 2 * ((a - a.mean(0)) * (b - b.mean(0))).mean(0)
    return float(
        np.mean(
            together / np.maximum(a.var(0) + b.var(0) + np.square(a.mean(0) - b.mean(0)), 1e-12)
        )
    )


def stability(
    gen: StyleGAN2, params: Params, seeds: list[int], psi: float, threshold: float = 0.5
) -> Float[np.ndarray, "2"]:
    """IoU of the backgrounds, and of the foregrounds, with the stored noise and with another."""
    numbers = np.arange(len(seeds), dtype=np.int32)
    taps = flat_taps(gen.resolution)
    out = collect(
        gen, seeds, two_noises, truncation=psi, per_sample=(numbers,), shared=(params,), taps=taps
    )
    a, b = (x > threshold for x in out)
    return np.array([(x & y).sum() / max((x | y).sum(), 1) for x, y in ((~a, ~b), (a, b))])


def judge(gen: StyleGAN2, params: Params, seeds: list[int], psi: float) -> dict[str, float]:
    """How good the masks of these samples are, as far as that shows without labels.

    share: of pixels with alpha > 0.5. certain: 1 - 2 mean min(a, 1 - a). stability: the smaller IoU
        under another noise. separation: see `separated`; boxed: that of a fixed box. score:
        separation times `stability`; -1 where nearly all pixels are on one side; less 1 where the
        background is not 1.5 times as common on the frame (default faces: 2.5 where right, 1.0 to
        1.3 where hair was taken), or the masks separate less than the box does (0.090; right masks
        0.13 to 0.14). A drifting mask loses separation long before it collapses.
    """
    alpha, separation, boxed = collect(
        gen, seeds, separated, truncation=psi, shared=(params,), taps=flat_taps(gen.resolution)
    )
    facts = {
        "share": float((alpha > 0.5).mean()),
        "certain": float(1 - 2 * np.minimum(alpha, 1 - alpha).mean()),
        "stability": float(stability(gen, params, seeds, psi).min()),
        "separation": float(separation.mean()),
        "boxed": float(boxed.mean()),
        "on_frame": float(
            (alpha[:, frame(*alpha.shape[1:])] <= 0.5).mean() / max((alpha <= 0.5).mean(), 1e-6)
        ),
    }
    collapsed = not COLLAPSED < facts["share"] < 1 - COLLAPSED
    wrong = facts["on_frame"] < BORDER_RATIO or facts["separation"] < facts["boxed"]
    judged = facts["separation"] * facts["stability"]
    return facts | {"score": -1.0 if collapsed else judged - WRONG_SIDE * wrong}


def separated(
    gen: Any, z: jax.Array, truncation: jax.Array, params: Params, *, taps: tuple[str, ...]
) -> tuple[jax.Array, ...]:
    """alpha [n r r], the explained share of the features' variance [n], and that of a box."""
    image, features = gen.synthesize(gen.map(z, truncation), "const", taps)
    alpha = mask(params, tuple(features[t] for t in taps))
    hard = (alpha > 0.5).astype(jnp.float32)[..., None]
    finest = [t for t in taps if features[t].shape[1] >= min(16, image.shape[1])]
    edge = hard.shape[1] // 8
    box = jnp.zeros_like(hard).at[:, edge:, edge : hard.shape[1] - edge].set(1)
    return alpha, *(
        jnp.stack([_between(features[t], side) for t in finest]).mean(0) for side in (hard, box)
    )


def _between(x: Float[Array, "n h w c"], hard: Float[Array, "n r r 1"]) -> Float[Array, "n"]:
    """Variance between the two parts over all variance, at the features' size."""
    x = x.astype(jnp.float32) / (x.std((0, 1, 2)) + 1e-6)
    x = x - x.mean((1, 2), keepdims=True)
    n, size = x.shape[:2]
    factor = hard.shape[1] // size
    inside = hard.reshape(n, size, factor, size, factor).mean((2, 4))[..., None]
    between = jnp.zeros(n)
    for part in (inside, 1 - inside):
        weight = part.sum((1, 2)) + 1e-6
        between = between + (weight * jnp.square((x * part).sum((1, 2)) / weight)).sum(-1)
    return between / jnp.maximum(jnp.square(x).sum((1, 2, 3)), 1e-12)


def two_noises(
    gen: StyleGAN2,
    z: jax.Array,
    truncation: jax.Array,
    number: jax.Array,
    params: Params,
    *,
    taps: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """alpha with the stored noise, and with the noise of sample `number`."""
    features = draw(gen, jax.random.key(1), number, truncation, taps, z)[1]
    return masked(gen, z, truncation, params, taps=taps)[1], mask(params, features)


def background_facts(
    gen: Any, z: jax.Array, truncation: jax.Array, background: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean colours of the frames of image and background [n 3], correlation of layouts [n]."""
    w = gen.map(z, truncation)
    whole, rest = gen.synthesize(w)[0], background.synthesize(w)[0]
    border = jnp.asarray(frame(*whole.shape[1:3]), jnp.float32)[None, :, :, None]
    first, second = ((x * border).sum((1, 2)) / border.sum() for x in (whole, rest))
    a, b = (x - x.mean((1, 2), keepdims=True) for x in (whole, rest))
    layout = (a * b).sum((1, 2, 3)) / jnp.sqrt(
        jnp.maximum((a * a).sum((1, 2, 3)) * (b * b).sum((1, 2, 3)), 1e-12)
    )
    return first, second, jnp.abs(layout)
