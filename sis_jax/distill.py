"""Distil the parts into a segmenter for real photos: `python -m sis_jax.distill RUN`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sis_jax.runs import cli
from sis_jax.runs.config import door
from sis_jax.runs.configs.distill import DistillConfig

if TYPE_CHECKING:
    from sis_jax.stages.student import Student


@door(DistillConfig)
def distill(config: DistillConfig) -> Student:
    """Train a segmenter on generated images; stop it any time, the same command goes on where it
    stopped.

    Returns the Student. Raises UsageError for settings that cannot work.
    """
    from sis_jax.stages.distill import distill as work

    return work(config)


if __name__ == "__main__":
    cli.main(distill)
