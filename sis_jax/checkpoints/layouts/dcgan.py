"""A DCGAN's state dict to our arrays: `main.0, 3, ...` convolutions, `main.1, 4, ...` norms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from sis_jax.checkpoints.build import build, faults, refuse, shapes_of
from sis_jax.checkpoints.layouts.stylegan2 import Converted, float32
from sis_jax.models.dcgan import DCGAN, DCGANConfig
from sis_jax.types import Info, SisError

_EPSILON = 1e-5  # torch's BatchNorm2d
_RULE = re.compile(r"main\.(\d\d?)\.(weight|bias|running_mean|running_var|num_batches_tracked)")
_MAX_STAGES = 9
_NORM = ("weight", "bias", "running_mean", "running_var")


def config_of(fields: Mapping[str, Any]) -> DCGANConfig:
    """The config from the fields in a `config.json`; SisError where they are no such thing."""
    z_dim, channels = fields.get("z_dim"), fields.get("channels")
    sizes = [z_dim, *channels] if isinstance(channels, (list, tuple)) else []
    if (
        not 2 <= len(sizes) <= 10
        or not all(type(v) is int and 0 < v <= 65536 for v in sizes)
        or len(fields) != 2
    ):
        raise SisError(
            'the "generator" in config.json describes no DCGAN: convert the checkpoint again'
        )
    return DCGANConfig(sizes[0], tuple(sizes[1:]))


def build_generator(
    config: DCGANConfig, arrays: Mapping[str, np.ndarray], what: str, info: Info
) -> DCGAN:
    """A generator with these numbers; SisError that lists every array which does not fit."""
    return build(lambda: DCGAN(config), arrays, what, info)


@np.errstate(all="ignore")  # overflow is reported as a fault
def convert_generator(source: Mapping[str, np.ndarray], what: str) -> Converted:
    """A state dict (in, out, kh, kw) under our names, batch norm folded into scale and offset."""
    wrong = [
        f"unknown: {key[:80]}, file has {list(value.shape)}"
        for key, value in source.items()
        if not _RULE.fullmatch(key)
    ]
    convolutions = sorted(
        int(m[1])
        for key, v in source.items()
        if (m := re.fullmatch(r"main\.(\d\d?)\.weight", key)) and v.ndim == 4
    )
    if convolutions != list(range(0, 3 * len(convolutions), 3)) or len(convolutions) < 2:
        raise SisError(
            f"{what} holds no DCGAN known here: its convolutions are main.{convolutions}, "
            "expected main.0, main.3, main.6, ..."
        )
    arrays: dict[str, np.ndarray] = {}
    used = set()
    for stage, at in enumerate(convolutions):
        arrays[f"stage{stage}.weight"] = source[f"main.{at}.weight"].transpose(2, 3, 0, 1)
        n_out = source[f"main.{at}.weight"].shape[1]
        last = at == convolutions[-1]
        scale, offset, more = (
            (np.ones(n_out), np.zeros(n_out), wrong[:0]) if last else _fold(source, at + 1, n_out)
        )
        wrong += more
        bias = source.get(f"main.{at}.bias")
        if bias is not None and bias.shape != (n_out,):
            wrong.append(f"shape: main.{at}.bias, file has {list(bias.shape)}, model has [{n_out}]")
            bias = None
        arrays[f"stage{stage}.scale"] = scale
        arrays[f"stage{stage}.offset"] = offset if bias is None else offset + bias * scale
        used |= {f"main.{at}.{part}" for part in ("weight", "bias")} | {
            f"main.{at + 1}.{part}" for part in (*_NORM, "num_batches_tracked") if not last
        }
    wrong += [
        f"surplus: {key[:80]}, file has {list(source[key].shape)}"
        for key in source
        if _RULE.fullmatch(key) and key not in used
    ]
    channels = tuple(source[f"main.{at}.weight"].shape[1] for at in convolutions[:-1])
    config = DCGANConfig(source["main.0.weight"].shape[0], channels)
    if not 1 <= len(channels) <= _MAX_STAGES or min(config.z_dim, *channels) < 1:
        raise SisError(
            f"{what} holds no DCGAN known here: a latent of {config.z_dim} and stages of "
            f"{list(channels[:12])} channels"
        )
    notes = _as_rgb(arrays, f"stage{len(channels)}")
    arrays = float32(arrays)
    refuse(what, wrong + faults(arrays, shapes_of(lambda: DCGAN(config))))
    return Converted(arrays, asdict(config), notes)


def _as_rgb(arrays: dict[str, np.ndarray], last: str) -> tuple[str, ...]:
    """Three colours from the last layer of a generator that draws grey or RGBA."""
    count = arrays[f"{last}.weight"].shape[-1]
    if count not in (1, 4):
        return ()
    for key in (f"{last}.{part}" for part in ("weight", "scale", "offset")):
        arrays[key] = np.repeat(arrays[key][..., :3], 3 // min(count, 3), axis=-1)
    if count == 1:
        return ("it draws grey images; the one channel was repeated three times",)
    return ("its alpha channel was left out",)


def _fold(
    source: Mapping[str, np.ndarray], at: int, n: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Scale and offset of the batch norm main.{at}, and its faults."""
    parts = {part: source.get(f"main.{at}.{part}") for part in _NORM}
    wrong = [
        f"missing: main.{at}.{part}, model has [{n}]"
        for part, value in parts.items()
        if value is None
    ]
    wrong += [
        f"shape: main.{at}.{p}, file has {list(v.shape)}, model has [{n}]"
        for p, v in parts.items()
        if v is not None and v.shape != (n,)
    ]
    if wrong:
        return np.ones(n), np.zeros(n), wrong
    weight, bias, mean, variance = (np.asarray(parts[part], np.float64) for part in _NORM)
    if not (variance >= 0).all():
        return np.ones(n), np.zeros(n), [f"numbers: main.{at}.running_var is not a variance"]
    scale = weight / np.sqrt(variance + _EPSILON)
    return scale, bias - mean * scale, []
