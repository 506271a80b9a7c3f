"""The work of `sis_jax.synthesize` (Segmentation in Style, section 3.3); format: `data/folder.py`.

Example i depends on its own seed and nothing else, so batches, devices, processes and interruptions
do not change a byte.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from sis_jax import parallel
from sis_jax.data.files import utf8
from sis_jax.data.folder import (
    CARD,
    CLASSES,
    METADATA,
    Dataset,
    Example,
    SplitWriter,
    classes_json,
    write_chunks,
)
from sis_jax.data.part_names import BACKGROUND
from sis_jax.data.threads import cores
from sis_jax.ops.progress import progress, say
from sis_jax.ops.sampling import probe
from sis_jax.runs.configs.synthesize import Images, SynthesizeConfig
from sis_jax.runs.run import RunFolder, Stage
from sis_jax.stages.teacher import Teacher
from sis_jax.types import UsageError

CHUNK = 128  # examples between two points from which a killed run goes on


def synthesize(config: SynthesizeConfig) -> Dataset:
    """As `sis_jax.synthesize`, which explains the configuration."""
    _check(config)
    process, processes = parallel.initialize()  # before anything touches a device
    with contextlib.ExitStack() as held:
        with parallel.together(processes):
            teacher, place = _teacher(config)
            classes = tuple(c["name"] for c in teacher.parts.classes)
            resolved = replace(config, images=_drawn(config, teacher), classes=classes)
            first = process == 0
            stage = held.enter_context(_stage(place, teacher, resolved, config)) if first else None
        with parallel.together(processes):
            _write_share(place / "data", teacher, resolved, process, processes)
        with parallel.together(processes):
            if stage is not None and not stage.done:
                _finish(place / "data", resolved, stage)
            held.close()
    return Dataset.open(place)


def _teacher(config: SynthesizeConfig) -> tuple[Teacher, Path]:
    """The generator with its labels, and the run folder to write to."""
    run, out = config.run, config.out
    if isinstance(run, str | Path):
        teacher, place = Teacher.from_run(run, config.level), Path(run if out is None else out)
    elif config.parts is None or out is None:
        raise UsageError(
            "a generator needs its parts and a folder: synthesize(gen, parts, out=...)"
        )
    else:
        parts = config.parts.level(config.level) if config.level else config.parts
        teacher, place = Teacher.of(run, parts), Path(out)
    teacher = teacher if config.images.mix is None else teacher.mixing(config.images.mix)
    return teacher, place.parent if place.name == "data" else place


def _drawn(config: SynthesizeConfig, teacher: Teacher) -> Images:
    """The options of the images with their truncation, that of the samples unless it is given."""
    psi = config.images.truncation
    return replace(config.images, truncation=teacher.truncation if psi is None else psi)


def _check(config: SynthesizeConfig) -> None:
    n, val, images = config.n, config.val, config.images
    if n < 2:
        raise UsageError(f"n is {n}, expected at least 2 images (10000 is the default)")
    if not 0 <= val < 1:
        raise UsageError(
            f"val is {val}, expected a share from 0 to below 1 (0.05 holds out one image in twenty)"
        )
    if images.truncation is not None and not 0 <= images.truncation <= 2:
        raise UsageError(f"truncation is {images.truncation}, expected 0 to 2 (0.7 is the paper's)")
    if images.seed < 0:
        raise UsageError(f"seed is {images.seed}, expected 0 or more")
    if images.mix is not None and not 0 <= images.mix <= 1:
        raise UsageError(f"mix is {images.mix}, expected a share of the images from 0 to 1")


@contextlib.contextmanager
def _stage(
    place: Path, teacher: Teacher, config: SynthesizeConfig, given: SynthesizeConfig
) -> Iterator[Stage]:
    """The first process holds the run folder, and writes classes and card."""
    inputs = {"generator": teacher.gen.info.sha256, "parts": teacher.parts.digest()}
    with (
        RunFolder.open(place, config.overwrite) as run,
        run.stage(config, given=given, inputs=inputs, generator=teacher.gen.info) as stage,
    ):
        found = teacher.parts.background.get("found", True)
        if not (found or BACKGROUND in teacher.parts.names):
            say(
                "the background was not found, so no pixel has class 0: see the warnings in "
                "report.html"
            )
        if not stage.done:
            if not stage.resumed:
                shutil.rmtree(place / "data", ignore_errors=True)
            run.write_bytes(f"data/{CLASSES}", classes_json(teacher.parts.classes))
            run.write_bytes(f"data/{CARD}", utf8(_card(teacher, config)))
        yield stage


def _finish(folder: Path, config: SynthesizeConfig, stage: Stage) -> None:
    """Put the metadata of all processes together."""
    for split, seeds in _splits(config).items():
        _writer(folder / split, len(seeds)).finish()
        stage.files.append(f"data/{split}/{METADATA}")


def _write_share(
    folder: Path, teacher: Teacher, config: SynthesizeConfig, process: int, processes: int
) -> None:
    """This process's chunks of every split: each `processes`-th one."""
    splits = _splits(config)
    todo = []
    for split, seeds in splits.items():
        writer = _writer(folder / split, len(seeds))
        todo += [
            (writer, chunk, seeds)
            for i, chunk in enumerate(writer.chunks())
            if i % processes == process and not writer.done(chunk)
        ]
    bar = progress(sum(map(len, splits.values())), "images", "img")
    bar.update(bar.total - sum(len(chunk) for _, chunk, _ in todo))
    drawn = _examples(teacher, [seeds[i] for _, chunk, seeds in todo for i in chunk], config)
    write_chunks([(writer, chunk) for writer, chunk, _ in todo], drawn, bar.update)
    bar.close()


