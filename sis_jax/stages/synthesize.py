"""The work of `sis_jax.synthesize`.

Section 3.3 of Segmentation in Style: pictures from random latents, masks by the method that found
the parts. What is written is in `data/folder.py`. Example i depends on its own seed and nothing
else, so batches, devices, processes and interruptions do not change a byte.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.experimental import multihost_utils

from sis_jax import parallel
from sis_jax.data.folder import CARD, CLASSES, METADATA, Dataset, Example, SplitWriter, classes_json
from sis_jax.ops.progress import progress, say
from sis_jax.runs import cli
from sis_jax.runs.run import RunFolder
from sis_jax.stages.teacher import Teacher
from sis_jax.types import UsageError

if TYPE_CHECKING:
    from sis_jax.data.parts import Parts
    from sis_jax.types import Generator

CHUNK = 128  # examples between two points from which a killed run goes on


def synthesize(
    run: str | Generator,
    parts: Parts | None = None,
    *,
    n: int = 10_000,
    out: str | None = None,
    val: float = 0.05,
    truncation: float | None = None,
    soft: bool = False,
    mix: float | None = None,
    seed: int = 1,
    overwrite: bool = False,
) -> Dataset:
    """As `sis_jax.synthesize`, which explains the arguments."""
    _check(n, val, truncation, seed, mix)
    process, processes = parallel.initialize()  # before anything touches a device
    if isinstance(run, str | Path):
        teacher, place, name = Teacher.from_run(run), Path(run if out is None else out), str(run)
    elif parts is None or out is None:
        raise UsageError(
            "a generator needs its parts and a folder: synthesize(gen, parts, out=...)"
        )
    else:
        teacher, place, name = Teacher.of(run, parts), Path(out), run.info.name
    teacher = teacher if mix is None else teacher.mixing(mix)
    place = place.parent if place.name == "data" else place
    if teacher.parts.background.get("found") is False:
        say(
            "the background was not found, so no pixel has class 0: see the warnings in report.html"
        )
    psi = teacher.truncation if truncation is None else truncation
    config = {
        "n": n,
        "val": val,
        "truncation": psi,
        "soft": soft,
        "seed": seed,
        "classes": [c["name"] for c in teacher.parts.classes],
    }
    config |= {} if mix is None else {"mix": mix}
    if process == 0:
        asked = {
            "run": name,
            "n": n,
            "val": val,
            "truncation": truncation,
            "soft": soft,
            "seed": seed,
        }
        _write_as_stage(
            place,
            teacher,
            config,
            overwrite,
            processes,
            asked | ({"out": out} if out else {}) | ({} if mix is None else {"mix": mix}),
        )
    else:
        _write_share(place / "data", teacher, config, process, processes)
    _wait_for_all(processes, "metadata")
    return Dataset.open(place)


def _check(
    n: int, val: float, truncation: float | None, seed: int, mix: float | None = None
) -> None:
    if n < 2:
        raise UsageError(f"n is {n}, expected at least 2 pictures (10000 is the default)")
    if not 0 <= val < 1:
        raise UsageError(
            f"val is {val}, expected a share from 0 to below 1 (0.05 keeps one picture in twenty)"
        )
    if truncation is not None and not 0 <= truncation <= 2:
        raise UsageError(f"truncation is {truncation}, expected 0 to 2 (0.7 is the paper's)")
    if seed < 0:
        raise UsageError(f"seed is {seed}, expected 0 or more")
    if mix is not None and not 0 <= mix <= 1:
        raise UsageError(f"mix is {mix}, expected a share of the pictures from 0 to 1")


def _write_as_stage(
    place: Path,
    teacher: Teacher,
    config: dict[str, Any],
    overwrite: bool,
    processes: int,
    asked: dict[str, Any],
) -> None:
    """The first process: it holds the run folder, writes classes and card, and puts the metadata
    together.
    """
    with RunFolder.open(place, overwrite) as run:
        inputs = {"generator": teacher.gen.info.sha256, "parts": teacher.parts.digest()}
        with run.stage(
            "synthesize",
            config,
            inputs=inputs,
            generator=teacher.gen.info,
            command=cli.command("synthesize", asked),
        ) as stage:
            if stage.done:
                say(
                    f"{place / 'data'} already holds this dataset; give --overwrite to write it "
                    "again"
                )
                return
            if not stage.resumed:
                shutil.rmtree(place / "data", ignore_errors=True)
            run.write_bytes(f"data/{CLASSES}", classes_json(teacher.parts.classes))
            run.write_bytes(f"data/{CARD}", _card(teacher, config).encode())
            _wait_for_all(processes, "folder")
            _write_share(place / "data", teacher, config, 0, processes)
            for split, seeds in _splits(config).items():
                _writer(place / "data" / split, len(seeds)).finish()
                stage.files.append(f"data/{split}/{METADATA}")


def _write_share(
    folder: Path, teacher: Teacher, config: dict[str, Any], process: int, processes: int
) -> None:
    """This process's chunks of every split: each `processes`-th one."""
    if process:
        _wait_for_all(processes, "folder")
    splits = _splits(config)
    todo = []
    for split, seeds in splits.items():
        writer = _writer(folder / split, len(seeds))
        todo += [
            (writer, chunk, seeds)
            for i, chunk in enumerate(writer.chunks())
            if i % processes == process and not writer.done(chunk)
        ]
    bar = progress(sum(map(len, splits.values())), "pictures", "img")
    bar.update(bar.total - sum(len(chunk) for _, chunk, _ in todo))
    for writer, chunk, seeds in todo:
        writer.write(chunk, _examples(teacher, [seeds[i] for i in chunk], config))
        bar.update(len(chunk))
    bar.close()
    _wait_for_all(processes, "pictures")


