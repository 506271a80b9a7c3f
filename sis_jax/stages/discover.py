"""The work of `sis_jax.discover`.

The method does the work (`methods/`); this file resolves the request, and turns what was fitted
into `Parts`, a run folder and a report.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sis_jax import methods
from sis_jax.checkpoints import load_generator
from sis_jax.data.parts import Parts, classes_from
from sis_jax.methods.base import Fitted
from sis_jax.ops.progress import say
from sis_jax.ops.sampling import sample_seeds
from sis_jax.ops.selection import only_just
from sis_jax.runs import cli
from sis_jax.runs.page import write_page
from sis_jax.runs.run import RunFolder
from sis_jax.stages.inputs import digests, gather
from sis_jax.stages.texts import Texts, check_rare
from sis_jax.types import UsageError, unknown_name

if TYPE_CHECKING:
    from sis_jax.checkpoints.clip import CLIP
    from sis_jax.types import Generator

SHOWN = 8  # samples in the gallery
# share of the frame that a background holds: 0.57 to 0.75 on the default faces, 0.45 on a DCGAN
# whose masks were poor
FRAME = 0.5
UNSURE = 0.7  # agreement below this earns a warning


def discover(
    gen: str | Generator | None = None,
    *,
    out: str | None = None,
    method: str = "segmentation_in_style",
    recipe: str | None = None,
    ontology: str | Mapping[str, Any] | None = None,
    rare: str | None = None,
    neutral: str = "a photo",
    rare_n: int = 2000,
    rare_share: float = 0.5,
    clip: str | CLIP | None = None,
    seed: int = 0,
    overwrite: bool = False,
    **settings: Any,
) -> Parts:
    """As `sis_jax.discover`, which explains the arguments."""
    fitted_with = _resolve(method, recipe, settings)
    if seed < 0:
        raise UsageError(f"seed is {seed}, expected 0 or more")
    generator = load_generator(gen) if gen is None or isinstance(gen, str | Path) else gen
    texts = _texts(generator, fitted_with, ontology, rare, neutral, rare_n, rare_share, clip)
    named = str(gen) if isinstance(gen, str | Path) else generator.info.name
    if out is None:
        return _discover(
            generator, method, fitted_with, seed, texts, gather(fitted_with, generator, named, None)
        )[0]

    config = {"gen": named, "method": method, "recipe": recipe, "seed": seed}
    config |= _settings(fitted_with)
    asked = {"ontology": ontology, "rare": rare, "clip": clip if isinstance(clip, str) else None}
    if rare is not None:
        asked |= {"neutral": neutral, "rare_n": rare_n, "rare_share": rare_share}
    config |= texts.config() if texts else {}
    shown = (
        {"gen": gen, "out": out, "method": method, "recipe": recipe, "seed": seed}
        | asked
        | settings
    )
    reads, command = (
        digests(fitted_with, generator, texts.clip.info.sha256 if texts else None),
        cli.command("discover", shown),
    )
    with RunFolder.open(out, overwrite) as run:
        with run.stage(
            "discover", config, inputs=reads, generator=generator.info, command=command, late=True
        ) as stage:
            if stage.done:
                say(f"{out} already holds these parts; give --overwrite to find them again")
            else:
                inputs = gather(fitted_with, generator, named, run.path / "parts" / "training")
                parts, others = _discover(generator, method, fitted_with, seed, texts, inputs)
                for name, data in (parts.files() | others).items():
                    run.write_bytes(f"parts/{name}", data)
        write_page(run.path)
        return Parts.load(run.path)


def _fields(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.init]


def _settings(method: Any) -> dict[str, Any]:
    return {name: getattr(method, name) for name in _fields(type(method))}


def _resolve(method: str, recipe: str | None, settings: dict[str, Any]) -> Any:
    """The method with the recipe's settings, overridden by those given that are not the default."""
    cls = methods.get(method)
    known = {f.name: f.default for f in dataclasses.fields(cls) if f.init}
    for name in settings:
        if name not in known:
            raise unknown_name(f"setting of {method}", name, known, f"It has {', '.join(known)}.")
    chosen: dict[str, Any] = {}
    if recipe is not None:
        recipes = getattr(importlib.import_module(cls.__module__), "RECIPES", {})
        if recipe not in recipes:
            raise (
                unknown_name("recipe", recipe, recipes)
                if recipes
                else UsageError(f"{method} has no recipes, got recipe={recipe!r}")
            )
        chosen |= recipes[recipe]
    chosen |= {k: v for k, v in settings.items() if v != known[k]}
    _check_numbers(chosen)
    return cls(**chosen)


def _check_numbers(settings: dict[str, Any]) -> None:
    """What no method can do with: the methods themselves compare, and NaN passes most
    comparisons.
    """
    for name, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{name} is {value}, expected a finite number")
        if name.endswith("truncation") and not 0 <= value <= 2:
            raise UsageError(f"{name} is {value}, expected 0 to 2 (0.7 is usual)")


def _texts(
    gen: Generator,
    method: Any,
    ontology: Any,
    rare: str | None,
    neutral: str,
    rare_n: int,
    rare_share: float,
    clip: Any,
) -> Texts | None:
    """What text shall do, None where it shall do nothing: then no text model is loaded."""
    _check_texts(ontology, rare, neutral, rare_n, rare_share, clip)
    if ontology is None and rare is None:
        return None

    return Texts.of(gen, method, ontology, rare, neutral, rare_n, rare_share, clip)


