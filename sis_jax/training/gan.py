"""One training step of StyleGAN2(-ADA), as pure functions of one device's share of a batch.

Karras et al. 2020, arXiv 1912.04958 (losses, lazy regularisation, path length: sections 3.1 and
3.2) and arXiv 2006.06676 (ADA). The four phases, G main, G regularisation, D main, D
regularisation, are four functions, so that a lazy phase costs nothing when it does not run.
Sample i of a batch draws its latents, noise and augmentation from (key, i) alone. The minibatch
standard deviation groups images of one device: another number of devices gives other bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from sis_jax.models.discriminator import ONE_BY_ONE, Discriminator
from sis_jax.models.furrygan import Composition, FurryGAN
from sis_jax.models.stylegan2 import StyleGAN2
from sis_jax.ops.augment import augment
from sis_jax.parallel import AXIS, is_mapped, pmean
from sis_jax.training.trees import descended, join, split
from sis_jax.types import Noise

Trained = StyleGAN2 | FurryGAN  # generators that are trained here
State = dict[str, Any]  # a pytree of arrays, Optax state included
W_AVG_DECAY = 0.995
MIXING_PROBABILITY = 0.9
PATH_DECAY = 0.01


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of a run, fixed at compile time.

    r1_gamma weighs the gradient penalty, path_length the perceptual path length; both run once in
    so many steps, scaled up to match.
    """

    learning_rate: float = 0.0025
    r1_gamma: float = 0.1
    r1_interval: int = 16
    path_length: float = 2.0
    path_interval: int = 4
    ema_images: float = 10_000.0
    ema_rampup: float | None = 0.05
    dtype: str = "float32"


def optimizer(recipe: Recipe, interval: int | None) -> optax.GradientTransformation:
    """Adam(0, 0.99, 1e-8); with a regulariser every k steps corrected by k / (k + 1)."""
    c = 1.0 if interval is None else interval / (interval + 1)
    return optax.adam(recipe.learning_rate * c, b1=0.0, b2=0.99**c, eps=1e-8)


def optimizers(recipe: Recipe) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """The generator's and the discriminator's."""
    return optimizer(recipe, recipe.path_interval if recipe.path_length else None), optimizer(
        recipe, recipe.r1_interval
    )


def new_state(
    gen: Trained, disc: Discriminator, recipe: Recipe, ema: Trained | None = None
) -> tuple[Any, Any, State]:
    """(generator structure, discriminator structure, state) at the start of a run."""
    g_graph, g, buffers = split(gen)
    d_graph, d, _ = split(disc)
    opt_g, opt_d = optimizers(recipe)
    state = {
        "g": g,
        "buffers": buffers,
        "ema": split(ema)[1] if ema is not None else jax.tree.map(jnp.array, g),
        "d": d,
        "opt_g": opt_g.init(g),
        "opt_d": opt_d.init(d),
        "path_mean": jnp.zeros(()),
        "augment": jnp.zeros(()),
    }
    return g_graph, d_graph, state


def images_at_once(gen: Trained, platform: str) -> int | None:
    """Images of a device that are differentiated at a time, None for all: of large images few, so
    that memory does not grow with the batch. At least the four that the discriminator compares.
    """
    if gen.resolution < ONE_BY_ONE:
        return None
    return 4 if platform == "cpu" else 16


def _gradient(
    loss: Callable[[Any, Array | None], tuple[Array, Any]], params: Any, n: int, at_once: int | None
) -> tuple[tuple[Array, Any], Any]:
    """((value, more), gradient) of the mean of loss(params, rows) over groups of the n images.

    rows: Int[m], the numbers of the images in a group, or None where that is all of them.
    """
    step = jax.value_and_grad(loss, has_aux=True)
    if at_once is None or n <= at_once or n % at_once:
        return step(params, None)
    groups = n // at_once
    # Images so far apart share a minibatch standard deviation.
    rows = jnp.arange(n).reshape(at_once, groups).T

    def add(total: Any, some: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, step(params, some)), None

    shapes = jax.eval_shape(step, params, rows[0])
    start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    total, _ = jax.lax.scan(add, start, rows)
    return jax.tree.map(lambda a: a / groups, total)


