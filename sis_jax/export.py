"""Write a run's dataset in another format: `python -m sis_jax export RUN --format
coco|voc|yolo|hf|tfds|npz`, as blanks to be painted, or its student.
"""

from __future__ import annotations

from pathlib import Path

from sis_jax.runs import cli


@cli.hooks("sis_jax.stages.export", "results", "plan")
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

    run: a run, or a data folder; for the student also its name, such as "faces-student".
    format: coco, voc, yolo (lossy, says by how much), hf, tfds, npz, tfrecord; blanks, pictures to
        paint for `discover --method datasetgan`; or jax or onnx, the run's student as one portable
        file.
    out: folder to write; default RUN/exports/FORMAT. Of a student: the file; default
        RUN/exports/student.jax or student.onnx.
    n: of blanks: how many pictures (16).
    filled: of blanks: start from the run's masks, to be corrected.
    overwrite: replace an earlier export there; painted blanks are never replaced.

    Returns the folder or file. Raises UsageError for a run without a dataset or student, an unknown
    format, or a folder that holds other things.
    """
    from sis_jax.stages.export import export as work

    return work(run, format=format, out=out, n=n, filled=filled, overwrite=overwrite)


if __name__ == "__main__":
    cli.main(export)
