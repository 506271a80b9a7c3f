"""A training run of a generator in a folder: photos in, the loop of lazy phases, checkpoints that
resume to the same bits, a weights folder out.

The stage is `stages/train_generator.py`; one step is in `training/gan.py`.
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from sis_jax import parallel
from sis_jax.checkpoints import load_discriminator, load_generator, save_generator
from sis_jax.data import draw
from sis_jax.data.photos import Photos
from sis_jax.models import discriminator, stylegan2
from sis_jax.ops import wasserstein
from sis_jax.ops.augment import adjust_probability
from sis_jax.ops.progress import progress, progress_shown, say
from sis_jax.runs.run import RunFolder
from sis_jax.training import gan as training
from sis_jax.types import Info, SisError, UsageError, to_uint8

if TYPE_CHECKING:
    from sis_jax.models.stylegan2 import StyleGAN2

GRID_SEEDS, GRID_COLUMNS = range(64), 8
SWD_IMAGES = 2000
ADA_EVERY = 4  # steps between two corrections of the augmentation probability


@dataclass
class Trainer:
    """A training run in a folder: load or resume, loop, save."""

    run_folder: RunFolder
    config: dict[str, Any]
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        c = self.config
        # Each device needs whole groups of 4 for the minibatch standard deviation: with a small
        # batch some devices stay idle.
        self.devices = max(
            (d for d in range(1, parallel.device_count() + 1) if c["batch"] % (4 * d) == 0),
            default=1,
        )
        self.photos, self.held = self._read_photos()
        platform = jax.default_backend()
        dtype = (
            c["dtype"] if c["dtype"] != "auto" else ("float32" if platform == "cpu" else "bfloat16")
        )
        gamma = (
            c["r1_gamma"]
            if c["r1_gamma"] is not None
            else training.r1_gamma_for(c["resolution"], c["batch"])
        )
        self.recipe = training.Recipe(
            learning_rate=c["learning_rate"], r1_gamma=gamma, path_length=c["path_length"],
            ema_images=c["ema_images"], ema_rampup=None if c["start_from"] else 0.05, dtype=dtype,
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
            c["photos"], c["resolution"], mirror=c["mirror"],
            rows=slice(0, c["rows"]) if c["rows"] else None, cache=self.run_folder.path / "cache",
            progress=progress_shown(),
        )  # fmt: skip
        say(photos.summary())
        if len(photos) < 2 * c["batch"]:
            raise SisError(
                f"{len(photos)} photos are too few for batches of {c['batch']}: give at least "
                f"{2 * c['batch']}, or a smaller --batch"
            )
        return photos.holdout(min(c["holdout"], len(photos) // 5), seed=c["seed"])

    def _networks(self) -> tuple[Any, Any]:
        c = self.config
        if c["start_from"]:
            gen, disc = load_generator(c["start_from"]), load_discriminator(c["start_from"])
            if gen.resolution != c["resolution"]:
                raise UsageError(
                    f"{c['start_from']} draws {gen.resolution} pixels, asked for --resolution "
                    f"{c['resolution']}; they must be equal"
                )
            return gen, disc
        rng = np.random.default_rng(c["seed"])
        channels = stylegan2.channel_table(c["resolution"], c["channel_base"], c["channel_max"])
        shape = stylegan2.GeneratorConfig(
            c["resolution"],
            channels,
            c["latent"],
            c["latent"],
            mapping_layers=c["mapping_layers"],
            mapping_width=c["latent"],
        )
        judge = discriminator.DiscriminatorConfig(c["resolution"], channels)
        return stylegan2.StyleGAN2(shape, rng), discriminator.Discriminator(judge, rng)

    # the loop

    @property
    def images_seen(self) -> int:
        return self.step * self.config["batch"]

    def run(self) -> None:
        """Train until `images` or `minutes` is reached; save at every snapshot and at the end."""

        c, began = self.config, time.perf_counter()
        stop_at = None if c["minutes"] is None else began + 60 * c["minutes"]
        total = -(-c["images"] // c["batch"])
        if self.step >= total:
            say(f"already trained on {self.images_seen:,} images; raise --images to go on")
            return
        reference = wasserstein.SwdReference(np.asarray(self.held.images), seed=0)
        every = max(c["snapshot"] // c["batch"], 1)
        steps = self._steps(self.photos.batches(c["batch"], c["seed"], self.step))
        before, clock = self.seconds, time.perf_counter()
        say("compiling the training step (up to a minute or two the first time) ...")
        bar = progress(total * c["batch"], "training", "img")
        bar.update(self.images_seen)
        while self.step < total:
            facts = next(steps)
            self.step += 1
            bar.update(c["batch"])
            late = stop_at is not None and time.perf_counter() > stop_at
            if self.step % every == 0 or self.step == total or late:
                self.seconds = before + time.perf_counter() - clock
                self._snapshot(facts, reference)
                bar.set_postfix_str(
                    f"swd {self.curve[-1]['swd']:.2f}, p {float(self.state['augment']):.2f}"
                )
                if late:
                    break
        bar.close()
        self._save()

    def _steps(self, batches: Iterator[np.ndarray]) -> Iterator[dict[str, Any]]:
        """Run one step after another; yields what was measured (arrays still on the device)."""
        c, recipe = self.config, self.recipe
        graphs, root = (self.g_graph, self.d_graph), jax.random.key(c["seed"])
        signs: list[Any] = []
        average = jax.jit(training.average)

        def phase(body: Any, **static: Any) -> Any:
            if body is not training.g_regularise:
                static["augmented"] = (
                    float(self.state["augment"]) > 0
                )  # a second compilation, but no cost while nothing is augmented
            return parallel.map_devices(
                body,
                (None, None, 0),
                None,
                devices=self.devices,
                graphs=graphs,
                recipe=recipe,
                **static,
            )

        for step, real in enumerate(batches, start=self.step):
            keys = jax.random.split(jax.random.fold_in(root, step), 4)
            blocks, _ = parallel.shard(real, self.devices)
            facts: dict[str, Any] = {}
            order = [
                (training.g_main, True),
                (
                    training.g_regularise,
                    bool(recipe.path_length) and step % recipe.path_interval == 0,
                ),
            ]
            order += [
                (training.d_main, True),
                (training.d_regularise, step % recipe.r1_interval == 0),
            ]
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
                f"training diverged at {self.images_seen:,} images (loss is not a number); the "
                "last checkpoint is good: "
                f"run again with --r1-gamma {self.recipe.r1_gamma * 4:g} and --overwrite"
            )
        gen = self.generator()
        rows = [to_uint8(gen.sample(range(i, i + 100)).images) for i in range(0, SWD_IMAGES, 100)]
        fakes = np.concatenate(rows)
        row = {
            "images": self.images_seen,
            "seconds": round(self.seconds, 1),
            "swd": reference.distance(fakes)["average"],
        }
        row |= {"augment": float(self.state["augment"])} | numbers
        self.curve.append(row)
        grid = draw.grid(fakes[: len(GRID_SEEDS)], GRID_COLUMNS)
        self.run_folder.write_image(f"samples/{self.images_seen:09d}.png", grid)
        self.run_folder.write_bytes("curves.csv", self._curve_csv())
        self._save()

    def _curve_csv(self) -> bytes:
        columns = [
            "images",
            "seconds",
            "swd",
            "augment",
            "loss_g",
            "loss_d",
            "score_real",
            "score_fake",
            "sign_real",
            "r1",
            "path_length",
        ]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(self.curve)
        return text.getvalue().encode()

    def _manager(self) -> Any:
        if self._checkpoints is None:
            import orbax.checkpoint as ocp  # late: takes a second to import

            folder = (self.run_folder.path / "checkpoints").absolute()
            self._checkpoints = ocp.CheckpointManager(
                folder, options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
            )
        return self._checkpoints

    def _save(self) -> None:
        import orbax.checkpoint as ocp  # late: takes a second to import

        manager = self._manager()
        if manager.latest_step() == self.step:
            return
        arrays = jax.tree.map(np.asarray, self.state)
        meta = {"step": self.step, "seconds": self.seconds, "curve": self.curve}
        manager.save(
            self.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)
            ),
        )
        manager.wait_until_finished()
        self._export()

    def _resume(self) -> None:
        import orbax.checkpoint as ocp  # late: takes a second to import

        manager = self._manager()
        latest = manager.latest_step()
        if latest is None:
            return
        shapes = jax.tree.map(np.asarray, self.state)
        back = manager.restore(
            latest,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(shapes), meta=ocp.args.JsonRestore()
            ),
        )
        self.state = dict(back["state"])
        self.step, self.seconds, self.curve = (
            int(back["meta"]["step"]),
            float(back["meta"]["seconds"]),
            list(back["meta"]["curve"]),
        )
        say(f"resuming at {self.images_seen:,} images")

    # results

    def generator(self) -> StyleGAN2:
        """The averaged generator as it is now."""
        return training.join(self.g_graph, self.state["ema"], self.state["buffers"])

    def facts(self) -> dict[str, Any]:
        """What the record and the card say of the run."""
        device = jax.devices()[0]
        last = self.curve[-1] if self.curve else {}
        return {
            "images": self.images_seen, "training_seconds": round(self.seconds, 1),
            "photos": len(self.photos), "held_out": len(self.held),
            "skipped": len(self.photos.skipped),
            "device": f"{self.devices} x {device.device_kind} ({os.cpu_count()} cores)",
            "swd": last.get("swd"), "recipe": asdict(self.recipe),
        }  # fmt: skip

    def _export(self) -> None:
        """The weights folder: averaged generator and discriminator in half precision, with a card
        that says how they came about.
        """
        gen, disc = self.generator(), training.join(self.d_graph, self.state["d"], {})
        gen.info = Info(
            self.run_folder.path.resolve().name,
            self.config["licence"],
            f"trained on {Path(self.config['photos']).name}",
        )
        save_generator(
            gen,
            self.run_folder.path / "generator",
            disc,
            card=self._card(gen.info.name),
            dtype="float16",
        )

    def _card(self, name: str) -> str:
        facts = self.facts()
        before = (
            f", starting from the weights of {self.started_from}"
            if self.config["start_from"]
            else ""
        )
        rows = {
            "photos": f"{facts['photos']:,} of {Path(self.config['photos']).name}"
            + (", mirrored" if self.config["mirror"] else ""),
            "licence": self.config["licence"],
            "images seen": f"{facts['images']:,}{before}",
            "training": f"{facts['training_seconds']:,.0f} s on {facts['device']}",
            "sliced Wasserstein distance": f"{facts['swd']:.2f} (x 1000) between {SWD_IMAGES:,} "
            "samples at psi 1 and "
            f"{facts['held_out']:,} held-out photos",
            "recipe": ", ".join(f"{k} {v}" for k, v in facts["recipe"].items()),
        }
        table = "\n".join(f"| {k} | {v} |" for k, v in rows.items())
        return (
            f"---\nlibrary_name: sis_jax\ntags: [jax, flax, stylegan2]\n---\n# {name}\n\nA "
            "StyleGAN2 generator of "
            f"{self.config['resolution']} x {self.config['resolution']} pixels, with its "
            "discriminator, trained by `sis_jax`.\n\n"
            f"| | |\n|---|---|\n{table}\n\nIt draws what its photos show, with their biases. Load "
            "it: `sis_jax.load_generator(PATH)`.\n"
        )
