"""The work of `sis_jax.discover`: resolve the configuration, fit the method, write `Parts`."""

from __future__ import annotations

import importlib
import math
import shlex
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from sis_jax import parallel
from sis_jax.checkpoints import hub, load_generator
from sis_jax.data.part_names import finer_classes
from sis_jax.data.part_summary import summary_of
from sis_jax.data.parts import Parts, classes_from
from sis_jax.methods import base as methods
from sis_jax.methods.base import SHOWN, Fitted
from sis_jax.methods.settings import SETTINGS, USUAL
from sis_jax.models.furrygan import FurryGAN
from sis_jax.ops.sampling import sample_seeds
from sis_jax.ops.selection import only_just
from sis_jax.runs.config import build, variant
from sis_jax.runs.configs.discover import DiscoverConfig, RareClass
from sis_jax.runs.page import write_page
from sis_jax.runs.run import RunFolder
from sis_jax.stages.inputs import digests, gather
from sis_jax.stages.naming import default_clip
from sis_jax.stages.texts import Texts, check_rare
from sis_jax.types import Generator, UsageError, unknown_name

# share of the frame that a background holds: 0.57 to 0.75 on the default faces, 0.45 on a DCGAN
# whose masks were poor
FRAME = 0.5
AUTO, OWN = "auto", "furrygan"  # OWN: where a generator draws its masks itself
UNSURE = 0.7  # agreement below this causes a warning


def discover(config: DiscoverConfig) -> Parts:
    """As `sis_jax.discover`, which explains the configuration."""
    return parallel.by_turns(_work, config, stored=config.out is not None)


def _work(config: DiscoverConfig) -> Parts:
    resolve(config)  # before weights are read
    if config.seed < 0:
        raise UsageError(f"seed is {config.seed}, expected 0 or more")
    gen, given = config.gen, config
    generator = load_generator(gen) if gen is None or isinstance(gen, str | Path) else gen
    config = with_method(config, generator)
    settings = resolve(config)
    texts = _texts(generator, settings, config)
    named = str(gen) if isinstance(gen, str | Path) else generator.info.name
    if config.out is None:
        inputs = gather(settings, generator, named, None)
        return _discover(generator, config, settings, texts, inputs)[0]

    resolved = replace(
        config,
        gen=named,
        settings=type(config.settings)(**_fields(settings)),
        ontology=asdict(texts.ontology) if texts and texts.ontology else None,
        clip=texts.clip.info.name if texts else None,
        rare_class=texts.rare_class if texts else config.rare_class,
    )
    reads = digests(settings, generator, texts.clip.info.sha256 if texts else None)
    with RunFolder.open(config.out, config.overwrite) as run:
        with run.stage(
            resolved, given=given, inputs=reads, generator=generator.info, late=True
        ) as stage:
            if not stage.done:
                inputs = gather(settings, generator, named, run.path / "parts" / "training")
                parts, others = _discover(generator, config, settings, texts, inputs)
                for name, data in (parts.files() | others).items():
                    run.write_bytes(f"parts/{name}", data)
        write_page(run.path)
        return Parts.load(run.path)


def _fields(method: Any) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in fields(method) if f.init}


def with_method(config: DiscoverConfig, gen: Generator | None) -> DiscoverConfig:
    """The configuration with the method that "auto" stands for."""
    if config.method != AUTO:
        return config
    usual, own = SETTINGS[USUAL](), SETTINGS[OWN]
    shared = {f.name for f in fields(own)}
    given = {k for k, v in vars(config.settings).items() if v != getattr(usual, k)}
    clustered = config.recipe or config.rare_class.rare or given - shared
    if not isinstance(gen, FurryGAN) or clustered:
        return replace(config, method=USUAL)
    return build(variant(DiscoverConfig, own), config.flat() | {"method": OWN})


