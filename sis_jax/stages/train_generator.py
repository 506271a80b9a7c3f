"""The work of `sis_jax.train_generator`.

The method is StyleGAN2 with adaptive augmentation (arXiv 1912.04958, 2006.06676); one step is in
`training/gan.py`, the training in `training/generator_loop.py`; this file holds the arguments,
their checks, and all reading and writing of files.

    DIR/
    ├── run.json · curves.csv
    ├── samples/000123456.png    64 samples of the averaged generator, the same seeds every time
    ├── checkpoints/             Orbax; resuming is the default
    └── generator/               a weights folder: what `discover` and `load_generator` take
"""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from sis_jax.checkpoints import load_discriminator, load_generator, save_generator
from sis_jax.data import draw
from sis_jax.data.photos import Photos
from sis_jax.models import stylegan2
from sis_jax.models.discriminator import Discriminator, DiscriminatorConfig
from sis_jax.models.stylegan2 import StyleGAN2
from sis_jax.ops.progress import progress_shown, say
from sis_jax.runs import cli
from sis_jax.runs.run import RunFolder
from sis_jax.training import gan, generator_loop
from sis_jax.training.generator_loop import GeneratorTraining, Job
from sis_jax.training.loop import Checkpoints, as_csv
from sis_jax.types import Info, SisError, UsageError

GRID_SEEDS, GRID_COLUMNS = 64, 8
COLUMNS = (
    "images", "seconds", "swd", "augment", "loss_g", "loss_d", "score_real", "score_fake",
    "sign_real", "r1", "path_length",
)  # fmt: skip


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
            job = _job(config, run.path / "cache")
            with closing(Checkpoints(run.path / "checkpoints", job.identity())) as checkpoints:
                training = GeneratorTraining(job, checkpoints)
                for fakes in training.snapshots():
                    _write(run, training, fakes, config)
            stage.record |= training.facts()
            return training.generator()


def _job(config: dict[str, Any], cache: Path) -> Job:
    """Photos, networks and hyper-parameters of a configuration."""
    c = config
    photos = _photos(c, cache)
    gen, disc = _networks(c)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    gamma = gan.r1_gamma_for(c["resolution"], c["batch"])
    recipe = gan.Recipe(
        learning_rate=c["learning_rate"], path_length=c["path_length"], ema_images=c["ema_images"],
        r1_gamma=gamma if c["r1_gamma"] is None else c["r1_gamma"],
        ema_rampup=None if c["start_from"] else 0.05,
        dtype=dtype if c["dtype"] == "auto" else c["dtype"],
    )  # fmt: skip
    return Job(
        gen, disc, *photos, recipe, c["batch"], c["images"], c["snapshot"], c["minutes"],
        adaptive=c["augment"] == "ada", seed=c["seed"],
    )  # fmt: skip


def _photos(c: dict[str, Any], cache: Path) -> tuple[Photos, Photos]:
    """(photos to train on, photos held out)."""
    photos = Photos.open(
        c["photos"], c["resolution"], mirror=c["mirror"],
        rows=slice(0, c["rows"]) if c["rows"] else None, cache=cache, progress=progress_shown(),
    )  # fmt: skip
    say(photos.summary())
    if len(photos) < 2 * c["batch"]:
        raise SisError(
            f"{len(photos)} photos are too few for batches of {c['batch']}: give at least "
            f"{2 * c['batch']}, or a smaller --batch"
        )
    return photos.holdout(min(c["holdout"], len(photos) // 5), seed=c["seed"])


def _networks(c: dict[str, Any]) -> tuple[StyleGAN2, Discriminator]:
    """Generator and discriminator to begin with: stored ones, or random weights."""
    if c["start_from"]:
        gen, disc = load_generator(c["start_from"]), load_discriminator(c["start_from"])
        if not isinstance(gen, StyleGAN2):
            raise UsageError(
                f"{c['start_from']} is a {type(gen).__name__}, expected a StyleGAN2: leave out "
                "--start-from to begin from random weights"
            )
        if gen.resolution != c["resolution"]:
            raise UsageError(
                f"{c['start_from']} draws {gen.resolution} pixels, asked for --resolution "
                f"{c['resolution']}; they must be equal"
            )
        return gen, disc
    rng = np.random.default_rng(c["seed"])
    channels = stylegan2.channel_table(c["resolution"], c["channel_base"], c["channel_max"])
    shape = stylegan2.GeneratorConfig(
        c["resolution"], channels, c["latent"], c["latent"], mapping_layers=c["mapping_layers"],
        mapping_width=c["latent"],
    )  # fmt: skip
    judge = DiscriminatorConfig(c["resolution"], channels)
    return StyleGAN2(shape, rng), Discriminator(judge, rng)


def _write(
    run: RunFolder, training: GeneratorTraining, fakes: np.ndarray, config: dict[str, Any]
) -> None:
    """The files of a snapshot: a grid of samples, the curve, and the weights folder in half
    precision.
    """
    grid = draw.grid(fakes[:GRID_SEEDS], GRID_COLUMNS)
    run.write_image(f"samples/{training.images_seen:09d}.png", grid)
    run.write_bytes("curves.csv", as_csv(training.run.curve, COLUMNS))
    gen, name = training.generator(), run.path.resolve().name
    gen.info = Info(name, config["licence"], f"trained on {Path(config['photos']).name}")
    save_generator(
        gen, run.path / "generator", training.discriminator(), dtype="float16",
        card=_card(name, training, config),
    )  # fmt: skip


def _card(name: str, training: GeneratorTraining, config: dict[str, Any]) -> str:
    """The README.md of the weights folder: how they came about."""
    facts, origin = training.facts(), training.job.gen.info.name
    before = f", starting from the weights of {origin}" if config["start_from"] else ""
    rows = {
        "photos": f"{facts['photos']:,} of {Path(config['photos']).name}"
        + (", mirrored" if config["mirror"] else ""),
        "licence": config["licence"],
        "images seen": f"{facts['images']:,}{before}",
        "training": f"{facts['training_seconds']:,.0f} s on {facts['device']}",
        "sliced Wasserstein distance": f"{facts['swd']:.2f} (x 1000) between "
        f"{generator_loop.SWD_IMAGES:,} samples at psi 1 and {facts['held_out']:,} held-out photos",
        "recipe": ", ".join(f"{k} {v}" for k, v in facts["recipe"].items()),
    }
    table = "\n".join(f"| {k} | {v} |" for k, v in rows.items())
    return (
        f"---\nlibrary_name: sis_jax\ntags: [jax, flax, stylegan2]\n---\n# {name}\n\nA StyleGAN2 "
        f"generator of {config['resolution']} x {config['resolution']} pixels, with its "
        f"discriminator, trained by `sis_jax`.\n\n| | |\n|---|---|\n{table}\n\nIt draws what its "
        "photos show, with their biases. Load it: `sis_jax.load_generator(PATH)`.\n"
    )


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
