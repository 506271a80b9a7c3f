"""CLIP's files: OpenAI's and open_clip's checkpoints, Hugging Face folders, our weights folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sis_jax.checkpoints import catalogue, files, shards
from sis_jax.checkpoints.clip_inputs import (
    MEAN,
    MERGES,
    STD,
    VOCABULARY,
    Preprocessing,
    Tokenizer,
    preprocessing_of,
)
from sis_jax.checkpoints.layouts import clip
from sis_jax.checkpoints.sources import Source, recognise
from sis_jax.data.files import parse_json
from sis_jax.models.clip import CLIPConfig
from sis_jax.types import Info, SisError, UsageError

OPEN_CLIP_CONFIG, PREPROCESSOR = "open_clip_config.json", "preprocessor_config.json"
# values of a tower in open_clip's config that leave it a network supported here
_KINDS_OF_OPEN_CLIP = {
    "vision_cfg": {
        "timm_model_name": None,
        "attentional_pool": False,
        "no_ln_pre": False,
        "pool_type": "tok",
        "patch_dropout": 0.0,
    },
    "text_cfg": {
        "hf_model_name": None,
        "embed_cls": False,
        "no_causal_mask": False,
        "pool_type": "argmax",
    },
}


@dataclass(frozen=True)
class Stored:
    """A CLIP as read: shape, arrays under our names as float32, inputs, origin."""

    config: CLIPConfig
    arrays: dict[str, np.ndarray]
    preprocessing: Preprocessing
    tokenizer: Tokenizer
    info: Info
    notes: tuple[str, ...] = ()


def weights_file(path: Path) -> Path:
    """The weights in a foreign folder; `path` itself for anything else."""
    if not path.is_dir() or files.is_folder(path):
        return path
    return shards.find(path) or path


def name_of(path: Path) -> str:
    """The file's own name, or where that is generic its folder's or its name on the hub."""
    if not shards.is_standard(path.name):
        return path.stem
    folder = path.absolute().parent  # not resolved: the hub's cache is full of links
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def read_foreign(
    path: Path, source: Source | None = None, name: str | None = None, licence: str | None = None
) -> Stored:
    """A CLIP of OpenAI's, open_clip's or Hugging Face's layout, with the files beside it.

    source: what `recognise` gave for the file, if known. Raises SisError that lists all misfits.
    """
    what = str(path)
    source = source or recognise(shards.read_tree(path), shards.size_of(path), what)
    if source.clip is None:
        raise UsageError(
            f"{path} holds {files.in_words(kind_of(source))}, not a CLIP: use "
            f"sis.{files.loader(kind_of(source))}"
        )
    layout, facts = source.layout, clip.Facts()
    digest = shards.sha256_of(path)
    public = catalogue.clip_by_digest(digest)
    notes: tuple[str, ...] = ()
    if layout == "transformers-clip":
        facts = _transformers_facts(path.parent)
    elif public is None and (
        path.name.startswith("open_clip") or (path.parent / OPEN_CLIP_CONFIG).is_file()
    ):
        layout, facts = "open_clip", _open_clip_facts(path.parent)
    elif public is None and source.activation:
        layout = "open_clip"
        facts = clip.Facts(vision_activation=source.activation, text_activation=source.activation)
        notes = (f"a training file of open_clip; taken as {source.activation}, by the name in it",)
    elif public is None:
        notes = (
            "such a file does not name its activation; taken as quick-GELU, as in all of OpenAI's "
            "models",
        )
    config, arrays = clip.convert(source.clip.arrays, layout, facts, what)
    beside = layout != "openai-clip" and all(
        (path.parent / part).is_file() for part in (VOCABULARY, MERGES)
    )
    text = Tokenizer(
        config.text.context,
        config.text.vocabulary,
        str(path.parent) if beside else None,
        layout != "transformers-clip",
    )
    notes += _vocabulary_notes(text)
    name = name or (public.name if public else name_of(path))
    openai = public is not None or name.startswith("openai/clip-")
    info = Info(
        name,
        licence or (catalogue.OPENAI_LICENCE if openai else Info.licence),
        path.name,
        digest,
        layout,
    )
    return Stored(
        config,
        arrays,
        _preprocessing(path.parent, layout, config.vision.image_size),
        text,
        info,
        notes,
    )


def kind_of(source: Source) -> str:
    """The kind of weights folder that a recognised file becomes."""
    if source.clip is not None:
        return "clip"
    if source.backbone is not None:
        return "backbone"
    if source.layout in ("dcgan", "biggan"):
        return source.layout
    return "stylegan2"


def _vocabulary_notes(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The note where texts cannot become tokens."""
    if tokenizer.has_vocabulary:
        return ()
    return (
        f"no {VOCABULARY} and {MERGES} beside the weights: this CLIP takes token ids only, no "
        "texts",
    )


