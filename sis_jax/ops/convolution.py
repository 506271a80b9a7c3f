"""Array operations of StyleGAN2 (Karras et al. 2020, "Analyzing and improving the image quality of
StyleGAN"), as pure functions.

NHWC activations, HWIO kernels. Every function is exact (no approximation against the papers'
definition), twice differentiable and works in float32 and bfloat16; filters and demodulation
coefficients are always computed in float32.

Formulations were chosen by measurement: `python scripts/benchmark.py ops`, two cores, XLA's CPU
backend of jax 0.10.2, batch 16, in milliseconds:

                              forward   gradient   second order
    up    32 px  64 ->  32   18 | 18    38 | 206    90 | 256    ours | textbook form left to XLA
    up    16 px 128 ->  64    9 |  7    22 | 184    45 | 198
    down  64 px  32 ->  64    9 |  9    26 |  24    54 | 236
    down  32 px  64 -> 128    7 |  7    19 |  17    35 | 198
    filter 64 px 32           1 | 75     2 | 146    13 | 288    shift-and-add | depthwise conv

Convolutions are dense, and the resampling ones come with their own derivatives, because the
backward pass that XLA derives for a strided or dilated convolution runs over zeros or off the fast
path.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

_NHWC = ("NHWC", "HWIO", "NHWC")
LRELU_SLOPE = 0.2
LRELU_GAIN = float(np.sqrt(2))


def conv2d(
    x: Float[Array, "n h w i"], kernel: Float[Array, "kh kw i o"], padding: str | int = "SAME"
) -> Float[Array, "n h2 w2 o"]:
    """Cross-correlation, stride 1; padding: "SAME", "VALID" or zeros on every side."""
    pad = [(padding, padding)] * 2 if isinstance(padding, int) else padding
    return lax.conv_general_dilated(x, kernel.astype(x.dtype), (1, 1), pad, dimension_numbers=_NHWC)


def leaky_relu(x: Float[Array, "*n"], clamp: float | None = None) -> Float[Array, "*n"]:
    """Leaky ReLU with slope 0.2, times sqrt(2), then clamped to [-clamp, clamp] if asked."""
    y = jnp.where(x >= 0, x * LRELU_GAIN, x * (LRELU_SLOPE * LRELU_GAIN))
    return y if clamp is None else jnp.clip(y, -clamp, clamp)


def linear(
    x: Float[Array, "*n i"],
    weight: Float[Array, "i o"],
    bias: Float[Array, "o"] | None = None,
    lr_multiplier: float = 1.0,
) -> Float[Array, "*n o"]:
    """Fully connected layer with equalised learning rate: x W lr_mul / sqrt(fan_in) + b lr_mul."""
    weight = (weight * (lr_multiplier / np.sqrt(weight.shape[0]))).astype(x.dtype)
    # Accelerators round the factors of a product of float32 to 10 bits or 7 unless asked not to.
    y = jnp.matmul(x, weight, precision="highest")
    return y if bias is None else y + (bias * lr_multiplier).astype(x.dtype)


def pixel_norm(z: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
    """z / sqrt(mean(z^2) + 1e-8) over the last axis."""
    return z * lax.rsqrt(jnp.mean(jnp.square(z), axis=-1, keepdims=True) + 1e-8)


# The filter's transpose is the filter, that of doubling is halving: stated outright, because XLA's
# own transpose of shift-and-add is slower.


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def blur(x: Float[Array, "n h w c"], pad: int, gain: float = 1.0) -> Float[Array, "n h2 w2 c"]:
    """The filter [1,3,3,1]^2 / 64 times `gain`, with `pad` (1 or 2) zeros on every side."""
    outer, inner = (np.sqrt(gain) * np.array([0.125, 0.375])).astype(x.dtype)
    for axis in (1, 2):
        n = x.shape[axis] + 2 * pad - 3
        padded = jnp.pad(x, [(pad, pad) if a == axis else (0, 0) for a in range(4)])
        a, b, c, d = (lax.slice_in_dim(padded, i, i + n, axis=axis) for i in range(4))
        x = outer * (a + d) + inner * (b + c)
    return x


@jax.custom_vjp
def upsample2d(x: Float[Array, "n h w c"]) -> Float[Array, "n 2*h 2*w c"]:
    """Twice the size: zero-insertion, then the filter [1,3,3,1]^2 / 16 (pad 2,1).

    By phase: out[2m] = (x[m-1] + 3 x[m]) / 4, out[2m+1] = (3 x[m] + x[m+1]) / 4 along each axis.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        padded = jnp.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(4)])
        before = lax.slice_in_dim(padded, 0, n, axis=axis)
        after = lax.slice_in_dim(padded, 2, n + 2, axis=axis)
        both = jnp.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis=axis + 1)
        x = both.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
    return x


