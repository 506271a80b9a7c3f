"""DINOv2 in Hugging Face's layout. Layer scale is folded: s (x W + b) = x (W s) + b s."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

from sis_jax.checkpoints.build import checked
from sis_jax.checkpoints.layouts.tables import Arrays, Rule, translate
from sis_jax.models.dinov2 import DINOv2, DINOv2Config
from sis_jax.types import SisError

_MOST, _LAYERS = 1 << 14, 99  # a folder may ask for any shape; nothing known is larger


def _in_block(rest: str) -> Callable[[re.Match, int], str]:
    return lambda match, _: f"transformer.block{match[1]}.{match.expand(rest)}"


def _qkv(match: re.Match, _: int) -> str:
    return f"transformer.block{match[1]}.{match[2][0]}.{match[3]}"


_LAYER = r"encoder\.layer\.(\d\d?)\."
_QKV = _LAYER + r"attention\.attention\.(query|key|value)\."
_RULES: tuple[Rule, ...] = (
    (r"embeddings\.cls_token", "class_token", "flat"),
    (r"embeddings\.register_tokens", "registers", "first"),
    (r"embeddings\.position_embeddings", "positions", "first"),
    (r"embeddings\.patch_embeddings\.projection\.weight", "patch", "oihw"),
    (r"embeddings\.patch_embeddings\.projection\.bias", "patch_bias", "same"),
    (r"embeddings\.mask_token", "", "drop"),
    (r"layernorm\.(weight|bias)", r"norm.\1", "same"),
    (_LAYER + r"norm([12])\.(weight|bias)", _in_block(r"ln_\2.\3"), "same"),
    (_QKV + "(weight)", _qkv, "transpose"),
    (_QKV + "(bias)", _qkv, "same"),
    (_LAYER + r"attention\.output\.dense\.weight", _in_block("out.weight"), "transpose"),
    (_LAYER + r"attention\.output\.dense\.bias", _in_block("out.bias"), "same"),
    (_LAYER + r"mlp\.fc1\.weight", _in_block("fc.weight"), "transpose"),
    (_LAYER + r"mlp\.fc1\.bias", _in_block("fc.bias"), "same"),
    (_LAYER + r"mlp\.fc2\.weight", _in_block("proj.weight"), "transpose"),
    (_LAYER + r"mlp\.fc2\.bias", _in_block("proj.bias"), "same"),
    (_LAYER + r"layer_scale1\.lambda1", _in_block("out.scale"), "same"),
    (_LAYER + r"layer_scale2\.lambda1", _in_block("proj.scale"), "same"),
)


def convert(source: Mapping[str, np.ndarray], what: str) -> tuple[DINOv2Config, Arrays]:
    """The network's shape and float32 arrays under our names; SisError lists all misfits."""
    arrays, wrong = translate(source, _RULES)
    config = _config(arrays, what)
    wrong += _fold(arrays, config)
    return config, checked(arrays, wrong, lambda: DINOv2(config), what)


def config_of(table: Mapping[str, object]) -> DINOv2Config:
    """The config that a weights folder stores; SisError where it is damaged."""
    try:
        config = DINOv2Config(**table)  # type: ignore[arg-type]
        numbers = list(vars(config).values())
        if not all(type(n) is int and 0 <= n < _MOST for n in numbers) or 0 in numbers[:-1]:
            raise ValueError
        if config.layers > _LAYERS or config.width % 64:
            raise ValueError
    except (TypeError, ValueError):
        raise SisError(
            f"{dict(table)} is no shape of a DINOv2: convert the checkpoint again"
        ) from None
    return config


def _config(arrays: Arrays, what: str) -> DINOv2Config:
    layers = [m[1] for key in arrays if (m := re.match(r"transformer\.block(\d+)\.", key))]
    shapes = {"patch": 4, "positions": 2, "transformer.block0.fc.bias": 1}
    for key, axes in shapes.items():
        if key not in arrays or arrays[key].ndim != axes or not arrays[key].size:
            raise SisError(
                f"{what} does not fit the network: {key}, which defines its shape, is "
                "missing or has other axes than DINOv2's"
            )
    patch, _, _, width = arrays["patch"].shape
    registers = arrays["registers"].shape[0] if "registers" in arrays else 0
    grid = max(1, round((len(arrays["positions"]) - 1) ** 0.5))
    if width % 64 or 1 + grid**2 != len(arrays["positions"]):
        raise SisError(
            f"{what} is not built as DINOv2: {width} channels and {len(arrays['positions'])} "
            "positions, expected a multiple of 64 and a square grid besides the class token"
        )
    hidden = arrays["transformer.block0.fc.bias"].shape[0]
    return DINOv2Config(width, max(map(int, layers)) + 1, hidden, patch, grid, registers)


def _fold(arrays: Arrays, config: DINOv2Config) -> list[str]:
    """Multiply each layer scale into its linear layer; returns the missing and misshapen ones."""
    wrong = []
    for layer in range(config.layers):
        for part in ("out", "proj"):
            name = f"transformer.block{layer}.{part}"
            scale = arrays.pop(f"{name}.scale", None)
            if scale is None or scale.shape != (config.width,):
                wrong.append(f"layer scale: {name} has none of {config.width} channels")
                continue
            for array in ("weight", "bias"):
                value = arrays.get(f"{name}.{array}")
                if value is not None and value.shape[-1:] == scale.shape:
                    arrays[f"{name}.{array}"] = value * scale
    return wrong
