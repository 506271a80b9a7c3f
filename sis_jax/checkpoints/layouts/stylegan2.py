"""StyleGAN2 from arrays under our names: its shape is read, missing settings are supplied."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from sis_jax.checkpoints.build import build, faults, refuse, shapes_of
from sis_jax.checkpoints.layouts.tables import TABLES, translate
from sis_jax.models.conditional import check_classes
from sis_jax.models.discriminator import Discriminator, DiscriminatorConfig
from sis_jax.models.stylegan2 import LR_MULTIPLIER, GeneratorConfig, StyleGAN2, resolutions
from sis_jax.types import Info, SisError

Arrays = dict[str, np.ndarray]
_MAX_SIZE = 4096
_W_SAMPLES = 10_000


@dataclass(frozen=True)
class Facts:
    """Settings that a checkpoint states beside its arrays, by default the published ones.

    architecture: "skip", "resnet" or "" (not stated). mapping_lr: learning rate multiplier.
    """

    conv_clamp: float | None = None
    mbstd_group: int | None = None
    mapping_lr: float = LR_MULTIPLIER
    architecture: str = ""
    activation: str = "lrelu"


@dataclass(frozen=True)
class Network:
    """One network of a foreign checkpoint, as it is stored."""

    arrays: Mapping[str, np.ndarray]
    facts: Facts = field(default_factory=Facts)


@dataclass(frozen=True)
class Converted:
    """One network under our names: float32 arrays (views where possible), config, notes."""

    arrays: Arrays
    config: dict[str, Any]
    notes: tuple[str, ...] = ()


def generator_config(fields: Mapping[str, Any]) -> GeneratorConfig:
    """The config from the fields in a `config.json`; SisError where they are no such thing."""
    return _config(GeneratorConfig, fields, "generator")


def discriminator_config(fields: Mapping[str, Any]) -> DiscriminatorConfig:
    """The config from the fields in a `config.json`; SisError where they are no such thing."""
    return _config(DiscriminatorConfig, fields, "discriminator")


def _config(kind, fields: Mapping[str, Any], what: str):
    try:
        whole = {
            k: v
            for k, v in fields.items()
            if k not in ("channels", "conv_clamp", "label_concat", "classes")
        }
        if not all(type(v) is int and 0 <= v <= 65536 for v in whole.values()):
            raise TypeError("a size is not an integer up to 65536")
        channels = tuple(fields["channels"])
        if not all(type(c) is int and 0 < c <= 65536 for c in channels):
            raise TypeError("a channel count is not an integer up to 65536")
        clamp = fields.get("conv_clamp")
        more: dict[str, Any] = {"conv_clamp": None if clamp is None else float(clamp)}
        if "classes" in fields:
            classes = tuple(fields["classes"])
            if not all(type(c) is int for c in classes):
                raise TypeError("a class is no integer")
            more["classes"] = check_classes(classes or None, fields.get("c_dim", 0))
        if "label_concat" in fields:
            more["label_concat"] = bool(fields["label_concat"])
        config = kind(**whole, channels=channels, **more)
        if (
            config.resolution > _MAX_SIZE
            or config.mapping_layers > 64
            or len(resolutions(config.resolution)) != len(channels)
        ):
            raise TypeError(
                f"{config.resolution} pixels, {len(channels)} channel counts and "
                f"{config.mapping_layers} layers do not go together"
            )
        return config
    except (TypeError, ValueError, KeyError) as error:
        raise SisError(
            f'the "{what}" in config.json describes no StyleGAN2 ({error}): convert the '
            "checkpoint again"
        ) from None


def build_generator(
    config: GeneratorConfig, arrays: Mapping[str, np.ndarray], what: str, info: Info
) -> StyleGAN2:
    """A generator with these numbers; SisError that lists every array which does not fit."""
    return build(lambda: StyleGAN2(config), arrays, what, info)


def build_discriminator(
    config: DiscriminatorConfig, arrays: Mapping[str, np.ndarray], what: str, info: Info
) -> Discriminator:
    """A discriminator with these numbers; SisError that lists every array which does not fit."""
    return build(lambda: Discriminator(config), arrays, what, info)


def convert_generator(network: Network, layout: str, what: str) -> Converted:
    """A foreign generator under our names; `what` names the file in errors."""
    _check_facts(network.facts, "skip", what)
    arrays, wrong = translate(network.arrays, TABLES[layout, "generator"])
    concat = layout == "tf" and "mapping/LabelConcat/weight" in network.arrays
    if concat and arrays["mapping.embed.weight"].ndim == 2:
        _equalise_label_concat(arrays)
    notes = [*_as_rgb(arrays), *_supply_noise(arrays, network.arrays)]
    needs_average = "mapping.w_avg" not in arrays and "mapping.fc0.weight" in arrays
    config = replace(
        _read_generator(arrays, network.facts.conv_clamp, what, wrong), label_concat=concat
    )
    if needs_average:
        arrays["mapping.w_avg"] = np.zeros(config.w_dim, np.float32)
    arrays = float32(arrays, network.facts.mapping_lr)
    refuse(what, wrong + faults(arrays, shapes_of(lambda: StyleGAN2(config))))
    if needs_average:
        arrays["mapping.w_avg"] = _average_w(config, arrays)
        notes.append(f"the average w was missing; it was estimated from {_W_SAMPLES} samples")
    return Converted(arrays, asdict(config), tuple(notes))


@np.errstate(all="ignore")
def _equalise_label_concat(arrays: Arrays) -> None:
    """The first TensorFlow code embeds labels by a bare matrix; ours is scaled, with a bias."""
    weight = arrays["mapping.embed.weight"]
    arrays["mapping.embed.weight"] = weight * np.float32(np.sqrt(len(weight)))
    arrays["mapping.embed.bias"] = np.zeros(weight.shape[-1:], np.float32)


def convert_discriminator(network: Network, layout: str, what: str) -> Converted:
    """A foreign discriminator under our names, as `convert_generator`."""
    _check_facts(network.facts, "resnet", what)
    arrays, wrong = translate(network.arrays, TABLES[layout, "discriminator"])
    notes = _from_rgb(arrays)
    config = _read_discriminator(arrays, network.facts, what, wrong)
    arrays = float32(arrays, network.facts.mapping_lr)
    refuse(what, wrong + faults(arrays, shapes_of(lambda: Discriminator(config))))
    return Converted(arrays, asdict(config), tuple(notes))


def _check_facts(facts: Facts, architecture: str, what: str) -> None:
    if facts.architecture not in ("", architecture):
        raise SisError(
            f'{what} has the architecture "{facts.architecture[:20]}", only "{architecture}" (the '
            "published default) is supported"
        )
    if facts.activation != "lrelu":
        raise SisError(
            f'{what} has the activation "{facts.activation[:20]}", only "lrelu" (the published '
            "default) is supported"
        )


@np.errstate(over="ignore")  # overflow is reported as a fault
def float32(arrays: Arrays, mapping_lr: float = LR_MULTIPLIER) -> Arrays:
    """The same arrays as float32, another learning rate multiplier of the mapping folded in."""
    factor = np.float32(mapping_lr / LR_MULTIPLIER)
    made = {
        key: np.asarray(value, np.float32) if value.dtype.kind == "f" else value
        for key, value in arrays.items()
    }
    if factor != 1:
        made |= {key: value * factor for key, value in made.items() if key.startswith("mapping.fc")}
    return made


def _sizes(arrays: Arrays, pattern: str) -> list[int]:
    return sorted({int(m[1]) for key in arrays if (m := re.fullmatch(pattern, key))})


def _shape(arrays: Arrays, key: str, rank: int) -> tuple[int, ...]:
    """Shape of an array that decides the architecture; KeyError for a missing or misshapen one."""
    value = arrays[key]
    if value.ndim != rank:
        raise KeyError(key)
    return value.shape


def _unreadable(what: str, key: str, wrong: list[str], kind: str) -> SisError:
    more = f"; also: {'; '.join(wrong[:6])}" if wrong else ""
    return SisError(
        f"{what} holds no StyleGAN2 {kind} that can be read: {key} is missing or misshapen{more}"
    )


def _blocks(arrays: Arrays, pattern: str, what: str, kind: str) -> int:
    """The resolution: the highest block there is, and every power of two below it must be there."""
    sizes = _sizes(arrays, pattern)
    top = sizes[-1] if sizes else 4
    if (
        top > _MAX_SIZE
        or top & (top - 1)
        or sizes != list(resolutions(top))[-len(sizes) :]
        or not sizes
    ):
        raise SisError(
            f"{what} holds no StyleGAN2 {kind}: its blocks are {sizes[:12] or 'none'}, expected "
            "4, 8, 16, ..."
        )
    return top


def _read_generator(
    arrays: Arrays, conv_clamp: float | None, what: str, wrong: list[str]
) -> GeneratorConfig:
    top = _blocks(arrays, r"synthesis\.b(\d{1,5})\.conv1\.weight", what, "generator")
    try:
        channels = tuple(
            _shape(arrays, f"synthesis.b{r}.conv1.weight", 4)[3] for r in resolutions(top)
        )
        w_dim = _shape(arrays, "synthesis.b4.conv1.affine.weight", 2)[0]
        layers = len(_sizes(arrays, r"mapping\.fc(\d{1,3})\.weight"))
        n_in, width = _shape(arrays, "mapping.fc0.weight", 2)
        c_dim, embed_dim = (
            _shape(arrays, "mapping.embed.weight", 2)
            if "mapping.embed.weight" in arrays
            else (0, 0)
        )
    except KeyError as error:
        raise _unreadable(what, error.args[0], wrong, "generator") from None
    z_dim = n_in - embed_dim
    if z_dim < 1 or (embed_dim and not c_dim):
        raise SisError(
            f"{what}: the first mapping layer takes {n_in} numbers, too few for a label embedding "
            f"of {embed_dim}"
        )
    return GeneratorConfig(
        top,
        channels,
        z_dim,
        w_dim,
        c_dim,
        layers,
        width if layers > 1 else w_dim,
        conv_clamp,
        embed_dim,
    )


def _read_discriminator(
    arrays: Arrays, facts: Facts, what: str, wrong: list[str]
) -> DiscriminatorConfig:
    top = _blocks(
        {**arrays, "b4.conv1.weight": np.zeros(0)},
        r"b(\d{1,5})\.conv1\.weight",
        what,
        "discriminator",
    )
    try:
        channels = (_shape(arrays, "b4.conv.weight", 4)[3],)
        channels += tuple(_shape(arrays, f"b{r}.conv0.weight", 4)[2] for r in resolutions(top)[1:])
        layers = len(_sizes(arrays, r"mapping\.fc(\d{1,3})\.weight"))
        scores = _shape(arrays, "b4.out.weight", 2)[1]
        c_dim, cmap = (
            _shape(arrays, "mapping.embed.weight", 2)
            if "mapping.embed.weight" in arrays
            else (scores if scores > 1 else 0, 0)
        )
    except KeyError as error:
        raise _unreadable(what, error.args[0], wrong, "discriminator") from None
    return DiscriminatorConfig(
        top, channels, c_dim, cmap, layers, facts.mbstd_group or 4, facts.conv_clamp
    )


def _as_rgb(arrays: Arrays) -> list[str]:
    """Three colours from RGB layers of grey, grey with alpha or RGBA; returns notes."""
    layers = [
        k[: -len("weight")] for k in arrays if re.fullmatch(r"synthesis\.b\d+\.torgb\.weight", k)
    ]
    counts = {arrays[layer + "weight"].shape[-1:] for layer in layers}
    counts |= {arrays[layer + "bias"].shape for layer in layers if layer + "bias" in arrays}
    if counts not in ({(1,)}, {(2,)}, {(4,)}):
        return []
    ((count,),) = counts
    for key in [layer + part for layer in layers for part in ("weight", "bias")]:
        if key in arrays:
            colours = arrays[key][..., : 3 if count == 4 else 1]
            arrays[key] = np.repeat(colours, 3 // colours.shape[-1], axis=-1)
    alpha = "its alpha channel was left out" if count != 1 else ""
    grey = "it draws grey images; the one channel was repeated three times" if count < 3 else ""
    return ["; ".join(filter(None, (grey, alpha)))]


def _from_rgb(arrays: Arrays) -> list[str]:
    """A first layer that takes RGB, for a discriminator of grey or RGBA images; returns notes."""
    weight, bias = arrays.get("fromrgb.weight"), arrays.get("fromrgb.bias")
    if weight is None or bias is None or weight.ndim != 4 or bias.shape != weight.shape[3:]:
        return []
    count = weight.shape[2]
    if count not in (1, 2, 4):
        return []
    if count != 1:  # alpha is 1 everywhere in an opaque image
        bias = bias + weight[..., -1, :].sum((0, 1)) / np.sqrt(count)
        weight = weight[..., :-1, :]
    times = 3 // weight.shape[2]
    factor = np.sqrt(3 / count) / times  # the equalised learning rate is 1 / sqrt(inputs)
    arrays["fromrgb.weight"] = np.repeat(weight, times, axis=2) * np.float32(factor)
    arrays["fromrgb.bias"] = bias
    return [f"the discriminator took {count} channels; it takes the same images as RGB"]


def _supply_noise(arrays: Arrays, source: Mapping[str, np.ndarray]) -> list[str]:
    """Noise maps and strengths for networks saved without any; returns notes on the changes."""
    layers = [
        m[1]
        for key in arrays
        if (m := re.fullmatch(r"(synthesis\.b\d{1,4}\.conv[01])\.weight", key))
    ]
    maps = [key for key in arrays if key.endswith(".noise_const")]
    strengths = [key for key in arrays if key.endswith(".noise_strength")]
    if maps or not layers or (not strengths and any("noise" in key for key in source)):
        return []
    rng = np.random.RandomState(0)
    for layer in sorted(layers, key=lambda name: (int(name.split(".")[1][1:]), name)):
        resolution = int(layer.split(".")[1][1:])
        if resolution > _MAX_SIZE:
            return []
        arrays[layer + ".noise_const"] = rng.randn(resolution, resolution).astype(np.float32)
        if not strengths:
            arrays[layer + ".noise_strength"] = np.zeros((), np.float32)
    return [
        "the noise maps were missing; new ones were drawn"
        if strengths
        else "the network was trained without noise; its strengths are zero"
    ]


def _average_w(config: GeneratorConfig, arrays: Arrays) -> np.ndarray:
    """Mean of w over random z (and labels), as the published tools estimate it."""
    rng = np.random.RandomState(123)
    gen = build_generator(config, arrays, "the mapping network", Info())
    z = jnp.asarray(rng.randn(_W_SAMPLES, config.z_dim), jnp.float32)
    labels = (
        jnp.eye(config.c_dim)[rng.randint(config.c_dim, size=_W_SAMPLES)] if config.c_dim else None
    )
    return np.asarray(gen.mapping(z, labels)).mean(0, dtype=np.float64).astype(np.float32)
