"""CLIP (Radford et al. 2021, arXiv 2103.00020): images and text in one space.

Here: the text and the vision transformer (section 2.4; Dosovitskiy et al. 2020), and the network of
    both towers; the ResNet tower is in `clip_resnet.py`. Linear layers are [in, out], convolutions
    HWIO. Dense features follow the value path of MaskCLIP (Zhou et al. 2022, arXiv 2112.01071,
    section 3.2): the last attention layer without its attention weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from sis_jax.models.clip_resnet import Dense, ResNet, ResNetConfig, attend, check_floating
from sis_jax.ops.resize import cubic_matrix
from sis_jax.types import UsageError


def quick_gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """x sigmoid(1.702 x): the activation of OpenAI's models."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": partial(jax.nn.gelu, approximate=False),  # x Phi(x), by the error function
}


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a stack of blocks. hidden: of the MLPs. activation: of `ACTIVATIONS`."""

    width: int
    layers: int
    heads: int
    hidden: int
    activation: str = "quick_gelu"
    epsilon: float = 1e-5


@dataclass(frozen=True)
class ViTConfig:
    """Shape of a vision transformer; image_size and patch_size in pixels."""

    image_size: int
    patch_size: int
    transformer: TransformerConfig


@dataclass(frozen=True)
class TextConfig:
    """Shape of a text transformer. vocabulary: number of tokens; context: tokens of a text.

    end: id of the token whose place is read out; None reads the largest id of each text.
    """

    vocabulary: int
    context: int
    transformer: TransformerConfig
    end: int | None = None


@dataclass(frozen=True)
class CLIPConfig:
    """Shape of both towers; embed_dim: of the space they share."""

    embed_dim: int
    vision: ViTConfig | ResNetConfig
    text: TextConfig


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, in float32."""

    def __init__(self, width: int, epsilon: float):
        self.weight = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * self.weight[...] + self.bias[...]).astype(x.dtype)


