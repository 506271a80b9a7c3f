"""ResNet 18, 34 and 50 in torchvision's layout, which timm shares, without the classifier."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from sis_jax.checkpoints.build import checked
from sis_jax.checkpoints.layouts.tables import Arrays, Rule, translate
from sis_jax.models.backbones import RESNETS, build
from sis_jax.types import SisError

_NORM = {"weight": "scale", "bias": "shift", "running_mean": "mean", "running_var": "var"}
_BLOCK = r"layer([1-4])\.(\d\d?)\."
_PARTS = (("(weight|bias|running_mean)", "same"), ("(running_var)", "variance"))


def convert(source: Mapping[str, np.ndarray], what: str) -> tuple[str, Arrays]:
    """The name in `backbones.NETWORKS` and float32 arrays; SisError lists all misfits."""
    depth = _depth(source, what)
    arrays, wrong = translate(source, _rules(RESNETS[depth][0]))
    arch = f"resnet{depth}"
    return arch, checked(arrays, wrong, lambda: build(arch), what)


def _depth(source: Mapping[str, np.ndarray], what: str) -> int:
    """By the blocks of each stage and whether they are bottlenecks."""
    found = {(m[1], m[2]) for key in source if (m := re.match(_BLOCK, key))}
    blocks = tuple(sum(stage == str(n) for stage, _ in found) for n in range(1, 5))
    bottleneck = "layer1.0.conv3.weight" in source
    for depth, shape in RESNETS.items():
        if shape == (blocks, bottleneck):
            return depth
    raise SisError(
        f"{what} holds a ResNet of {'-'.join(map(str, blocks))} "
        f"{'bottleneck' if bottleneck else 'basic'} blocks: expected ResNet-18, 34 or 50"
    )


def _rules(blocks: tuple[int, ...]) -> tuple[Rule, ...]:
    starts = np.cumsum([0, *blocks])

    def block(match: re.Match) -> str:
        return f"blocks.{starts[int(match[1]) - 1] + int(match[2])}"

    def conv(match: re.Match, _: int) -> str:
        return f"{block(match)}.convs.{int(match[3]) - 1}.weight"

    def skip(match: re.Match, _: int) -> str:
        return f"{block(match)}.skip.weight"

    def stem_norm(match: re.Match, _: int) -> str:
        return f"norm.{_NORM[match[1]]}"

    def norm(match: re.Match, _: int) -> str:
        return f"{block(match)}.norms.{int(match[3]) - 1}.{_NORM[match[4]]}"

    def skip_norm(match: re.Match, _: int) -> str:
        return f"{block(match)}.skip_norm.{_NORM[match[3]]}"

    rules: list[Rule] = [
        (r"conv1\.weight", "stem.weight", "oihw"),
        (_BLOCK + r"conv([123])\.weight", conv, "oihw"),
        (_BLOCK + r"downsample\.0\.weight", skip, "oihw"),
        (r"fc\.(?:weight|bias)|.*\.num_batches_tracked", "", "drop"),
    ]
    for parts, transform in _PARTS:
        rules += [
            (r"bn1\." + parts, stem_norm, transform),
            (_BLOCK + r"bn([123])\." + parts, norm, transform),
            (_BLOCK + r"downsample\.1\." + parts, skip_norm, transform),
        ]
    return tuple(rules)