def resolve(config: DiscoverConfig) -> Any:
    """The method with the recipe's settings, overridden by those given that are not the default;
    UsageError for unknown names and impossible numbers.
    """
    name = USUAL if config.method == AUTO else config.method
    cls = methods.get(name)
    chosen = _recipe(name, config.recipe, cls)
    usual = type(config.settings)()
    chosen |= {k: v for k, v in vars(config.settings).items() if v != getattr(usual, k)}
    _check_numbers(chosen)
    return cls(**chosen)


def _recipe(method: str, recipe: str | None, cls: type) -> dict[str, Any]:
    if recipe is None:
        return {}
    recipes = getattr(importlib.import_module(cls.__module__), "RECIPES", {})
    if not recipes:
        raise UsageError(f"{method} has no recipes, got recipe={recipe!r}")
    if recipe not in recipes:
        raise unknown_name("recipe", recipe, recipes)
    return dict(recipes[recipe])


def _check_numbers(settings: dict[str, Any]) -> None:
    """The methods compare by themselves, but NaN passes most comparisons."""
    for name, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{name} is {value}, expected a finite number")
        if name.endswith("truncation") and not 0 <= value <= 2:
            raise UsageError(f"{name} is {value}, expected 0 to 2 (0.7 is usual)")


def _texts(gen: Generator, method: Any, config: DiscoverConfig) -> Texts | None:
    """The text of the request, None where there is none: then no text model is loaded."""
    _check_texts(config)
    if config.ontology is None and config.rare_class.rare is None:
        return None
    return Texts.of(gen, method, config)


def _check_texts(config: DiscoverConfig) -> None:
    """UsageError for options that would be ignored."""
    rare, usual = config.rare_class, RareClass()
    unused = [
        f"--{f.name.replace('_', '-')}"
        for f in fields(rare)
        if rare.rare is None and getattr(rare, f.name) != getattr(usual, f.name)
    ]
    if unused:
        raise UsageError(
            f"{unused[0]} sets how a rare class is found, and none was asked for: add --rare TEXT"
        )
    if config.clip is not None and config.ontology is None and rare.rare is None:
        raise UsageError(
            "--clip is a text model, and no text was given: add --ontology or --rare TEXT"
        )


def _discover(
    gen: Generator,
    config: DiscoverConfig,
    settings: Any,
    texts: Texts | None,
    inputs: dict[str, Any],
) -> tuple[Parts, dict[str, bytes]]:
    """Fit, label a few samples, and put all of it together; and further files of `parts/`."""
    seed = config.seed
    if texts and texts.rare_class.rare is not None:
        inputs = {**inputs, "finer": False}  # the rare class is one more coarse part
    fitted = settings.fit(gen, seed, **inputs)
    found = texts.extended(gen, fitted, seed) if texts else None
    if found:
        gen, fitted = found.gen, found.fitted
    warnings = [*_warnings(fitted, found.cluster), *found.warnings] if found else _warnings(fitted)
    classes = classes_from(list(fitted.clusters), fitted.background["found"])
    parts = _level(gen, fitted, classes, seed, config.method, tuple(warnings))
    if fitted.finer is not None:
        below = finer_classes(classes, fitted.finer.clusters)
        parts = replace(parts, finer=_level(gen, fitted.finer, below, seed, config.method))
    parts = parts.with_classes(classes)
    parts, files = texts.named(gen, parts, found) if texts else (parts, {})
    return parts, files | fitted.files


def _level(
    gen: Generator,
    fitted: Fitted,
    classes: tuple[dict[str, Any], ...],
    seed: int,
    method: str,
    warnings: tuple[str, ...] = (),
) -> Parts:
    """One level of parts, with samples to look at."""
    seeds = sample_seeds(seed, SHOWN)
    images, masks, confidence = (np.concatenate(x) for x in zip(*fitted.label_seeds(gen, seeds)))
    return Parts(
        method=method, settings=_fields(fitted.method), arrays=dict(fitted.arrays),
        classes=classes, clusters=fitted.clusters,
        background=fitted.background, generator=gen.info, seed=seed, sweep=fitted.sweep,
        warnings=warnings, samples=images, masks=masks, seeds=tuple(seeds),
        confidence=tuple(float(c.mean()) for c in confidence),
    )  # fmt: skip