@jax.custom_vjp
def downsample2d(x: Float[Array, "n h w c"]) -> Float[Array, "n h//2 w//2 c"]:
    """Half the (even) size: the filter [1,3,3,1]^2 / 64 (pad 1,1), then every second sample."""
    # To an even size, so that taking phases is a reshape
    y = jnp.pad(blur(x, 1), ((0, 0), (0, 1), (0, 1), (0, 0)))
    n, h, w, c = y.shape
    return y.reshape(n, h // 2, 2, w // 2, 2, c)[:, :, 0, :, 0]


blur.defvjp(
    lambda x, pad, gain: (blur(x, pad, gain), None),
    lambda pad, gain, _, g: (blur(g, 3 - pad, gain),),
)
upsample2d.defvjp(lambda x: (upsample2d(x), None), lambda _, g: (4 * downsample2d(g),))
downsample2d.defvjp(lambda x: (downsample2d(x), None), lambda _, g: (0.25 * upsample2d(g),))


# Three bilinear maps of images y on the fine grid [2h+1], images x on the coarse grid [h] and 3x3
# kernels k [3 3 fine coarse]. Each one's derivatives are the other two, so gradients of any order
# stay among them. That is the point: left to itself, XLA's CPU backend computes the second
# derivative of a strided convolution, and the first of a dilated one, 3 to 8 times slower than
# these (table above).


@jax.custom_vjp
def strided_conv(
    y: Float[Array, "n h2 w2 i"], k: Float[Array, "3 3 i o"]
) -> Float[Array, "n h w o"]:
    """out[m] = sum_t y[2m + t] k[t]: a 3x3 convolution with stride 2 and no padding."""
    return lax.conv_general_dilated(y, k, (2, 2), "VALID", dimension_numbers=_NHWC)


@jax.custom_vjp
def transposed_conv(
    x: Float[Array, "n h w o"], k: Float[Array, "3 3 i o"]
) -> Float[Array, "n h2 w2 i"]:
    """out[2m + t] += x[m] k[t]^T, `strided_conv` transposed: a dense convolution per phase."""
    n, h, w, _ = x.shape
    k = jnp.swapaxes(k, 2, 3)[::-1, ::-1]
    x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))

    def phase(
        row: int, column: int
    ) -> (
        jax.Array
    ):  # even phases see two taps, a coarse sample back and the sample itself; odd phases one
        kernel = k[row::2, column::2][: 2 - row, : 2 - column]
        return lax.conv_general_dilated(
            x, kernel, (1, 1), [(1 - row, 0), (1 - column, 0)], dimension_numbers=_NHWC
        )

    rows = [jnp.stack([phase(row, 0), phase(row, 1)], axis=3) for row in (0, 1)]
    return jnp.stack(rows, axis=2).reshape(n, 2 * h + 2, 2 * w + 2, -1)[:, :-1, :-1]


@jax.custom_vjp
def strided_kernel(
    y: Float[Array, "n h2 w2 i"], x: Float[Array, "n h w o"]
) -> Float[Array, "3 3 i o"]:
    """out[t] = sum_m y[2m + t]^T x[m]: the gradient of `strided_conv` in its kernel."""
    zero = jnp.zeros((3, 3, y.shape[-1], x.shape[-1]), x.dtype)
    return jax.linear_transpose(
        lambda k: lax.conv_general_dilated(y, k, (2, 2), "VALID", dimension_numbers=_NHWC), zero
    )(x)[0]


