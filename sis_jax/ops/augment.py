"""Adaptive discriminator augmentation: the 'bgc' pipeline of StyleGAN2-ADA, and its strength.

Karras et al. 2020 (arXiv 2006.06676), section 3 and appendix B. Where this differs:
* The paper resamples between two sym6 wavelet filters, which shift a mirrored image by a fraction
  of a pixel. Here a symmetric 12-tap quadrature-mirror low-pass: down(up(x)) equals x to 0.5 %.
* The paper reflects the image once and shows zeros beyond; here reflections tile the plane.
* An image for which no operation was drawn is returned bit for bit.
"""

from __future__ import annotations

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

# Low-pass of sum sqrt(2) that minimises sum_m (<h, h shifted by 2m> - [m = 0])^2 + mean |H|^2 over
# [0.75 pi, pi]: nearly its own inverse.
_HALF = (-0.0063288439, 0.0300188219, -0.0060613761, -0.1231322120, 0.1292442989, 0.6833660924)
LOW_PASS = _HALF + _HALF[::-1]
# Supersampled pixels the filter needs beyond the image, on each side
_REACH = len(LOW_PASS) // 2 - 1

# Appendix B. A scale of 2 ** N(0, std^2) is the paper's Lognormal(0, (std ln 2)^2).
BLIT_SHIFT = 0.125  # of the edge length, uniform within plus or minus this, whole pixels
SCALE_STD = 0.2  # octaves, isotropic and anisotropic
SHIFT_STD = 0.125  # of the edge length, normal
BRIGHTNESS_STD = 0.2  # where the whole range is 2
CONTRAST_STD = 0.5  # octaves
SATURATION_STD = 1.0  # octaves

_GEOMETRY_DRAWS, _COLOUR_DRAWS = (14, 4), (7, 3)  # uniform, normal


def augment(
    key: Key[Array, ""] | UInt32[Array, "2"],
    images: Float[Array, "b h w 3"],
    p: Float[Array, ""] | float,
    first: Int[Array, ""] | int = 0,
) -> Float[Array, "b h w 3"]:
    """Augmented images [b h w 3], every operation drawn with probability `p` for every image.

    images: in [-1, 1], h and w at least 4; results may leave it. p: 0..1, may be traced; no
        gradient reaches it. first: index of `images[0]` in the global batch: image i is driven by
        (key, first + i) alone. Affine in `images`. Memory: 48 floats per pixel at the peak.
    """
    b, h, w, channels = images.shape
    if channels != 3 or min(h, w) < 4:
        raise ValueError(
            f"augment takes RGB images of at least 4x4 pixels, shape [b h w 3]; got {images.shape}"
        )
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(b))
    (gu, gn), (cu, cn) = jax.vmap(_draws)(keys)
    p = jax.lax.stop_gradient(jnp.asarray(p, jnp.float32))
    inverse, moved = jax.vmap(lambda u, n: _geometry(u, n, p, h, w))(gu, gn)
    colour, tinted = jax.vmap(lambda u, n: _colour(u, n, p))(cu, cn)
    # The resampling is nearly all of the cost, and while p is small many batches do not need it.
    warped = jax.lax.cond(jnp.any(moved), lambda x: resample(x, inverse), lambda x: x, images)
    images = jnp.where(moved[:, None, None, None], warped, images)
    return jnp.where(
        tinted[:, None, None, None], _recolour(images, colour.astype(images.dtype)), images
    )


def adjust_probability(
    p: Float[Array, ""] | float,
    sign_mean: Float[Array, ""] | float,
    images_seen_since: int,
    target: float = 0.6,
    speed_images: int = 500_000,
) -> Float[Array, ""]:
    """The next p (section 3.2): p + sign(r_t - target) images_seen_since / speed_images, in [0, 1].

    sign_mean: r_t = E[sign D(real)] since the last call, -1..1. images_seen_since: real images
        since then.
    """
    step = jnp.sign(jnp.asarray(sign_mean, jnp.float32) - target) * (
        images_seen_since / speed_images
    )
    return jnp.clip(jnp.asarray(p, jnp.float32) + step, 0.0, 1.0)


