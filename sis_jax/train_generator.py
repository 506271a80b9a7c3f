"""Train a StyleGAN2 on a folder of photos: `python -m sis_jax.train_generator PHOTOS --out DIR`.

The method is StyleGAN2 with adaptive augmentation (arXiv 1912.04958, 2006.06676); one step is in `nn/stylegan2_training.py`. This file holds what
surrounds it: photos, the schedule of lazy phases, checkpoints that resume to the same bits, pictures and a quality curve.

    DIR/
    ├── run.json · curves.csv
    ├── samples/000123456.png    64 samples of the averaged generator, the same seeds every time
    ├── checkpoints/             Orbax; resuming is the default
    └── generator/               a weights folder: what `discover` and `load_generator` take
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sis_jax.core import cli, draw
from sis_jax.core.types import SisError, UsageError, to_uint8
from sis_jax.data.photos import Photos
from sis_jax.data.run import RunFolder

if TYPE_CHECKING:
    from sis_jax.nn.stylegan2 import StyleGAN2

GRID_SEEDS, GRID_COLUMNS = range(64), 8
SWD_IMAGES = 2000
ADA_EVERY = 4  # steps between two corrections of the augmentation probability


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
    """Train a StyleGAN2 on photos; stop it any time, the same command goes on where it stopped.

    photos: a folder, a .zip, .tar or .npz of pictures; each is cut to its largest centred square.
    out: folder for everything that is made.
    resolution: side of the pictures the generator draws, a power of two.
    images: photos shown to the discriminator in all (25 million is the papers' figure, 1 million gives a first idea at 64 pixels).
    start_from: a generator with its discriminator to go on from (a name, a folder, a checkpoint file) instead of random weights.
    batch: images per step over all devices, a multiple of 4.
    channel_base: channels at resolution r are channel_base / r, at most channel_max.
    channel_max: see channel_base.
    latent: size of z and w.
    mapping_layers: depth of the mapping network.
    learning_rate: of Adam, before the correction for lazy regularisation.
    r1_gamma: weight of the gradient penalty; by default 0.0002 resolution^2 / batch.
    path_length: weight of path length regularisation, 0 switches it off.
    augment: "ada" augments what the discriminator sees as soon as it overfits, "none" never.
    mirror: also show every photo flipped.
    rows: use only the first so many photos, in the order of their names.
    holdout: photos kept apart to measure quality on.
    ema_images: half-life, in images, of the averaged generator.
    dtype: of the convolutions; auto is bfloat16 on an accelerator, float32 on a CPU.
    snapshot: images between two checkpoints, sample grids and points of the curve.
    minutes: stop after so long, whatever `images` says, and save.
    licence: terms of the weights; they follow from the photos.
    seed: of weights, latents and order.
    overwrite: throw away what another configuration left in `out`.

    Returns the averaged generator.
    """
    config = dict(locals())
    _check(config)
    with RunFolder.open(out, overwrite) as run:
        if overwrite:
            _discard(run.path)
        compared = {k: v for k, v in config.items() if k not in ("images", "minutes", "overwrite", "out")}
        with run.stage("train_generator", compared, command=cli.command("train_generator", config), again=True) as stage:
            trainer = Trainer(run, config)
            trainer.run()
            stage.record |= trainer.facts()
            return trainer.generator()


def _check(config: dict[str, Any]) -> None:
    least = dict.fromkeys(("images", "batch", "latent", "mapping_layers", "channel_base", "channel_max", "snapshot", "holdout", "rows"), 1)
    least |= dict.fromkeys(("r1_gamma", "path_length", "ema_images", "seed", "minutes"), 0)
    for name, bound in least.items():
        if config[name] is not None and config[name] < bound:
            raise UsageError(f"{name} is {config[name]}, expected at least {bound}")
    if config["learning_rate"] <= 0:
        raise UsageError(f"learning_rate is {config['learning_rate']}, expected a number above 0 (0.0025 is the papers')")
    if config["batch"] % 4:
        raise UsageError(f"batch is {config['batch']}, expected a multiple of 4: the discriminator compares images in groups of four")
    side = config["resolution"]
    if side < 8 or side & (side - 1):
        raise UsageError(f"resolution is {side}, expected 8, 16, 32, 64, ...: a StyleGAN2 doubles its way up from 4")
    if config["channel_base"] < side:
        raise UsageError(
            f"channel_base is {config['channel_base']}, expected at least the resolution, {side}: that leaves one channel there"
        )


def _discard(folder: Path) -> None:
    import shutil

    for name in ("checkpoints", "samples", "generator"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "curves.csv").unlink(missing_ok=True)


@dataclass
class Trainer:
    """A training run in a folder: load or resume, loop, save."""

    run_folder: RunFolder
    config: dict[str, Any]
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        import jax

        from sis_jax.core import parallel
        from sis_jax.nn import stylegan2_training as training

        c = self.config
        # Each device needs whole groups of 4 for the minibatch standard deviation: with a small batch some devices stay idle.
        self.devices = max((d for d in range(1, parallel.device_count() + 1) if c["batch"] % (4 * d) == 0), default=1)
        self.photos, self.held = self._read_photos()
        platform = jax.default_backend()
        dtype = c["dtype"] if c["dtype"] != "auto" else ("float32" if platform == "cpu" else "bfloat16")
        gamma = c["r1_gamma"] if c["r1_gamma"] is not None else training.r1_gamma_for(c["resolution"], c["batch"])
        self.recipe = training.Recipe(
            learning_rate=c["learning_rate"], r1_gamma=gamma, path_length=c["path_length"], ema_images=c["ema_images"],
            ema_rampup=None if c["start_from"] else 0.05, dtype=dtype,
        )  # fmt: skip
        gen, disc = self._networks()
        self.g_graph, self.d_graph, self.state = training.new_state(gen, disc, self.recipe)
        self.step, self.started_from = 0, getattr(gen.info, "name", "")
        self._checkpoints = None
        self._resume()

    # photos and networks

    def _read_photos(self) -> tuple[Photos, Photos]:
        c = self.config
        photos = Photos.open(
            c["photos"], c["resolution"], mirror=c["mirror"], rows=slice(0, c["rows"]) if c["rows"] else None,
            cache=self.run_folder.path / "cache", progress=cli.progress_shown(),
        )  # fmt: skip
        cli.say(photos.summary())
        if len(photos) < 2 * c["batch"]:
            raise SisError(
                f"{len(photos)} photos are too few for batches of {c['batch']}: give at least {2 * c['batch']}, or a smaller --batch"
            )
        return photos.holdout(min(c["holdout"], len(photos) // 5), seed=c["seed"])

    def _networks(self) -> tuple[Any, Any]:
        from sis_jax.nn import stylegan2, stylegan2_discriminator
        from sis_jax.weights import load_discriminator, load_generator

        c = self.config
        if c["start_from"]:
            gen, disc = load_generator(c["start_from"]), load_discriminator(c["start_from"])
            if gen.resolution != c["resolution"]:
                raise UsageError(
                    f"{c['start_from']} draws {gen.resolution} pixels, asked for --resolution {c['resolution']}; they must be equal"
                )
            return gen, disc
        rng = np.random.default_rng(c["seed"])
        channels = stylegan2.channel_table(c["resolution"], c["channel_base"], c["channel_max"])
        shape = stylegan2.GeneratorConfig(
            c["resolution"], channels, c["latent"], c["latent"], mapping_layers=c["mapping_layers"], mapping_width=c["latent"]
        )
        judge = stylegan2_discriminator.DiscriminatorConfig(c["resolution"], channels)
        return stylegan2.StyleGAN2(shape, rng), stylegan2_discriminator.Discriminator(judge, rng)

    # the loop

    @property
    def images_seen(self) -> int:
        return self.step * self.config["batch"]

    def run(self) -> None:
        """Train until `images` or `minutes` is reached; save at every snapshot and at the end."""
        from sis_jax.core import metrics

        c, began = self.config, time.perf_counter()
        stop_at = None if c["minutes"] is None else began + 60 * c["minutes"]
        total = -(-c["images"] // c["batch"])
        if self.step >= total:
            cli.say(f"already trained on {self.images_seen:,} images; raise --images to go on")
            return
        reference = metrics.SwdReference(np.asarray(self.held.images), seed=0)
        every = max(c["snapshot"] // c["batch"], 1)
        steps = self._steps(self.photos.batches(c["batch"], c["seed"], self.step))
        before, clock = self.seconds, time.perf_counter()
        cli.say("compiling the training step (up to a minute or two the first time) ...")
        bar = cli.progress(total * c["batch"], "training", "img")
        bar.update(self.images_seen)
        while self.step < total:
            facts = next(steps)
            self.step += 1
            bar.update(c["batch"])
            late = stop_at is not None and time.perf_counter() > stop_at
            if self.step % every == 0 or self.step == total or late:
                self.seconds = before + time.perf_counter() - clock
                self._snapshot(facts, reference)
                bar.set_postfix_str(f"swd {self.curve[-1]['swd']:.2f}, p {float(self.state['augment']):.2f}")
                if late:
                    break
        bar.close()
        self._save()

    def _steps(self, batches: Iterator[np.ndarray]) -> Iterator[dict[str, Any]]:
        """Run one step after another; yields what was measured (arrays still on the device)."""
        import jax

        from sis_jax.core import parallel
        from sis_jax.core.augment import adjust_probability
        from sis_jax.nn import stylegan2_training as training

        c, recipe = self.config, self.recipe
        graphs, root = (self.g_graph, self.d_graph), jax.random.key(c["seed"])
        signs: list[Any] = []
        average = jax.jit(training.average)

        def phase(body: Any, **static: Any) -> Any:
            if body is not training.g_regularise:
                static["augmented"] = float(self.state["augment"]) > 0  # a second compilation, but no cost while nothing is augmented
            return parallel.map_devices(body, (None, None, 0), None, devices=self.devices, graphs=graphs, recipe=recipe, **static)

        for step, real in enumerate(batches, start=self.step):
            keys = jax.random.split(jax.random.fold_in(root, step), 4)
            blocks, _ = parallel.shard(real, self.devices)
            facts: dict[str, Any] = {}
            order = [(training.g_main, True), (training.g_regularise, bool(recipe.path_length) and step % recipe.path_interval == 0)]
            order += [(training.d_main, True), (training.d_regularise, step % recipe.r1_interval == 0)]
            for key, (body, due) in zip(keys, order):
                if due:
                    self.state, measured = phase(body)(self.state, key, blocks)
                    facts |= measured
            decay = training.ema_decay(recipe, c["batch"], (step + 1) * c["batch"])
            self.state["ema"] = average(self.state["ema"], self.state["g"], decay)
            signs.append(facts["sign_real"])
            if c["augment"] == "ada" and (step + 1) % ADA_EVERY == 0:
                mean = float(np.mean([float(s) for s in signs]))
                p = adjust_probability(float(self.state["augment"]), mean, len(signs) * c["batch"])
                self.state["augment"] = np.float32(p)
                signs.clear()
            yield facts

    # saving and resuming

    def _snapshot(self, facts: dict[str, Any], reference: Any) -> None:
        numbers = {k: float(v) for k, v in facts.items()}
        if not np.isfinite(numbers["loss_d"]) or not np.isfinite(numbers["loss_g"]):
            raise SisError(
                f"training diverged at {self.images_seen:,} images (loss is not a number); the last checkpoint is good: "
                f"run again with --r1-gamma {self.recipe.r1_gamma * 4:g} and --overwrite"
            )
        gen = self.generator()
        rows = [to_uint8(gen.sample(range(i, i + 100)).images) for i in range(0, SWD_IMAGES, 100)]
        fakes = np.concatenate(rows)
        row = {"images": self.images_seen, "seconds": round(self.seconds, 1), "swd": reference.distance(fakes)["average"]}
        row |= {"augment": float(self.state["augment"])} | numbers
        self.curve.append(row)
        grid = draw.grid(fakes[: len(GRID_SEEDS)], GRID_COLUMNS)
        self.run_folder.write_image(f"samples/{self.images_seen:09d}.png", grid)
        self.run_folder.write_bytes("curves.csv", self._curve_csv())
        self._save()

    def _curve_csv(self) -> bytes:
        columns = ["images", "seconds", "swd", "augment", "loss_g", "loss_d", "score_real", "score_fake", "sign_real", "r1", "path_length"]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(self.curve)
        return text.getvalue().encode()

    def _manager(self) -> Any:
        if self._checkpoints is None:
            import orbax.checkpoint as ocp

            folder = (self.run_folder.path / "checkpoints").absolute()
            self._checkpoints = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True))
        return self._checkpoints

    def _save(self) -> None:
        import jax
        import orbax.checkpoint as ocp

        manager = self._manager()
        if manager.latest_step() == self.step:
            return
        arrays = jax.tree.map(np.asarray, self.state)
        meta = {"step": self.step, "seconds": self.seconds, "curve": self.curve}
        manager.save(self.step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)))
        manager.wait_until_finished()
        self._export()

    def _resume(self) -> None:
        import jax
        import orbax.checkpoint as ocp

        manager = self._manager()
        latest = manager.latest_step()
        if latest is None:
            return
        shapes = jax.tree.map(np.asarray, self.state)
        back = manager.restore(latest, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes), meta=ocp.args.JsonRestore()))
        self.state = dict(back["state"])
        self.step, self.seconds, self.curve = int(back["meta"]["step"]), float(back["meta"]["seconds"]), list(back["meta"]["curve"])
        cli.say(f"resuming at {self.images_seen:,} images")

    # results

    def generator(self) -> StyleGAN2:
        """The averaged generator as it is now."""
        from sis_jax.nn import stylegan2_training as training

        return training.join(self.g_graph, self.state["ema"], self.state["buffers"])

    def facts(self) -> dict[str, Any]:
        """What the record and the card say of the run."""
        import jax

        device = jax.devices()[0]
        last = self.curve[-1] if self.curve else {}
        return {
            "images": self.images_seen, "training_seconds": round(self.seconds, 1), "photos": len(self.photos), "held_out": len(self.held),
            "skipped": len(self.photos.skipped), "device": f"{self.devices} x {device.device_kind} ({os.cpu_count()} cores)",
            "swd": last.get("swd"), "recipe": asdict(self.recipe),
        }  # fmt: skip

    def _export(self) -> None:
        """The weights folder: averaged generator and discriminator in half precision, with a card that says how they came about."""
        from sis_jax.core.types import Info
        from sis_jax.nn import stylegan2_training as training
        from sis_jax.weights import save_generator

        gen, disc = self.generator(), training.join(self.d_graph, self.state["d"], {})
        gen.info = Info(self.run_folder.path.resolve().name, self.config["licence"], f"trained on {Path(self.config['photos']).name}")
        save_generator(gen, self.run_folder.path / "generator", disc, card=self._card(gen.info.name), dtype="float16")

    def _card(self, name: str) -> str:
        facts = self.facts()
        before = f", starting from the weights of {self.started_from}" if self.config["start_from"] else ""
        rows = {
            "photos": f"{facts['photos']:,} of {Path(self.config['photos']).name}" + (", mirrored" if self.config["mirror"] else ""),
            "licence": self.config["licence"],
            "images seen": f"{facts['images']:,}{before}",
            "training": f"{facts['training_seconds']:,.0f} s on {facts['device']}",
            "sliced Wasserstein distance": f"{facts['swd']:.2f} (x 1000) between {SWD_IMAGES:,} samples at psi 1 and {facts['held_out']:,} held-out photos",
            "recipe": ", ".join(f"{k} {v}" for k, v in facts["recipe"].items()),
        }
        table = "\n".join(f"| {k} | {v} |" for k, v in rows.items())
        return (
            f"---\nlibrary_name: sis_jax\ntags: [jax, flax, stylegan2]\n---\n# {name}\n\nA StyleGAN2 generator of "
            f"{self.config['resolution']} x {self.config['resolution']} pixels, with its discriminator, trained by `sis_jax`.\n\n"
            f"| | |\n|---|---|\n{table}\n\nIt draws what its photos show, with their biases. Load it: `sis_jax.load_generator(PATH)`.\n"
        )


def _plan(config: dict[str, Any]) -> dict[str, Any]:
    """The seconds are those of two processor cores: 1.4e10 multiply-adds of the forward pass a second, as 22 pictures of the default's size are."""
    _check(config)
    from sis_jax.nn import stylegan2, stylegan2_training

    work = stylegan2_training.multiply_adds(stylegan2.channel_table(config["resolution"], config["channel_base"], config["channel_max"]))
    seconds = min(config["images"] * work / 1.4e10, 60 * config["minutes"] if config["minutes"] else float("inf"))
    files = ["run.json", "curves.csv", "samples/*.png", "checkpoints/", "generator/"]
    return {"files": files, "images": config["images"], "seconds": seconds}


train_generator.plan = _plan  # type: ignore[attr-defined]
train_generator.results = lambda value, config: [Path(config["out"]) / "generator"]  # type: ignore[attr-defined]


if __name__ == "__main__":
    cli.use_cpu_cores()
    cli.main(train_generator)
