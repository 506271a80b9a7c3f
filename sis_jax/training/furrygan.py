"""The mask losses of FurryGAN (Bae et al., ECCV 2022, arXiv 2208.10422), as one phase of a
generator's training; the adversarial ones are those of its discriminator, on `FurryGAN.fakes`.

Where this differs from the released code:
* All mask losses run every second step, those of every step at twice their weights, as lazy
  regularisers do.
* Weights change over images, not steps. Style mixing stays StyleGAN2's. Masks are antialiased where
  they are reduced for the predictor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sis_jax.models.furrygan import LAYERS, Predictor, composite
from sis_jax.ops.resize import resize_bilinear
from sis_jax.parallel import pmean
from sis_jax.training import gan
from sis_jax.training.gan import Recipe, State, Trained
from sis_jax.training.trees import descended, join, split

EVERY = 2  # steps between two runs of this phase
RAMP = 80_000  # images until the fine mask counts fully, 5,000 steps of the paper's batch
SHORT_RAMP = 8_000  # the same where the foreground was trained before
BINARY = 5.0, 0.5  # weight of binarisation at the start, and after the ramp
AREA = 5.0  # weight of the least area, and of the fine mask's limit
FINE = 0.01  # share of the image that the fine mask may add
Predicting = Callable[[Array], Array]  # images to masks
COLUMNS = ("mask_area", "binarisation", "consistency", "participation", "loss_predictor")


@dataclass(frozen=True)
class Masks:
    """Hyper-parameters. least_area: share of an image that is foreground at least. growth: of the
    fine mask's weight in one run of the phase.
    """

    least_area: float
    growth: float


def with_predictor(
    graphs: tuple[Any, ...], state: State, gen: Trained, recipe: Recipe, seed: int
) -> tuple[tuple[Any, ...], State]:
    """Structures and state of a training, a mask predictor in their last places."""
    graph, p, _ = split(Predictor(gen.resolution, np.random.default_rng(seed)))
    held = gan.optimizer(recipe, None).init(p)
    return (*graphs, graph), state | {"p": p, "opt_p": held}


def terms(
    image: Float[Array, "n r r 3"], found: dict[str, Array], predictor: Predicting, least: float
) -> dict[str, Float[Array, ""]]:
    """The losses of the generator's masks, unweighted; `found` has `LAYERS` of `image`."""
    mask, coarse, _, front, behind = (found[name] for name in LAYERS)
    front = jax.lax.stop_gradient(front)
    added = jnp.clip(mask - coarse, 0, 1).mean((1, 2))
    # Less mask where the two differ: the background is to show itself.
    seen = composite(mask, front, jax.lax.stop_gradient(behind))
    return {
        "binarisation": jnp.minimum(coarse, 1 - coarse).mean(),
        "area": jax.nn.relu(least - coarse.mean((1, 2))).mean(),
        "fine": jax.nn.relu(added - FINE).mean(),
        "consistency": jnp.square(predictor(front) - predictor(image)).mean(),
        "participation": jnp.square(seen - behind).mean(),
    }


def predicted(
    image: Float[Array, "n r r 3"], found: dict[str, Array], predictor: Predicting
) -> Float[Array, ""]:
    """The predictor's loss: the mask of an image, and of its foreground alone."""
    guesses = jnp.stack([predictor(image), predictor(found["foreground"])])
    size = guesses.shape[-1]
    truth = resize_bilinear(found["mask"][..., None], (size, size))[..., 0]
    return jnp.square(guesses - truth).mean()


def step(
    state: State, key: jax.Array, images: Array, *, graphs: tuple, recipe: Recipe, masks: Masks,
    **_: Any,
) -> tuple[State, dict[str, Array]]:  # fmt: skip
    """Generator and predictor, of half as many images as `images` has."""
    k_map, k_noise = jax.random.split(key)
    n = max(len(images) // 2, 1)
    own = jax.random.fold_in(k_noise, gan.indices(1)[0])
    inner = state["buffers"]["synthesis"]
    grown = inner["fine_weight"]

    def loss(params: Any) -> tuple[Array, tuple]:
        gen = join(graphs[0], params, state["buffers"])
        ws, _ = gan.map_mixed(gen, k_map, n)
        styles = gen.synthesis.styles(ws)
        made = gen.synthesis(styles, "random", LAYERS, own, jnp.dtype(recipe.dtype))
        found = terms(made[0], made[1], join(graphs[-1], state["p"], {}), masks.least_area)
        binary = BINARY[0] + grown * (BINARY[1] - BINARY[0])
        weights = {"binarisation": EVERY * binary, "area": EVERY * AREA, "fine": EVERY * AREA}
        total = jnp.sum(
            jnp.stack([weights.get(name, 1.0) * value for name, value in found.items()])
        )
        return total, (made, found)

    def loss_p(params: Any) -> Array:
        return predicted(made[0], made[1], join(graphs[-1], params, {}))

    (_, (made, found)), g = jax.value_and_grad(loss, has_aux=True)(state["g"])
    value, p = jax.value_and_grad(loss_p)(state["p"])
    optimiser = gan.optimizer(recipe, None)
    for name, grads in (("g", g), ("p", p)):
        grads = gan.finite(pmean(grads))
        params, held = descended(optimiser, grads, state[f"opt_{name}"], state[name])
        state = state | {name: params, f"opt_{name}": held}
    inner = inner | {"fine_weight": jnp.minimum(grown + masks.growth, 1.0)}
    state = state | {"buffers": state["buffers"] | {"synthesis": inner}}
    facts = {name: found[name] for name in COLUMNS if name in found}
    return state, pmean(facts | {"mask_area": made[1]["mask"].mean(), "loss_predictor": value})