strided_conv.defvjp(
    lambda y, k: (strided_conv(y, k), (y, k)),
    lambda r, g: (transposed_conv(g, r[1]), strided_kernel(r[0], g)),
)
transposed_conv.defvjp(
    lambda x, k: (transposed_conv(x, k), (x, k)),
    lambda r, g: (strided_conv(g, r[1]), strided_kernel(g, r[0])),
)
strided_kernel.defvjp(
    lambda y, x: (strided_kernel(y, x), (y, x)),
    lambda r, g: (transposed_conv(r[1], g), strided_conv(r[0], g)),
)


def conv_up(
    x: Float[Array, "n h w i"], kernel: Float[Array, "3 3 i o"]
) -> Float[Array, "n 2*h 2*w o"]:
    """StyleGAN2's `Conv0_up`: zero-insertion, full 3x3 convolution, filter with gain 4.

    On accelerators one dense convolution where the input is narrow: it is bound by memory there.
    """
    if kernel.shape[2] > _FOLDED_CHANNELS:
        return conv_up_by_phase(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=conv_up_by_phase, default=conv_up_folded)


def conv_up_by_phase(
    x: Float[Array, "n h w i"], kernel: Float[Array, "3 3 i o"]
) -> Float[Array, "n 2*h 2*w o"]:
    """`conv_up` with the fewest operations: a convolution per phase, then the filter."""
    flipped = jnp.swapaxes(kernel, 2, 3)[::-1, ::-1].astype(x.dtype)
    return blur(transposed_conv(x, flipped), 1, gain=4.0)


def conv_up_folded(
    x: Float[Array, "n h w i"], kernel: Float[Array, "3 3 i o"]
) -> Float[Array, "n 2*h 2*w o"]:
    """`conv_up` with the fewest bytes: the filter folded into a 3x3 kernel for all four phases.

    At 64 -> 32 channels to 1024 pixels 39 GFLOP and 0.47 GB an image; by phase 10 and 2.3.
    """
    n, h, w, _ = x.shape
    folded = jnp.einsum("pay,qbx,yxio->abipqo", _FOLD, _FOLD, kernel, precision="highest")
    y = conv2d(x, folded.reshape(3, 3, kernel.shape[2], -1))
    return y.reshape(n, h, w, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, -1)