def _draws(key: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    # One block per kind of number: random bits cost compile time per call, not per number.
    uniform, normal = jax.random.split(key)
    u = jax.random.uniform(uniform, (_GEOMETRY_DRAWS[0] + _COLOUR_DRAWS[0],))
    n = jax.random.normal(normal, (_GEOMETRY_DRAWS[1] + _COLOUR_DRAWS[1],))
    return (u[: _GEOMETRY_DRAWS[0]], n[: _GEOMETRY_DRAWS[1]]), (
        u[_GEOMETRY_DRAWS[0] :],
        n[_GEOMETRY_DRAWS[1] :],
    )


# ----------------------------------------------------------------------------------------- geometry


def _geometry(
    u: Float[Array, "14"], n: Float[Array, "4"], p: Array, h: int, w: int
) -> tuple[Float[Array, "3 3"], Bool[Array, ""]]:
    """The matrix from output to input positions, and whether anything was drawn.

    Positions in pixels, x right, y down, from the image's centre. The paper's G = op_k ... op_1 has
    the inverse op_1^-1 ... op_k^-1, so each inverse goes on the right.
    """
    (
        on_flip, flip, on_turn, turn, on_blit, blit_x, blit_y, on_zoom, on_pre, pre, on_squeeze,
        on_post, post, on_shift,
    ) = u  # fmt: skip
    size = jnp.asarray([w, h], jnp.float32)
    p_rotate = 1 - jnp.sqrt(1 - p)  # two chances to rotate: p is the probability of at least one
    mirrored = (on_flip < p) & (flip < 0.5)
    turns = jnp.where(on_turn < p, (turn * 4).astype(jnp.int32), 0)
    blit = jnp.where(
        on_blit < p, jnp.round((2 * jnp.stack([blit_x, blit_y]) - 1) * BLIT_SHIFT * size), 0.0
    )
    zoom = jnp.where(on_zoom < p, jnp.exp2(n[0] * SCALE_STD), 1.0)
    before = jnp.where(on_pre < p_rotate, (2 * pre - 1) * math.pi, 0.0)
    squeeze = jnp.where(on_squeeze < p, jnp.exp2(n[1] * SCALE_STD), 1.0)
    after = jnp.where(on_post < p_rotate, (2 * post - 1) * math.pi, 0.0)
    shift = jnp.where(on_shift < p, n[2:4] * SHIFT_STD * size, 0.0)
    matrix = _stretch(jnp.where(mirrored, -1.0, 1.0), jnp.ones(()))
    for step in (
        _turn(
            jnp.asarray([1.0, 0.0, -1.0, 0.0])[turns], jnp.asarray([0.0, 1.0, 0.0, -1.0])[turns]
        ),  # exact: cos(pi / 2) in float32 is not 0
        _translate(-blit[0], -blit[1]),
        _stretch(1 / zoom, 1 / zoom),
        _turn(jnp.cos(before), jnp.sin(before)),
        _stretch(1 / squeeze, squeeze),
        _turn(jnp.cos(after), jnp.sin(after)),
        _translate(-shift[0], -shift[1]),
    ):
        matrix = _dot(matrix, step)
    moved = (
        mirrored
        | (turns != 0)
        | (blit != 0).any()
        | (zoom != 1)
        | (before != 0)
        | (squeeze != 1)
        | (after != 0)
        | (shift != 0).any()
    )
    return matrix, moved


def _dot(a: Array, b: Array) -> Array:
    # Accelerators round the factors of a default-precision product, which moves a corner by a
    # visible fraction of a pixel.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _rows(*values: Array) -> Float[Array, "3 3"]:
    zero, one = jnp.zeros(()), jnp.ones(())
    return jnp.stack([*values, zero, zero, one]).reshape(3, 3)


def _stretch(x: Array, y: Array) -> Float[Array, "3 3"]:
    zero = jnp.zeros(())
    return _rows(x, zero, zero, zero, y, zero)


def _turn(cos: Array, sin: Array) -> Float[Array, "3 3"]:
    zero = jnp.zeros(())
    return _rows(cos, -sin, zero, sin, cos, zero)


def _translate(x: Array, y: Array) -> Float[Array, "3 3"]:
    zero, one = jnp.zeros(()), jnp.ones(())
    return _rows(one, zero, x, zero, one, y)


# --------------------------------------------------------------------------------------- resampling


def resample(
    images: Float[Array, "b h w c"], inverse: Float[Array, "b 3 3"]
) -> Float[Array, "b h w c"]:
    """The images seen through one affine map each, reflected at their borders.

    inverse: output to input position in pixels from the centre. Supersampled twice on both sides of
        the bilinear look-up.
    """
    _, h, w, _ = images.shape
    fine = _up(_up(images, 1), 2)
    x = (
        jnp.arange(-_REACH, 2 * w + _REACH) - (w - 0.5)
    ) / 2  # centres of the supersampled output, in pixels from the centre
    y = (jnp.arange(-_REACH, 2 * h + _REACH) - (h - 0.5)) / 2
    m = inverse[:, :, :, None, None]
    source_x = m[:, 0, 0] * x[None, None, :] + m[:, 0, 1] * y[None, :, None] + m[:, 0, 2]
    source_y = m[:, 1, 0] * x[None, None, :] + m[:, 1, 1] * y[None, :, None] + m[:, 1, 2]
    sampled = _bilinear(fine, _reflect(source_x, w), _reflect(source_y, h))
    return _down(_down(sampled, 1), 2)


def _reflect(position: Array, size: int) -> Array:
    """Positions from the centre, folded at the borders -> indices of the supersampled axis."""
    span = size - 1
    folded = jnp.mod(position + span / 2, 2 * span)
    return 2 * (span - jnp.abs(folded - span)) + 0.5


def _bilinear(
    fine: Float[Array, "b H W c"], x: Float[Array, "b i j"], y: Float[Array, "b i j"]
) -> Float[Array, "b i j c"]:
    """Values between four pixels, side by side in the channels: one row is gathered, not four."""
    b, height, width, c = fine.shape
    quads = jnp.concatenate(
        [fine[:, :-1, :-1], fine[:, :-1, 1:], fine[:, 1:, :-1], fine[:, 1:, 1:]], -1
    )
    x0, y0 = jnp.clip(jnp.floor(x), 0, width - 2), jnp.clip(jnp.floor(y), 0, height - 2)
    rows = (y0 * (width - 1) + x0).astype(jnp.int32) + (
        jnp.arange(b) * ((height - 1) * (width - 1))
    )[:, None, None]
    found = quads.reshape(-1, 4 * c).at[rows].get(mode="promise_in_bounds")
    fx, fy = (x - x0)[..., None].astype(fine.dtype), (y - y0)[..., None].astype(fine.dtype)
    top = found[..., :c] * (1 - fx) + found[..., c : 2 * c] * fx
    bottom = found[..., 2 * c : 3 * c] * (1 - fx) + found[..., 3 * c :] * fx
    return top * (1 - fy) + bottom * fy


def _up(x: Array, axis: int) -> Array:
    """Twice the samples along `axis`, by shift and add; sample j is at (j - 0.5) / 2."""
    size, reach = x.shape[axis], (_REACH + 1) // 2
    index = jnp.abs(jnp.arange(-reach, size + reach))
    padded = jnp.take(x, _fold(index, size), axis=axis)
    phases = []
    for phase in (0, 1):
        # Output 2 i + phase is half a fine pixel from input i, so it meets input i + k through
        # the tap 2 k fine pixels away.
        taps = [
            (k, LOW_PASS[_REACH + phase - 2 * k])
            for k in range(-reach, reach + 1)
            if 0 <= _REACH + phase - 2 * k < len(LOW_PASS)
        ]
        phases.append(
            sum(
                jax.lax.slice_in_dim(padded, reach + k, reach + k + size, axis=axis)
                * (tap * math.sqrt(2))
                for k, tap in taps
            )
        )
    return jnp.stack(phases, axis + 1).reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])


