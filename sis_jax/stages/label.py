"""The work of `sis_jax.label`; the comparison is in `stages/naming.py`."""

from __future__ import annotations

import hashlib
import shlex
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sis_jax import parallel
from sis_jax.checkpoints import hub, load_generator
from sis_jax.data.files import read_run, write_atomic
from sis_jax.data.ontology import ontology_of
from sis_jax.data.part_edits import PartEdits, read_edits, state_of
from sis_jax.data.part_summary import summary_of
from sis_jax.data.parts import Parts
from sis_jax.ops.progress import say
from sis_jax.runs.config import without
from sis_jax.runs.configs.label import RECIPES, LabelConfig
from sis_jax.runs.page import write_page
from sis_jax.runs.run import RunFolder
from sis_jax.stages.naming import default_clip, encode_prompts, load_text_model, name_parts
from sis_jax.stages.regions import trial
from sis_jax.stages.teacher import Teacher, load_parts
from sis_jax.types import Generator, UsageError, unknown_name


def label(config: LabelConfig) -> Parts:
    """As `sis_jax.label`, which explains the configuration."""
    return parallel.by_turns(_work, config, stored=isinstance(config.run, str | Path))


def _work(config: LabelConfig) -> Parts:
    if config.edits is not None:
        return _by_hand(config, read_edits(config.edits))
    asked, config = config, resolve(config)
    words = ontology_of(
        config.words.ontology, config.words.prompt, config.words.neutral, config.words.templates
    )
    teacher = _teacher(config.run, config.gen)
    model = load_text_model(config.clip, teacher.gen.info.name)
    if not isinstance(config.run, str | Path):
        return name_parts(teacher, model, words, config.naming).parts
    resolved = replace(
        config, clip=model.info.name, words=replace(config.words, ontology=asdict(words))
    )
    inputs = {
        "generator": teacher.gen.info.sha256,
        "clip": model.info.sha256,
        "clusters": _digest(teacher.parts),
    }
    # `discover` may have written its parts again since: then they have no scores, and are named
    # again although this stage is done.
    named = any(c["score"] is not None for c in teacher.parts.classes) or _edited(
        Path(config.run), teacher.parts
    )
    with RunFolder.open(config.run, config.overwrite) as run:
        with run.stage(
            resolved,
            given=asked,
            inputs=inputs,
            generator=teacher.gen.info,
            again=not named,
            late=True,
        ) as stage:
            if not stage.done:
                found = name_parts(teacher, model, words, config.naming)
                for name, data in found.parts.files().items():
                    run.write_bytes(f"parts/{name}", data)
                run.write_json("parts/names.json", found.table())
                # The parts are those of `discover`, which `overwrite` must not remove here.
                stage.files[:] = ["parts/names.json"]
        write_page(run.path)
        return Parts.load(run.path)


_EDITS, _FILE = "label edits ", "parts/edits.json"


def _by_hand(config: LabelConfig, edits: PartEdits) -> Parts:
    """Parts with the names of an edits.json. Each application is a stage of its own, "label edits
    2" after "label edits 1": it names the parts that the earlier ones left.
    """
    others = [name for name in config.changed() if name not in ("run", "edits", "overwrite")]
    if others:
        flag = others[0].replace("_", "-")
        raise UsageError(f"--edits gives the names, and takes no --{flag}: leave one of them out")
    if not isinstance(config.run, str | Path):
        return edits.apply(config.run)
    run = Path(config.run)
    parts = load_parts(run)
    stages = read_run(run)["stages"]
    records = [record for name, record in stages.items() if name.startswith(_EDITS)]
    done = sum(record.get("state") == "done" for record in records)
    applied = _edited(run, parts) and _stored(run).levels == edits.levels
    if applied and done == len(records):
        say(f"{run} already has the names of {config.edits}")
        return parts
    parts = parts if applied else edits.apply(parts)
    resolved, name = replace(config, edits=edits.content()), f"{_EDITS}{done + 1}"
    # A record that a killed process left is replaced.
    with RunFolder.open(run, overwrite=True) as folder:
        with folder.stage(resolved, given=config, name=name, generator=parts.generator):
            made = replace(edits, result=state_of(parts))
            folder.write_bytes(_FILE, made.dump())
            # The other files are those of `discover`; classes.json, the last, completes them.
            for file, data in parts.files().items():
                write_atomic(folder.path / "parts" / file, data)
        write_page(folder.path)
        return Parts.load(folder.path)


