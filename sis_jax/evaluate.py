"""Measure masks on real photos: `python -m sis_jax.evaluate RUN --images DIR --masks DIR`, or
`--benchmark celebamask-hq --root DIR`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sis_jax.runs import cli
from sis_jax.runs.config import door
from sis_jax.runs.configs.evaluate import EvaluateConfig

if TYPE_CHECKING:
    from sis_jax.runs.metrics import Metrics


@door(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> Metrics:
    """Compare a run's masks with the ground truth: IoU, F, accuracy, borders, confusion, with
    intervals; no label is used unless a row states it.

    Returns `Metrics`; a run gets RUN/metrics/<name>.json and RUN/metrics.json. Raises UsageError
    for inputs that cannot be measured.
    """
    from sis_jax.stages.evaluate import evaluate as work

    return work(config)


if __name__ == "__main__":
    cli.main(evaluate)
