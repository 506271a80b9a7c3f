"""The configuration of `sis_jax.export.export`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional

from sis_jax.runs.config import Config, Switch, spelled


@dataclass(frozen=True)
class ExportConfig(Config):
    """Which run, and which format.

    Args:
        run: a run, or a data folder; for the student also its name, such as "faces-student".
        format: coco, voc, yolo (lossy, reports by how much), hf, tfds, npz, tfrecord; blanks,
            images to annotate for `discover --method datasetgan`; or jax or onnx, the run's student
            as one portable file.
        out: folder to write; default RUN/exports/FORMAT. Of a student: the file; default
            RUN/exports/student.jax or student.onnx.
        n: of blanks: number of images (16).
        filled: of blanks: start from the run's masks, to be corrected.
        overwrite: replace an earlier export there; annotated blanks are never replaced.
    """

    verb: ClassVar[str] = "export"

    run: Annotated[str | Path, Positional, spelled("RUN")]
    _: KW_ONLY
    format: str = "coco"
    out: str | None = None
    n: int | None = None
    filled: Switch = False
    overwrite: Switch = False