def _examples(teacher: Teacher, seeds: list[int], config: SynthesizeConfig) -> Iterator[Example]:
    at = 0
    for images, masks, confidences in teacher.label(seeds, config.images.truncation):
        for image, mask, confidence in zip(images, masks, confidences):
            yield Example(
                "",
                image,
                mask,
                seeds[at],
                float(confidence.mean()),
                confidence if config.soft else None,
            )
            at += 1


def _splits(config: SynthesizeConfig) -> dict[str, range]:
    """The seeds of each split; an empty one is left out."""
    first, held = config.images.seed * 100_000, round(config.n * config.val)
    splits = {
        "train": range(first, first + config.n - held),
        "val": range(first + config.n - held, first + config.n),
    }
    return {name: seeds for name, seeds in splits.items() if len(seeds)}


def _writer(folder: Path, total: int) -> Any:
    return SplitWriter(folder, total, CHUNK)


def _card(teacher: Teacher, config: SynthesizeConfig) -> str:
    info, names = (
        teacher.gen.info,
        ", ".join(f"{c['id']} {c['name']}" for c in teacher.parts.classes),
    )
    annotated = "annotated" in teacher.fitted.method.wants
    learned = "learned from annotated images" if annotated else "found without labels"
    return (
        "---\nlicense: other\ntask_categories: [image-segmentation]\ntags: [synthetic, "
        "sis_jax]\n---\n# Generated images with masks\n\n"
        f"{config.n:,} images made by the generator {info.name} (psi "
        f"{config.images.truncation:g}) and masks by {teacher.parts.method}, "
        f"{learned}. No person, place or thing in them exists.\n\n"
        f"Licence: {info.licence} (it follows from the generator)\n\n"
        f"Classes: {names}. A mask's pixel is the class id, 0 is the background, 255 is to be "
        "ignored.\n\n"
        "`metadata.jsonl`: file names, the seed of the image, and `confidence`, the method's mean "
        "confidence over the "
        f"image's pixels (0..1).\n"
    )


def plan(config: SynthesizeConfig) -> dict[str, Any]:
    _check(config)
    out = Path(config.out or str(config.run))
    out = out if out.name == "data" else out / "data"
    files = [
        "classes.json",
        "README.md",
        *(
            f"{s}/{f}"
            for s in _splits(config)
            for f in ("images/*.png", "masks/*.png", "metadata.jsonl")
        ),
    ]
    return {"files": [f"{out}/{f}" for f in files]} | _tried(config)


def _tried(config: SynthesizeConfig) -> dict[str, float]:
    """Seconds and bytes, from a second's worth of images; nothing without parts."""
    try:
        teacher, _ = _teacher(config)
    except UsageError:
        return {}
    began, images = time.perf_counter(), _drawn(config, teacher)
    one = next(_examples(teacher, [0], replace(config, images=images)))
    with tempfile.TemporaryDirectory() as folder:
        at = time.perf_counter()
        SplitWriter(Path(folder), 1, 1).write_one(0, one)
        encoding = (time.perf_counter() - at) / cores()
    drawing = probe(teacher.label(range(2**16), images.truncation))
    # An accelerator draws while the cores encode, a CPU does both.
    cpu = jax.default_backend() == "cpu"
    each = drawing.each + encoding if cpu else max(drawing.each, encoding)
    waiting = 2 * cores() * (one.image.nbytes + one.mask.nbytes)
    return {
        "seconds": time.perf_counter() - began + config.n * each,
        "memory_bytes": drawing.memory + waiting,
    }


def results(data: Dataset, config: SynthesizeConfig) -> list[Path]:
    return [data.path]


def summary(data: Dataset, config: SynthesizeConfig) -> list[str]:
    known = [row["confidence"] for row in data.split("train").rows if row.get("confidence")]
    certainty = f"; mean confidence {sum(known) / len(known):.2f}" if known else ""
    place = shlex.quote(str(config.out or config.run))
    return [
        f"{len(data):,} images with masks of {', '.join(data.names.values())}{certainty}",
        f"next: python -m sis_jax.distill {place} --photos MY_PHOTOS/ (photos need no masks, and "
        "may be left out)",
    ]