def _stepped(
    state: State,
    network: Literal["g", "d"],
    loss: Callable[[Any, Array | None], tuple[Array, Any]],
    recipe: Recipe,
    n: int,
    at_once: int | None,
) -> tuple[State, Array, Any]:
    """(state, value, more) of a step of one network along the mean of all devices' gradients."""
    params, optimiser = state[network], optimizers(recipe)["gd".index(network)]
    (value, more), grads = _gradient(loss, params, n, at_once)
    params, held = descended(optimiser, finite(pmean(grads)), state[f"opt_{network}"], params)
    return state | {network: params, f"opt_{network}": held}, value, more


def finite(grads: Any) -> Any:
    """Gradients with 0 for what is no number, and a bound for what is infinite."""
    return jax.tree.map(lambda g: jnp.nan_to_num(g, nan=0.0, posinf=1e5, neginf=-1e5), grads)


def _some(images: Array, rows: Array | None) -> Array:
    return images if rows is None else images[rows]


def _own(key: Array, rows: Array | None) -> Array:
    """A group's key for what is drawn per image."""
    return key if rows is None else jax.random.fold_in(key, rows[0])


def indices(n: int) -> jax.Array:
    """Numbers of this device's samples within the whole batch."""
    return jnp.arange(n) + (jax.lax.axis_index(AXIS) * n if is_mapped() else 0)


def _draw(key: jax.Array, n: int, size: int) -> jax.Array:
    """N(0, 1) [n, size], row i from (key, number of sample i)."""
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (size,)))(indices(n))


def map_mixed(
    gen: Trained, key: jax.Array, n: int
) -> tuple[Float[Array, "n s w"], Float[Array, "w"]]:
    """w with style mixing (probability 0.9), and the average w moved towards this batch's."""
    first, second, which, where = jax.random.split(key, 4)
    z = jnp.concatenate([_draw(first, n, gen.z_dim), _draw(second, n, gen.z_dim)])
    w, other = jnp.split(gen.mapping(z), 2)
    average = gen.mapping.w_avg[...]
    moved = average + (1 - W_AVG_DECAY) * (pmean(jax.lax.stop_gradient(w).mean(0)) - average)
    cutoff = jnp.where(
        jax.random.uniform(which) < MIXING_PROBABILITY,
        jax.random.randint(where, (), 1, gen.num_ws),
        gen.num_ws,
    )
    return jnp.where(
        jnp.arange(gen.num_ws)[None, :, None] < cutoff, w[:, None], other[:, None]
    ), moved


def render(gen: Trained, ws: jax.Array, key: jax.Array, dtype: str) -> jax.Array:
    """Images [n r r 3] for the discriminator, with noise of this device's own."""
    key = jax.random.fold_in(key, indices(1)[0])
    if isinstance(gen, FurryGAN):
        return gen.fakes(ws, key, jnp.dtype(dtype))
    return rendered(gen, ws, "random", key, jnp.dtype(dtype))


def rendered(
    gen: Trained, ws: Float[Array, "n s w"], noise: Noise = "const",
    key: jax.Array | None = None, dtype: Any = jnp.float32,
) -> Float[Array, "n r r 3"]:  # fmt: skip
    """Images to differentiate; the layers from `ONE_BY_ONE` pixels on for one after another."""
    synthesis, styles = gen.synthesis, gen.synthesis.styles(ws)
    if isinstance(synthesis, Composition) or gen.resolution < ONE_BY_ONE:
        return synthesis(styles, noise, (), key, dtype)[0]
    first = dict(synthesis.layers())[f"b{ONE_BY_ONE}.conv0"]
    stem, _ = synthesis.advance(synthesis.begin(len(ws), dtype), styles, noise, key, stop=first)

    def one(given: tuple) -> jax.Array:
        i, *rest = given
        own = None if key is None else jax.random.fold_in(key, i)
        begun, own_styles = jax.tree.map(lambda a: a[None], rest)
        return synthesis.advance(begun, own_styles, noise, own, first=first)[0][1][0]

    return jax.lax.map(jax.checkpoint(one), (jnp.arange(len(ws)), stem, styles))


