"""Clusters of the pixels of one image: colour spaces, vectors of a pixel, k-means for many images.

`ops/kmeans.py` clusters one large set on all devices; here thousands of small sets are clustered
inside a compiled function, each on its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sis_jax.ops import kmeans
from sis_jax.ops import kmeans_steps as steps

ITERATIONS = 20  # of Lloyd's algorithm, in every restart


def converted(rgb: Float[Array, "*n 3"], color: str) -> Float[Array, "*n 3"]:
    """RGB in [-1, 1] as it is, as luma and differences, or as CIE L*a*b* (sRGB, D65) over 50."""
    if color == "rgb":
        return rgb
    if color == "ycc":
        y = rgb @ jnp.array([0.299, 0.587, 0.114])
        return jnp.stack([y, 0.564 * (rgb[..., 2] - y), 0.713 * (rgb[..., 0] - y)], -1)
    unit = jnp.clip((rgb + 1) / 2, 0, 1)
    linear = jnp.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    to_xyz = jnp.array(
        [
            [0.412456, 0.357576, 0.180438],
            [0.212673, 0.715152, 0.072175],
            [0.019334, 0.119192, 0.950304],
        ]
    )
    xyz = linear @ (to_xyz / jnp.array([[0.95047], [1.0], [1.08883]])).T
    f = jnp.where(xyz > 0.008856, jnp.cbrt(jnp.maximum(xyz, 1e-6)), 7.787 * xyz + 16 / 116)
    return (
        jnp.stack(
            [116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1
        )
        / 50
    )


def vectors(tensor: Float[Array, "h w d 3"], mode: str) -> Float[Array, "p v"]:
    """One vector per pixel; "correlation": centred over the variants, of unit norm."""
    if mode == "correlation":
        tensor = tensor - tensor.mean(2, keepdims=True)
        tensor = tensor / jnp.sqrt(jnp.sum(tensor**2, axis=(2, 3), keepdims=True) + 1e-6)
    return tensor.reshape(tensor.shape[0] * tensor.shape[1], -1)


def cluster(x: Float[Array, "p v"], k: int, n_init: int) -> Float[Array, "k v"]:
    """k-means of one image's pixels: the best of n_init starts, the same draws for every image."""
    own = jnp.sum(x * x, -1)

    def distances(centers: Float[Array, "k v"]) -> Float[Array, "p k"]:
        return jnp.maximum(own[:, None] + kmeans.scores(x, centers), 0)

    def start(key: Array) -> Float[Array, "k v"]:
        def pick(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], Array]:
            near, _ = carry
            chosen = x[jax.random.categorical(key, jnp.log(near + 1e-12))]
            return (
                jnp.minimum(near, jnp.maximum(own + jnp.sum(chosen**2) - 2 * x @ chosen, 0)),
                chosen,
            ), chosen

        return jax.lax.scan(pick, (jnp.ones_like(own), x[0]), jax.random.split(key, k))[1]

    def sums(centers: Float[Array, "1 k v"]) -> tuple[Array, Array]:
        # Rows first, unlike `steps.sums_of`: its product adds them in another order
        member = jax.nn.one_hot(jnp.argmin(distances(centers[0]), -1), k)
        return (member.T @ x)[None], member.sum(0)[None]

    def run(key: Array) -> tuple[Array, Array]:
        centers = steps.lloyd_steps(start(key)[None], sums, ITERATIONS)[0]
        return jnp.sum(distances(centers).min(-1)), centers

    inertia, centers = jax.lax.map(run, jax.random.split(jax.random.key(0), n_init))
    return centers[jnp.argmin(inertia)]
