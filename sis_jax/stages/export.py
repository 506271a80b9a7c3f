"""The work of `sis_jax.export`."""

from __future__ import annotations

from pathlib import Path

from sis_jax.checkpoints.student import find, load_student
from sis_jax.data.blanks import write_blanks
from sis_jax.data.exports.formats import FORMATS, write_dataset
from sis_jax.data.folder import Dataset
from sis_jax.types import UsageError, unknown_name

STUDENT = ("jax", "onnx")


def export(
    run: str | Path,
    *,
    format: str = "coco",  # noqa: A002
    out: str | None = None,
    n: int | None = None,
    filled: bool = False,
    overwrite: bool = False,
) -> Path:
    """As `sis_jax.export`, which explains the arguments."""
    if format not in (*FORMATS, "blanks", *STUDENT):
        raise unknown_name("format", format, (*FORMATS, "blanks", *STUDENT))
    if format in STUDENT:
        _check(format, n, filled)
        return _export_student(run, format, Path(out) if out is not None else None, overwrite)
    place = Path(out) if out is not None else Path(run) / "exports" / format
    if format == "blanks":
        return write_blanks(
            run, place, n=16 if n is None else n, filled=filled, overwrite=overwrite
        )

    _check(format, n, filled)
    return write_dataset(format, Dataset.open(run), place, overwrite=overwrite)


def _export_student(run: str | Path, format: str, out: Path | None, overwrite: bool) -> Path:  # noqa: A002

    student = load_student(run)
    place = _student_file(run, format, out)
    if place.exists() and not overwrite:
        raise UsageError(f"{place} is there already: add --overwrite, or give another --out")
    return student.export(place)


def _student_file(run: str | Path, format: str, out: Path | None) -> Path:  # noqa: A002
    """Where the student goes; UsageError for one that does not exist, a place that cannot be, or
    one given by name, which has no run to write into.
    """
    find(run)
    if out is None and not Path(run).exists():
        raise UsageError(
            f"{run} is no run here to write into: give --out, such as --out "
            f"{Path(run).name}.{format}"
        )
    place = out or Path(run) / "exports" / f"student.{format}"
    if place.suffix.lower() != f".{format}":
        raise UsageError(
            f"{place} is to hold the student as {format}: give it a name that ends in .{format}"
        )
    if place.is_dir():
        raise UsageError(f"{place} is a folder, but the student is one file: give another --out")
    return place


def _check(format: str, n: int | None, filled: bool) -> None:  # noqa: A002
    if n is not None or filled:
        raise UsageError(
            f"--n and --filled belong to --format blanks, got them with {format}, which always "
            "writes everything"
        )


def results(folder: Path, config: object) -> list[Path]:
    return [folder]


def plan(config: dict) -> dict:
    run, format, out = config["run"], config["format"], config["out"]  # noqa: A001
    if format in STUDENT:
        return {"files": [str(_student_file(run, format, Path(out) if out is not None else None))]}
    return {"files": [out or f"{run}/exports/{format}"]}