def _json(path: Path, why: str) -> dict[str, Any]:
    if not path.is_file():
        raise SisError(f"{path} is missing; it holds {why}: put it beside the weights")
    try:
        content = parse_json(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SisError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise SisError(f"{path} cannot be read: expected a JSON object")
    return content


def _transformers_facts(folder: Path) -> clip.Facts:
    """Heads, activations and end token, by transformers' names and defaults."""
    path = folder / files.CONFIG
    config = _json(path, "the number of heads of this layout")
    vision, text = (
        {**_table(config, f"{tower}_config"), **_table(config, f"{tower}_config_dict")}
        for tower in ("vision", "text")
    )
    end = text.get("eos_token_id", 49407)
    try:
        return clip.Facts(
            vision_heads=int(vision.get("num_attention_heads", 12)),
            text_heads=int(text.get("num_attention_heads", 8)),
            vision_activation=str(vision.get("hidden_act", "quick_gelu")),
            text_activation=str(text.get("hidden_act", "quick_gelu")),
            vision_epsilon=float(vision.get("layer_norm_eps", 1e-5)),
            text_epsilon=float(text.get("layer_norm_eps", 1e-5)),
            end=None
            if end == 2
            else int(
                end
                # 2 is what early conversions wrote by mistake; transformers reads the largest id
                # then
            ),
        )
    except (TypeError, ValueError):
        raise SisError(
            f"{path} does not describe a CLIP: a number of heads, an epsilon or the end token is "
            "no number"
        ) from None


def _open_clip_facts(folder: Path) -> clip.Facts:
    """Heads and activation from open_clip's config; SisError for networks not built like CLIP."""
    path = folder / OPEN_CLIP_CONFIG
    whole = _json(path, "the number of heads and the activation")
    model = _table(whole, "model_cfg")
    vision, text = (_table(model, tower) for tower in _KINDS_OF_OPEN_CLIP)
    for tower, usual in _KINDS_OF_OPEN_CLIP.items():
        for key, value in usual.items():
            if key != "patch_dropout" and _table(model, tower).get(key, value) not in (value, None):
                raise SisError(
                    f"{path} describes a network that is not supported: {tower} has {key} = "
                    f"{_table(model, tower)[key]!r}"
                )
    activation = "quick_gelu" if model.get("quick_gelu") is True else "gelu"
    try:
        heads = (
            int(vision["width"]) // int(vision.get("head_width", 64))
            if isinstance(vision.get("layers"), int)
            else None
        )
        a, b = (float(_table(tower, "norm_kwargs").get("eps", 1e-5)) for tower in (vision, text))
        return clip.Facts(heads, int(text.get("heads", 8)), activation, activation, a, b)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise SisError(
            f'{path} does not describe a CLIP: "model_cfg" lacks the width or heads of a tower'
        ) from None


def _table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _preprocessing(folder: Path, layout: str, native: int) -> Preprocessing:
    """Sizes and colours from the file beside the weights, else OpenAI's at the network's size."""
    usual = Preprocessing(native, native)
    if layout == "openai-clip":
        return usual
    path = folder / (OPEN_CLIP_CONFIG if layout == "open_clip" else PREPROCESSOR)
    if not path.is_file():
        return usual
    settings = _json(path, "the colours")
    if layout == "open_clip":
        settings = _table(settings, "preprocess_cfg")
        _refuse_steps(path, settings, _OPEN_CLIP_STEPS)
        sides = settings.get("size", native)
        if (sides if isinstance(sides, list) else [sides, sides]) != [native, native]:
            raise SisError(
                f"{path} cuts photos to {sides} pixels, but the network reads {native}: they do "
                "not belong together"
            )
        fields = {
            "size": native,
            "resize": native,
            "mean": settings.get("mean", MEAN),
            "std": settings.get("std", STD),
        }
    else:
        _refuse_sizes(path, settings)
        _refuse_steps(path, settings, _TRANSFORMERS_STEPS)
        crop, size = (
            _one(settings.get(key, native), *names)
            for key, names in (("crop_size", ("height",)), ("size", ("shortest_edge", "height")))
        )
        fields = {
            "size": crop,
            "resize": size,
            "mean": settings.get("image_mean", MEAN),
            "std": settings.get("image_std", STD),
        }
    try:
        found = preprocessing_of(fields)
    except SisError:
        raise SisError(
            f"{path} does not describe a preprocessing: sizes in pixels, three means and three "
            "positive deviations"
        ) from None
    if found.size != native:
        raise SisError(
            f"{path} cuts photos to {found.size} pixels, but the network reads {native}: they do "
            "not belong together"
        )
    return found


# Supported values of a step. Any other would silently give other embeddings than the
# network's authors get.
_OPEN_CLIP_STEPS = {"resize_mode": ("shortest",), "interpolation": ("bicubic",), "mode": ("RGB",)}
_TRANSFORMERS_STEPS = {
    **{f"do_{step}": (True,) for step in ("resize", "center_crop", "rescale", "normalize")},
    "resample": (3, "bicubic"),  # Pillow's number
}


def _refuse_steps(
    path: Path, settings: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]
) -> None:
    """SisError that names the first step which is not done here."""
    for key, values in known.items():
        if settings.get(key) is not None and settings[key] not in values:
            raise SisError(
                f"{path} has {key} = {settings[key]!r}, which is not supported: the only value "
                f"known is {values[0]!r}"
            )
    factor = settings.get("rescale_factor")
    if (
        "do_rescale" in known
        and factor is not None
        and (not isinstance(factor, (int, float)) or not abs(factor * 255 - 1) < 1e-4)
    ):
        raise SisError(
            f"{path} has rescale_factor = {factor!r}, which is not supported: the only value "
            "known is 1/255"
        )


