"""Every stage, one after the other: `python -m sis_jax run [GEN | PHOTOS] --out RUN --budget 2h`.
Each stage resumes, so the command can be stopped and given again.
"""

from __future__ import annotations

from pathlib import Path

from sis_jax.runs import cli
from sis_jax.runs.config import door
from sis_jax.runs.configs.pipeline import RunConfig


@door(RunConfig, stage="sis_jax.stages.pipeline")
def run(config: RunConfig) -> Path:
    """From a generator, or a folder of photos, to a segmenter: plan, train (photos only), discover,
    synthesize, distill, predict (photos only), report.

    Returns the path of the report. Raises UsageError for inputs that a stage cannot work with, and
    for a budget that is too short.
    """
    from sis_jax.stages.pipeline import run as work

    return work(config)


if __name__ == "__main__":
    cli.main(run)
