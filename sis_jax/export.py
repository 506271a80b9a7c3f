"""Write a run's dataset in another format: `python -m sis_jax export RUN --format coco|voc|yolo|hf|tfds|npz`."""

from __future__ import annotations

from pathlib import Path

from sis_jax.core import cli


def export(run: str | Path, *, format: str = "coco", out: str | None = None, overwrite: bool = False) -> Path:  # noqa: A002
    """Write the images and masks of a run in another format.

    run: a run, or a data folder.
    format: coco, voc, yolo (lossy, says by how much), hf, tfds, npz, or tfrecord.
    out: folder to write; default RUN/exports/FORMAT.
    overwrite: replace an earlier export there.

    Returns the folder. Raises UsageError for a run without a dataset, an unknown format, or a folder that holds other things.
    """
    from sis_jax.data.folder import Dataset
    from sis_jax.data.formats import FORMATS, write_dataset

    if format not in FORMATS:
        from sis_jax.core.types import unknown_name

        raise unknown_name("format", format, FORMATS)
    place = Path(out) if out is not None else Path(run) / "exports" / format
    return write_dataset(format, Dataset.open(run), place, overwrite=overwrite)


def _results(folder: Path, config: object) -> list[Path]:
    return [folder]


def _plan(config: dict) -> dict:
    return {"files": [config["out"] or f"{config['run']}/exports/{config['format']}"]}


export.results = _results  # type: ignore[attr-defined]
export.plan = _plan  # type: ignore[attr-defined]


if __name__ == "__main__":
    cli.main(export)
