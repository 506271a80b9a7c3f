"""Training of a small CLIP: images against texts, globally and per patch.

Global loss: the sigmoid loss of SigLIP (Zhai et al. 2023, arXiv 2303.15343, equation 1), where a
text may be true of several images of a batch, as captions from few attributes are, and where for
each text those it is true of weigh as much as those it is not. Patch loss: the same, where the
similarity of an image and a text is that of the patches which resemble the text most (after PACL,
Mukhoti et al. 2023, arXiv 2212.04994): nothing tells where a word's place is, but what is common to
the images that a word is true of has to be found in few patches. During training a part of the
patches is left out (FLIP, Li et al. 2023, arXiv 2212.00794), which saves time and keeps a patch
from speaking for its neighbours.

Where the parts of generated images are known (without labels: a clustering), `grounded_step` uses
them instead: dense features learn to tell the parts apart, and a word is looked for in the parts
that it can be about.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sis_jax.models.clip import CLIPConfig, CLIPNetwork, ViT
from sis_jax.types import UsageError

State = dict[str, Any]
_MAX_LOG_SCALE = 4.6052  # the published limit: a factor of 100


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters. Hashable: it is fixed at compile time.

    learning_rate: the peak, see `rate_at`. weight_decay: AdamW's, of matrices only. ema: decay of
        the averaged network.
    keep: share of the patches that an image is seen by. dense: weight of the patch loss.
        sharpness: of the choice of patches, in the patch loss.
    parts, contrast: weight of the loss of parts in `grounded_step`, and the factor on its cosines.
        told: weight of its regression on a teacher's scores;
    spread: the cosine that stands for one standard deviation of them.
    """

    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    ema: float = 0.998
    keep: float = 0.5
    dense: float = 1.0
    sharpness: float = 10.0
    parts: float = 1.0
    contrast: float = 12.0
    told: float = 1.0
    spread: float = 0.15