def _check_texts(
    ontology: Any, rare: str | None, neutral: str, rare_n: int, rare_share: float, clip: Any
) -> None:
    """UsageError for what would be ignored."""
    usual = {name: p.default for name, p in inspect.signature(discover).parameters.items()}
    given = {"neutral": neutral, "rare_n": rare_n, "rare_share": rare_share}
    unused = [
        f"--{name.replace('_', '-')}"
        for name, value in given.items()
        if rare is None and value != usual[name]
    ]
    if unused:
        raise UsageError(
            f"{unused[0]} says how a rare class is found, and none was asked for: add --rare TEXT"
        )
    if clip is not None and ontology is None and rare is None:
        raise UsageError(
            "--clip is a text model, and no text was given: add --ontology or --rare TEXT"
        )


def _discover(
    gen: Generator,
    method: str,
    settings: Any,
    seed: int,
    texts: Texts | None,
    inputs: dict[str, Any],
) -> tuple[Parts, dict[str, bytes]]:
    """Fit, look at a few samples, and put all of it into one object; and further files of the run's
    `parts/`.
    """
    fitted = settings.fit(gen, seed, **inputs)
    found = texts.extended(gen, fitted, seed) if texts else None
    if found:
        gen, fitted = found.gen, found.fitted
    classes = classes_from(list(fitted.clusters), fitted.background["found"])
    owner = {cluster: c["id"] for c in classes for cluster in c["clusters"]}
    clusters = tuple(
        c | {"class_id": owner[c["id"]], "background": owner[c["id"]] == 0} for c in fitted.clusters
    )
    seeds = sample_seeds(seed, SHOWN)
    images, masks, sure = (np.concatenate(x) for x in zip(*fitted.label_seeds(gen, seeds)))
    resolved = _settings(fitted.method)
    said = [*_warnings(fitted, found.cluster), *found.warnings] if found else _warnings(fitted)
    parts = Parts(
        method=method, settings=resolved, arrays=dict(fitted.arrays), classes=classes,
        clusters=clusters,
        background=fitted.background, generator=gen.info, seed=seed, sweep=fitted.sweep,
        warnings=tuple(said), samples=images, masks=masks, seeds=tuple(seeds),
        confidence=tuple(float(c.mean()) for c in sure),
    )  # fmt: skip
    parts, files = texts.named(gen, parts, found) if texts else (parts, {})
    return parts, files | fitted.files


def _warnings(fitted: Fitted, rare: int | None = None) -> list[str]:
    """What a user should know before trusting the parts, each with its cure. rare: the cluster of a
    rare class, which has warnings of its own.
    """
    method, clusters = fitted.method, fitted.clusters
    found: list[str] = [*fitted.warnings]
    if not fitted.background["found"]:
        found.append(
            f"The background was not found ({fitted.background['why']}), so no class has id 0. "
            "Look at the gallery and send the background "
            "there by hand: parts.rename({id: None})."
        )
    elif "painted" not in method.wants:
        held = sum(c["border_share"] for c in clusters if c["background"])
        if held < FRAME:
            found.append(
                f"The background holds only {held:.0%} of the pictures' frame: part of it may be "
                "in other clusters. Look at the gallery, send those "
                f"to the background, parts.rename({{id: None}}), or "
                f"{'raise k' if method.clusters_by_k else 'give another seed'}."
            )
        narrow = (
            only_just(clusters) if method.clusters_by_k else []
        )  # others learn which side is the background
        found += [
            f"Cluster {c['id']} was only just taken for background ({c['border_share']:.0%} of "
            f"the frame, {c['share']:.0%} of the picture). "
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


def plan(config: dict[str, Any]) -> dict[str, Any]:
    """Files, and what the method expects to need. Samples are scored at about 100 a second; a rare
    class is clustered once more.
    """
    settings = _resolve(
        config["method"],
        config["recipe"],
        {k: v for k, v in config.items() if k in _fields_of(config["method"])},
    )
    names = [
        "run.json",
        "parts/parts.safetensors",
        "parts/classes.json",
        "parts/gallery.png",
        "parts/samples/*.png",
        "report.html",
    ]
    need = settings.estimate()
    rare, neutral, rare_n, rare_share = (
        config[name] for name in ("rare", "neutral", "rare_n", "rare_share")
    )
    _check_texts(config["ontology"], rare, neutral, rare_n, rare_share, config["clip"])
    if config["ontology"] is not None:
        names.append("parts/names.json")
    if rare is not None:
        check_rare(settings, rare, neutral, rare_n, rare_share)
        names += ["parts/rare.png", "parts/rare.json", "parts/rare.safetensors"]
        need = need | {"seconds": 2 * need["seconds"] + rare_n / 100 + 10}
    return {"files": [f"{config['out']}/{n}" for n in names] if config["out"] else []} | need


def _fields_of(method: str) -> list[str]:
    return _fields(methods.get(method))


def results(parts: Any, config: dict[str, Any]) -> list[Path]:
    out = Path(config["out"]) if config["out"] else None
    if out is None:
        return []
    rare = [out / "parts" / "rare.png"] if config["rare"] else []
    return [
        out / "parts" / "gallery.png",
        *rare,
        out / "parts" / "classes.json",
        out / "report.html",
    ]
