"""The work of `sis_jax.train_generator`.

The method is StyleGAN2 with adaptive augmentation (arXiv 1912.04958, 2006.06676); one step is in
`training/gan.py`, the training in `training/generator_loop.py`; this file holds the checks,
and all reading and writing of files.

    DIR/
    ├── run.json · curves.csv
    ├── samples/000123456.png    64 samples of the averaged generator, the same seeds every time
    ├── checkpoints/             Orbax; resuming is the default
    └── generator/               a weights folder for `discover` and `load_generator`
"""

from __future__ import annotations

import shlex
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sis_jax import parallel
from sis_jax.checkpoints import load_discriminator, load_generator, save_generator
from sis_jax.checkpoints.backbones import load_backbone
from sis_jax.data import draw
from sis_jax.data.decode import CROPS
from sis_jax.data.photos import Photos
from sis_jax.models import furrygan as models
from sis_jax.models import projected, stylegan2
from sis_jax.models.discriminator import ONE_BY_ONE, Discriminator, DiscriminatorConfig
from sis_jax.models.furrygan import FurryGAN
from sis_jax.models.projected import ProjectedDiscriminator
from sis_jax.models.stylegan2 import StyleGAN2
from sis_jax.ops.progress import say
from sis_jax.runs.configs.train_generator import Network, TrainGeneratorConfig
from sis_jax.runs.run import RunFolder
from sis_jax.training import furrygan, gan, generator_loop, quality
from sis_jax.training.gan import Trained
from sis_jax.training.generator_loop import GeneratorTraining, Job
from sis_jax.training.loop import Checkpoints, as_csv
from sis_jax.types import Info, SisError, UsageError

GRID_SEEDS, GRID_COLUMNS = 64, 8
COLUMNS = (
    "images", "seconds", *generator_loop.MEASURED, "swd", "augment", "loss_g", "loss_d",
    "score_real", "score_fake", "sign_real", "r1", "path_length",
)  # fmt: skip


_LEAST = {
    **dict.fromkeys(("images", "batch", "latent", "mapping_layers", "channel_base"), 1),
    **dict.fromkeys(("channel_max", "snapshot", "holdout", "rows"), 1),
    **dict.fromkeys(("r1_gamma", "path_length", "ema_images", "seed", "minutes", "patience"), 0),
}


def train_generator(config: TrainGeneratorConfig) -> Trained:
    """As `sis_jax.train_generator`, which explains the configuration."""
    return parallel.by_turns(_work, config)


def _work(config: TrainGeneratorConfig) -> Trained:
    _check(config)
    with RunFolder.open(config.out, config.overwrite) as run:
        if config.overwrite:
            _discard(run.path)
        with run.stage(config, again=True) as stage:
            job = _job(config, run.path / "cache")
            with closing(Checkpoints(run.path / "checkpoints", job.identity())) as checkpoints:
                training = GeneratorTraining(job, checkpoints)
                for fakes in training.snapshots():
                    _write(run, training, fakes, config)
            stage.record |= training.facts()
            earlier = (run.path / "samples").glob("*.png")  # of a process that was stopped, too
            stage.files += ["curves.csv", *(f"samples/{path.name}" for path in earlier)]
            return training.generator()


def _job(config: TrainGeneratorConfig, cache: Path) -> Job:
    """Photos, networks and hyper-parameters of a configuration."""
    net, train = config.network, config.train
    photos = _photos(config, cache)
    backbone = load_backbone()
    gen, disc = networks(net, train.seed, backbone)
    dtype = "bfloat16" if parallel.fast_in_bfloat16(jax.devices()[0]) else "float32"
    gamma = gan.r1_gamma_for(net.resolution, train.batch)
    recipe = gan.Recipe(
        learning_rate=train.learning_rate, path_length=0.0 if net.foreground else train.path_length,
        ema_images=train.ema_images, r1_gamma=gamma if train.r1_gamma is None else train.r1_gamma,
        ema_rampup=None if net.start_from else 0.05,
        dtype=dtype if net.dtype == "auto" else net.dtype,
    )  # fmt: skip
    return Job(
        gen, disc, *photos, recipe, train.batch, train.images, train.snapshot, train.minutes,
        train.patience,
        config.data.augment == "ada" and net.discriminator == "stylegan2", train.seed, backbone,
        _masks(config),
    )  # fmt: skip


