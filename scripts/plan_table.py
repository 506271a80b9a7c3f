"""How many samples go through a network at a time on accelerators of 8 to 141 GB, as Markdown.

    python scripts/plan_table.py

Counted on shapes (`sis_jax/ops/plan.py`): no weights are read, and no accelerator is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from sis_jax.methods.base import small_image
from sis_jax.methods.segmentation_in_style import SegmentationInStyle, _collect_body, _label_body
from sis_jax.models import clip
from sis_jax.models.clip_resnet import ResNetConfig
from sis_jax.models.discriminator import Discriminator, DiscriminatorConfig
from sis_jax.models.stylegan2 import GeneratorConfig, StyleGAN2, channel_table
from sis_jax.ops import plan
from sis_jax.stages import regions
from sis_jax.training import gan

MEMORY = (8, 16, 24, 40, 80, 141)  # GB
SHARE = 0.75  # of it, that JAX takes
GROUP = 16  # as `gan.images_at_once` has it from 256 pixels on
PAPER = SegmentationInStyle(k=9, layer="64x64", grid=128, smooth="off", refine="none")
CLIPS = {  # the image tower, numbers of an embedding
    "ViT-B/32": (clip.ViTConfig(224, 32, clip.TransformerConfig(768, 12, 12, 3072)), 512),
    "ViT-L/14@336": (clip.ViTConfig(336, 14, clip.TransformerConfig(1024, 24, 16, 4096)), 768),
    "RN50x64": (ResNetConfig(448, 128, (3, 15, 36, 10), 64), 1024),
}


def main() -> None:
    """Print the table."""
    print("| pass |" + "".join(f" {size} GB |" for size in MEMORY))
    print("|---|" + "---|" * len(MEMORY))
    for name, cells in rows():
        print(f"| {name} |" + "".join(f" {cell} |" for cell in cells))


def rows() -> Iterator[tuple[str, list[str]]]:
    """(pass, samples per device at a time for each size of memory; "-" where it is refused)."""
    for name, fixed, (count, needed) in passes():
        yield name, [str(count) if _fits(fixed, needed, size) else "-" for size in MEMORY]
    for resolution in (256, 512, 1024):
        fixed, of_four, more = training(resolution)
        name = f"`train_generator`, {resolution} pixels, images of a step"
        yield name, [_largest(fixed, of_four, more, size) for size in MEMORY]


def passes() -> Iterator[tuple[str, int, tuple[int, int]]]:
    """(name, bytes of the weights, (samples at a time, bytes that they need))."""
    for resolution in (256, 1024):
        gen = config_f(resolution)
        arrays = PAPER._blank(512, 9)
        shown = {"taps": ("64x64",), "align_corners": True, "smooth": False}
        given = gen, np.zeros((1, 512), np.float32), np.float32(1)
        name, drawn = f"config-F, {resolution} pixels", (None, 0, None)
        yield (
            f"features at 64 pixels, {name}", plan.size_of(gen),
            plan.rows_at_once(
                _collect_body, (*drawn, 0), (*given, np.zeros(1, np.int32)), "gpu", grid=128,
                count=128 * 128, **shown,
            ),
        )  # fmt: skip
        yield (
            f"images with labels, {name}", plan.size_of(gen),
            plan.rows_at_once(
                _label_body, (*drawn, None), (*given, arrays), "gpu", outline=small_image(gen),
                **shown,
            ),
        )  # fmt: skip
    for name, (vision, d) in CLIPS.items():
        network, side = text_model(vision, d), 2 * vision.image_size
        images = np.zeros((1, 256, 256, 3), np.uint8), np.zeros((1, 256, 256), np.uint8)
        static = {"size": (side, side), "align_corners": False, "k": 9}
        static["colours"] = ((0.5,) * 3, (0.5,) * 3)
        yield (
            f"`label` with {name}", plan.size_of(network),
            plan.rows_at_once(
                regions._sums, (None, 0, 0), (network, *images), "gpu", **static
            ),
        )  # fmt: skip


def training(resolution: int) -> tuple[int, int, int]:
    """(bytes of the state, bytes of a step of four images, of each further image)."""
    gen = config_f(resolution)
    disc = shape_of(Discriminator, DiscriminatorConfig(resolution, gen.config.channels))
    recipe, shapes = gan.Recipe(dtype="bfloat16"), {}
    graphs = tuple(gan.split(network)[0] for network in (gen, disc))
    state = jax.eval_shape(lambda g, d: gan.new_state(g, d, recipe)[2], gen, disc)
    for count in (4, 8):
        real = np.zeros((count, resolution, resolution, 3), np.uint8)
        shapes[count] = max(
            plan.bytes_of(
                partial(phase, graphs=graphs, recipe=recipe, **more), state, jax.random.key(0), real
            )
            for phase, more in (
                (gan.g_main, {"augmented": True}),
                (gan.g_regularise, {}),
                (gan.d_main, {"augmented": True}),
                (gan.d_regularise, {"augmented": True}),
            )
        )
    return plan.size_of(state), shapes[4], (shapes[8] - shapes[4]) // 4


def config_f(resolution: int) -> StyleGAN2:
    """The published size of a network, as shapes."""
    return shape_of(StyleGAN2, GeneratorConfig(resolution, channel_table(resolution, 32768, 512)))


def text_model(vision: clip.ViTConfig | ResNetConfig, d: int) -> clip.CLIPNetwork:
    """A published CLIP, as shapes."""
    blocks = clip.TransformerConfig(d, 12, d // 64, 4 * d)
    config = clip.CLIPConfig(d, vision, clip.TextConfig(49408, 77, blocks))
    return shape_of(clip.CLIPNetwork, config)


def shape_of(network: Any, config: Any) -> Any:
    """The network with shapes in place of arrays."""
    return nnx.eval_shape(lambda: network(config))


def _fits(fixed: int, needed: int, size: float) -> bool:
    return fixed + plan.SLACK * needed <= SHARE * size * 1e9


def _largest(fixed: int, of_four: int, more: int, size: float) -> str:
    """Images of a step, in fours; from GROUP on it takes them in groups. The state is there before
    and after it.
    """
    sizes = range(4, GROUP + 1, 4)
    fitting = [n for n in sizes if _fits(2 * fixed, of_four + (n - 4) * more, size)]
    return "any" if GROUP in fitting else str(fitting[-1]) if fitting else "-"


if __name__ == "__main__":
    main()
