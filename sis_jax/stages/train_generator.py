"""The work of `sis_jax.train_generator`.

The method is StyleGAN2 with adaptive augmentation (arXiv 1912.04958, 2006.06676); one step is in
`training/gan.py`. The loop around it is `training/generator_loop.py`; this file holds the
checks and the run folder.

    DIR/
    ├── run.json · curves.csv
    ├── samples/000123456.png    64 samples of the averaged generator, the same seeds every time
    ├── checkpoints/             Orbax; resuming is the default
    └── generator/               a weights folder: what `discover` and `load_generator` take
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sis_jax.models import stylegan2
from sis_jax.models.stylegan2 import StyleGAN2
from sis_jax.runs.configs.train_generator import TrainGeneratorConfig
from sis_jax.runs.run import RunFolder
from sis_jax.training import gan
from sis_jax.training.generator_loop import Trainer
from sis_jax.types import UsageError

_LEAST = {
    **dict.fromkeys(("images", "batch", "latent", "mapping_layers", "channel_base"), 1),
    **dict.fromkeys(("channel_max", "snapshot", "holdout", "rows"), 1),
    **dict.fromkeys(("r1_gamma", "path_length", "ema_images", "seed", "minutes"), 0),
}


def train_generator(config: TrainGeneratorConfig) -> StyleGAN2:
    """As `sis_jax.train_generator`, which explains the configuration."""
    _check(config)
    with RunFolder.open(config.out, config.overwrite) as run:
        if config.overwrite:
            _discard(run.path)
        with run.stage(config, again=True) as stage:
            trainer = Trainer(run, config.flat())
            trainer.run()
            stage.record |= trainer.facts()
            return trainer.generator()


def _check(config: TrainGeneratorConfig) -> None:
    for name, value in config.flat().items():
        if name in _LEAST and value is not None and value < _LEAST[name]:
            raise UsageError(f"{name} is {value}, expected at least {_LEAST[name]}")
    rate, batch = config.train.learning_rate, config.train.batch
    if rate <= 0:
        raise UsageError(
            f"learning_rate is {rate}, expected a number above 0 (0.0025 is the papers')"
        )
    if batch % 4:
        raise UsageError(
            f"batch is {batch}, expected a multiple of 4: the discriminator compares images in "
            "groups of four"
        )
    resolution, base = config.network.resolution, config.network.channel_base
    if resolution < 8 or resolution & (resolution - 1):
        raise UsageError(
            f"resolution is {resolution}, expected 8, 16, 32, 64, ...: a StyleGAN2 doubles its way "
            "up from 4"
        )
    if base < resolution:
        raise UsageError(
            f"channel_base is {base}, expected at least the resolution, {resolution}: that leaves "
            "one channel there"
        )


def _discard(folder: Path) -> None:
    for name in ("checkpoints", "samples", "generator"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "curves.csv").unlink(missing_ok=True)


def plan(config: TrainGeneratorConfig) -> dict[str, Any]:
    """The seconds are those of two processor cores: 1.4e10 multiply-adds of the forward pass a
    second, as 22 images of the default's resolution are.
    """
    _check(config)
    net, train = config.network, config.train
    table = stylegan2.channel_table(net.resolution, net.channel_base, net.channel_max)
    limit = 60 * train.minutes if train.minutes else float("inf")
    seconds = min(train.images * gan.multiply_adds(table) / 1.4e10, limit)
    files = ["run.json", "curves.csv", "samples/*.png", "checkpoints/", "generator/"]
    return {"files": files, "images": train.images, "seconds": seconds}


def results(value: StyleGAN2, config: TrainGeneratorConfig) -> list[Path]:
    return [Path(config.out) / "generator"]