def _fold(index: Array, size: int) -> Array:
    span = 2 * (size - 1)
    index = index % span
    return jnp.minimum(index, span - index)


def _down(x: Array, axis: int) -> Array:
    """Half of the samples inside the margin: the transpose of `_up`, scaled to keep the mean."""
    size = (x.shape[axis] - 2 * _REACH) // 2
    terms = (
        jax.lax.slice_in_dim(x, k, k + 2 * size - 1, stride=2, axis=axis) * (tap / math.sqrt(2))
        for k, tap in enumerate(LOW_PASS)
    )
    return functools.reduce(operator.add, terms)


# ------------------------------------------------------------------------------------------- colour


def _colour(
    u: Float[Array, "7"], n: Float[Array, "3"], p: Array
) -> tuple[Float[Array, "3 4"], Bool[Array, ""]]:
    """The affine map of RGB, and whether any was drawn; hue turns around (1, 1, 1) / sqrt(3)."""
    on_bright, on_contrast, on_luma, luma, on_hue, hue, on_saturation = u
    bright = jnp.where(on_bright < p, n[0] * BRIGHTNESS_STD, 0.0)
    contrast = jnp.where(on_contrast < p, jnp.exp2(n[1] * CONTRAST_STD), 1.0)
    flipped = (on_luma < p) & (luma < 0.5)
    angle = jnp.where(on_hue < p, (2 * hue - 1) * math.pi, 0.0)
    saturation = jnp.where(on_saturation < p, jnp.exp2(n[2] * SATURATION_STD), 1.0)
    eye, grey = jnp.eye(3), jnp.full((3, 3), 1 / 3)  # grey = v v^T
    cross = jnp.asarray([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    linear, offset = eye * contrast, jnp.full(3, bright) * contrast
    for step in (
        eye - 2 * grey * flipped,  # Householder reflection: light becomes dark, hue stays
        jnp.cos(angle) * eye + (1 - jnp.cos(angle)) * grey + jnp.sin(angle) * cross,  # Rodrigues
        grey + (eye - grey) * saturation,
    ):
        linear, offset = _dot(step, linear), _dot(step, offset)
    drawn = (bright != 0) | (contrast != 1) | flipped | (angle != 0) | (saturation != 1)
    return jnp.concatenate([linear, offset[:, None]], 1), drawn


def _recolour(
    images: Float[Array, "b h w 3"], matrix: Float[Array, "b 3 4"]
) -> Float[Array, "b h w 3"]:
    m = matrix[:, None, None]
    return sum((images[..., k : k + 1] * m[..., k] for k in range(3)), m[..., 3])