def _masks(config: TrainGeneratorConfig) -> furrygan.Masks | None:
    """Hyper-parameters of a FurryGAN's masks, None for other generators."""
    if not config.network.foreground:
        return None
    ramp = furrygan.SHORT_RAMP if config.network.start_from else furrygan.RAMP
    growth = furrygan.EVERY * config.train.batch / ramp
    return furrygan.Masks(config.train.foreground_area, growth)


def _photos(config: TrainGeneratorConfig, cache: Path) -> tuple[Photos, Photos]:
    """(photos to train on, photos held out)."""
    data, batch = config.data, config.train.batch
    photos = Photos.open(
        config.photos, config.network.resolution, mirror=data.mirror,
        rows=slice(0, data.rows) if data.rows else None, crop=CROPS[data.fit], cache=cache,
    )  # fmt: skip
    say(photos.summary())
    if len(photos) < 2 * batch:
        raise SisError(
            f"{len(photos)} photos are too few for batches of {batch}: give at least "
            f"{2 * batch}, or a smaller --batch"
        )
    return photos.holdout(min(data.holdout, len(photos) // 5), seed=config.train.seed)


def networks(
    net: Network, seed: int, backbone: Any
) -> tuple[Trained, Discriminator | ProjectedDiscriminator]:
    """Generator and discriminator to begin with: stored ones, or random weights."""
    rng = np.random.default_rng(seed)
    gen = _started(net) if net.start_from else None
    channels = stylegan2.channel_table(net.resolution, net.channel_base, net.channel_max)
    if gen is None:
        shape = stylegan2.GeneratorConfig(
            net.resolution, channels, net.latent, net.latent, mapping_layers=net.mapping_layers,
            mapping_width=net.latent,
        )  # fmt: skip
        gen = StyleGAN2(shape, rng)
    if net.foreground and isinstance(gen, StyleGAN2):
        gen = models.around(gen, rng)
    if net.discriminator == "projected":
        judge = projected.config_for(backbone, net.resolution)
        return gen, ProjectedDiscriminator(judge, rng)
    if net.start_from:
        return gen, load_discriminator(net.start_from)
    return gen, Discriminator(DiscriminatorConfig(net.resolution, channels), rng)


def _started(net: Network) -> Trained:
    """The stored generator to begin with."""
    gen = load_generator(net.start_from)
    if isinstance(gen, FurryGAN) and not net.foreground:
        raise UsageError(f"{net.start_from} is a FurryGAN: add --foreground to go on from it")
    if not isinstance(gen, Trained):
        raise UsageError(
            f"{net.start_from} is a {type(gen).__name__}, expected a StyleGAN2: leave out "
            "--start-from to begin from random weights"
        )
    if gen.resolution != net.resolution:
        raise UsageError(
            f"{net.start_from} generates {gen.resolution} pixels, asked for --resolution "
            f"{net.resolution}; they must be equal"
        )
    return gen


def _write(
    run: RunFolder, training: GeneratorTraining, fakes: np.ndarray, config: TrainGeneratorConfig
) -> None:
    """The files of a snapshot: a grid of samples, the curve, and if it is the best so far the
    weights in half precision.
    """
    grid = draw.grid(draw.reduced(fakes[:GRID_SEEDS]), GRID_COLUMNS)
    run.write_image(f"samples/{training.images_seen:09d}.png", grid)
    columns = (*COLUMNS, *furrygan.COLUMNS) if config.network.foreground else COLUMNS
    run.write_bytes("curves.csv", as_csv(training.run.curve, columns))
    if not training.improved:
        return
    gen, name = training.generator(), run.path.resolve().name
    gen.info = Info(name, _licence(training, config), f"trained on {Path(config.photos).name}")
    save_generator(
        gen, run.path / "generator", training.discriminator(), dtype="float16",
        card=_card(name, training, config),
    )  # fmt: skip


def _licence(training: GeneratorTraining, config: TrainGeneratorConfig) -> str:
    """The terms of the photos, and those of the weights that the training began with."""
    if not config.network.start_from:
        return config.licence
    return f"{config.licence}; {training.job.gen.info.licence}"


def _card(name: str, training: GeneratorTraining, config: TrainGeneratorConfig) -> str:
    """The README.md of the weights folder: how they came about."""
    facts, origin = training.facts(), training.job.gen.info.name
    before = f", starting from the weights of {origin}" if config.network.start_from else ""
    rows = {
        "photos": f"{facts['photos']:,} of {Path(config.photos).name}"
        + (", mirrored" if config.data.mirror else ""),
        "licence": _licence(training, config),
        "images seen": f"{training.best['images']:,}{before}",
        "training": f"{facts['training_seconds']:,.0f} s on {facts['device']}",
        **_measured(training),
        "sliced Wasserstein distance": f"{facts['swd']:.2f} (x 1000) between "
        f"{training.judged:,} samples at psi 1 and {facts['held_out']:,} held-out photos",
        "recipe": ", ".join(f"{k} {v}" for k, v in facts["recipe"].items()),
    }
    table = "\n".join(f"| {k} | {v} |" for k, v in rows.items())
    kind = "FurryGAN" if config.network.foreground else "StyleGAN2"
    stored = "" if training.job.projected else ", with its discriminator"
    return (
        f"---\nlibrary_name: sis_jax\ntags: [jax, flax, {kind.lower()}]\n---\n# {name}\n\nA {kind} "
        f"generator of {config.network.resolution} x {config.network.resolution} pixels"
        f"{stored}, trained by `sis_jax`.\n\n| | |\n|---|---|\n{table}\n\nIts images "
        "have the biases of its photos. Load it: `sis_jax.load_generator(PATH)`.\n"
    )


def _measured(training: GeneratorTraining) -> dict[str, str]:
    """The rows of the card on the distance that decided, none where it was not measured."""
    best, backbone = training.best, training.job.backbone
    if "frechet" not in best:
        return {}
    reference = min(len(training.job.photos), quality.REFERENCE)
    return {
        "Fréchet distance": f"{best['frechet']:.2f} in the coarsest features of "
        f"{backbone.info.name} (not the FID), {len(training.job.held_out):,} samples at psi 1 at a "
        f"time against {reference:,} photos; {best['frechet_floor']:.2f} for held-out photos",
        "precision, recall": f"{best['precision']:.3f}, {best['recall']:.3f}",
    }


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
    if config.network.foreground and resolution >= ONE_BY_ONE:
        raise UsageError(
            f"--foreground trains generators of up to {ONE_BY_ONE // 2} pixels, asked for "
            f"--resolution {resolution}"
        )
    if not 0 <= config.train.foreground_area < 1:
        raise UsageError(
            f"foreground_area is {config.train.foreground_area}, expected 0 to 1 (0.35 is the "
            "paper's)"
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
    """Seconds at 1.4e10 multiply-adds of the forward pass a second, as on two cores."""
    _check(config)
    net, train = config.network, config.train
    table = stylegan2.channel_table(net.resolution, net.channel_base, net.channel_max)
    limit = 60 * train.minutes if train.minutes else float("inf")
    seconds = min(train.images * gan.multiply_adds(table) / 1.4e10, limit)
    files = ["run.json", "curves.csv", "samples/*.png", "checkpoints/", "generator/"]
    return {"files": files, "images": train.images, "seconds": seconds}


def results(value: Trained, config: TrainGeneratorConfig) -> list[Path]:
    return [Path(config.out) / "generator"]


def summary(value: Trained, config: TrainGeneratorConfig) -> list[str]:
    out = Path(config.out)
    return [
        f"a generator of {value.resolution} pixels: look at {out}/samples, and at its quality in "
        f"{out}/curves.csv",
        f"next: python -m sis_jax.discover {shlex.quote(str(out / 'generator'))} --out "
        f"{shlex.quote(f'{out}-parts')}",
    ]
