"""Write a run's dataset in another format: `python -m sis_jax export RUN --format
coco|voc|yolo|hf|tfds|npz`, as blanks to be annotated, or its student.
"""

from __future__ import annotations

from pathlib import Path

from sis_jax.runs import cli
from sis_jax.runs.config import door
from sis_jax.runs.configs.export import ExportConfig


@door(ExportConfig)
def export(config: ExportConfig) -> Path:
    """Write the images and masks of a run in another format.

    Returns the folder or file. Raises UsageError for a run without a dataset or student, an unknown
    format, or a folder that holds other things.
    """
    from sis_jax.stages.export import export as work

    return work(config)


if __name__ == "__main__":
    cli.main(export)
