"""One training step of a generator against a projected discriminator, of one device's batch.

Sauer et al. 2021 (arXiv 2111.01007): hinge loss, differentiable augmentation, no gradient penalty,
no path length. Where this differs from the released code: both networks step at once on the same
generated images, which saves a pass through the generator and one through the backbone.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, UInt8

from sis_jax.models.projected import ProjectedDiscriminator
from sis_jax.ops.diff_augment import diff_augment
from sis_jax.parallel import pmean
from sis_jax.training import gan
from sis_jax.training.gan import Recipe, State, Trained
from sis_jax.training.trees import descended, join, split

LEARNING_RATE = 0.002  # of the discriminator; the recipe's is the generator's


def optimizers(recipe: Recipe) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """The generator's and the discriminator's: Adam(0, 0.99, 1e-8)."""
    rates = recipe.learning_rate, LEARNING_RATE
    first, second = (optax.adam(rate, b1=0.0, b2=0.99, eps=1e-8) for rate in rates)
    return first, second


def new_state(
    gen: Trained, disc: ProjectedDiscriminator, backbone: Any, recipe: Recipe
) -> tuple[tuple[Any, Any, Any], State]:
    """(structures of generator, discriminator and backbone, state) at the start of a run."""
    g_graph, g, buffers = split(gen)
    d_graph, d, d_rest = split(disc)
    b_graph, weights = nnx.split(backbone)
    opt_g, opt_d = optimizers(recipe)
    state = {
        "g": g, "buffers": buffers, "ema": jax.tree.map(jnp.array, g),
        "d": d, "d_rest": d_rest, "backbone": nnx.to_pure_dict(weights),
        "opt_g": opt_g.init(g), "opt_d": opt_d.init(d), "augment": jnp.zeros(()),
    }  # fmt: skip
    return (g_graph, d_graph, b_graph), state


def step(
    state: State, key: jax.Array, real: UInt8[Array, "n r r 3"], *, graphs: tuple, recipe: Recipe
) -> tuple[State, dict[str, Array]]:
    """D: mean max(0, 1 - D(x)) + max(0, 1 + D(G(z))). G: mean -D(G(z))."""
    k_map, k_noise, k_fake, k_real = jax.random.split(key, 4)
    n, backbone = len(real), nnx.merge(graphs[2], state["backbone"])

    def judge(params: Any) -> ProjectedDiscriminator:
        return join(graphs[1], params, state["d_rest"])

    def seen(images: Float[Array, "n r r 3"], key: Array) -> list[Array]:
        images = diff_augment(key, images, gan.indices(n)[0])
        return judge(state["d"]).features(backbone, images)

    def fakes(params: Any) -> tuple[list[Array], Array]:
        gen = join(graphs[0], params, state["buffers"])
        ws, w_avg = gan.map_mixed(gen, k_map, n)
        return seen(gan.render(gen, ws, k_noise, recipe.dtype), k_fake), w_avg

    fake, backward, w_avg = jax.vjp(fakes, state["g"], has_aux=True)
    photos = seen(gan.to_float(real), k_real)

    def loss_d(params: Any) -> tuple[Array, tuple[dict, dict]]:
        disc = judge(params)
        on_fake, on_real = disc(fake), disc(photos)
        loss = jax.nn.relu(1 + on_fake).mean() + jax.nn.relu(1 - on_real).mean()
        scores = {"score_fake": on_fake.mean(), "score_real": on_real.mean()}
        return loss, (scores, split(disc)[2])

    def loss_g(features: list[Array]) -> Array:
        return -judge(state["d"])(features).mean()

    (value_d, (scores, d_rest)), grads_d = jax.value_and_grad(loss_d, has_aux=True)(state["d"])
    value_g, towards = jax.value_and_grad(loss_g)(fake)
    grads = {"g": backward(towards)[0], "d": grads_d}
    grads = gan.finite(pmean(grads))
    for name, optimiser in zip("gd", optimizers(recipe)):
        params, held = descended(optimiser, grads[name], state[f"opt_{name}"], state[name])
        state = state | {name: params, f"opt_{name}": held}
    state = gan.with_average(state | {"d_rest": d_rest}, w_avg)
    return state, pmean({"loss_d": value_d, "loss_g": value_g} | scores)
