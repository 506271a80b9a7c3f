"""The training of a StyleGAN2 on photos: lazy phases, augmentation, quality at every snapshot."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from sis_jax import parallel
from sis_jax.data.photos import Photos
from sis_jax.models.discriminator import ONE_BY_ONE, Discriminator
from sis_jax.models.projected import ProjectedDiscriminator
from sis_jax.ops import plan
from sis_jax.ops.augment import adjust_probability
from sis_jax.ops.progress import say
from sis_jax.ops.sampling import collect, image_only
from sis_jax.ops.wasserstein import SwdReference
from sis_jax.training import furrygan, gan, projected
from sis_jax.training.gan import Trained
from sis_jax.training.loop import Checkpoints, Course, Training, loop, on_devices
from sis_jax.training.quality import LEAST, Quality, spread

SWD_IMAGES = 2000  # of up to 256 pixels; of larger ones as many as have the same memory
CRITERION = "frechet"  # the column of the curve that decides which snapshot is kept
# Distances this close are equal, and the later snapshot is the better one: of street photos, far
# from the floor, noise came to 1,523 and blurred people, after half as many images more, to 1,546.
TIE = 0.05
DISTANCES = ("frechet", "kernel")  # the columns that have a floor
MEASURED = tuple(name for base in DISTANCES for name in (base, f"{base}_floor"))
MEASURED += ("precision", "recall")
ADA_EVERY = 4  # steps between two corrections of the augmentation probability


@dataclass(frozen=True)
class Job:
    """The training job. gen, disc: the networks to begin with.

    photos, held_out: to train on, and to measure quality on. batch: images per step over all
        devices. images: shown to the discriminator in all. snapshot: between two snapshots.
        minutes: stop after so long. patience: stop after so many snapshots without a better one, 0
        never. adaptive: augment as soon as the discriminator overfits. backbone: whose features
        judge a snapshot, and a projected discriminator uses; without one the last counts as the
        best. masks: of a FurryGAN's training.
    """

    gen: Trained
    disc: Discriminator | ProjectedDiscriminator
    photos: Photos
    held_out: Photos
    recipe: gan.Recipe
    batch: int
    images: int
    snapshot: int
    minutes: float | None
    patience: int
    adaptive: bool
    seed: int
    backbone: Any = None
    masks: furrygan.Masks | None = None

    @property
    def projected(self) -> bool:
        """Whether the discriminator is a projected one."""
        return isinstance(self.disc, ProjectedDiscriminator)

    def identity(self) -> dict[str, Any]:
        """The settings that a checkpoint must share, for JSON; the precision may change."""
        recipe = {k: v for k, v in asdict(self.recipe).items() if k != "dtype"}
        found = {
            "generator": asdict(self.gen.config), "discriminator": asdict(self.disc.config),
            "recipe": recipe, "batch": self.batch, "adaptive": self.adaptive, "seed": self.seed,
        }  # fmt: skip
        return found if self.masks is None else found | {"masks": asdict(self.masks)}


class GeneratorTraining:
    """A job on its way, from its last checkpoint where there is one."""

    def __init__(self, job: Job, checkpoints: Checkpoints):
        self.job, self.checkpoints = job, checkpoints
        # Each device needs whole groups of 4 for the minibatch standard deviation: with a small
        # batch some devices stay idle.
        self.devices = parallel.devices_for(job.batch, group=4)
        self.graphs, state = _begun(job)
        found = checkpoints.restore(state, best=_networks(state))
        self.run = found or Training(state)
        self.run.facts.setdefault("signs", [])  # of scores of photos, since the last correction
        self.p = float(self.run.state["augment"])  # on the host too: reading it back would wait
        if found:
            say(f"resuming at {self.images_seen:,} images")

    @property
    def images_seen(self) -> int:
        """Photos shown to the discriminator so far."""
        return self.run.step * self.job.batch

    @property
    def judged(self) -> int:
        """Samples of a snapshot."""
        return max(min(SWD_IMAGES, SWD_IMAGES * 256**2 // self.job.gen.resolution**2), 64)

    def snapshots(self) -> Iterator[UInt8[np.ndarray, "n r r 3"]]:
        """Train until `images` or `minutes`, or until `patience` is lost; yields samples of the
        averaged generator and a row of the curve at every snapshot, then writes the checkpoint.
        """
        job, total = self.job, -(-self.job.images // self.job.batch)
        if self.run.step >= total or self.exhausted:
            cure = "give --patience 0" if self.exhausted else "raise --images"
            say(f"already trained on {self.images_seen:,} images; {cure} to go on")
            return
        stop_at = np.inf if job.minutes is None else time.perf_counter() + 60 * job.minutes
        quality = self._quality()
        reference = SwdReference(np.asarray(job.held_out.images), seed=0)
        say("compiling the training step (up to a minute or two the first time) ...")
        course = Course(
            total, max(job.snapshot // job.batch, 1), losses=("loss_d", "loss_g"),
            stop=lambda: time.perf_counter() > stop_at or self.exhausted,
            cure=f"run again with {_steadier(job)} and --overwrite", unit=("img", job.batch),
            show=_shown,
        )  # fmt: skip
        batches = partial(job.photos.batches, job.batch, job.seed)
        for _, facts in loop(self.run, self._step, batches, course, self.checkpoints, self.devices):
            fakes = self._samples()
            row = {"images": self.images_seen, "seconds": round(self.run.seconds, 1)}
            row |= {"swd": reference.distance(fakes)["average"], "augment": self.p}
            if quality is not None:
                row |= quality.measure(fakes)
                row |= {f"{name}_floor": quality.floor[name] for name in DISTANCES}
            self.run.curve.append(row | facts)
            if self.improved and quality is not None:
                self.run.kept["best"] = _networks(self.run.state)
            yield fakes
            if self.exhausted:
                say(
                    f"stopped: none of the last {job.patience} snapshots is better than that at "
                    f"{self.least['images']:,} images; that at {self.best['images']:,} is kept; "
                    "--patience 0 goes on"
                )

    def _quality(self) -> Quality | None:
        """None where there is no backbone, or too few photos are held out."""
        job = self.job
        if job.backbone is None or len(job.held_out) < LEAST:
            return None
        photos = job.photos.images[spread(len(job.photos))]
        return Quality(job.backbone, photos, np.asarray(job.held_out.images[: self.judged]))

    @property
    def least(self) -> dict[str, Any]:
        """The row of the curve with the least distance, the last one where none was measured."""
        measured = [row for row in self.run.curve if CRITERION in row]
        return min(measured, key=lambda row: row[CRITERION]) if measured else self.run.curve[-1]

    @property
    def best(self) -> dict[str, Any]:
        """The last row of the curve whose distance is the least one but for `TIE`."""
        least = self.least
        if CRITERION not in least:
            return least
        most = (1 + TIE) * least[CRITERION]
        return [row for row in self.run.curve if row.get(CRITERION, np.inf) <= most][-1]

    @property
    def improved(self) -> bool:
        """Whether the last snapshot is the best one."""
        return self.best is self.run.curve[-1]

    @property
    def exhausted(self) -> bool:
        """Whether so many snapshots as `patience` allows came after the one of least distance."""
        if not (self.job.patience and self.run.curve):
            return False
        since = sum(row["images"] > self.least["images"] for row in self.run.curve)
        return since >= self.job.patience

    def _samples(self) -> UInt8[np.ndarray, "n r r 3"]:
        return collect(self._now(), range(self.judged), image_only)

    def _step(
        self, state: gan.State, step: int, real: UInt8[np.ndarray, "b r r 3"]
    ) -> tuple[gan.State, dict[str, Any]]:
        """One step of all phases that are due, of the average, and of the augmentation."""
        job = self.job
        key = jax.random.fold_in(jax.random.key(job.seed), step)
        keys = [*jax.random.split(key, 4), jax.random.fold_in(key, 4)]
        blocks, _ = parallel.shard(real, self.devices)
        facts: dict[str, Any] = {}
        for key, phase in zip(keys, self._phases(step)):
            if phase is not None:
                state, measured = phase(state, key, blocks)
                facts |= measured
                settle(state, job.gen)
        decay = gan.ema_decay(job.recipe, job.batch, (step + 1) * job.batch)
        state["ema"] = _average(state["ema"], state["g"], decay)
        if job.adaptive:
            state["augment"] = self._augmentation(state["augment"], step, facts["sign_real"])
        return state, facts

    def measured(self, real: UInt8[np.ndarray, "b r r 3"]) -> tuple[float, float, int]:
        """(seconds of the first step with its compilation, seconds of a mean step, bytes of a step
        beside the state), for a plan. Nothing of this training changes but its augmentation.
        """
        state, seconds = on_devices(self.run.state, self.devices), []
        for step in (0, 0, 1):  # all phases are due in step 0, only the main ones in step 1
            began = time.perf_counter()
            jax.block_until_ready(self._step(state, step, real))
            seconds.append(time.perf_counter() - began)
        first, whole, main = seconds
        recipe = self.job.recipe
        interval = recipe.path_interval if recipe.path_length else recipe.r1_interval
        lazy = max(whole - main, 0.0) / interval
        body = partial(projected.step if self.job.projected else _d_augmented, **self._fixed)
        return first, main + lazy, plan.bytes_of(body, self.run.state, jax.random.key(0), real)

    @property
    def _fixed(self) -> dict[str, Any]:
        """What every phase is compiled for."""
        job = self.job
        fixed = {"graphs": self.graphs, "recipe": job.recipe}
        if job.projected:
            return fixed
        return fixed | {"at_once": gan.images_at_once(job.gen, jax.default_backend())}

    def _phases(self, step: int) -> list[Callable[..., Any] | None]:
        """G main, G regularisation, D main, D regularisation, a FurryGAN's masks; None where one is
        not due. A projected discriminator has one phase.
        """
        recipe, augmented = self.job.recipe, self.p > 0
        run = partial(
            parallel.map_devices, in_axes=(None, None, 0), out_axes=None, devices=self.devices,
            **self._fixed,
        )  # fmt: skip
        masks = self.job.masks
        due = masks is not None and step % furrygan.EVERY == furrygan.EVERY - 1
        last = [run(furrygan.step, masks=masks) if due else None]
        if self.job.projected:
            return [run(projected.step), None, None, None, *last]
        # `augmented` costs a second compilation, but nothing while nothing is augmented.
        g_due = recipe.path_length and step % recipe.path_interval == 0
        d_due = step % recipe.r1_interval == 0
        return [
            run(gan.g_main, augmented=augmented),
            run(gan.g_regularise) if g_due else None,
            run(gan.d_main, augmented=augmented),
            run(gan.d_regularise, augmented=augmented) if d_due else None,
            *last,
        ]

    def _augmentation(self, p: jax.Array, step: int, sign: jax.Array) -> jax.Array:
        """The augmentation probability after a step; it waits every `ADA_EVERY` steps only."""
        signs = self.run.facts["signs"]
        signs.append(sign)
        if (step + 1) % ADA_EVERY:
            return p
        mean = float(np.mean([float(s) for s in signs]))
        self.p = float(adjust_probability(self.p, mean, len(signs) * self.job.batch))
        signs.clear()
        return on_devices(np.float32(self.p), self.devices)

    def _now(self) -> Trained:
        """The averaged generator of this step."""
        return gan.join(self.graphs[0], self.run.state["ema"], self.run.state["buffers"])

    def generator(self) -> Trained:
        """The averaged generator of the best snapshot."""
        kept = self.run.kept.get("best", self.run.state)
        return gan.join(self.graphs[0], kept["ema"], kept["buffers"])

    def discriminator(self) -> Discriminator | None:
        """The discriminator of the best snapshot, None for a projected one: it is not stored."""
        if self.job.projected:
            return None
        return gan.join(self.graphs[1], self.run.kept.get("best", self.run.state)["d"], {})

    def facts(self) -> dict[str, Any]:
        """The facts of the training in the record and the card."""
        job, device = self.job, jax.devices()[0]
        best = self.best if self.run.curve else {}
        return {
            "images": self.images_seen, "training_seconds": round(self.run.seconds, 1),
            "photos": len(job.photos), "held_out": len(job.held_out),
            "skipped": len(job.photos.skipped),
            "device": f"{self.devices} x {device.device_kind} ({os.cpu_count()} cores)",
            "swd": best.get("swd"),
            "best": {k: best[k] for k in ("images", *MEASURED) if k in best},
            "recipe": asdict(job.recipe),
        }  # fmt: skip


def _begun(job: Job) -> tuple[tuple[Any, ...], gan.State]:
    """(structures of the networks, state) at the start."""
    if isinstance(job.disc, ProjectedDiscriminator):
        graphs, state = projected.new_state(job.gen, job.disc, job.backbone, job.recipe)
    else:
        *graphs, state = gan.new_state(job.gen, job.disc, job.recipe)
    if job.masks is None:
        return tuple(graphs), state
    return furrygan.with_predictor(tuple(graphs), state, job.gen, job.recipe, job.seed)


def settle(state: gan.State, gen: Trained) -> None:
    """On a CPU, wait for a phase of large images and give its memory back: the next one has blocks
    of other sizes, and both are long.
    """
    if gen.resolution >= ONE_BY_ONE and jax.default_backend() == "cpu":
        jax.block_until_ready(state)
        plan.give_back()


def _steadier(job: Job) -> str:
    """The flag that keeps losses finite."""
    if job.projected:
        return f"--learning-rate {job.recipe.learning_rate / 4:g}"
    return f"--r1-gamma {job.recipe.r1_gamma * 4:g}"


def _networks(state: gan.State) -> dict[str, Any]:
    """What is kept of a snapshot."""
    return {name: state[name] for name in ("ema", "buffers", "d")}


def _shown(row: dict[str, Any]) -> str:
    seen = f"swd {row['swd']:.2f}, p {row['augment']:.2f}"
    if CRITERION not in row:
        return seen
    return f"{CRITERION} {row[CRITERION]:.2f} (floor {row[CRITERION + '_floor']:.2f}), {seen}"


_average = jax.jit(gan.average)
_d_augmented = partial(gan.d_main, augmented=True)