def _examples(teacher: Teacher, seeds: list[int], config: dict[str, Any]) -> Iterator[Example]:
    at = 0
    for images, masks, sure in teacher.label(seeds, config["truncation"]):
        for image, mask, certainty in zip(images, masks, sure):
            yield Example(
                "",
                image,
                mask,
                seeds[at],
                float(certainty.mean()),
                certainty if config["soft"] else None,
            )
            at += 1


def _splits(config: dict[str, Any]) -> dict[str, range]:
    """The seeds of each split; an empty one is left out."""
    first, held = config["seed"] * 100_000, round(config["n"] * config["val"])
    splits = {
        "train": range(first, first + config["n"] - held),
        "val": range(first + config["n"] - held, first + config["n"]),
    }
    return {name: seeds for name, seeds in splits.items() if len(seeds)}


def _writer(folder: Path, total: int) -> Any:
    return SplitWriter(folder, total, CHUNK)


def _wait_for_all(processes: int, where: str) -> None:
    """Wait until every process of the job has come this far."""
    if processes > 1:
        multihost_utils.sync_global_devices(f"sis_jax synthesize {where}")


def _card(teacher: Teacher, config: dict[str, Any]) -> str:
    info, names = (
        teacher.gen.info,
        ", ".join(f"{c['id']} {c['name']}" for c in teacher.parts.classes),
    )
    painted = "painted" in teacher.fitted.method.wants
    learned = "learned from pictures that somebody painted" if painted else "found without labels"
    return (
        "---\nlicense: other\ntask_categories: [image-segmentation]\ntags: [synthetic, "
        "sis_jax]\n---\n# Generated pictures with masks\n\n"
        f"{config['n']:,} pictures drawn by the generator {info.name} (psi "
        f"{config['truncation']:g}) and masks by {teacher.parts.method}, "
        f"{learned}. No person, place or thing in them exists.\n\n"
        f"Licence: {info.licence} (it follows from the generator)\n\n"
        f"Classes: {names}. A mask's pixel is the class id, 0 is the background, 255 is to be "
        "ignored.\n\n"
        "`metadata.jsonl`: file names, the seed of the picture, and `confidence`, the mean over "
        "the picture of how sure the method is of each "
        f"pixel (0..1).\n"
    )


def plan(config: dict[str, Any]) -> dict[str, Any]:
    _check(config["n"], config["val"], config["truncation"], config["seed"], config["mix"])
    out = Path(config["out"] or config["run"])
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
    return {
        "files": [f"{out}/{f}" for f in files],
        "seconds": 6 + config["n"] * 0.012,
        "memory_bytes": 1.0e9,
    }


def results(data: Any, config: dict[str, Any]) -> list[Path]:
    return [data.path]
