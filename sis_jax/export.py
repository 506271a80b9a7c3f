"""Write a run's dataset in another format: `python -m sis_jax export RUN --format coco|voc|yolo|hf|tfds|npz`, or as blanks to be painted."""

from __future__ import annotations

from pathlib import Path

from sis_jax.core import cli


def export(
    run: str | Path,
    *,
    format: str = "coco",  # noqa: A002
    out: str | None = None,
    n: int | None = None,
    filled: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the images and masks of a run in another format.

    run: a run, or a data folder.
    format: coco, voc, yolo (lossy, says by how much), hf, tfds, npz, tfrecord; or blanks, pictures to paint for `discover --method datasetgan`.
    out: folder to write; default RUN/exports/FORMAT.
    n: of blanks: how many pictures (16).
    filled: of blanks: start from the run's masks, to be corrected.
    overwrite: replace an earlier export there; painted blanks are never replaced.

    Returns the folder. Raises UsageError for a run without a dataset, an unknown format, or a folder that holds other things.
    """
    from sis_jax.data.formats import FORMATS

    if format not in (*FORMATS, "blanks"):
        from sis_jax.core.types import unknown_name

        raise unknown_name("format", format, (*FORMATS, "blanks"))
    place = Path(out) if out is not None else Path(run) / "exports" / format
    if format == "blanks":
        from sis_jax.data.blanks import write_blanks

        return write_blanks(run, place, n=16 if n is None else n, filled=filled, overwrite=overwrite)
    from sis_jax.data.folder import Dataset
    from sis_jax.data.formats import write_dataset

    _check(format, n, filled)
    return write_dataset(format, Dataset.open(run), place, overwrite=overwrite)


def _check(format: str, n: int | None, filled: bool) -> None:  # noqa: A002
    if n is not None or filled:
        from sis_jax.core.types import UsageError

        raise UsageError(f"--n and --filled belong to --format blanks, got them with {format}, which always writes the whole dataset")


def _results(folder: Path, config: object) -> list[Path]:
    return [folder]


def _plan(config: dict) -> dict:
    return {"files": [config["out"] or f"{config['run']}/exports/{config['format']}"]}


export.results = _results  # type: ignore[attr-defined]
export.plan = _plan  # type: ignore[attr-defined]


if __name__ == "__main__":
    cli.main(export)
