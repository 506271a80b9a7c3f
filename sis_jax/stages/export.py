"""The work of `sis_jax.export`."""

from __future__ import annotations

from pathlib import Path

from sis_jax import parallel
from sis_jax.checkpoints import catalogue
from sis_jax.checkpoints.student import find, load_student
from sis_jax.data.blanks import write_blanks
from sis_jax.data.exports.formats import FORMATS, write_dataset
from sis_jax.data.folder import Dataset
from sis_jax.runs.configs.export import ExportConfig
from sis_jax.types import UsageError, unknown_name

STUDENT = ("jax", "onnx")


def export(config: ExportConfig) -> Path:
    """As `sis_jax.export`, which explains the configuration."""
    process, processes = parallel.initialize()
    with parallel.together(processes):  # the first one writes
        return _work(config) if process == 0 else _place(config)


def _work(config: ExportConfig) -> Path:
    run, form = config.run, config.format
    if form not in (*FORMATS, "blanks", *STUDENT):
        raise unknown_name("format", form, (*FORMATS, "blanks", *STUDENT))
    if form in STUDENT:
        _check(config)
        return _export_student(config)
    catalogue.check_run(run)
    place = _place(config)
    if form == "blanks":
        n = 16 if config.n is None else config.n
        return write_blanks(run, place, n=n, filled=config.filled, overwrite=config.overwrite)
    _check(config)
    return write_dataset(form, Dataset.open(run), place, overwrite=config.overwrite)


def _place(config: ExportConfig) -> Path:
    if config.format in STUDENT:
        return _student_file(config)
    return Path(config.out or Path(config.run) / "exports" / config.format)


def _export_student(config: ExportConfig) -> Path:
    student = load_student(config.run)
    place = _student_file(config)
    if place.exists() and not config.overwrite:
        raise UsageError(f"{place} is there already: add --overwrite, or give another --out")
    return student.export(place)


def _student_file(config: ExportConfig) -> Path:
    """Where the student goes; UsageError for a missing one, or one by name, which has no run."""
    run, form = config.run, config.format
    find(run)
    if config.out is None and not Path(run).exists():
        raise UsageError(
            f"{run} is no run here to write into: give --out, such as --out {Path(run).name}.{form}"
        )
    place = Path(config.out or Path(run) / "exports" / f"student.{form}")
    if place.suffix.lower() != f".{form}":
        raise UsageError(
            f"{place} is to hold the student as {form}: give it a name that ends in .{form}"
        )
    if place.is_dir():
        raise UsageError(f"{place} is a folder, but the student is one file: give another --out")
    return place


def _check(config: ExportConfig) -> None:
    if config.n is not None or config.filled:
        raise UsageError(
            f"--n and --filled belong to --format blanks, got them with {config.format}, which "
            "always writes everything"
        )


def plan(config: ExportConfig) -> dict[str, list[str]]:
    if config.format in STUDENT:
        return {"files": [str(_student_file(config))]}
    return {"files": [config.out or f"{config.run}/exports/{config.format}"]}