def _fold() -> Float[np.ndarray, "phase tap row"]:
    """Along one axis: weight of a kernel's row in the tap of each phase of output pixels."""
    filtered, fold = (0.25, 0.75, 0.75, 0.25), np.zeros((2, 3, 3), np.float32)
    for phase, at, row in np.ndindex(2, 4, 3):
        twice = phase + at + row - 3  # of the distance to the input pixel
        if twice % 2 == 0 and abs(twice) <= 2:
            fold[phase, twice // 2 + 1, row] += filtered[at]
    return fold


_FOLD = _fold()
# Input channels up to which folding is faster by the roofline of a GPU (reads and writes saved
# against operations added; not measured).
_FOLDED_CHANNELS = 256


def conv_down(
    x: Float[Array, "n h w i"], kernel: Float[Array, "3 3 i o"]
) -> Float[Array, "n h//2 w//2 o"]:
    """StyleGAN2's `Conv1_down`: filter (pad 2,2), then a 3x3 convolution with stride 2."""
    return strided_conv(blur(x, 2), kernel.astype(x.dtype))


def modulated_conv(
    x: Float[Array, "n h w i"],
    kernel: Float[Array, "k k i o"],
    style: Float[Array, "n i"],
    *,
    demodulate: bool = True,
    up: bool = False,
) -> Float[Array, "n h2 w2 o"]:
    """Weight modulation and demodulation (StyleGAN2, eq. 1 and 3), without a kernel per sample.

    w'_ijk = s_i w_ijk / sqrt(fan_in), w''_ijk = w'_ijk / sqrt(sum_ik w'^2 + 1e-8). Scaling kernels
    per sample equals scaling the input by s and the output by d_j = 1 / sqrt(sum_ik w'^2 + 1e-8):
    exact.
    """
    kernel = kernel * (1.0 / np.sqrt(kernel.shape[0] * kernel.shape[1] * kernel.shape[2]))
    if demodulate and x.dtype != jnp.float32:
        # Half precision: the demodulated result does not depend on the scale of either factor, so
        # bring both near 1.
        kernel = kernel * lax.rsqrt(jnp.max(jnp.square(kernel), axis=(0, 1, 2)) + 1e-16)
        style = style / (jnp.max(jnp.abs(style), axis=1, keepdims=True) + 1e-8)
    y = x * style[:, None, None, :].astype(x.dtype)
    y = conv_up(y, kernel) if up else conv2d(y, kernel)
    if demodulate:
        energy = jnp.sum(jnp.square(kernel), axis=(0, 1))  # [i, o]
        d = lax.rsqrt(jnp.matmul(jnp.square(style), energy, precision="highest") + 1e-8)
        y = y * d[:, None, None, :].astype(y.dtype)
    return y


_GRADIENT_PIXELS, _GRADIENT_CHANNELS = 1024, 16  # from here on matrix products are faster


@jax.custom_vjp
def conv_same(
    x: Float[Array, "n h w i"], kernel: Float[Array, "k k i o"]
) -> Float[Array, "n h w o"]:
    """`conv2d` with SAME padding and an odd kernel, whose kernel gradient is fast on CPUs.

    XLA's CPU backend takes 2 to 3 times as long for that gradient on large images (64 px, 36 -> 24
    channels, batch 16, one core: 66 ms, here 35). First derivatives only.
    """
    return conv2d(x, kernel)


def _conv_same_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = kept
    flipped = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    large = x.shape[1] * x.shape[2] >= _GRADIENT_PIXELS and g.shape[-1] >= _GRADIENT_CHANNELS
    ours = _kernel_gradient if large else _derived_kernel_gradient
    size = kernel.shape[0]
    return conv2d(g, flipped), lax.platform_dependent(
        x, g, cpu=partial(ours, size=size), default=partial(_derived_kernel_gradient, size=size)
    )


def _derived_kernel_gradient(x: Array, g: Array, size: int) -> Array:
    shape = jax.ShapeDtypeStruct((size, size, x.shape[-1], g.shape[-1]), x.dtype)
    return jax.linear_transpose(lambda kernel: conv2d(x, kernel), shape)(g)[0]


def _kernel_gradient(x: Array, g: Array, size: int) -> Array:
    """One matrix product per kernel entry and sample: a sample's data stay in the cache.

    With padded rows, a shift by (i, j) pixels is one by i * width + j entries; where a row wraps, g
    is 0.
    """
    n, h, w, _ = x.shape
    pad, width = size // 2, w + size - 1
    flat_x = jnp.pad(x, ((0, 0), (pad, pad + 1), (pad, pad), (0, 0))).reshape(n, -1, x.shape[-1])
    flat_g = jnp.pad(g, ((0, 0), (0, 0), (0, size - 1), (0, 0))).reshape(n, -1, g.shape[-1])
    starts = [i * width + j for i in range(size) for j in range(size)]

    def one(total: Array, sample: tuple[Array, Array]) -> tuple[Array, None]:
        a, b = sample
        products = (
            jnp.matmul(b, a[s : s + h * width], preferred_element_type=total.dtype) for s in starts
        )
        return total + jnp.stack(list(products)), None

    zeros = jnp.zeros((size * size, g.shape[-1], x.shape[-1]), jnp.float32)
    total, _ = lax.scan(one, zeros, (flat_x, flat_g.transpose(0, 2, 1)))
    kernel = total.transpose(0, 2, 1).reshape(size, size, x.shape[-1], g.shape[-1])
    return kernel.astype(x.dtype)


conv_same.defvjp(lambda x, kernel: (conv2d(x, kernel), (x, kernel)), _conv_same_backward)
