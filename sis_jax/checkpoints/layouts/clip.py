"""CLIP in other people's layouts, and the shape of the network read from the arrays.

Layouts: "openai-clip" (OpenAI's state dicts and archives), "open_clip" (the same names beside a
    config), "transformers-clip" (Hugging Face). Rules are as in `layouts/tables.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sis_jax.checkpoints.build import build, checked, refuse
from sis_jax.checkpoints.layouts.tables import Arrays, Rule, translate
from sis_jax.models.clip import (
    ACTIVATIONS,
    CLIPConfig,
    CLIPNetwork,
    TextConfig,
    TransformerConfig,
    ViTConfig,
)
from sis_jax.models.clip_resnet import ResNetConfig
from sis_jax.types import Info, SisError

_EPSILON = 1e-5  # torch's BatchNorm2d
_HEAD = 64  # width of a head unless stated otherwise: all of OpenAI's models
_NORM = ("weight", "bias", "mean", "var")


@dataclass(frozen=True)
class Facts:
    """Settings that the arrays do not show. heads: None is width / 64. end: id of the end token,
    None for a text's largest id.
    """

    vision_heads: int | None = None
    text_heads: int | None = None
    vision_activation: str = "quick_gelu"
    text_activation: str = "quick_gelu"
    vision_epsilon: float = 1e-5
    text_epsilon: float = 1e-5
    end: int | None = None


def _block(rest: str) -> Callable[[re.Match, int], str]:
    """A name inside block `match[2]` of the tower `match[1]`."""
    return lambda match, _: (
        f"{'visual' if match[1] else 'text'}.transformer.block{match[2]}.{match.expand(rest)}"
    )


_TOWER = r"(visual\.)?(?:text\.)?transformer\.resblocks\.(\d\d?)\."
_OPENAI_TEXT: tuple[Rule, ...] = (
    (r"(?:text\.)?token_embedding\.weight", "text.token_embedding", "same"),
    (r"(?:text\.)?positional_embedding", "text.positions", "same"),
    (r"(?:text\.)?ln_final\.(weight|bias)", r"text.ln_final.\1", "same"),
    (r"(?:text\.)?text_projection", "text.projection", "same"),
    (r"logit_scale", "logit_scale", "scalar"),
    (_TOWER + r"attn\.in_proj_weight\.([qkv])", _block(r"\3.weight"), "transpose"),
    (_TOWER + r"attn\.in_proj_bias\.([qkv])", _block(r"\3.bias"), "same"),
    (_TOWER + r"attn\.out_proj\.weight", _block("out.weight"), "transpose"),
    (_TOWER + r"attn\.out_proj\.bias", _block("out.bias"), "same"),
    (_TOWER + r"mlp\.c_(fc|proj)\.weight", _block(r"\3.weight"), "transpose"),
    (_TOWER + r"mlp\.c_(fc|proj)\.bias", _block(r"\3.bias"), "same"),
    (_TOWER + r"ln_([12])\.(weight|bias)", _block(r"ln_\3.\4"), "same"),
    (r"input_resolution|context_length|vocab_size|(?:text\.)?attn_mask", "", "drop"),
)
_OPENAI_VIT: tuple[Rule, ...] = (
    (r"visual\.conv1\.weight", "visual.patch", "oihw"),
    (r"visual\.class_embedding", "visual.class_embedding", "same"),
    (r"visual\.positional_embedding", "visual.positions", "same"),
    (r"visual\.ln_(pre|post)\.(weight|bias)", r"visual.ln_\1.\2", "same"),
    (r"visual\.proj", "visual.projection", "same"),
)


def _norm(match: re.Match, _: int) -> str:
    """A batch norm's array, kept beside the convolution that it will be folded into."""
    where, n, part = match.groups()
    layer = f"{where[:-1].replace('.', '_', 1)}." if where else ""
    return f"visual.{layer}{'conv' + n if n else 'downsample'}.norm.{part.removeprefix('running_')}"


def _conv(match: re.Match, _: int) -> str:
    where, n = match.groups()
    layer = f"{where[:-1].replace('.', '_', 1)}." if where else ""
    return f"visual.{layer}{'conv' + n if n else 'downsample'}.weight"


