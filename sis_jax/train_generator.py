"""Train a StyleGAN2 on a folder of photos: `python -m sis_jax.train_generator PHOTOS --out DIR`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sis_jax.runs import cli
from sis_jax.runs.config import door
from sis_jax.runs.configs.train_generator import TrainGeneratorConfig

if TYPE_CHECKING:
    from sis_jax.training.gan import Trained


@door(TrainGeneratorConfig)
def train_generator(config: TrainGeneratorConfig) -> Trained:
    """Train a StyleGAN2 on photos; stop it any time, the same command goes on where it stopped.

    Returns the averaged generator. Raises UsageError for settings that cannot work.
    """
    from sis_jax.stages.train_generator import train_generator as work

    return work(config)


if __name__ == "__main__":
    cli.main(train_generator)
