"""Name the parts of a run from text: `python -m sis_jax.label RUN --ontology FILE`, or `--prompt "a photo of hair=hair"`.

What is compared with what is in `stages/naming.py`, the rule by which a name is given in `ops/class_scores.py`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sis_jax.ops.progress import say
from sis_jax.runs import cli

if TYPE_CHECKING:
    from sis_jax.checkpoints.clip import CLIP
    from sis_jax.data.ontology import Ontology
    from sis_jax.data.parts import Parts
    from sis_jax.stages.naming import Naming
    from sis_jax.stages.teacher import Teacher
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
    """Name parts from text; parts that get one name become one, and those that no text fits stay as they are, marked unsure.

    run: the folder in which `discover` left its parts; in Python also parts.
    ontology: what is called what, {prompt: class}; null is the background. A JSON file, "faces" (which ships), in Python also a dict; more in
        data/ontology.py.
    prompt: the same as words, "a photo of hair=hair"; "a wall=" is background. May be given beside an ontology.
    neutral: words that fit nothing in particular; a part that they fit best gets no name.
    templates: sentences for the prompts, "a photo of {}"; the average of several is more reliable than one.
    clip: text model, a name or a path. By default one made for the generator (faces64: "faces-clip") where it lies in
        ported_weights, else openai/clip-vit-base-patch32.
    gen: the generator of the parts, in Python; found by its name otherwise.
    recipe: "paper" is the setting of Segmentation in Style: RN50x64 on pictures of 2048 pixels. Settings given beside it win.
    mode: "dense" averages CLIP's features over the pixels of a part, "crop" shows it cut-out parts.
    size: pixels of the shorter side at which CLIP reads pictures in the mode "dense", 0 is what it prefers, usually
        twice what it was trained on.
    n: samples to look at.
    margin: a name is given only where its probability is ahead of the next by this much (0 = always).
    seed: of the samples.
    overwrite: throw away the names that another configuration gave.

    Returns the named Parts, the table of all scores is in RUN/parts/names.json. Raises UsageError for an ontology that cannot work, parts without a
    generator, or a text model that is not here; SisError for damaged weights.
    """
    from sis_jax.data.ontology import ontology_of
    from sis_jax.stages.naming import Naming, load_text_model, name_parts

    asked = {"clip": clip, "templates": templates, "mode": mode, "size": size, "n": n, "margin": margin, "seed": seed}
    resolved = _with_recipe(recipe, asked)
    words = ontology_of(ontology, prompt, neutral, resolved.pop("templates"))
    wanted = resolved.pop("clip")
    how = Naming(**resolved)
    teacher = _teacher(run, gen)
    model = load_text_model(wanted, teacher.gen.info.name)
    if not isinstance(run, str | Path):
        return name_parts(teacher, model, words, how).parts
    shown = {"run": run, "ontology": ontology, "prompt": prompt, "neutral": neutral, "recipe": recipe}
    return _as_stage(Path(run), teacher, model, words, how, cli.command("label", shown | _changed(asked)), overwrite)


def _with_recipe(recipe: str | None, asked: dict[str, Any]) -> dict[str, Any]:
    """What was asked, with the recipe's settings wherever that is the default."""
    from sis_jax.stages.naming import RECIPES
    from sis_jax.types import unknown_name

    if recipe is not None and recipe not in RECIPES:
        raise unknown_name("recipe", recipe, RECIPES)
    return asked | {k: v for k, v in RECIPES.get(recipe or "", {}).items() if k not in _changed(asked)}


