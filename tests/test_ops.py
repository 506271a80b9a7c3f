"""`ops/convolution.py` against plain definitions: values, first and second derivatives, adjoints,
both precisions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy.signal import convolve2d, correlate2d

from sis_jax.ops import convolution
from sis_jax.ops.resize import resize_bilinear

TAPS = np.array([1.0, 3.0, 3.0, 1.0])
FILTER = np.outer(TAPS, TAPS) / 64
SIZES = [(4, 4), (6, 10)]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


# The definitions, once in NumPy and SciPy (values), once as dilated and depthwise convolutions
# (whose derivatives are XLA's own)


def each_image(x, function):
    """`function` of every [h w] plane of x [n h w c]."""
    return np.stack(
        [
            np.stack([function(plane) for plane in image.transpose(2, 0, 1)], -1)
            for image in np.asarray(x, np.float64)
        ]
    )


def inserted(plane):
    """Zeros between samples: [2h, 2w]."""
    out = np.zeros((2 * plane.shape[0], 2 * plane.shape[1]))
    out[::2, ::2] = plane
    return out


def filtered(plane, before, after, gain=1.0):
    return convolve2d(np.pad(plane, (before, after)), gain * FILTER, mode="valid")


def dense(x, kernel, function):
    """Sum over input channels of `function(plane, 3x3 kernel)`, per output channel."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    n, _, _, i = x.shape
    return np.stack(
        [
            np.stack(
                [
                    sum(function(x[b, :, :, c], kernel[:, :, c, o]) for c in range(i))
                    for o in range(kernel.shape[3])
                ],
                -1,
            )
            for b in range(n)
        ]
    )


def numpy_conv_up(x, kernel):
    def one(plane, k):
        full = correlate2d(inserted(plane)[:-1, :-1], k, mode="full")
        return filtered(full, 1, 1, 4)

    return dense(x, kernel, one)


def numpy_conv_down(x, kernel):
    return dense(
        x, kernel, lambda plane, k: correlate2d(filtered(plane, 2, 2), k, mode="valid")[::2, ::2]
    )


def plain_filter(x, pad, gain=1.0, up=1, down=1):
    """Zero insertion, the filter, every `down`-th sample: one depthwise convolution."""
    c = x.shape[-1]
    kernel = jnp.tile(jnp.asarray(gain * FILTER, x.dtype)[:, :, None, None], (1, 1, 1, c))
    return lax.conv_general_dilated(
        x,
        kernel,
        (down, down),
        [pad, pad],
        lhs_dilation=(up, up),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=c,
    )


def plain_conv_up(x, kernel):
    full = lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        [(2, 2)] * 2,
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return plain_filter(full, (1, 1), 4.0)