def _score(
    disc: Discriminator, images: jax.Array, key: jax.Array | None, p: jax.Array, dtype: str
) -> jax.Array:
    if key is not None:
        images = augment(key, images, p, first=indices(images.shape[0])[0])
    return disc.score(images, dtype=jnp.dtype(dtype))[:, 0]


def g_main(
    state: State,
    key: jax.Array,
    images: jax.Array,
    *,
    graphs: tuple,
    recipe: Recipe,
    augmented: bool,
    at_once: int | None = None,
) -> tuple[State, dict]:
    """G main: mean softplus(-D(G(z))). `images`: one entry per image (its length counts).

    at_once: as `images_at_once` gives it, here and in the other phases.
    """
    n = images.shape[0]
    k_map, k_noise, k_aug = jax.random.split(key, 3)

    def loss(params, rows):
        gen, disc = join(graphs[0], params, state["buffers"]), join(graphs[1], state["d"], {})
        ws, w_avg = map_mixed(gen, k_map, n)
        scores = _score(
            disc,
            render(gen, _some(ws, rows), _own(k_noise, rows), recipe.dtype),
            _own(k_aug, rows) if augmented else None,
            state["augment"],
            recipe.dtype,
        )
        return jax.nn.softplus(-scores).mean(), w_avg

    state, value, w_avg = _stepped(state, "g", loss, recipe, n, at_once)
    return with_average(state, w_avg), {"loss_g": pmean(value)}


def with_average(state: State, w_avg: jax.Array) -> State:
    """The state with this average w."""
    buffers = state["buffers"]
    return state | {"buffers": buffers | {"mapping": buffers["mapping"] | {"w_avg": w_avg}}}


def path_lengths(
    gen: Trained, ws: Float[Array, "n s w"], y: Float[Array, "n r r 3"], **render: Any
) -> Float[Array, "n"]:
    """|J^T y| of eq. 4, y = N(0, 1) / sqrt(pixels): root of the mean over W+ layers."""

    def projected(w):
        return jnp.sum(rendered(gen, w, **render) * y)

    return jnp.sqrt(jnp.square(jax.grad(projected)(ws)).sum(2).mean(1))