def _refuse_sizes(path: Path, settings: Mapping[str, Any]) -> None:
    size, crop = settings.get("size"), settings.get("crop_size")
    if isinstance(size, dict) and "shortest_edge" not in size:
        raise SisError(
            f"{path} has size = {size}, which squeezes photos and is not supported: the only form "
            f'known is {{"shortest_edge": n}}'
        )
    if isinstance(crop, dict) and crop.get("width", crop.get("height")) != crop.get("height"):
        raise SisError(f"{path} has crop_size = {crop}, which is not supported: only squares are")


def _one(size: Any, *names: str) -> Any:
    """A size as a number: older files hold one, newer ones a table."""
    if isinstance(size, dict):
        return next((size[name] for name in names if name in size), None)
    return size


# Our own folders


def read_folder(path: Path) -> Stored:
    """A CLIP from a weights folder; UsageError for other kinds, SisError for damage."""
    folder = files.read_config(path)
    if folder.kind != "clip":
        raise UsageError(
            f"{path} holds {files.in_words(folder.kind)}, not a CLIP: use "
            f"sis.{files.loader(folder.kind)}"
        )
    if folder.clip is None:
        raise SisError(
            f'{path / files.CONFIG} has lost its "clip", the shape of the network: convert the '
            "checkpoint again"
        )
    config = clip.config_of(_table(folder.clip, "network"))
    arrays, digest = files.read_arrays(path, folder)
    texts = [part for part in (VOCABULARY, MERGES) if part in folder.sha256]
    for part in texts:
        if not (path / part).is_file() or files.sha256_of(path / part) != folder.sha256[part]:
            raise SisError(
                f"{path / part} is not the file that {files.CONFIG} describes: convert the "
                "checkpoint again"
            )
    openai = folder.clip.get("openai_tokens") is not False
    tokenizer = Tokenizer(
        config.text.context, config.text.vocabulary, str(path) if len(texts) == 2 else None, openai
    )
    info = replace(folder.info(), sha256=digest)
    preprocessing = preprocessing_of(_table(folder.clip, "preprocessing"))
    if preprocessing.size != config.vision.image_size:
        raise SisError(
            f"{path / files.CONFIG} cuts photos to {preprocessing.size} pixels, but the network "
            f"reads {config.vision.image_size}: convert the checkpoint again"
        )
    return Stored(config, arrays, preprocessing, tokenizer, info, folder.notes)


def write_folder(stored: Stored, path: Path, dtype: str = "float32") -> files.Folder:
    """Write a weights folder that `read_folder` reads, with the vocabulary of the source."""
    info = stored.info
    table = {
        "network": asdict(stored.config),
        "preprocessing": asdict(stored.preprocessing),
        "openai_tokens": stored.tokenizer.openai,
    }
    source = {"file": info.source, "sha256": info.sha256, "layout": info.layout}
    folder = files.Folder(
        "clip", info.name, info.licence, {}, source=source, notes=stored.notes, clip=table
    )
    place = stored.tokenizer.folder
    stored.tokenizer.check()  # a damaged one is refused before anything is written
    texts = (
        {part: (Path(place) / part).read_bytes() for part in (VOCABULARY, MERGES)} if place else {}
    )
    return files.write_folder(
        path, folder, stored.arrays, None, catalogue.card(folder), dtype, texts
    )