def _stored(run: Path) -> PartEdits:
    """The edits that were applied last; none where there is no such file."""
    return read_edits(run / _FILE) if (run / _FILE).exists() else PartEdits({})


def _edited(run: Path, parts: Parts) -> bool:
    """Whether the parts have the names that edits gave them."""
    return _stored(run).result == state_of(parts)


def resolve(config: LabelConfig) -> LabelConfig:
    """The configuration with the recipe's settings wherever the default was asked for."""
    if config.recipe is None:
        return config
    if config.recipe not in RECIPES:
        raise unknown_name("recipe", config.recipe, RECIPES)
    chosen = without(RECIPES[config.recipe], config.changed())

    def filled(group: Any) -> Any:
        return replace(group, **{k: v for k, v in chosen.items() if hasattr(group, k)})

    return replace(filled(config), words=filled(config.words), naming=filled(config.naming))


def _teacher(run: str | Path | Parts, gen: Generator | None) -> Teacher:
    """The generator that the parts were found in, with them."""
    if isinstance(run, str | Path) and gen is None:
        return Teacher.from_run(run)
    parts = load_parts(run) if isinstance(run, str | Path) else run
    if gen is not None:
        return Teacher.of(gen, parts)
    try:
        return Teacher.of(load_generator(parts.generator.name), parts)
    except UsageError as error:
        raise UsageError(
            f"the generator of these parts is not found by its name ({error}); give it: "
            "sis.label(parts, ontology, gen=gen)"
        ) from None


def _digest(parts: Parts) -> str:
    """The clusters, whatever their names, which this stage writes."""
    digest = hashlib.sha256()
    for name in sorted(parts.arrays):
        digest.update(parts.arrays[name].tobytes())
    return digest.hexdigest()


def plan(config: LabelConfig) -> dict[str, Any]:
    """Files, and what a trial takes."""
    record = _FILE if config.edits is not None else "parts/names.json"
    names = ("parts/classes.json", record, "parts/gallery.png", "report.html")
    files = [f"{config.run}/{n}" for n in names]
    if config.edits is not None:
        return {"files": files, "seconds": 1, "memory_bytes": 0.3e9}
    return {"files": files} | _tried(resolve(config))


def _tried(config: LabelConfig) -> dict[str, float]:
    """Seconds and bytes, from the text and a second's worth of samples; nothing where there are no
    parts yet, for crops, whose number the samples decide, and before a model was downloaded.
    """
    words, how = config.words, config.naming
    ontology = ontology_of(words.ontology, words.prompt, words.neutral, words.templates)
    try:
        teacher = _teacher(config.run, config.gen)
    except UsageError:
        return {}
    name = default_clip(teacher.gen.info.name) if config.clip is None else config.clip
    if how.mode == "crop" or (isinstance(name, str) and hub.is_name(name)):
        return {}
    began, model = time.perf_counter(), load_text_model(name, teacher.gen.info.name)
    encode_prompts(model, ontology)
    tried = trial(teacher, model, how)
    seconds = time.perf_counter() - began + (how.n - tried.read) * tried.each
    return {"seconds": seconds, "memory_bytes": tried.memory}


def results(parts: Parts, config: LabelConfig) -> list[Path]:
    run = Path(str(config.run))
    record = _FILE if config.edits is not None else "parts/names.json"
    return [run / "parts" / "classes.json", run / record, run / "report.html"]


def summary(parts: Parts, config: LabelConfig) -> list[str]:
    run = shlex.quote(str(config.run))
    return [*summary_of(parts), f"next: python -m sis_jax.synthesize {run} --n 10000"]