def _warnings(fitted: Fitted, rare: int | None = None) -> list[str]:
    """Warnings before the parts are trusted, each with its cure; rare: the rare cluster."""
    method, clusters = fitted.method, fitted.clusters
    found: list[str] = [*fitted.warnings]
    if not fitted.background["found"]:
        found.append(
            f"The background was not found ({fitted.background['why']}), so no class has id 0. "
            "Look at the gallery and send the background there by hand: parts.rename({id: None})."
        )
    elif "annotated" not in method.wants:
        held = sum(c["border_share"] for c in clusters if c["background"])
        if held < FRAME:
            found.append(
                f"The background holds only {held:.0%} of the images' frame: part of it may be "
                "in other clusters. Look at the gallery, send those "
                f"to the background, parts.rename({{id: None}}), or "
                f"{'raise k' if method.clusters_by_k else 'give another seed'}."
            )
        narrow = (
            only_just(clusters) if method.clusters_by_k else []
        )  # others learn which side is the background
        found += [
            f"Cluster {c['id']} was only just taken for background ({c['border_share']:.0%} of "
            f"the frame, {c['share']:.0%} of the image). "
            "Look at the gallery: if it shows the object, give another k or seed."
            for c in (clusters[i] for i in narrow)
        ]
    shaky, cure = (
        [c["id"] for c in clusters if c["agreement"] < UNSURE and c["id"] != rare],
        method.shaky_cure,
    )
    if shaky and cure:
        found.append(
            f"Clusters {', '.join(map(str, shaky))} change when other samples or another seed are "
            f"used: {cure}."
        )
    return found


def plan(config: DiscoverConfig) -> dict[str, Any]:
    """Files, and the method's estimate of its time and memory."""
    resolve(config)  # before weights are read
    rare, asked = config.rare_class, config.method
    names = [
        "run.json",
        "parts/parts.safetensors",
        "parts/classes.json",
        "parts/gallery.png",
        "parts/samples/*.png",
        "report.html",
    ]
    gen = config.gen
    away = isinstance(gen, str) and hub.is_name(gen)  # a dry run downloads nothing
    if gen is None or isinstance(gen, str | Path):
        gen = None if away else load_generator(gen)
    config = with_method(config, gen)
    settings = resolve(config)
    _check_texts(config)
    if config.ontology is not None:
        names.append("parts/names.json")
    if rare.rare is not None:
        check_rare(settings, rare)
        names += ["parts/rare.png", "parts/rare.json", "parts/rare.safetensors"]
    need = {} if gen is None else _tried(gen, settings, config)
    if asked == AUTO and not away:
        need = need | {"method": config.method}
    return {"files": [f"{config.out}/{n}" for n in names] if config.out else []} | need


def _tried(gen: Generator, method: Any, config: DiscoverConfig) -> dict[str, Any]:
    """Seconds and bytes; nothing of a rare class before its text model was downloaded."""
    if config.rare_class.rare is None:
        return method.estimate(gen)
    model = default_clip(gen.info.name) if config.clip is None else config.clip
    if isinstance(model, str) and hub.is_name(model):
        return {}
    texts = Texts.of(gen, method, config)
    return texts.tried(gen, method, method.estimate(gen))


def results(parts: Parts, config: DiscoverConfig) -> list[Path]:
    if config.out is None:
        return []
    names = ["parts/gallery.png", *(["parts/rare.png"] if config.rare_class.rare else [])]
    return [Path(config.out) / n for n in (*names, "parts/classes.json", "report.html")]


def summary(parts: Parts, config: DiscoverConfig) -> list[str]:
    if config.out is None:
        return []
    out = shlex.quote(config.out)
    return [
        *summary_of(parts),
        f"next: look at {out}/report.html, which also renames and merges parts; then python -m "
        f"sis_jax.synthesize {out} --n 10000",
    ]
