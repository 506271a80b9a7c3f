"""BigGAN-deep in the layout of `pytorch_pretrained_biggan` to our arrays.

Spectral norm is divided out: W / sigma with sigma = u W v (Miyato et al. 2018, arXiv 1802.05957,
    section 2.1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sis_jax.checkpoints.build import build, faults, refuse, shapes_of
from sis_jax.checkpoints.layouts.stylegan2 import Converted, float32
from sis_jax.checkpoints.layouts.tables import Rule, translate
from sis_jax.data.files import parse_json
from sis_jax.models.biggan import BigGAN, BigGANConfig
from sis_jax.models.conditional import check_classes
from sis_jax.types import Info, SisError

Arrays = Mapping[str, np.ndarray]
CHECKPOINT, SETTINGS = "pytorch_model.bin", "config.json"
_MAX_BLOCKS, _MAX_DOUBLINGS, _MAX_SIZE = 64, 10, 1 << 20
_MAX_SETTINGS = 1 << 20  # bytes


def config_of(given: Mapping[str, Any]) -> BigGANConfig:
    """The config from the fields in our `config.json`; SisError where they are damaged."""
    try:
        lists: dict[str, Any] = {
            name: tuple(given[name]) for name in ("channels", "bottlenecks", "ups")
        }
        classes, attention, eps = tuple(given.get("classes", ())), given["attention"], given["eps"]
        sizes = {name: given[name] for name in ("z_dim", "embed_dim", "num_classes", "n_stats")}
        whole = [*sizes.values(), *lists["channels"], *lists["bottlenecks"]]
        blocks = len(lists["ups"])
        if not all(type(v) is int and 0 < v <= _MAX_SIZE for v in whole) or not all(
            type(up) is bool for up in lists["ups"]
        ):
            raise TypeError("a size is not an integer, or an up is neither true nor false")
        if (
            not 0 < blocks == len(lists["bottlenecks"]) == len(lists["channels"]) - 1 <= _MAX_BLOCKS
            or sum(lists["ups"]) > _MAX_DOUBLINGS
        ):
            raise TypeError("channels, bottlenecks and ups do not go together")
        if (
            not (attention is None or (type(attention) is int and 0 <= attention < blocks))
            or type(eps) is not float
            or not 0 < eps < 1
        ):
            raise TypeError("attention or eps is out of range")
        if given.keys() - {f.name for f in fields(BigGANConfig)}:
            raise TypeError("it has other fields")
        return BigGANConfig(
            **sizes,
            **lists,
            attention=attention,
            eps=eps,
            classes=check_classes(classes or None, sizes["num_classes"]),
        )
    except (TypeError, ValueError, KeyError) as error:
        raise SisError(
            f'the "generator" in config.json describes no BigGAN ({error}): convert the '
            "checkpoint again"
        ) from None


def build_generator(config: BigGANConfig, arrays: Arrays, what: str, info: Info) -> BigGAN:
    """A generator with these numbers; SisError that lists every array which does not fit."""
    return build(lambda: BigGAN(config), arrays, what, info)


def published_settings(checkpoint: Path) -> dict[str, Any] | None:
    """The `config.json` published beside a checkpoint (or with its prefix), or None."""
    named = checkpoint.name.replace(CHECKPOINT, SETTINGS)
    for path in dict.fromkeys((checkpoint.with_name(named), checkpoint.with_name(SETTINGS))):
        if path == checkpoint or not path.is_file():
            continue
        try:
            with open(path, encoding="utf-8") as f:
                settings = parse_json(f.read(_MAX_SETTINGS))
        except (OSError, ValueError) as error:
            raise SisError(
                f"{path}, beside the BigGAN checkpoint, cannot be read ({str(error)[:80]}): "
                "download it again"
            ) from None
        if isinstance(settings, dict) and "layers" in settings:
            return settings
    return None


def checkpoint_in(path: Path) -> Path:
    """The checkpoint of a folder in the published layout; any other path as it is."""
    if (
        path.is_dir()
        and (path / CHECKPOINT).is_file()
        and published_settings(path / CHECKPOINT) is not None
    ):
        return path / CHECKPOINT
    return path


def convert_generator(source: Arrays, settings: Mapping[str, Any] | None, what: str) -> Converted:
    """A state dict under our names. settings: the published config.json, if there."""
    plain, wrong = _without_spectral_norm(source)
    attention = next(
        (
            int(m[1])
            for key in plain
            if (m := re.fullmatch(r"generator\.layers\.(\d\d?)\.gamma", key))
        ),
        None,
    )
    arrays, more = translate(plain, _rules(attention))
    wrong += more
    config = _read(arrays, attention, settings, what, wrong)
    arrays = float32(arrays)
    refuse(what, wrong + faults(arrays, shapes_of(lambda: BigGAN(config))))
    notes = (
        ()
        if settings
        else (
            "config.json was not beside the checkpoint; the size was taken to double at every "
            "other block, eps to be 1e-4",
        )
    )
    return Converted(arrays, asdict(config), notes)


@np.errstate(all="ignore")  # overflow is reported as a fault
def _without_spectral_norm(source: Arrays) -> tuple[dict[str, np.ndarray], list[str]]:
    """The state dict with `x.weight` for `x.weight_orig`, `_u` and `_v`; and their faults."""
    plain: dict[str, np.ndarray] = {}
    wrong = []
    for key, value in source.items():
        stem = key.removesuffix("_orig")
        if stem == key:
            if not (key.endswith(("_u", "_v")) and key[:-2] + "_orig" in source):
                plain[key] = value
            continue
        matrix = (
            np.asarray(value, np.float64).reshape(len(value), -1)
            if value.ndim > 1 and value.size
            else np.zeros((0, 0))
        )
        u, v = source.get(stem + "_u"), source.get(stem + "_v")
        if (
            u is None
            or u.shape != matrix.shape[:1]
            or (v is not None and v.shape != matrix.shape[1:])
        ):
            wrong.append(
                f"spectral norm: {stem}_u or {stem}_v is missing or does not fit {key}, file has "
                f"{list(value.shape)}"
            )
            continue
        if v is None:  # before 1.0, torch kept u only
            v = matrix.T @ u
            v = v / max(float(np.linalg.norm(v)), 1e-12)
        sigma = float(u.astype(np.float64) @ matrix @ v)
        if not np.isfinite(sigma) or sigma == 0:
            wrong.append(f"spectral norm: that of {key} is {sigma}")
            continue
        plain[stem] = value / np.float32(sigma)
    return plain, wrong


def _rules(attention: int | None) -> tuple[Rule, ...]:
    """The layout; it counts the attention layer among the blocks, ours are counted alone."""
    block = r"generator\.layers\.(\d\d?)\."

    def ours(rest: str) -> Any:
        def name(match: re.Match, _: int) -> str:
            at = int(match[1])
            return f"block{at - (attention is not None and at > attention)}.{match.expand(rest)}"

        return name

    return (
        (r"embeddings\.weight", "embedding", "transpose"),
        (r"generator\.gen_z\.weight", "weight", "transpose"),
        (r"generator\.gen_z\.bias", "bias", "same"),
        (block + r"bn_([0-3])\.(scale|offset)\.weight", ours(r"bn\2.\3"), "transpose"),
        (block + r"bn_([0-3])\.running_means", ours(r"bn\2.means"), "same"),
        (block + r"bn_([0-3])\.running_vars", ours(r"bn\2.variances"), "same"),
        (block + r"conv_([0-3])\.weight", ours(r"conv\2.weight"), "oihw"),
        (block + r"conv_([0-3])\.bias", ours(r"conv\2.bias"), "same"),
        (block + r"snconv1x1_(theta|phi|g)\.weight", r"attention.\2.weight", "oihw"),
        (block + r"snconv1x1_o_conv\.weight", "attention.out.weight", "oihw"),
        (block + "gamma", "attention.gamma", "scalar"),
        (r"generator\.bn\.weight", "bn.scale", "same"),
        (r"generator\.bn\.bias", "bn.offset", "same"),
        (r"generator\.bn\.running_means", "bn.means", "same"),
        (r"generator\.bn\.running_vars", "bn.variances", "same"),
        (
            r"generator\.conv_to_rgb\.weight",
            "torgb.weight",
            "oihw_rgb",
        ),  # as many outputs as channels, of which three are looked at
        (r"generator\.conv_to_rgb\.bias", "torgb.bias", "rgb"),
    )


def _read(
    arrays: Arrays,
    attention: int | None,
    settings: Mapping[str, Any] | None,
    what: str,
    wrong: list[str],
) -> BigGANConfig:
    """The architecture, from the shapes of the arrays and the settings."""
    numbers = sorted(
        {int(m[1]) for key in arrays if (m := re.fullmatch(r"block(\d\d?)\.conv3\.weight", key))}
    )
    try:
        if numbers != list(range(len(numbers))) or not numbers:
            raise KeyError("generator.layers.0")
        first = [_shape(arrays, f"block{i}.conv0.weight", 4)[2:] for i in numbers]
        last = _shape(arrays, f"block{numbers[-1]}.conv3.weight", 4)[3]
        num_classes, embed_dim = _shape(arrays, "embedding", 2)
        z_dim = _shape(arrays, "weight", 2)[0] - embed_dim
        n_stats = _shape(arrays, "bn.means", 2)[0]
    except KeyError as error:
        more = f"; also: {'; '.join(wrong[:6])}" if wrong else ""
        raise SisError(
            f"{what} holds no BigGAN that can be read: {error.args[0]} is missing or "
            f"misshapen{more}"
        ) from None
    if z_dim < 1 or not num_classes or not n_stats:
        raise SisError(
            f"{what} holds no BigGAN that can be read: no room for a latent, a class or "
            "statistics in its shapes"
        )
    channels = (*(n_in for n_in, _ in first), last)
    ups, eps = (
        _doublings(settings, channels, what)
        if settings is not None
        else (tuple(i % 2 == 1 for i in numbers), BigGANConfig.eps)
    )
    if sum(ups) > _MAX_DOUBLINGS:
        raise SisError(f"{what} doubles the size {sum(ups)} times, more than any BigGAN")
    return BigGANConfig(
        z_dim,
        embed_dim,
        num_classes,
        channels,
        tuple(middle for _, middle in first),
        ups,
        attention,
        n_stats,
        eps,
    )


def _shape(arrays: Arrays, key: str, rank: int) -> tuple[int, ...]:
    if arrays[key].ndim != rank:
        raise KeyError(key)
    return arrays[key].shape


def _doublings(
    settings: Mapping[str, Any], channels: tuple[int, ...], what: str
) -> tuple[tuple[bool, ...], float]:
    """Which blocks double the size, and epsilon, from the settings, which must fit the arrays."""
    layers = settings.get("layers")
    eps = settings.get("eps", BigGANConfig.eps)
    width = settings.get("channel_width")
    rows = (
        [
            row
            for row in layers
            if isinstance(row, list) and len(row) == 3 and all(type(v) in (int, bool) for v in row)
        ]
        if isinstance(layers, list)
        else []
    )
    fits = (
        type(layers) is list
        and len(rows) == len(layers) == len(channels) - 1
        and type(eps) is float
        and 0 < eps < 1
    )
    if fits and type(width) is int:
        fits = [(width * a, width * b) for _, a, b in rows] == list(pairwise(channels))
    ups = tuple(bool(row[0]) for row in rows)
    if fits and type(settings.get("output_dim")) is int:
        fits = settings["output_dim"] == 4 * 2 ** sum(ups)
    if not fits:
        raise SisError(
            f"the {SETTINGS} beside {what} belongs to another BigGAN: its layers do not fit the "
            "arrays; put the two files of one model together"
        )
    return ups, eps
