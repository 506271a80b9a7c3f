"""One training step of Labels4Free (Abdal et al. 2021), as pure functions of one device's share.


    x   = a G(w) + (1 - a) G_bg(w')
    L_D = softplus(-D(real)) + softplus(D(x)), and R1 on the real images once in so many steps
    L_A = s softplus(-D(x)) + lambda [min(a, 1 - a) + relu(phi_fg - mean a)]
          + w_bg [relu(phi_bg - (1 - mean a)) + relu(phi_fr - (1 - mean_frame a))]

a is the alpha network's mask of G(w)'s features; phi_fr is ours: without it, chance decides which
part is the background. The generator is frozen. Both networks learn from the same images.

Sample i draws its latents, noise and background from (key, i) alone, and `order` deals whole groups
of the minibatch standard deviation to a device: any number of devices gives the same numbers up to
the order of additions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from sis_jax.models.alpha import Params, alpha_logits, composite, flat_taps
from sis_jax.models.discriminator import Discriminator
from sis_jax.models.stylegan2 import StyleGAN2
from sis_jax.ops.resize import resize_bilinear
from sis_jax.ops.sampling import quantised
from sis_jax.ops.selection import frame
from sis_jax.parallel import pmean
from sis_jax.training.gan import r1_penalty
from sis_jax.training.trees import descended, join, split

Scaling = tuple[Float[Array, "2 _"], ...]
State = dict[str, Any]  # a pytree of arrays, Optax state included


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of the losses, named after the equations, fixed at compile time.

    coverage: "image" hinges the mean of each mask, "batch" that of all masks. same_latents: w' = w.
        least_frame: phi_fr, share of `ops.selection.frame`. decay_steps: both rates fall to 0 over
        so many steps (0: they do not).
    """

    truncation: float = 1.0
    background_truncation: float = 1.0
    same_latents: bool = False
    adversarial: float = 1.0
    binary: float = 1.2
    least_foreground: float = 0.25
    background: float = 3.0
    least_background: float = 0.4
    least_frame: float = 0.0
    coverage: str = "image"
    learning_rate: float = 2e-4
    d_learning_rate: float = 2e-4
    r1_gamma: float = 10.0
    r1_interval: int = 16
    ema: float = 0.99
    decay_steps: int = 0
    quirk: bool = False


def optimizers(recipe: Recipe) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Adam with beta1 = 0 for alpha network and D, rate and beta2 corrected as published."""
    a, d = 4 / 5, recipe.r1_interval / (recipe.r1_interval + 1)

    def adam(rate: float, c: float, steps: int) -> optax.GradientTransformation:
        return optax.adam(
            optax.cosine_decay_schedule(rate * c, steps) if steps else rate * c, b1=0.0, b2=0.99**c
        )

    # D's optimiser also counts the penalty's steps
    regularised = recipe.decay_steps + -(-recipe.decay_steps // recipe.r1_interval)
    return adam(recipe.learning_rate, a, recipe.decay_steps), adam(
        recipe.d_learning_rate, d, regularised if recipe.r1_gamma else recipe.decay_steps
    )


def new_state(alpha: Params, disc: Discriminator, recipe: Recipe) -> tuple[Any, State]:
    """(structure of the discriminator, state) at the start of a run."""
    graph, d, _ = split(disc)
    opt_a, opt_d = optimizers(recipe)
    state = {"a": alpha, "ema": jax.tree.map(jnp.array, alpha), "d": d}
    return graph, state | {"opt_a": opt_a.init(alpha), "opt_d": opt_d.init(d)}


def order(batch: int, devices: int, group: int = 4) -> np.ndarray:
    """int32[devices, batch / devices]: the samples of each device, in whole groups for D."""
    group = min(group, batch)
    return (
        np.arange(batch, dtype=np.int32)
        .reshape(group, devices, -1)
        .swapaxes(0, 1)
        .reshape(devices, -1)
    )


def draw(
    gen: StyleGAN2,
    key: jax.Array,
    samples: jax.Array,
    psi: float | jax.Array,
    taps: tuple[str, ...] = (),
    latents: jax.Array | None = None,
) -> tuple[Float[Array, "n r r 3"], tuple[jax.Array, ...], Float[Array, "n z"]]:
    """(images, features, latents) of `samples`, with noise of their own; no gradient."""

    def latent(i: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, 0), i), (gen.z_dim,))

    def one(styles: Any, i: jax.Array) -> Any:
        styles = {name: s[None] for name, s in styles.items()}
        image, features = gen.synthesis(
            styles, "random", taps, jax.random.fold_in(jax.random.fold_in(key, 1), i)
        )
        return image[0], tuple(features[t][0] for t in taps)

    z = jax.vmap(latent)(samples) if latents is None else latents
    image, features = jax.vmap(one)(gen.synthesis.styles(gen.map(z, psi)), samples)
    return *jax.lax.stop_gradient((image, features)), z


def alpha_loss(
    alpha: Float[Array, "n r r 1"], scores: Float[Array, "n"], recipe: Recipe
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """L_A of the module's docstring, and its parts."""
    edge = jnp.asarray(frame(*alpha.shape[1:3]), alpha.dtype)
    share, at_frame = alpha.mean((1, 2, 3)), (alpha[..., 0] * edge).sum((1, 2)) / edge.sum()
    if recipe.coverage == "batch":
        share, at_frame = share.mean(), at_frame.mean()
    parts = {
        "adversarial": jax.nn.softplus(-scores).mean(),
        "binary": jnp.minimum(alpha, 1 - alpha).mean(),
        "short_of_foreground": jax.nn.relu(recipe.least_foreground - share).mean(),
        "short_of_background": jax.nn.relu(recipe.least_background - (1 - share)).mean(),
        "short_of_frame": jax.nn.relu(recipe.least_frame - (1 - at_frame)).mean(),
    }
    front = recipe.binary * (parts["binary"] + parts["short_of_foreground"])
    back = recipe.background * (parts["short_of_background"] + parts["short_of_frame"])
    return recipe.adversarial * parts["adversarial"] + front + back, parts