_PLACE = r"visual\.((?:layer[1-4]\.\d\d?\.)?)"
_PARTS = r"(weight|bias|running_mean|running_var)"
_OPENAI_RESNET: tuple[Rule, ...] = (
    (_PLACE + r"conv([123])\.weight", _conv, "oihw"),
    (r"visual\.(layer[1-4]\.\d\d?\.)downsample\.()0\.weight", _conv, "oihw"),
    (_PLACE + r"bn([123])\." + _PARTS, _norm, "same"),
    (r"visual\.(layer[1-4]\.\d\d?\.)downsample\.()1\." + _PARTS, _norm, "same"),
    (r"visual\..*\.num_batches_tracked", "", "drop"),
    (r"visual\.attnpool\.positional_embedding", "visual.attnpool.positions", "same"),
    (r"visual\.attnpool\.([qkv])_proj\.weight", r"visual.attnpool.\1.weight", "transpose"),
    (r"visual\.attnpool\.([qkv])_proj\.bias", r"visual.attnpool.\1.bias", "same"),
    (r"visual\.attnpool\.c_proj\.weight", "visual.attnpool.out.weight", "transpose"),
    (r"visual\.attnpool\.c_proj\.bias", "visual.attnpool.out.bias", "same"),
)

_LAYER = r"(?:(vision)|text)_model\.encoder\.layers\.(\d\d?)\."
_TRANSFORMERS: tuple[Rule, ...] = (
    (r"text_model\.embeddings\.token_embedding\.weight", "text.token_embedding", "same"),
    (r"text_model\.embeddings\.position_embedding\.weight", "text.positions", "same"),
    (r"text_model\.final_layer_norm\.(weight|bias)", r"text.ln_final.\1", "same"),
    (r"text_projection\.weight", "text.projection", "transpose"),
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding", "flat"),
    (r"vision_model\.embeddings\.patch_embedding\.weight", "visual.patch", "oihw"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positions", "same"),
    (
        r"vision_model\.pre_layrnorm\.(weight|bias)",
        r"visual.ln_pre.\1",
        "same",
    ),  # the published names are spelled like this
    (r"vision_model\.post_layernorm\.(weight|bias)", r"visual.ln_post.\1", "same"),
    (r"visual_projection\.weight", "visual.projection", "transpose"),
    (r"logit_scale", "logit_scale", "scalar"),
    (_LAYER + r"self_attn\.([qkv]|out)_proj\.weight", _block(r"\3.weight"), "transpose"),
    (_LAYER + r"self_attn\.([qkv]|out)_proj\.bias", _block(r"\3.bias"), "same"),
    (_LAYER + r"mlp\.fc1\.weight", _block("fc.weight"), "transpose"),
    (_LAYER + r"mlp\.fc1\.bias", _block("fc.bias"), "same"),
    (_LAYER + r"mlp\.fc2\.weight", _block("proj.weight"), "transpose"),
    (_LAYER + r"mlp\.fc2\.bias", _block("proj.bias"), "same"),
    (_LAYER + r"layer_norm([12])\.(weight|bias)", _block(r"ln_\3.\4"), "same"),
    (r"(?:text|vision)_model\.embeddings\.position_ids", "", "drop"),
)


def _rules(layout: str, source: Mapping[str, np.ndarray]) -> tuple[Rule, ...]:
    if layout == "transformers-clip":
        return _TRANSFORMERS
    resnet = any(key.startswith(("visual.attnpool.", "visual.layer1.")) for key in source)
    return _OPENAI_TEXT + (_OPENAI_RESNET if resnet else _OPENAI_VIT)


def convert(
    source: Mapping[str, np.ndarray], layout: str, facts: Facts, what: str
) -> tuple[CLIPConfig, Arrays]:
    """A state dict as float32 under our names, and the network's shape; SisError lists misfits."""
    arrays, wrong = translate(_split(source), _rules(layout, source))
    wrong += _fold(arrays)
    config = _config(arrays, facts, what, wrong)
    return config, checked(arrays, wrong, lambda: CLIPNetwork(config), what)


def build_network(
    config: CLIPConfig, arrays: dict[str, np.ndarray], what: str, info: Info
) -> CLIPNetwork:
    """A network with these numbers, taken out of `arrays`; SisError lists all misfits."""
    return build(lambda: CLIPNetwork(config), arrays, what, info, emptied=True)


def _split(source: Mapping[str, np.ndarray]) -> Arrays:
    """`in_proj` stacks query, key and value: three arrays, so that rules are one to one."""
    split: Arrays = {}
    for key, value in source.items():
        if (
            key.endswith(("attn.in_proj_weight", "attn.in_proj_bias"))
            and value.ndim
            and value.shape[0] % 3 == 0
        ):
            split |= {f"{key}.{part}": third for part, third in zip("qkv", np.split(value, 3))}
        else:
            split[key] = value
    return split


def _fold(arrays: Arrays) -> list[str]:
    """Fold batch norms into convolutions: w' = w g / sqrt(var + 1e-5), b' = b - mean g / ..."""
    wrong = []
    for name in sorted({key.split(".norm.")[0] for key in arrays if ".norm." in key}):
        parts = {part: arrays.pop(f"{name}.norm.{part}", None) for part in _NORM}
        kernel = arrays.get(f"{name}.weight")
        if kernel is None:
            continue  # reported as missing later, with all other faults
        shape = kernel.shape[-1:]
        bad = [
            f"missing: batch norm of {name}, {part}"
            for part, value in parts.items()
            if value is None
        ]
        bad += [
            f"shape: batch norm of {name}, {p} has {list(v.shape)}, not {list(shape)}"
            for p, v in parts.items()
            if v is not None and v.shape != shape
        ]
        gain, bias, mean, var = (
            np.ones(shape) if bad or v is None else np.asarray(v, np.float64)
            for v in parts.values()
        )
        if not (var >= 0).all():
            bad, var = [f"numbers: batch norm of {name} holds no variance"], np.ones(shape)
        scale = gain / np.sqrt(var + _EPSILON)
        arrays[f"{name}.weight"], arrays[f"{name}.bias"] = kernel * scale, bias - mean * scale
        wrong += bad
    return wrong


# The shape of the network, from our names


def _config(arrays: Arrays, facts: Facts, what: str, wrong: list[str]) -> CLIPConfig:
    """The config that the arrays imply; raises with all faults so far where they leave it open."""
    vit = "visual.patch" in arrays
    needed = {**_TELLING, **(_TELLING_VIT if vit else _TELLING_RESNET)}
    found: dict[str, tuple[int, ...]] = {
        key: arrays[key].shape if key in arrays else () for key in needed
    }
    silent = [f"missing: {key}" for key in needed if key not in arrays]
    silent += [
        f"shape: {key}, file has {list(s)}"
        for key, s in found.items()
        if key in arrays and (len(s) != needed[key] or 0 in s)
    ]
    refuse(what, wrong + silent if silent else [])
    (vocabulary, width) = found["text.token_embedding"]
    hidden = found["text.transformer.block0.fc.bias"][0]
    text = _transformer(
        "text", width, hidden, arrays, facts.text_heads, facts.text_activation, facts.text_epsilon
    )
    vision = _vit(arrays, found, facts) if vit else _resnet(arrays, found)
    words = TextConfig(vocabulary, found["text.positions"][0], text, facts.end)
    config = CLIPConfig(found["text.projection"][1], vision, words)
    unfit = _sizes(config)
    refuse(what, wrong + unfit if unfit else [])
    return config


# Arrays that define the network's shape, and their number of axes.
_TELLING = {
    "text.token_embedding": 2,
    "text.positions": 2,
    "text.projection": 2,
    "text.transformer.block0.fc.bias": 1,
}
_TELLING_VIT = {"visual.patch": 4, "visual.positions": 2, "visual.transformer.block0.fc.bias": 1}
_TELLING_RESNET = {"visual.conv3.weight": 4, "visual.attnpool.positions": 2}


def _vit(arrays: Arrays, found: dict[str, tuple[int, ...]], facts: Facts) -> ViTConfig:
    patch, _, _, width = found["visual.patch"]
    hidden = found["visual.transformer.block0.fc.bias"][0]
    config = _transformer(
        "visual",
        width,
        hidden,
        arrays,
        facts.vision_heads,
        facts.vision_activation,
        facts.vision_epsilon,
    )
    return ViTConfig(_grid(found["visual.positions"][0]) * patch, patch, config)


def _resnet(arrays: Arrays, found: dict[str, tuple[int, ...]]) -> ResNetConfig:
    a, b, c, d = (_count(arrays, rf"visual\.layer{n}_(\d\d?)\.") for n in (1, 2, 3, 4))
    positions, trunk = found["visual.attnpool.positions"]
    return ResNetConfig(
        32 * _grid(positions), found["visual.conv3.weight"][3], (a, b, c, d), trunk // _HEAD
    )


def _transformer(
    tower: str,
    width: int,
    hidden: int,
    arrays: Arrays,
    heads: int | None,
    activation: str,
    epsilon: float,
) -> TransformerConfig:
    layers = _count(arrays, rf"{tower}\.transformer\.block(\d\d?)\.")
    return TransformerConfig(
        width, layers, width // _HEAD if heads is None else heads, hidden, activation, epsilon
    )


def _count(arrays: Arrays, pattern: str) -> int:
    return max((int(m[1]) + 1 for key in arrays if (m := re.match(pattern, key))), default=0)


def _grid(positions: int) -> int:
    """Edge of the square grid of a table of positions, which has one row more."""
    return max(1, round((positions - 1) ** 0.5))


def _sizes(config: CLIPConfig) -> list[str]:
    """Faults in the numbers that the arrays do not show."""
    text = config.text
    wrong = (
        [f"end: token {text.end}, but there are {text.vocabulary} tokens"]
        if text.end is not None and text.end >= text.vocabulary
        else []
    )
    for tower, part in (("vision", config.vision), ("text", config.text)):
        if isinstance(part, ResNetConfig):
            if part.heads < 1 or part.trunk % part.heads or part.width % 2:
                wrong.append(
                    f"heads: a ResNet tower of {part.trunk} channels is not made of heads of "
                    f"{_HEAD}"
                )
            continue
        t = part.transformer
        if t.heads < 1 or t.width % t.heads:
            wrong.append(
                f"heads: the {tower} tower is {t.width} wide, which {t.heads} heads do not divide"
            )
        if t.activation not in ACTIVATIONS:
            wrong.append(
                f"activation: the {tower} tower uses {t.activation[:40]!r}, known are "
                f"{', '.join(ACTIVATIONS)}"
            )
    return wrong


def config_of(fields: Mapping[str, Any]) -> CLIPConfig:
    """The config from the fields in a `config.json`; SisError where they are no such thing."""
    try:
        vision, text = fields["vision"], fields["text"]
        if "patch_size" in vision:
            tower = ViTConfig(
                _whole(vision["image_size"]),
                _whole(vision["patch_size"]),
                _transformer_of(vision["transformer"]),
            )
        else:
            a, b, c, d = (_whole(n) for n in vision["layers"])
            tower = ResNetConfig(
                _whole(vision["image_size"]),
                _whole(vision["width"]),
                (a, b, c, d),
                _whole(vision["heads"]),
            )
        end = None if text["end"] is None else _whole(text["end"] + 1) - 1
        words = TextConfig(
            _whole(text["vocabulary"]),
            _whole(text["context"]),
            _transformer_of(text["transformer"]),
            end,
        )
        config = CLIPConfig(_whole(fields["embed_dim"]), tower, words)
    except (KeyError, TypeError, ValueError):
        raise SisError(
            'the "clip" in config.json describes no CLIP: convert the checkpoint again'
        ) from None
    refuse('the "clip" in config.json', _sizes(config))
    return config


def _transformer_of(fields: Mapping[str, Any]) -> TransformerConfig:
    activation, epsilon = str(fields["activation"]), float(fields["epsilon"])
    if _whole(fields["layers"]) > 100 or not 0 < epsilon < 1:
        raise ValueError
    return TransformerConfig(
        _whole(fields["width"]),
        fields["layers"],
        _whole(fields["heads"]),
        _whole(fields["hidden"]),
        activation,
        epsilon,
    )


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 24:
        raise ValueError
    return value
