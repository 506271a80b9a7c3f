"""The work of `sis_jax.label`.

What is compared with what is in `stages/naming.py`, the rule by which a name is given in
`ops/class_scores.py`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sis_jax.checkpoints import load_generator
from sis_jax.data.ontology import ontology_of
from sis_jax.data.parts import Parts
from sis_jax.ops.progress import say
from sis_jax.runs import cli
from sis_jax.runs.page import write_page
from sis_jax.runs.run import RunFolder
from sis_jax.stages.naming import RECIPES, Naming, load_text_model, name_parts
from sis_jax.stages.teacher import Teacher
from sis_jax.types import UsageError, unknown_name

if TYPE_CHECKING:
    from sis_jax.checkpoints.clip import CLIP
    from sis_jax.data.ontology import Ontology
    from sis_jax.types import Generator


def label(
    run: str | Path | Parts,
    ontology: str | Path | Mapping[str, Any] | Ontology | None = None,
    *,
    prompt: tuple[str, ...] = (),
    neutral: tuple[str, ...] = (),
    templates: tuple[str, ...] = (),
    clip: str | CLIP | None = None,
    gen: Generator | None = None,
    recipe: str | None = None,
    mode: Literal["dense", "crop"] = "dense",
    size: int = 0,
    n: int = 50,
    margin: float = 0.1,
    seed: int = 0,
    overwrite: bool = False,
) -> Parts:
    """As `sis_jax.label`, which explains the arguments."""
    asked = {
        "clip": clip,
        "templates": templates,
        "mode": mode,
        "size": size,
        "n": n,
        "margin": margin,
        "seed": seed,
    }
    resolved = _with_recipe(recipe, asked)
    words = ontology_of(ontology, prompt, neutral, resolved.pop("templates"))
    wanted = resolved.pop("clip")
    how = Naming(**resolved)
    teacher = _teacher(run, gen)
    model = load_text_model(wanted, teacher.gen.info.name)
    if not isinstance(run, str | Path):
        return name_parts(teacher, model, words, how).parts
    shown = {
        "run": run,
        "ontology": ontology,
        "prompt": prompt,
        "neutral": neutral,
        "recipe": recipe,
    }
    return _as_stage(
        Path(run),
        teacher,
        model,
        words,
        how,
        cli.command("label", shown | _changed(asked)),
        overwrite,
    )


def _with_recipe(recipe: str | None, asked: dict[str, Any]) -> dict[str, Any]:
    """What was asked, with the recipe's settings wherever that is the default."""
    if recipe is not None and recipe not in RECIPES:
        raise unknown_name("recipe", recipe, RECIPES)
    return asked | {
        k: v for k, v in RECIPES.get(recipe or "", {}).items() if k not in _changed(asked)
    }


def _changed(asked: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not the default."""
    defaults = {p.name: p.default for p in inspect.signature(label).parameters.values()}
    return {k: v for k, v in asked.items() if v is not defaults[k] and v != defaults[k]}


def _teacher(run: str | Path | Parts, gen: Generator | None) -> Teacher:
    """The generator that the parts were found in, with them."""
    if isinstance(run, str | Path) and gen is None:
        return Teacher.from_run(run)
    parts = Parts.load(run) if isinstance(run, str | Path) else run
    if gen is not None:
        return Teacher.of(gen, parts)
    try:
        return Teacher.of(load_generator(parts.generator.name), parts)
    except UsageError as error:
        raise UsageError(
            f"the generator of these parts is not found by its name ({error}); give it: "
            "sis.label(parts, ontology, gen=gen)"
        ) from None


def _as_stage(
    run: Path,
    teacher: Teacher,
    model: CLIP,
    words: Ontology,
    how: Naming,
    command: str,
    overwrite: bool,
) -> Parts:
    """Name the parts of a run folder in place, with the table of scores beside them and the report
    made again.
    """
    config = {"clip": model.info.name, "ontology": asdict(words), **asdict(how)}
    inputs = {
        "generator": teacher.gen.info.sha256,
        "clip": model.info.sha256,
        "clusters": _digest(teacher.parts),
    }
    with RunFolder.open(run, overwrite) as folder:
        with folder.stage(
            "label", config, inputs=inputs, generator=teacher.gen.info, command=command, late=True
        ) as stage:
            if stage.done and any(c["score"] is not None for c in teacher.parts.classes):
                say(f"{run} already has these names; give --overwrite to find them again")
            else:  # also where the stage is done, but `discover` wrote its parts again since
                named = name_parts(teacher, model, words, how)
                for name, data in named.parts.files().items():
                    folder.write_bytes(f"parts/{name}", data)
                folder.write_json("parts/names.json", named.table())
                stage.files[:] = [
                    "parts/names.json"
                ]  # the parts are those of `discover`, which `overwrite` must not remove here
        write_page(folder.path)
        return Parts.load(folder.path)


def _digest(parts: Parts) -> str:
    """Which clusters there are, whatever they are called: the names are what this stage writes."""
    digest = hashlib.sha256()
    for name in sorted(parts.arrays):
        digest.update(parts.arrays[name].tobytes())
    return digest.hexdigest()


def plan(config: dict[str, Any]) -> dict[str, Any]:
    """Files, and figures for a ViT-B/32 at twice its native size on two processor cores."""
    run = config["run"]
    files = [f"{run}/parts/{n}" for n in ("classes.json", "names.json", "gallery.png")] + [
        f"{run}/report.html"
    ]
    return {"files": files, "seconds": 8 + 0.6 * config["n"], "memory_bytes": 2.0e9}


def results(parts: Any, config: dict[str, Any]) -> list[Path]:
    run = Path(config["run"])
    return [run / "parts" / "classes.json", run / "parts" / "names.json", run / "report.html"]