def _changed(asked: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not the default."""
    defaults = {p.name: p.default for p in inspect.signature(label).parameters.values()}
    return {k: v for k, v in asked.items() if v is not defaults[k] and v != defaults[k]}


def _teacher(run: str | Path | Parts, gen: Generator | None) -> Teacher:
    """The generator that the parts were found in, with them."""
    from sis_jax.checkpoints import load_generator
    from sis_jax.data.parts import Parts
    from sis_jax.stages.teacher import Teacher
    from sis_jax.types import UsageError

    if isinstance(run, str | Path) and gen is None:
        return Teacher.from_run(run)
    parts = Parts.load(run) if isinstance(run, str | Path) else run
    if gen is not None:
        return Teacher.of(gen, parts)
    try:
        return Teacher.of(load_generator(parts.generator.name), parts)
    except UsageError as error:
        raise UsageError(
            f"the generator of these parts is not found by its name ({error}); give it: sis.label(parts, ontology, gen=gen)"
        ) from None


def _as_stage(run: Path, teacher: Teacher, model: CLIP, words: Ontology, how: Naming, command: str, overwrite: bool) -> Parts:
    """Name the parts of a run folder in place, with the table of scores beside them and the report made again."""
    from dataclasses import asdict

    from sis_jax.data.parts import Parts
    from sis_jax.runs.page import write_page
    from sis_jax.runs.run import RunFolder
    from sis_jax.stages.naming import name_parts

    config = {"clip": model.info.name, "ontology": asdict(words), **asdict(how)}
    inputs = {"generator": teacher.gen.info.sha256, "clip": model.info.sha256, "clusters": _digest(teacher.parts)}
    with RunFolder.open(run, overwrite) as folder:
        with folder.stage("label", config, inputs=inputs, generator=teacher.gen.info, command=command, late=True) as stage:
            if stage.done and any(c["score"] is not None for c in teacher.parts.classes):
                say(f"{run} already has these names; give --overwrite to find them again")
            else:  # also where the stage is done, but `discover` wrote its parts again since
                named = name_parts(teacher, model, words, how)
                for name, data in named.parts.files().items():
                    folder.write_bytes(f"parts/{name}", data)
                folder.write_json("parts/names.json", named.table())
                stage.files[:] = ["parts/names.json"]  # the parts are those of `discover`, which `overwrite` must not remove here
        write_page(folder.path)
        return Parts.load(folder.path)


def _digest(parts: Parts) -> str:
    """Which clusters there are, whatever they are called: the names are what this stage writes."""
    import hashlib

    digest = hashlib.sha256()
    for name in sorted(parts.arrays):
        digest.update(parts.arrays[name].tobytes())
    return digest.hexdigest()


def _plan(config: dict[str, Any]) -> dict[str, Any]:
    """Files, and figures for a ViT-B/32 at twice its native size on two processor cores."""
    run = config["run"]
    files = [f"{run}/parts/{n}" for n in ("classes.json", "names.json", "gallery.png")] + [f"{run}/report.html"]
    return {"files": files, "seconds": 8 + 0.6 * config["n"], "memory_bytes": 2.0e9}


def _results(parts: Any, config: dict[str, Any]) -> list[Path]:
    run = Path(config["run"])
    return [run / "parts" / "classes.json", run / "parts" / "names.json", run / "report.html"]


def _with_flag(verb: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`verb` for the command line, where one of its positional parameters is a flag."""

    @functools.wraps(verb)
    def door(**arguments: Any) -> Any:
        return verb(**arguments)

    signature = inspect.signature(verb)
    kinds = [p.replace(kind=p.KEYWORD_ONLY) if p.name == name else p for p in signature.parameters.values()]
    door.__signature__ = signature.replace(parameters=kinds)  # type: ignore[attr-defined]
    return door


def gathered(argv: Sequence[str], flag: str) -> list[str]:
    """`--prompt A --prompt B` as `--prompt A B`: both are natural to type, and of the first only the last would count."""
    rest: list[str] = []
    values: list[str] = []
    taking = False
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token.partition("=")
            taking = name == flag
            if taking:
                values += [value] if equals else []
                continue
        (values if taking else rest).append(token)
    return [*rest, *([flag, *values] if values else [])]


label.plan = _plan  # type: ignore[attr-defined]
label.results = _results  # type: ignore[attr-defined]
shell = _with_flag(label, "ontology")


if __name__ == "__main__":
    cli.use_cpu_cores()
    cli.main(shell, argv=gathered(sys.argv[1:], "--prompt"))
