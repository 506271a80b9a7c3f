"""The work of `sis_jax.train_generator`.

The method is StyleGAN2 with adaptive augmentation (arXiv 1912.04958, 2006.06676); one step is in
`training/gan.py`. The loop around it is `training/generator_loop.py`; this file holds the
arguments, their checks, and the run folder.

    DIR/
    ├── run.json · curves.csv
    ├── samples/000123456.png    64 samples of the averaged generator, the same seeds every time
    ├── checkpoints/             Orbax; resuming is the default
    └── generator/               a weights folder: what `discover` and `load_generator` take
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sis_jax.models import stylegan2
from sis_jax.runs import cli
from sis_jax.runs.run import RunFolder
from sis_jax.training import gan
from sis_jax.training.generator_loop import Trainer
from sis_jax.types import UsageError

if TYPE_CHECKING:
    from sis_jax.models.stylegan2 import StyleGAN2


def train_generator(
    photos: str,
    *,
    out: str,
    resolution: int = 64,
    images: int = 5_000_000,
    start_from: str | None = None,
    batch: int = 32,
    channel_base: int = 16384,
    channel_max: int = 512,
    latent: int = 512,
    mapping_layers: int = 8,
    learning_rate: float = 0.0025,
    r1_gamma: float | None = None,
    path_length: float = 2.0,
    augment: Literal["ada", "none"] = "ada",
    mirror: bool = True,
    rows: int | None = None,
    holdout: int = 500,
    ema_images: float = 10_000.0,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    snapshot: int = 50_000,
    minutes: float | None = None,
    licence: str = "as the photos it was trained on",
    seed: int = 0,
    overwrite: bool = False,
) -> StyleGAN2:
    """As `sis_jax.train_generator`, which explains the arguments."""
    config = dict(locals())
    _check(config)
    with RunFolder.open(out, overwrite) as run:
        if overwrite:
            _discard(run.path)
        compared = {
            k: v for k, v in config.items() if k not in ("images", "minutes", "overwrite", "out")
        }
        with run.stage(
            "train_generator", compared, command=cli.command("train_generator", config), again=True
        ) as stage:
            trainer = Trainer(run, config)
            trainer.run()
            stage.record |= trainer.facts()
            return trainer.generator()


def _check(config: dict[str, Any]) -> None:
    least = dict.fromkeys(
        (
            "images",
            "batch",
            "latent",
            "mapping_layers",
            "channel_base",
            "channel_max",
            "snapshot",
            "holdout",
            "rows",
        ),
        1,
    )
    least |= dict.fromkeys(("r1_gamma", "path_length", "ema_images", "seed", "minutes"), 0)
    for name, bound in least.items():
        if config[name] is not None and config[name] < bound:
            raise UsageError(f"{name} is {config[name]}, expected at least {bound}")
    if config["learning_rate"] <= 0:
        raise UsageError(
            f"learning_rate is {config['learning_rate']}, expected a number above 0 (0.0025 is "
            "the papers')"
        )
    if config["batch"] % 4:
        raise UsageError(
            f"batch is {config['batch']}, expected a multiple of 4: the discriminator compares "
            "images in groups of four"
        )
    side = config["resolution"]
    if side < 8 or side & (side - 1):
        raise UsageError(
            f"resolution is {side}, expected 8, 16, 32, 64, ...: a StyleGAN2 doubles its way up "
            "from 4"
        )
    if config["channel_base"] < side:
        raise UsageError(
            f"channel_base is {config['channel_base']}, expected at least the resolution, {side}: "
            "that leaves one channel there"
        )


def _discard(folder: Path) -> None:
    for name in ("checkpoints", "samples", "generator"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "curves.csv").unlink(missing_ok=True)


def plan(config: dict[str, Any]) -> dict[str, Any]:
    """The seconds are those of two processor cores: 1.4e10 multiply-adds of the forward pass a
    second, as 22 pictures of the default's size are.
    """
    _check(config)

    work = gan.multiply_adds(
        stylegan2.channel_table(config["resolution"], config["channel_base"], config["channel_max"])
    )
    seconds = min(
        config["images"] * work / 1.4e10,
        60 * config["minutes"] if config["minutes"] else float("inf"),
    )
    files = ["run.json", "curves.csv", "samples/*.png", "checkpoints/", "generator/"]
    return {"files": files, "images": config["images"], "seconds": seconds}


def results(value: Any, config: Any) -> list[Path]:
    return [Path(config["out"]) / "generator"]