class Block(nnx.Module):
    """Self-attention and a two-layer network, each after a layer norm and added to its input."""

    def __init__(self, config: TransformerConfig):
        width = config.width
        self.ln_1, self.ln_2 = LayerNorm(width, config.epsilon), LayerNorm(width, config.epsilon)
        self.q, self.k, self.v, self.out = (Dense(width, width) for _ in range(4))
        self.fc, self.proj = Dense(width, config.hidden), Dense(config.hidden, width)
        self.heads, self.activation = config.heads, config.activation

    def __call__(
        self, x: Float[Array, "b n c"], mask: Array | None = None
    ) -> Float[Array, "b n c"]:
        y = self.ln_1(x)
        x = x + self.out(attend(self.q(y), self.k(y), self.v(y), self.heads, mask))
        return x + self.proj(ACTIVATIONS[self.activation](self.fc(self.ln_2(x))))

    def value_path(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """W_o (W_v LN1(x) + b_v) + b_o: no attention weights, no residual, no second half."""
        return self.out(self.v(self.ln_1(x)))


class Transformer(nnx.Module):
    """`layers` blocks, called block0, block1, ..."""

    def __init__(self, config: TransformerConfig):
        for i in range(config.layers):
            setattr(self, f"block{i}", Block(config))
        self.layers = config.layers

    def blocks(self) -> list[Block]:
        """The blocks in the order they run."""
        return [getattr(self, f"block{i}") for i in range(self.layers)]

    def __call__(
        self, x: Float[Array, "b n c"], mask: Array | None = None
    ) -> Float[Array, "b n c"]:
        for block in self.blocks():
            x = block(x, mask)
        return x


class ViT(nnx.Module):
    """Patches and a class token through a transformer; the class token is the image's embedding."""

    def __init__(self, config: ViTConfig, embed_dim: int):
        width, patch = config.transformer.width, config.patch_size
        self.patch = nnx.Param(jnp.zeros((patch, patch, 3, width)))
        self.class_embedding = nnx.Param(jnp.zeros((width,)))
        self.positions = nnx.Param(jnp.zeros((1 + (config.image_size // patch) ** 2, width)))
        self.ln_pre = LayerNorm(width, config.transformer.epsilon)
        self.transformer = Transformer(config.transformer)
        self.ln_post = LayerNorm(width, config.transformer.epsilon)
        self.projection = nnx.Param(jnp.zeros((width, embed_dim)))
        self.config = config

    @property
    def stride(self) -> int:
        """Pixels from one position of `dense` to the next."""
        return self.config.patch_size

    def tokens(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b n c"]:
        """Input of the first block: class token, then patches row by row."""
        check_floating(pixels)
        b, h, w, _ = pixels.shape
        p = self.config.patch_size
        patches = (
            pixels.reshape(b, h // p, p, w // p, p, 3)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(b, (h // p) * (w // p), p * p * 3)
        )
        x = patches @ self.patch[...].reshape(p * p * 3, -1)
        first = jnp.broadcast_to(self.class_embedding[...], (b, 1, x.shape[-1]))
        return self.ln_pre(
            jnp.concatenate([first, x], axis=1)
            + resize_positions(self.positions[...], (h // p, w // p))
        )

    def hidden(self, pixels: Float[Array, "b h w 3"]) -> list[Float[Array, "b n c"]]:
        """Input of the first block, then each block's output, before the final norm."""
        states = [self.tokens(pixels)]
        for block in self.transformer.blocks():
            states.append(block(states[-1]))
        return states

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        x = self.transformer(self.tokens(pixels))
        return self.ln_post(x[:, 0]) @ self.projection[...]

    def dense(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 d"]:
        """LN_post of the last block's value path, projected, per patch."""
        *before, last = self.transformer.blocks()
        x = self.tokens(pixels)
        for block in before:
            x = block(x)
        y = self.ln_post(last.value_path(x[:, 1:])) @ self.projection[...]
        b, h, w, _ = pixels.shape
        return y.reshape(b, h // self.stride, w // self.stride, y.shape[-1])


def resize_positions(positions: Float[Array, "n c"], grid: tuple[int, int]) -> Float[Array, "m c"]:
    """Positional embeddings (class token, then a square grid) for another grid, bicubic."""
    size = round((positions.shape[0] - 1) ** 0.5)
    if grid == (size, size):
        return positions
    x = positions[1:].reshape(size, size, -1)
    rows, columns = (jnp.asarray(cubic_matrix(size, m), x.dtype) for m in grid)
    x = jnp.einsum("yi,xj,ijc->yxc", rows, columns, x, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([positions[:1], x.reshape(grid[0] * grid[1], -1)])


class Text(nnx.Module):
    """Tokens through a causal transformer; the end token's output is the text's embedding."""

    def __init__(self, config: TextConfig, embed_dim: int):
        width = config.transformer.width
        self.token_embedding = nnx.Param(jnp.zeros((config.vocabulary, width)))
        self.positions = nnx.Param(jnp.zeros((config.context, width)))
        self.transformer = Transformer(config.transformer)
        self.ln_final = LayerNorm(width, config.transformer.epsilon)
        self.projection = nnx.Param(jnp.zeros((width, embed_dim)))
        self.config = config

    def hidden(self, ids: Int[Array, "b n"]) -> Float[Array, "b n c"]:
        """Every position after the final norm."""
        n = ids.shape[1]
        x = self.token_embedding[...][ids] + self.positions[...][:n]
        return self.ln_final(self.transformer(x, jnp.tril(jnp.ones((n, n), bool))))

    def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b d"]:
        end = jnp.argmax(ids if self.config.end is None else ids == self.config.end, axis=1)
        x = self.hidden(ids)
        return x[jnp.arange(ids.shape[0]), end] @ self.projection[...]


class CLIPNetwork(nnx.Module):
    """Both towers, and the logarithm of the factor on their cosine similarity."""

    def __init__(self, config: CLIPConfig):
        d, vision = config.embed_dim, config.vision
        self.visual = ViT(vision, d) if isinstance(vision, ViTConfig) else ResNet(vision, d)
        self.text = Text(config.text, config.embed_dim)
        self.logit_scale = nnx.Param(jnp.zeros(()))
        self.config = config

    def check_pixels(self, pixels: Shaped[Array | np.ndarray, "..."], *, native: bool) -> None:
        """UsageError unless these images can be read; native: only at the size of training."""
        shape = pixels.shape
        size, stride = self.config.vision.image_size, self.visual.stride
        square = f"{size}x{size}"
        if len(shape) != 4 or shape[3] != 3:
            raise UsageError(
                f"pixels must be [b, {size}, {size}, 3], got {list(shape)}: use "
                "clip.preprocess(photos)"
            )
        check_floating(pixels)
        if native and shape[1:3] != (size, size):
            raise UsageError(
                f"this CLIP reads images of {square} pixels, got {shape[1]}x{shape[2]}: use "
                "clip.preprocess(photos)"
            )
        if shape[1] % stride or shape[2] % stride or 0 in shape[1:3]:
            raise UsageError(
                f"dense features need edges that are multiples of {stride} pixels, got "
                f"{shape[1]}x{shape[2]}; native is {square}"
            )
