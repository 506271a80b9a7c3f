"""Segment real photos with a run's student: `python -m sis_jax.predict RUN PHOTOS --out DIR`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sis_jax.runs import cli
from sis_jax.runs.config import door
from sis_jax.runs.configs.predict import PredictConfig

if TYPE_CHECKING:
    from sis_jax.data.masks import Masks


@door(PredictConfig, needs={"out": "DIR, a folder for the masks"})
def predict(config: PredictConfig) -> Masks:
    """Segment photos: one mask each, at the photo's own size.

    Returns Masks. A photo that cannot be read is in `.skipped` with the reason. Raises UsageError
    where there is nothing to segment.
    """
    from sis_jax.stages.predict import predict as work

    return work(config)


if __name__ == "__main__":
    cli.main(predict)