def initial(config: CLIPConfig, seed: int) -> CLIPNetwork:
    """A network at the start of training: normal numbers at the scales of section 2.4's code,
    biases zero, gains one, factor 10.
    """
    network = CLIPNetwork(config)
    graph, state = nnx.split(network)
    flat = []
    for i, (path, leaf) in enumerate(nnx.to_flat_state(state)):
        name, value = ".".join(map(str, path)), leaf[...]
        key = jax.random.fold_in(jax.random.key(seed), i)
        if name == "logit_scale":
            value = jnp.log(jnp.asarray(10.0))
        elif value.ndim >= 2 or name.endswith("class_embedding"):
            value = _deviation(name, value.shape, config) * jax.random.normal(key, value.shape)
        flat.append((path, leaf.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _deviation(name: str, shape: tuple[int, ...], config: CLIPConfig) -> float:
    if name.startswith("visual") and name.endswith(("positions", "class_embedding")):
        # patches come in at about 1: a small network should see from the start where a patch lies
        return 0.3
    if name.endswith("token_embedding"):
        # texts should differ from the start, or they pull images together before they are told
        # apart
        return 0.5
    if name.endswith("positions"):
        return 0.02
    if name.endswith("patch"):
        return (shape[0] * shape[1] * shape[2]) ** -0.5
    if name.endswith(
        ("out.weight", "proj.weight")
    ):  # what is added to the residual stream, 2 per layer
        tower = config.text if name.startswith("text") else config.vision
        return shape[0] ** -0.5 * (2 * tower.transformer.layers) ** -0.5  # type: ignore[union-attr]
    return shape[0] ** -0.5


def contrast(
    logits: Float[Array, "n m"], true: Bool[Array, "n m"] | Float[Array, "n m"]
) -> Float[Array, ""]:
    """Mean over texts of -log sigmoid of +logit where the text (column) is true of the image
    (row), of -logit where not, both kinds with half the weight.

    A text that is true of all images, or of none, has one kind only, with its half of the weight:
    it says where it lies, but compares nothing.
    """
    t = true.astype(logits.dtype)
    hits, misses = -jax.nn.log_sigmoid(logits) * t, -jax.nn.log_sigmoid(-logits) * (1 - t)
    return jnp.mean(
        0.5 * hits.sum(0) / jnp.maximum(t.sum(0), 1)
        + 0.5 * misses.sum(0) / jnp.maximum((1 - t).sum(0), 1)
    )


def patch_similarity(
    patches: Float[Array, "n p d"], texts: Float[Array, "m d"], sharpness: float
) -> Float[Array, "n m"]:
    """Similarity (cosine, inputs of unit length) of images and texts by the patches that resemble
    the text most: a softmax-weighted mean over patches.
    """
    cosine = jnp.einsum("npd,md->nmp", patches, texts)
    return (jax.nn.softmax(sharpness * cosine) * cosine).sum(-1)


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def _vit(network: CLIPNetwork) -> ViT:
    if not isinstance(network.visual, ViT):
        raise UsageError(
            "only CLIPs with a vision transformer can be trained here, this one has a ResNet"
        )
    return network.visual


def encode(
    network: CLIPNetwork, pixels: Float[Array, "n h w 3"], kept: Int[Array, "n p"] | None
) -> tuple[Float[Array, "n d"], Float[Array, "n p d"]]:
    """(points of images, dense features of the patches kept) in one pass; kept: numbers of
    patches, None is all of them. Not of unit length.
    """
    tower = _vit(network)
    x = tower.tokens(pixels)
    if kept is not None:
        x = jnp.concatenate(
            [x[:, :1], jnp.take_along_axis(x[:, 1:], kept[:, :, None], axis=1)], axis=1
        )
    *before, last = tower.transformer.blocks()
    for block in before:
        x = block(x)
    dense = tower.ln_post(last.value_path(x[:, 1:])) @ tower.projection[...]
    return tower.ln_post(last(x)[:, 0]) @ tower.projection[...], dense


def loss(
    network: CLIPNetwork,
    pixels: Float[Array, "n h w 3"],
    texts: Float[Array, "m d"],
    true: Bool[Array, "n m"],
    key: Array,
    recipe: Recipe,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """(global + weighted patch loss, both apart). texts: points, of any length; true: which text is
    true of which image.
    """
    n, count = pixels.shape[0], _vit(network).positions.shape[0] - 1
    order = jnp.argsort(jax.random.uniform(key, (n, count)), axis=1)
    kept = order[:, : max(1, round(recipe.keep * count))] if recipe.keep < 1 else None
    images, patches = encode(network, pixels, kept)
    scale, texts = jnp.exp(jnp.minimum(network.logit_scale[...], _MAX_LOG_SCALE)), _unit(texts)
    whole = contrast(scale * _unit(images) @ texts.T, true)
    local = contrast(scale * patch_similarity(_unit(patches), texts, recipe.sharpness), true)
    return whole + recipe.dense * local, {"global": whole, "patch": local, "scale": scale}


def rate_at(progress: float, recipe: Recipe) -> float:
    """Learning rate where a share `progress` (0..1) of the training is over: linear over the first
    twentieth, then a cosine to zero.
    """
    warm = 0.05
    if progress < warm:
        return recipe.learning_rate * max(progress, 1e-3) / warm
    return (
        recipe.learning_rate
        * 0.5
        * (1 + math.cos(math.pi * min(1.0, (progress - warm) / (1 - warm))))
    )


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW of rate 1 (`step` multiplies its update) on gradients clipped to norm 1; matrices
    decay, gains and biases do not.
    """
    matrices = partial(jax.tree.map, lambda a: a.ndim >= 2)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1.0, b2=0.98, weight_decay=recipe.weight_decay, mask=matrices),
    )


def new_state(
    network: CLIPNetwork,
    recipe: Recipe,
    concepts: Float[Array, "c d"] | None = None,
    parts: Float[Array, "k d"] | None = None,
) -> tuple[Any, State]:
    """(structure, state) at the start of training this network; concepts, parts: points that are
    learned in the place of texts, see `grounded_step`.
    """
    graph, params = nnx.split(network)
    points = {
        name: value
        for name, value in (("concepts", concepts), ("parts", parts))
        if value is not None
    }
    trained: dict[str, Any] = {"network": nnx.to_pure_dict(params)} | points
    average = jax.tree.map(jnp.array, trained)
    return graph, {
        "params": trained,
        "ema": average,
        "optimizer": optimizer(recipe).init(trained),
        "step": jnp.zeros((), jnp.int32),
    }


def step(
    graph: Any,
    state: State,
    pixels: Float[Array, "n h w 3"],
    ids: Int[Array, "m c"],
    true: Bool[Array, "n m"],
    rate: Float[Array, ""],
    key: Array,
    recipe: Recipe,
) -> tuple[State, dict[str, Float[Array, ""]]]:
    """One step of both towers at this learning rate; returns the next state and the losses. Pure,
    as all steps: jit it with `recipe` static.
    """

    def objective(params: dict[str, Any]) -> tuple[Array, dict[str, Array]]:
        network = nnx.merge(graph, params["network"])
        return loss(network, pixels, network.text(ids), true, key, recipe)

    return _descend(objective, state, rate, recipe)


def grounded_loss(
    network: CLIPNetwork,
    concepts: Float[Array, "a d"],
    parts: Float[Array, "k d"],
    pixels: Float[Array, "n h w 3"],
    true: Float[Array, "n a"],
    score: Float[Array, "n a"],
    share: Float[Array, "m p k"],
    about: Float[Array, "a k"],
    recipe: Recipe,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Global loss, loss of parts, and loss of facts in their parts.

    true: probability of each fact for each image. score: what a teacher says of it, mean 0 and
        deviation 1 per fact; regression on it learns from far fewer images than the contrast of
        probabilities does, so both are used. share: for the last m images, how much of every
        patch belongs to which part, summing to 1. about: which parts a fact can be about, 0..1; a
        fact about none is learned globally only. Parts: cross-entropy of softmax(contrast x cosine
        with the points of the parts) against `share`. Facts in parts: the mean similarity over
        patches, weighted by how likely they belong to those parts (as the network has it, without
        gradient: a word must not move the parts).
    """
    images, patches = encode(network, pixels, None)
    images, patches, concepts, parts = _unit(images), _unit(patches), _unit(concepts), _unit(parts)
    scale = jnp.exp(jnp.minimum(network.logit_scale[...], _MAX_LOG_SCALE))
    told = jnp.mean(jnp.square(images @ concepts.T / recipe.spread - score))
    whole = contrast(scale * images @ concepts.T, true)
    belongs = recipe.contrast * patches @ parts.T
    known = -jnp.sum(share * jax.nn.log_softmax(belongs[-share.shape[0] :]), axis=-1)
    apart = known.sum() / jnp.maximum(share.sum(), 1.0)
    looked_at = jax.lax.stop_gradient(jax.nn.softmax(belongs)) @ about.T
    similar = jnp.sum(looked_at * (patches @ concepts.T), axis=1) / (looked_at.sum(1) + 1e-3)
    weight = (about.sum(1) > 0).astype(similar.dtype)
    local = jnp.sum(weight * jnp.square(similar / recipe.spread - score)) / (
        len(score) * jnp.maximum(weight.sum(), 1.0)
    )
    total = whole + recipe.told * (told + recipe.dense * local) + recipe.parts * apart
    return total, {"global": whole, "told": told, "local": local, "parts": apart, "scale": scale}


def grounded_step(
    graph: Any,
    state: State,
    pixels: Float[Array, "n h w 3"],
    true: Float[Array, "n a"],
    score: Float[Array, "n a"],
    share: Float[Array, "m p k"],
    about: Float[Array, "a k"],
    rate: Float[Array, ""],
    recipe: Recipe,
) -> tuple[State, dict[str, Float[Array, ""]]]:
    """One step of the image tower on `grounded_loss`, with learned points for facts and for parts
    instead of texts.

    A text tower that begins with nothing holds the image tower up: until texts are told apart, they
    pull all images to one place.
    """

    def objective(params: dict[str, Any]) -> tuple[Array, dict[str, Array]]:
        network = nnx.merge(graph, params["network"])
        return grounded_loss(
            network, params["concepts"], params["parts"], pixels, true, score, share, about, recipe
        )

    return _descend(objective, state, rate, recipe)


def text_step(
    graph: Any,
    state: State,
    ids: Int[Array, "m c"],
    points: Float[Array, "m d"],
    rate: Float[Array, ""],
    recipe: Recipe,
) -> tuple[State, dict[str, Float[Array, ""]]]:
    """One step of the text tower towards known points: mean of 1 - cosine. No images are
    needed.
    """

    def objective(params: dict[str, Any]) -> tuple[Array, dict[str, Array]]:
        told = nnx.merge(graph, params["network"]).text(ids)
        away = jnp.mean(1 - jnp.sum(_unit(told) * _unit(points), axis=1))
        return away, {"text": away}

    return _descend(objective, state, rate, recipe)


def _descend(
    objective: Any, state: State, rate: Array, recipe: Recipe
) -> tuple[State, dict[str, Array]]:
    gradient, told = jax.grad(objective, has_aux=True)(state["params"])
    update, kept = optimizer(recipe).update(gradient, state["optimizer"], state["params"])
    # What takes no part in a step has no gradient, and must not shrink by its decay either.
    params = jax.tree.map(
        lambda p, u, g: jnp.where(jnp.any(g != 0), p + rate * u, p),
        state["params"],
        update,
        gradient,
    )
    # Young averages forget faster, so that the start is not remembered for long.
    decay = jnp.minimum(recipe.ema, (1 + state["step"]) / (10 + state["step"]))
    ema = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state["ema"], params)
    return {"params": params, "ema": ema, "optimizer": kept, "step": state["step"] + 1}, told


def class_points(
    dense: Float[Array, "n d"],
    share: Float[Array, "n c"],
    avoid: Float[Array, "r d"],
    steps: int = 400,
) -> tuple[Float[Array, "c d"], float]:
    """(a unit point for each class, the factor on cosines): logistic regression of which class a
    patch belongs to on its dense features.

    share: how much of each patch belongs to which class. avoid: directions, orthonormal rows, in
        which whole images differ. The points stay out of them: where a thing is must not say
        whether it is there.
    """
    dense, tune, rng = _unit(dense), optax.adam(0.02), np.random.default_rng(0)

    def apart(x: Array) -> Array:
        return _unit(x - x @ avoid.T @ avoid)

    def away(free: Any, x: Array, y: Array) -> Array:
        return -jnp.mean(
            jnp.sum(y * jax.nn.log_softmax(jnp.exp(free[1]) * x @ apart(free[0]).T), -1)
        )

    @jax.jit
    def step(free: Any, inner: Any, at: Array) -> Any:
        update, inner = tune.update(jax.grad(away)(free, dense[at], share[at]), inner)
        return optax.apply_updates(free, update), inner

    free: Any = (
        _unit((share.T @ dense) / jnp.maximum(share.sum(0), 1e-6)[:, None]),
        jnp.log(jnp.asarray(10.0)),
    )
    inner = tune.init(free)
    for _ in range(steps):
        free, inner = step(free, inner, rng.choice(len(dense), min(4096, len(dense))))
    return apart(free[0]), float(jnp.exp(free[1]))


def averaged(graph: Any, state: State) -> CLIPNetwork:
    """The network with its averaged parameters."""
    return nnx.merge(graph, state["ema"]["network"])