def step(
    state: State,
    frozen: tuple[StyleGAN2, StyleGAN2, Scaling],
    key: jax.Array,
    samples: jax.Array,
    real: jax.Array,
    *,
    graph: Any,
    recipe: Recipe,
) -> tuple[State, dict[str, jax.Array]]:
    """One step of D, then one of the alpha network. samples: int32[n]. real: uint8[n r r 3].

    frozen: the generator, that of backgrounds, and (mean, deviation) of the features per tap.
        Returns the state and the measurements.
    """
    gen, background, scaling = frozen
    taps = flat_taps(gen.resolution)
    front, features, z = draw(gen, jax.random.fold_in(key, 0), samples, recipe.truncation, taps)
    back, _, _ = draw(
        background,
        jax.random.fold_in(key, 1),
        samples,
        recipe.background_truncation,
        (),
        z if recipe.same_latents else None,
    )
    features = tuple((f - mean) / deviation for f, (mean, deviation) in zip(features, scaling))
    photos = to_float(real)

    def loss_d(params: Any, fake: jax.Array) -> Any:
        on_fake, on_real = (join(graph, params, {}).score(x)[:, 0] for x in (fake, photos))
        return (jax.nn.softplus(on_fake) + jax.nn.softplus(-on_real)).mean(), {
            "score_fake": on_fake.mean(),
            "score_real": on_real.mean(),
        }

    def loss_a(params: Params) -> Any:
        alpha = mask(params, features)[..., None]
        scores = join(graph, d, {}).score(composite(alpha, front, back))[:, 0]
        value, parts = alpha_loss(alpha, scores, recipe)
        return value, parts | {"foreground": alpha.mean()}

    opt_a, opt_d = optimizers(recipe)
    fake = composite(mask(state["a"], features)[..., None], front, back)
    (value_d, scores), grads = jax.value_and_grad(loss_d, has_aux=True)(state["d"], fake)
    d, next_d = descended(opt_d, pmean(grads), state["opt_d"], state["d"])
    (value_a, parts), grads = jax.value_and_grad(loss_a, has_aux=True)(state["a"])
    a, next_a = descended(opt_a, pmean(grads), state["opt_a"], state["a"])
    ema = jax.tree.map(lambda e, p: p + recipe.ema * (e - p), state["ema"], a)
    facts = pmean({"loss_d": value_d, "loss_a": value_a} | scores | parts)
    return state | {"a": a, "ema": ema, "d": d, "opt_a": next_a, "opt_d": next_d}, facts


def regularise(
    state: State, real: jax.Array, *, graph: Any, recipe: Recipe
) -> tuple[State, dict[str, jax.Array]]:
    """R1 on the real images: gamma / 2 times the squared gradient of D, times the interval."""
    photos = to_float(real)

    def loss(params: Any) -> Any:
        disc = join(graph, params, {})
        penalty = r1_penalty(disc, photos).mean()
        stray = disc.score(photos)[0, 0] if recipe.quirk else 0.0
        return penalty * (recipe.r1_gamma / 2 * recipe.r1_interval) + stray, penalty

    grads, penalty = jax.grad(loss, has_aux=True)(state["d"])
    d, opt_d = descended(optimizers(recipe)[1], pmean(grads), state["opt_d"], state["d"])
    return state | {"d": d, "opt_d": opt_d}, {"r1": pmean(penalty)}


def to_float(real: jax.Array) -> Float[Array, "n r r 3"]:
    """uint8 images as D sees them, in [-1, 1]."""
    return real.astype(jnp.float32) / 127.5 - 1


# functions of samples, each a body for `ops.sampling.map_samples`


def mask(
    params: Params, features: tuple[jax.Array, ...], size: int | None = None
) -> Float[Array, "n r r"]:
    """alpha, 0..1, at the finest features' size or enlarged to `size` pixels."""
    alpha = jax.nn.sigmoid(alpha_logits(params, features))
    size = size or alpha.shape[1]
    return resize_bilinear(alpha, (size, size), antialias=False)[..., 0]


def masked(
    gen: Any, z: jax.Array, truncation: jax.Array, params: Params, *, taps: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """(images, alpha), with the stored noise."""
    image, features = gen.synthesize(gen.map(z, truncation), "const", taps)
    found = tuple(features[t] for t in taps)
    return quantised(image), mask(params, found, image.shape[1])


def moments(
    gen: Any, z: jax.Array, truncation: jax.Array, *, taps: tuple[str, ...]
) -> tuple[jax.Array, ...]:
    """Per tap [n 2 c]: mean and mean square of each channel."""
    features = gen.synthesize(gen.map(z, truncation), "const", taps)[1]
    return tuple(
        jnp.stack([features[t].mean((1, 2)), jnp.square(features[t]).mean((1, 2))], axis=1)
        for t in taps
    )