def g_regularise(
    state: State,
    key: jax.Array,
    images: jax.Array,
    *,
    graphs: tuple,
    recipe: Recipe,
    at_once: int | None = None,
) -> tuple[State, dict]:
    """Path length penalty (eq. 4) on half the batch: 2 E(|J^T y| - a)^2 times the interval."""
    n = max(images.shape[0] // 2, 1)
    k_map, k_noise, k_y = jax.random.split(key, 3)

    def loss(params, rows):
        gen = join(graphs[0], params, state["buffers"])
        ws, _ = map_mixed(gen, k_map, n)
        r = gen.resolution
        ws = _some(ws, rows)
        y = _draw(_own(k_y, rows), len(ws), r * r * 3).reshape(len(ws), r, r, 3) / r
        noise_key = jax.random.fold_in(_own(k_noise, rows), indices(1)[0])
        lengths = path_lengths(
            gen, ws, y, noise="random", key=noise_key, dtype=jnp.dtype(recipe.dtype)
        )
        a = state["path_mean"] + PATH_DECAY * (pmean(lengths.mean()) - state["path_mean"])
        return jnp.square(lengths - a).mean() * recipe.path_length * recipe.path_interval, (
            a,
            lengths.mean(),
        )

    half = None if at_once is None else at_once // 2
    state, _, (a, length) = _stepped(state, "g", loss, recipe, n, half)
    return state | {"path_mean": a}, {"path_length": pmean(length)}


def d_main(
    state: State,
    key: jax.Array,
    real: jax.Array,
    *,
    graphs: tuple,
    recipe: Recipe,
    augmented: bool,
    at_once: int | None = None,
) -> tuple[State, dict]:
    """D main: mean softplus(D(G(z))) + softplus(-D(x)); reports r_t = E[sign D(x)]."""
    k_map, k_noise, k_fake, k_real = jax.random.split(key, 4)
    gen = join(graphs[0], state["g"], state["buffers"])
    n = real.shape[0]
    ws, w_avg = map_mixed(gen, k_map, n)

    def loss(params, rows):
        disc = join(graphs[1], params, {})
        fake = render(gen, _some(ws, rows), _own(k_noise, rows), recipe.dtype)
        on_fake, on_real = (
            _score(
                disc,
                images,
                _own(k, rows) if augmented else None,
                state["augment"],
                recipe.dtype,
            )
            for images, k in ((fake, k_fake), (to_float(_some(real, rows)), k_real))
        )
        aux = {
            "score_fake": on_fake.mean(),
            "score_real": on_real.mean(),
            "sign_real": jnp.sign(on_real).mean(),
        }
        return (jax.nn.softplus(on_fake) + jax.nn.softplus(-on_real)).mean(), aux

    state, value, aux = _stepped(state, "d", loss, recipe, n, at_once)
    return with_average(state, w_avg), pmean({"loss_d": value} | aux)


def r1_penalty(
    disc: Discriminator,
    real: Float[Array, "n r r 3"],
    dtype: Any = jnp.float32,
    transform: Any = lambda x: x,
) -> Float[Array, "n"]:
    """Squared norm of the gradient of D's score in each photo (Mescheder et al. 2018)."""
    grad = jax.grad(lambda x: disc.score(transform(x), dtype=dtype).sum())(real)
    return jnp.square(grad).sum((1, 2, 3))


def d_regularise(
    state: State,
    key: jax.Array,
    real: jax.Array,
    *,
    graphs: tuple,
    recipe: Recipe,
    augmented: bool,
    at_once: int | None = None,
) -> tuple[State, dict]:
    """R1: gamma / 2 times the penalty, times the interval."""
    first = indices(real.shape[0])[0]

    def loss(params, rows):
        disc, photos = join(graphs[1], params, {}), to_float(_some(real, rows))
        transform = (
            (lambda x: augment(_own(key, rows), x, state["augment"], first=first))
            if augmented
            else (lambda x: x)
        )
        penalty = r1_penalty(disc, photos, jnp.dtype(recipe.dtype), transform).mean()
        return penalty * (recipe.r1_gamma / 2 * recipe.r1_interval), penalty

    state, _, penalty = _stepped(state, "d", loss, recipe, real.shape[0], at_once)
    return state, {"r1": pmean(penalty)}


def to_float(real: jax.Array) -> jax.Array:
    """Photos in [-1, 1] from bytes."""
    return real.astype(jnp.float32) / 127.5 - 1


def ema_decay(recipe: Recipe, batch: int, images_seen: int) -> float:
    """0.5 ** (batch / half-life): `ema_images`, or at most `ema_rampup` of the images seen."""
    half_life = recipe.ema_images
    if recipe.ema_rampup is not None:
        half_life = min(half_life, images_seen * recipe.ema_rampup)
    return float(0.5 ** (batch / max(half_life, 1e-8)))


def average(ema: dict, g: dict, decay: jax.Array) -> dict:
    """The exponential moving average of the generator's parameters, one step on."""
    return jax.tree.map(lambda e, p: p + decay * (e - p), ema, g)


def r1_gamma_for(resolution: int, batch: int) -> float:
    """The ADA code's rule of thumb: 0.0002 resolution^2 / batch."""
    return 0.0002 * resolution**2 / batch


def count(tree: Any) -> int:
    """Number of parameters."""
    return int(sum(np.prod(a.shape) for a in jax.tree.leaves(tree)))


def multiply_adds(channels: Sequence[int]) -> float:
    """Of the 3 x 3 convolutions of one image in generator and discriminator, forward."""
    sizes = [4 * 2**i for i in range(len(channels))]
    inner = sum(9 * r * r * c * c for r, c in zip(sizes, channels))
    between = sum(9 * r * r * a * b for r, a, b in zip(sizes[1:], channels, channels[1:]))
    return 2.0 * (inner + between)