def plain_conv_down(x, kernel):
    return lax.conv_general_dilated(
        plain_filter(x, (2, 2)), kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


LINEAR = {
    "blur1": (
        lambda x: convolution.blur(x, 1),
        lambda x: plain_filter(x, (1, 1)),
        lambda p: filtered(p, 1, 1),
    ),
    "blur2": (
        lambda x: convolution.blur(x, 2),
        lambda x: plain_filter(x, (2, 2)),
        lambda p: filtered(p, 2, 2),
    ),
    "blur1 gain": (
        lambda x: convolution.blur(x, 1, 4.0),
        lambda x: plain_filter(x, (1, 1), 4.0),
        lambda p: filtered(p, 1, 1, 4),
    ),
    "upsample": (
        convolution.upsample2d,
        lambda x: plain_filter(x, (2, 2), 4.0, up=2),
        lambda p: filtered(inserted(p), 2, 1, 4),
    ),
    "downsample": (
        convolution.downsample2d,
        lambda x: plain_filter(x, (1, 1), down=2),
        lambda p: filtered(p, 1, 1)[::2, ::2],
    ),
}
CONVOLUTIONS = {
    "up": (convolution.conv_up, plain_conv_up, numpy_conv_up),
    "down": (convolution.conv_down, plain_conv_down, numpy_conv_down),
}


def near(ours, expected, tolerance=2e-5):
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    assert ours.shape == expected.shape
    worst = np.abs(ours - expected).max()
    assert worst <= tolerance * max(1.0, np.abs(expected).max()), f"largest error {worst}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LINEAR)
def test_filters(name, size):
    ours, plain, numpy = LINEAR[name]
    x = normal(2, *size, 3)
    near(ours(x), each_image(x, numpy))
    near(
        plain(x), each_image(x, numpy)
    )  # the two definitions agree, so the derivatives below mean something
    half = ours(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    near(half.astype(jnp.float32), each_image(x, numpy), 0.02)


@pytest.mark.parametrize("name", LINEAR)
def test_filter_derivatives(name):
    ours, plain, _ = LINEAR[name]
    x = normal(2, 6, 8, 2)
    w = normal(*plain(x).shape, seed=1)
    v = normal(*x.shape, seed=2)

    def through(f):
        first = jax.grad(lambda x: jnp.sum(jnp.sin(f(x)) * w))
        return jax.jit(lambda x: (first(x), jax.grad(lambda x: jnp.sum(first(x) * v))(x)))

    for a, b in zip(through(ours)(x), through(plain)(x)):
        near(a, b)


@pytest.mark.parametrize("name", LINEAR)
def test_filters_and_their_adjoints(name):
    """<f(x), g> = <x, f*(g)>, with the transpose that the library declares."""
    ours = LINEAR[name][0]
    x = normal(2, 6, 8, 2)
    y, back = jax.vjp(ours, x)
    g = normal(*y.shape, seed=1)
    np.testing.assert_allclose(np.vdot(y, g), np.vdot(x, back(g)[0]), rtol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_resampling_convolutions(name, size):
    ours, plain, numpy = CONVOLUTIONS[name]
    x, kernel = normal(2, *size, 3), normal(3, 3, 3, 4, seed=1)
    expected = numpy(x, kernel)
    near(ours(x, kernel), expected)
    near(plain(x, kernel), expected)
    half = ours(jnp.asarray(x, jnp.bfloat16), kernel)
    assert half.dtype == jnp.bfloat16
    near(half.astype(jnp.float32), expected, 0.02)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_resampling_convolutions_derivatives(name):
    """First derivatives in image and kernel, and all four second ones."""
    ours, plain, _ = CONVOLUTIONS[name]
    x, kernel = normal(2, 6, 8, 2), normal(3, 3, 2, 3, seed=1)
    w, v, u = (
        normal(*plain(x, kernel).shape, seed=2),
        normal(*x.shape, seed=3),
        normal(*kernel.shape, seed=4),
    )

    def through(f):
        first = jax.grad(lambda x, k: jnp.sum(jnp.square(f(x, k)) * w), argnums=(0, 1))

        def all_of(x, k):
            second_x = jax.grad(lambda x, k: jnp.sum(first(x, k)[0] * v), argnums=(0, 1))
            second_k = jax.grad(lambda x, k: jnp.sum(first(x, k)[1] * u), argnums=(0, 1))
            return first(x, k), second_x(x, k), second_k(x, k)

        return jax.tree.leaves(jax.jit(all_of)(x, kernel))

    ours, plain = through(ours), through(plain)
    assert len(ours) == 6
    for a, b in zip(ours, plain):
        near(a, b)


def test_bilinear_maps_are_each_others_adjoints():
    y, x, k = normal(2, 9, 13, 3), normal(2, 4, 6, 5, seed=1), normal(3, 3, 3, 5, seed=2)
    a = np.vdot(convolution.strided_conv(y, k), x)
    np.testing.assert_allclose(np.vdot(y, convolution.transposed_conv(x, k)), a, rtol=1e-4)
    np.testing.assert_allclose(np.vdot(k, convolution.strided_kernel(y, x)), a, rtol=1e-4)


def grouped(x, kernel, style, demodulate, up):
    """Equations 1 and 3 literally: a kernel per sample, one convolution per sample."""
    kernel = kernel / np.sqrt(np.prod(kernel.shape[:3]))
    out = []
    for image, s in zip(x, style):
        own = kernel * s[None, None, :, None]
        if demodulate:
            own = own / np.sqrt(np.sum(own**2, axis=(0, 1, 2)) + 1e-8)
        if up:
            out.append(numpy_conv_up(image[None], own)[0])
        else:
            pad = kernel.shape[0] // 2
            out.append(
                dense(
                    np.pad(image, ((pad, pad), (pad, pad), (0, 0)))[None],
                    own,
                    lambda p, k: correlate2d(p, k, mode="valid"),
                )[0]
            )
    return np.stack(out)


@pytest.mark.parametrize(
    ("size", "demodulate", "up"),
    [(3, True, False), (3, True, True), (1, False, False), (3, False, True)],
)
def test_modulated_conv(size, demodulate, up):
    x, kernel, style = (
        normal(3, 4, 6, 5),
        3 * normal(size, size, 5, 4, seed=1),
        2 * normal(3, 5, seed=2) + 1,
    )
    expected = grouped(*(np.asarray(a, np.float64) for a in (x, kernel, style)), demodulate, up)
    near(convolution.modulated_conv(x, kernel, style, demodulate=demodulate, up=up), expected)
    half = convolution.modulated_conv(
        jnp.asarray(x, jnp.bfloat16), kernel, style, demodulate=demodulate, up=up
    )
    assert half.dtype == jnp.bfloat16
    near(half.astype(jnp.float32), expected, 0.03)


def test_modulated_conv_in_half_precision_survives_large_styles():
    """Demodulated, a style 10000 times larger gives the same result: nothing may overflow on the
    way in float16.
    """
    x, kernel, style = normal(2, 4, 4, 3), normal(3, 3, 3, 4, seed=1), normal(2, 3, seed=2) + 2
    half = [
        convolution.modulated_conv(jnp.asarray(x, jnp.float16), kernel, style * size).astype(
            jnp.float32
        )
        for size in (1, 1e4)
    ]
    assert np.isfinite(half[1]).all()
    near(half[1], half[0], 0.01)


def test_modulated_conv_derivatives():
    x, kernel, style = normal(2, 4, 4, 3), normal(3, 3, 3, 2, seed=1), normal(2, 3, seed=2) + 1.5
    w = normal(2, 8, 8, 2, seed=3)

    def literally(x, kernel, style):
        own = kernel[None] * style[:, None, None, :, None] / np.sqrt(27)
        own = own * lax.rsqrt(jnp.sum(own**2, axis=(1, 2, 3), keepdims=True) + 1e-8)
        return jnp.concatenate([plain_conv_up(x[i : i + 1], own[i]) for i in range(2)])

    def first_and_second(f):
        first = jax.grad(lambda *a: jnp.sum(jnp.square(f(*a)) * w), argnums=(0, 1, 2))
        second = jax.grad(
            lambda *a: sum(jnp.sum(jnp.square(g)) for g in first(*a)), argnums=(0, 1, 2)
        )
        return jax.jit(lambda *a: (*first(*a), *second(*a)))(x, kernel, style)

    for ours, plain in zip(
        first_and_second(lambda *a: convolution.modulated_conv(*a, up=True)),
        first_and_second(literally),
    ):
        near(ours, plain, 1e-4)


def test_resize_against_the_reference(goldens):
    z = np.load(goldens / "misc" / "resize.npz")
    cases = sorted({key.split("/")[0] for key in z})
    assert len(cases) == 6
    for case in cases:
        x = jnp.asarray(z[f"{case}/x"])
        size = z[f"{case}/bilinear"].shape[1:3]
        near(resize_bilinear(x, size, align_corners=True), z[f"{case}/bilinear_ac"], 1e-5)
        near(resize_bilinear(x, size, antialias=False), z[f"{case}/bilinear"], 1e-5)
        near(resize_bilinear(x, size, antialias=True), z[f"{case}/bilinear_antialias"], 1e-5)


@pytest.mark.parametrize("align_corners", [True, False])
def test_resize_keeps_constants_and_corners(align_corners):
    """Weights sum to one (the labels of upsampled scores rest on it), and with aligned corners the
    corners stay.
    """
    flat = resize_bilinear(jnp.full((1, 3, 5, 2), 2.5), (11, 8), align_corners=align_corners)
    np.testing.assert_allclose(flat, 2.5, rtol=1e-6)
    x = normal(1, 3, 5, 2)
    corners = np.asarray(resize_bilinear(x, (11, 8), align_corners=align_corners))[
        :, [0, 0, -1, -1], [0, -1, 0, -1]
    ]
    same = np.allclose(corners, x[:, [0, 0, -1, -1], [0, -1, 0, -1]], atol=1e-6)
    assert same  # with half-pixel centres too: outside the outermost centres the edge is repeated
    assert resize_bilinear(x, (1, 1), align_corners=align_corners).shape == (1, 1, 1, 2)


def test_small_layers():
    x = normal(4, 6)
    near(convolution.pixel_norm(x), x / np.sqrt((np.asarray(x) ** 2).mean(1, keepdims=True) + 1e-8))
    near(convolution.leaky_relu(x), np.sqrt(2) * np.where(x > 0, x, 0.2 * x))
    assert np.abs(convolution.leaky_relu(100 * x, clamp=3.0)).max() == 3
    weight, bias = normal(6, 2, seed=1), normal(2, seed=2)
    near(convolution.linear(x, weight, bias, 0.01), x @ weight * 0.01 / np.sqrt(6) + 0.01 * bias)
