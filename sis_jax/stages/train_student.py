"""The training of a student: generated images first, then photos in rounds of self-training.

Both phases go through `training/loop.py` and resume to the same bits. At the end the student from
before the photos and the one from after are judged without labels (`stages/adapt.py`), and the
adaptation is kept only where it is the better one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from sis_jax import parallel
from sis_jax.checkpoints.student import Student
from sis_jax.data.decode import Fit
from sis_jax.data.files import write_atomic
from sis_jax.data.pairs import IGNORE, Pairs
from sis_jax.data.photos import Photos
from sis_jax.models import students
from sis_jax.ops import metrics
from sis_jax.ops.progress import say
from sis_jax.stages import adapt
from sis_jax.training.loop import Checkpoints, Course, Training, as_csv, loop
from sis_jax.training.photo_labels import STEPS, STEPS_OF_PLACE, PhotoLabels, fitted
from sis_jax.training.self_training import self_training_step
from sis_jax.training.student import Recipe, join, new_state, train_step
from sis_jax.types import Info, SisError, UsageError

COLUMNS = ("step", "loss", "accuracy", "val_iou", "phase")
VIEWS_PER_PHOTO = 2  # of a round, which takes as many photos as give that; the next takes others
VALIDATED = 200  # images


@dataclass(frozen=True)
class Job:
    """What is to be learned, all of it in memory.

    recipe: of the generated images; adaptation: of one round. pasted: share of a round's views with
        another photo's background. config: what a checkpoint must agree with, for JSON.
    train, val: pairs to learn from and to validate with; empty where only photos are learned from.
    start: the student to begin with. backbone: pretrained weights to begin with.
    teacher: a student whose masks of the photos are learned in the first round.
    alike: whether the photos are framed like the images: their background is at the same places.
    minutes: the adaptation ends this long after the start.
    origin: a few words on the images. fit: of the student, see `Student`.
    """

    network: students.StudentConfig
    recipe: Recipe
    adaptation: Recipe
    rounds: int
    pasted: float
    config: Any
    classes: tuple[dict[str, Any], ...]
    train: Pairs
    val: Pairs
    photos: Photos | None
    origin: str
    licence: str
    seed: int = 0
    snapshot: int = 250
    start: Student | None = None
    backbone: Any = None
    teacher: Student | None = None
    fit: Fit = "crop"
    alike: bool = False
    minutes: float | None = None


class StudentTraining:
    """A training in the folder `student/` of a run: `run()`, then `student()`."""

    def __init__(self, folder: Path, job: Job):
        self.folder, self.job = folder, job
        self.stop_at = np.inf if job.minutes is None else time.perf_counter() + 60 * job.minutes
        self.devices = parallel.devices_for(job.recipe.batch)
        # The resolution at which the student from before the photos works.
        given = job.start.side if job.start is not None and not job.recipe.steps else None
        self.first_side = given or job.recipe.side
        self.rounds = job.rounds if job.photos is not None and job.adaptation.steps else 0
        self.photos, self.held = _held_out(job) if self.rounds else (None, None)
        # Left hands are right hands in the mirror: there the mean with it means nothing.
        self.mirrored = not job.recipe.augmentation.swap
        self.val = job.val if len(job.val) else self._of_teacher()
        network = self._first_network()
        self.graph, state = new_state(network, job.recipe)
        self.checkpoints = Checkpoints(folder / "checkpoints", job.config)
        weights = {"params": state["params"], "statistics": state["statistics"]}
        found = self.checkpoints.restore(state, before=weights, teacher=weights)
        self.state = found or Training(state, facts={"phase": "train", "round": 0, "verdict": {}})
        if found is not None:
            say(f"resuming at step {found.step} of {found.facts['phase']}")

    def _first_network(self) -> nnx.Module:
        job = self.job
        if job.start is None:
            network: Any = students.build(job.network, np.random.default_rng(job.seed))
            if len(job.train):
                students.begin_with(network, job.train.shares(len(job.classes)))
            trunk = "backbone" if hasattr(network, "backbone") else "trunk"
            if job.backbone is not None:
                nnx.update(getattr(network, trunk), nnx.state(job.backbone))
            elif trunk == "backbone" and hasattr(network, "frozen"):
                network.frozen = False
            return network
        ours, theirs = ([c["id"] for c in of.classes] for of in (job, job.start))
        if (job.start.config, theirs) != (job.network, ours):
            raise UsageError(
                f"{job.start.info.name} is {job.start.config} for classes {theirs}, this one "
                f"is {job.network} for classes {ours}: they cannot share weights"
            )
        return job.start.network

    # the phases

    @property
    def saved(self) -> bool:
        """Whether a checkpoint exists to resume from."""
        return (self.folder / "checkpoints").is_dir()

    def run(self) -> None:
        """All phases, from where the last checkpoint is."""
        facts, job = self.state.facts, self.job
        if facts["phase"] == "train":
            self._train()
            self.state.kept["before"] = self._weights()
            self._begin(0) if self.rounds else self._finish()
        while facts["phase"] == "adapt":
            began = time.perf_counter()
            self._adapt()
            now = time.perf_counter()
            another = facts["round"] + 1 < job.rounds
            if another and now + (now - began) <= self.stop_at:
                self._begin(facts["round"] + 1)
            else:
                if another:
                    say(f"the time is up after round {facts['round'] + 1} of {job.rounds}")
                self._choose()
                self._finish()

    def _train(self) -> None:
        run = self._step(train_step, 3, self.job.recipe)
        key = jax.random.key(self.job.seed)
        batches = partial(self.job.train.batches, self.job.recipe.batch, self.job.seed)
        self._loop(run, key, batches, self.job.recipe)

    def _adapt(self) -> None:
        recipe, number = self.job.adaptation, 1 + self.state.facts["round"]
        if self.state.step >= recipe.steps:
            return
        photos = self._round()
        seed = self.job.seed + number
        run = self._step(self_training_step, 5, recipe)
        batches = partial(photos.batches, recipe.batch, seed, pasted=self.job.pasted)
        self._loop(
            run, jax.random.key(seed), batches, recipe, lambda: time.perf_counter() > self.stop_at
        )

    def _step(self, body: Callable[..., Any], arrays: int, recipe: Recipe) -> Callable[..., Any]:
        axes = (None, None, *(0,) * arrays)
        return parallel.map_devices(
            body, axes, None, devices=self.devices, graph=self.graph, recipe=recipe
        )

    def _loop(
        self, run: Any, key: jax.Array, batches: Any, recipe: Recipe,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        def step(state: Any, number: int, rows: tuple[np.ndarray, ...]) -> tuple[Any, Any]:
            return run(state, jax.random.fold_in(key, number), *self._blocks(rows))

        course = Course(
            recipe.steps, self.job.snapshot, stop, name=self.state.facts["phase"],
            cure=f"give --learning-rate {recipe.learning_rate / 3:g} --overwrite",
            unit=("img", recipe.batch), show=_shown,
        )  # fmt: skip
        for number, facts in loop(
            self.state, step, batches, course, self.checkpoints, self.devices
        ):
            self._note(number, facts)

    def _blocks(self, rows: tuple[np.ndarray, ...]) -> list[Any]:
        """Each device's share of a batch."""
        return [parallel.shard(a, self.devices)[0] for a in rows]

    def _begin(self, number: int) -> None:
        """A round from the averaged network, which also labels its photos, with fresh moments."""
        self.state.kept["teacher"] = self._weights()
        network = join(self.graph, *self._weights().values())
        self.state.facts |= {"phase": "adapt", "round": number}
        self.state.next_phase(new_state(network, self.job.adaptation)[1])
        self.checkpoints.save(self.state)

    def _finish(self) -> None:
        self.state.facts["phase"] = "done"
        self.state.next_phase(self.state.state)
        self.checkpoints.save(self.state)

    def _round(self) -> adapt.Round:
        """This round's share of the photos, with its teacher's soft masks."""
        assert self.photos is not None
        job, number = self.job, self.state.facts["round"]
        wanted = job.adaptation.steps * job.adaptation.batch // VIEWS_PER_PHOTO
        size = min(len(self.photos), max(wanted, job.adaptation.batch))
        order = np.random.default_rng([job.seed, 7]).permutation(len(self.photos))
        rows = np.sort(order[(number * size + np.arange(size)) % len(order)])
        side = job.recipe.side if number else self.first_side
        teacher = self._student_of(self.state.kept["teacher"], side)
        photos, first = self.photos.images[rows], not number
        return adapt.Round.labelled(
            job.teacher if job.teacher is not None and first else teacher, photos,
            job.recipe.side, f"masks of photos, round {number + 1} of {job.rounds}",
            mirrored=self.mirrored, pasted=job.pasted > 0,
            classifier=self._classifier(teacher, photos) if first else None,
        )  # fmt: skip

    def _classifier(self, teacher: Student, photos: np.ndarray) -> PhotoLabels | None:
        """Fitted to the masks of a teacher that learned from generated images alone; for photos
        alike, to the place of their background.
        """
        job, usual = self.job, self._usual()
        if job.backbone is None or job.teacher is not None or job.classes[0]["id"] != 0:
            return None
        some = np.asarray(photos[fitted(job.backbone, len(photos))])
        labels = PhotoLabels(job.backbone, some)
        if usual is not None:
            labels.fit(usual[None], STEPS_OF_PLACE)
        else:
            scores = adapt.predicted(teacher, adapt.reduced(some, teacher.side), self.mirrored)
            labels.fit(scores[..., 0], STEPS)
        return labels

    def _usual(self) -> np.ndarray | None:
        """Float32[side side]: share of the images that hold background there, for photos alike."""
        masks = self.job.train.masks
        if not (self.job.alike and len(masks)):
            return None
        share = (masks == 0).sum(0) / np.maximum((masks != IGNORE).sum(0), 1)
        share = (share + share[:, ::-1]) / 2 if self.mirrored else share
        return adapt.enlarged(share, (self.job.recipe.side, self.job.recipe.side))

    def _choose(self) -> None:
        """The better of the students from before and after, on held-out photos.

        Where nothing was trained before the photos, the teacher stands in for it; then there is
        nothing to go back to, and the comparison is only recorded.
        """
        assert self.held is not None
        held = np.asarray(self.held.images)
        job, before, after = self.job, self.state.kept["before"], self._weights()
        trained = bool(job.recipe.steps or job.start is not None)
        first = self._student_of(before, self.first_side) if trained else job.teacher
        assert first is not None
        old, new = (
            adapt.judge(student, held, self._val_iou(student), self.mirrored)
            for student in (first, self._student_of(after, job.recipe.side))
        )
        # Labels of photos alike begin with the place of the background: no collapse to guard from,
        # and crude images' own masks are no measure (street photos: IoU 0.58, then 0.33, refused
        # students that were better on photos, 0.06, then 0.14).
        better = new.score > old.score if job.alike else new.better_than(old)
        verdict = old.facts("before") | new.facts("after")
        name = "adaptation_kept" if trained else "better_than_teacher"
        self.state.facts["verdict"] = verdict | {name: better}
        if not better:
            say(f"the student from after the photos is not better. Before: {old}. After: {new}")
        if trained and not better:
            self.state.state |= before | {"ema": before["params"]}

    def _of_teacher(self) -> Pairs:
        """Held-out photos with the teacher's masks, where there are no generated images."""
        if self.held is None or self.job.teacher is None:
            return self.job.val
        images = adapt.reduced(self.held.images[:VALIDATED], self.job.recipe.side)
        masks = adapt.predicted(self.job.teacher, images, self.mirrored).argmax(-1)
        return Pairs(images, masks.astype(np.uint8), np.full(masks.shape, 255, np.uint8))

    # the student and what is known of it

    def _weights(self) -> dict[str, Any]:
        """The averaged network where there is one."""
        state, train = self.state.state, self.state.facts["phase"] == "train"
        averaged = self.job.recipe.ema if train else self.job.adaptation.ema
        params = state["ema"] if averaged else state["params"]
        return {"params": params, "statistics": state["statistics"]}

    @property
    def side(self) -> int:
        """The resolution at which the student works; where the adaptation was not kept, its own."""
        kept = self.state.facts["verdict"].get("adaptation_kept", True)
        return self.job.recipe.side if kept else self.first_side

    def student(self) -> Student:
        """The student as it is now."""
        return self._student_of(self._weights(), self.side)

    def _student_of(self, weights: dict[str, Any], side: int) -> Student:
        job = self.job
        facts: dict[str, Any] = {"learned from": job.origin, "steps": job.recipe.steps}
        if job.backbone is not None:
            facts["backbone"] = f"{job.backbone.info.name} ({job.backbone.info.licence})"
        if self.photos is not None:
            facts |= {"adapted to": Path(self.photos.source).name, "rounds": job.rounds}
            facts["steps of a round"] = job.adaptation.steps
        facts |= {k.replace("_", " "): v for k, v in self.state.facts["verdict"].items()}
        info = Info(
            f"{self.folder.resolve().parent.name}-student", job.licence, "distilled by sis_jax"
        )
        network = join(self.graph, weights["params"], weights["statistics"])
        return Student(network, job.network, job.classes, side, info, facts, job.fit)

    def facts(self) -> dict[str, Any]:
        """What run.json records."""
        last, verdict = (self.state.curve or [{}])[-1], self.state.facts["verdict"]
        val_iou = last.get("val_iou")
        if not verdict.get("adaptation_kept", True):  # the curve ends with the other one
            val_iou = verdict.get("val_iou_before")
        device = f"{self.devices} x {jax.devices()[0].device_kind} ({os.cpu_count()} cores)"
        return {
            "pictures": len(self.job.train), "val_iou": val_iou,
            "loss": last.get("loss"), "side": self.side, **self.state.facts["verdict"],
            "training_device": device,
        }  # fmt: skip

    def _note(self, step: int, facts: dict[str, float]) -> None:
        """A row of the curve."""
        job, now = self.job, self.state.facts
        done = 0 if now["phase"] == "train" else job.recipe.steps
        done += now["round"] * job.adaptation.steps
        row = {"phase": now["phase"], "step": done + step} | {
            k: round(v, 6) for k, v in facts.items()
        }
        iou = self._val_iou(self.student())
        self.state.curve.append(row | ({} if iou is None else {"val_iou": round(iou, 6)}))
        write_atomic(self.folder / "curves.csv", as_csv(self.state.curve, COLUMNS))

    def _val_iou(self, student: Student) -> float | None:
        """Mean IoU with the parts' masks of held-out generated images; None without any."""
        val, count = self.val, min(len(self.val), VALIDATED)
        if not count:
            return None
        table = np.full(256, 255, np.uint8)
        table[student.ids] = np.arange(len(student.ids))
        found = table[np.stack(student.masks(list(val.images[:count]), flip=False, edges=False))]
        counts = metrics.confusion(val.masks[:count], found, len(self.job.classes))
        return float(metrics.mean_iou(counts))


def _held_out(job: Job) -> tuple[Photos, Photos]:
    """(photos to learn from, photos to judge with)."""
    assert job.photos is not None
    if len(job.photos) < 4:
        raise SisError(f"{len(job.photos)} photos are too few to adapt to: give at least 4")
    return job.photos.holdout(min(adapt.HELD, len(job.photos) // 4), seed=job.seed)


def _shown(row: dict[str, Any]) -> str:
    iou = f", val IoU {row['val_iou']:.3f}" if "val_iou" in row else ""
    return f"loss {row['loss']:.3f}{iou}"
