"""The loop around a student's training step: batches, schedule of the two phases, checkpoints that
resume to the same bits, curves.

Phase "train" learns from labelled pictures. Phase "adapt" is self-training on photos, in rounds
(`stages/adapt.py`). At the end the student from before and the one from after are judged without
labels, and the adaptation is kept only if it is the better one.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sis_jax import parallel
from sis_jax.checkpoints.student import Student, load_student
from sis_jax.data.files import write_atomic
from sis_jax.data.pairs import Pairs
from sis_jax.data.photos import Photos
from sis_jax.models import students
from sis_jax.ops import metrics
from sis_jax.ops.progress import progress, say
from sis_jax.ops.student_augment import ALIGNED, NONE, WEAK, Augmentation
from sis_jax.stages import adapt as adaptation
from sis_jax.training import student as training
from sis_jax.types import Info, SisError, UsageError

COLUMNS: tuple[str, ...] = ("step", "loss", "accuracy", "val_iou", "phase")


@dataclass(frozen=True)
class Job:
    """What is to be learned. config: the verb's arguments. origin: a few words on the pictures.
    val: pairs to watch the training by.
    """

    config: dict[str, Any]
    classes: tuple[dict[str, Any], ...]
    train: Pairs
    val: Pairs
    photos: Photos | None
    side: int
    origin: str
    licence: str


@dataclass
class Trainer:
    """A training run in the folder `student/`: load or resume, loop, save."""

    folder: Path
    job: Job
    curve: list[dict[str, Any]] = field(default_factory=list)
    phase: str = "train"
    step: int = 0

    def __post_init__(self) -> None:
        c, job = self.job.config, self.job
        self.devices = max(d for d in range(1, parallel.device_count() + 1) if c["batch"] % d == 0)
        start = load_student(c["start_from"]) if c["start_from"] else None
        block = c["block"] or (start.config.block if start else students.usual_block(job.side))
        self.network_config = students.StudentConfig(
            c["student"], len(job.classes), c["width"], block
        )
        self.recipe = training.Recipe(
            steps=c["steps"], batch=c["batch"], side=job.side, learning_rate=c["learning_rate"],
            weight_decay=c["weight_decay"], optimizer=c["optimizer"], schedule=c["schedule"],
            weighting=c["weighting"], soft=c["soft"], ema=c["ema"],
            augmentation=_augmentation(c, job.classes), dtype=c["dtype"],
        )  # fmt: skip
        # Photos are varied by themselves: less is added, and another ground only seldom, because
        # their masks are coarser at the edge.
        shown = replace(
            self.recipe.augmentation,
            brightness=0.2,
            contrast=0.3,
            saturation=0.4,
            hue=10.0,
            blur=0.7,
            noise=0.05,
        )
        shown = (
            replace(shown, background=min(shown.background, 0.2))
            if c["augment"] != "none"
            else self.recipe.augmentation
        )
        self.adaptation = replace(
            self.recipe,
            steps=max(c["adapt_steps"], 1),
            weighting=1.0,
            soft=False,
            ema=self.recipe.ema or 0.995,
            augmentation=shown,
        )
        self.first_side = job.side  # at which the student from before adaptation works
        network = self._first_network(start)
        self.graph, self.state = training.new_state(network, self.recipe)
        self.before: dict[str, Any] | None = None  # the student before adaptation
        self.teacher: dict[str, Any] | None = None  # the one that labelled the photos of this round
        self.round = 0
        self.saved = False
        self.verdict: dict[str, Any] = {}
        self.photos, self.held = (
            (None, None) if job.photos is None else self._split_photos(job.photos)
        )
        self._manager: Any = None
        self._resume()

    def _first_network(self, found: Student | None) -> Any:
        """Random weights, or those of the student to begin with."""
        c = self.job.config
        if found is None:
            return students.build(self.network_config, np.random.default_rng(c["seed"]))
        ours, theirs = [x["id"] for x in self.job.classes], [x["id"] for x in found.classes]
        if (found.config, theirs) != (self.network_config, ours):
            raise UsageError(
                f"the student in {c['start_from']} is {found.config} for classes {theirs}, this "
                f"one is {self.network_config} for classes {ours}: "
                "they cannot share weights"
            )
        self.first_side = self.job.side if c["steps"] else found.side
        return found.network

    def _split_photos(self, photos: Photos) -> tuple[Photos, Photos]:
        if len(photos) < 4:
            raise SisError(f"{len(photos)} photos are too few to adapt to: give at least 4")
        return photos.holdout(min(adaptation.HELD, len(photos) // 4), seed=self.job.config["seed"])

    # the loop

    def run(self) -> None:
        """Both phases, from where the last checkpoint is."""
        c = self.job.config
        if self.phase == "train":
            self._loop(c["steps"], self._steps(self.job.train, self.recipe, 0))
            self.before = {"params": self._best(), "statistics": self.state["statistics"]}
            self.phase = (
                "adapt" if self.photos is not None and c["rounds"] and c["adapt_steps"] else "done"
            )
            if self.phase == "adapt":
                self._begin_round(0)
            self._save()
        while self.phase == "adapt":
            self._loop(
                c["adapt_steps"],
                self._steps(self._labelled_photos(), self.adaptation, 1 + self.round),
            )
            if self.round + 1 < c["rounds"]:
                self._begin_round(self.round + 1)
            else:
                self._choose()
                self.phase = "done"
            self._save()

    def _loop(self, total: int, steps: Iterator[dict[str, Any]]) -> None:
        if self.step >= total:
            return
        c = self.job.config
        bar = progress(total * c["batch"], self.phase, "img")
        bar.update(self.step * c["batch"])
        for facts in steps:
            self.step += 1
            bar.update(c["batch"])
            if self.step % c["snapshot"] == 0 or self.step == total:
                self._note(facts)
                bar.set_postfix_str(
                    f"loss {self.curve[-1]['loss']:.3f}, val IoU {self.curve[-1]['val_iou']:.3f}"
                )
                if self.step < total:
                    self._save()
            if self.step >= total:
                break
        bar.close()

    def _steps(
        self, pairs: Pairs, recipe: training.Recipe, number: int
    ) -> Iterator[dict[str, Any]]:
        c, key = self.job.config, jax.random.key(self.job.config["seed"] + number)
        run = parallel.map_devices(
            training.train_step,
            (None, None, 0, 0, 0),
            None,
            devices=self.devices,
            graph=self.graph,
            recipe=recipe,
        )
        for step, rows in enumerate(
            pairs.batches(c["batch"], c["seed"] + number, self.step), start=self.step
        ):
            self.state, facts = run(self.state, jax.random.fold_in(key, step), *self._blocks(rows))
            yield facts

    def _blocks(self, rows: tuple[np.ndarray, ...]) -> list[Any]:
        return [parallel.shard(a, self.devices)[0] for a in rows]

    # adaptation

    def _begin_round(self, number: int) -> None:
        """From the averaged network, which also labels the photos of the round, with fresh
        moments.
        """
        self.teacher = {"params": self._best(), "statistics": self.state["statistics"]}
        self.state = training.new_state(self._network(), self.adaptation)[1]
        self.phase, self.step, self.round = "adapt", 0, number

    def _labelled_photos(self) -> Pairs:
        """Photos with the masks that the round's teacher and the photos' own colours give them."""
        assert self.photos is not None and self.teacher is not None
        teacher = self._student_of(self.teacher, self.job.side if self.round else self.first_side)
        note = f"masks of photos, round {self.round + 1}"
        return adaptation.labelled(
            teacher, self.photos.images, self.job.side, self.recipe.augmentation.flip > 0, note
        )

    def _choose(self) -> None:
        """The better of the students before and after adaptation, on held-out photos."""
        assert self.before is not None and self.held is not None
        after = {"params": self._best(), "statistics": self.state["statistics"]}
        both = [
            self._student_of(self.before, self.first_side),
            self._student_of(after, self.job.side),
        ]
        old, new = (
            adaptation.judge(
                s, self.held.images, self._val_iou(s), self.recipe.augmentation.flip > 0
            )
            for s in both
        )
        kept = new.better_than(old)
        self.verdict = old.facts("before") | new.facts("after") | {"adaptation_kept": kept}
        if not kept:
            say(f"the adaptation is not kept. Before: {old}. After: {new}")
            self.state |= {
                "params": self.before["params"],
                "ema": self.before["params"],
                "statistics": self.before["statistics"],
            }

    # looking and saving

    def _best(self) -> Any:
        return (
            self.state["ema"] if self.recipe.ema or self.phase == "adapt" else self.state["params"]
        )

    def _network(self) -> Any:
        return training.join(self.graph, self._best(), self.state["statistics"])

    def student(self) -> Student:
        """The student as it is now."""
        return self._student_of(
            {"params": self._best(), "statistics": self.state["statistics"]}, self._side()
        )

    def _side(self) -> int:
        """At which the present network works: an adaptation to other pixels that was not kept
        leaves the student at its own.
        """
        return self.job.side if self.verdict.get("adaptation_kept", True) else self.first_side

    def _student_of(self, weights: dict[str, Any], side: int) -> Student:
        c = self.job.config
        facts = {"learned from": self.job.origin, "steps": c["steps"]} | (
            {"adapted to": self.photos.source} if self.photos is not None else {}
        )
        facts |= {k.replace("_", " "): v for k, v in self.verdict.items()}
        name = f"{self.folder.resolve().parent.name}-student"
        facts = {k: Path(v).name if k == "adapted to" else v for k, v in facts.items()}
        info = Info(name, self.job.licence, "distilled by sis_jax")
        network = training.join(self.graph, weights["params"], weights["statistics"])
        return Student(network, self.network_config, self.job.classes, side, info, facts)

    def facts(self) -> dict[str, Any]:
        """What run.json records."""
        last = self.curve[-1] if self.curve else {}
        return {
            "pictures": len(self.job.train),
            "val_iou": last.get("val_iou"),
            "loss": last.get("loss"),
            "side": self._side(),
            **self.verdict,
            "training_device": f"{self.devices} x {jax.devices()[0].device_kind} "
            f"({os.cpu_count()} cores)",
        }

    def _note(self, facts: dict[str, Any]) -> None:
        loss = float(facts["loss"])
        if not np.isfinite(loss):
            raise SisError(
                f"training diverged at step {self.step} (loss is not a number): give "
                f"--learning-rate {self.recipe.learning_rate / 3:g} --overwrite"
            )
        numbers = {k: round(float(v), 6) for k, v in facts.items()}
        before = (
            self.job.config["steps"] + self.round * self.job.config["adapt_steps"]
            if self.phase == "adapt"
            else 0
        )
        self.curve.append(
            {
                "phase": self.phase,
                "step": before + self.step,
                "val_iou": round(self._val_iou(self.student()), 6),
            }
            | numbers
        )
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(self.curve)
        write_atomic(self.folder / "curves.csv", text.getvalue().encode())

    def _val_iou(self, student: Student) -> float:
        """Mean IoU with the masks of pictures that were kept apart: with the teacher's opinion, not
        with the truth.
        """
        val = self.job.val
        count = min(len(val), 200)
        table = np.full(256, 255, np.uint8)
        table[student.ids] = np.arange(len(student.ids))
        got = table[np.stack(student.masks(list(val.images[:count]), flip=False))]
        return float(
            metrics.mean_iou(metrics.confusion(val.masks[:count], got, len(self.job.classes)))
        )

    def _save(self) -> None:
        import orbax.checkpoint as ocp  # late: takes a second to import

        manager, at = self._open(), self._number()
        if manager.latest_step() == at:
            return
        arrays = {
            "state": self.state,
            **{
                k: v
                for k, v in (("before", self.before), ("teacher", self.teacher))
                if v is not None
            },
        }
        meta = {
            "phase": self.phase,
            "step": self.step,
            "round": self.round,
            "curve": self.curve,
            "verdict": self.verdict,
            "held": list(arrays),
        }
        manager.save(
            at,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(jax.tree.map(np.asarray, arrays)),
                meta=ocp.args.JsonSave(meta),
            ),
        )
        manager.wait_until_finished()
        self.saved = True

    def _number(self) -> int:
        """One number per point of both phases, for Orbax."""
        c = self.job.config
        per_round, first = c["adapt_steps"] + 1, c["steps"] + 1
        if self.phase == "done":
            return first + max(c["rounds"], 1) * per_round
        return self.step if self.phase == "train" else first + self.round * per_round + self.step

    def _open(self) -> Any:
        if self._manager is None:
            import orbax.checkpoint as ocp  # late: takes a second to import

            options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
            self._manager = ocp.CheckpointManager(
                (self.folder / "checkpoints").absolute(), options=options
            )
        return self._manager

    def _resume(self) -> None:
        import orbax.checkpoint as ocp  # late: takes a second to import

        manager = self._open()
        latest = manager.latest_step()
        if latest is None:
            return
        meta = manager.restore(latest, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        weights = {"params": self.state["params"], "statistics": self.state["statistics"]}
        shapes = {name: self.state if name == "state" else weights for name in meta["held"]}
        arrays = manager.restore(
            latest,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardRestore(jax.tree.map(np.asarray, shapes))
            ),
        )["arrays"]
        self.state, self.before, self.teacher = (
            dict(arrays["state"]),
            arrays.get("before"),
            arrays.get("teacher"),
        )
        self.round, self.phase, self.step, self.curve = (
            int(meta["round"]), meta["phase"], int(meta["step"]), list(meta["curve"]),
        )  # fmt: skip
        self.verdict = dict(meta["verdict"])
        say(
            f"resuming at step {self.step} of {self.phase}"
            if self.phase != "done"
            else "the training was finished; writing the student"
        )


def _augmentation(config: dict[str, Any], classes: tuple[dict[str, Any], ...]) -> Augmentation:
    base = {"aligned": ALIGNED, "strong": Augmentation(), "weak": WEAK, "none": NONE}[
        config["augment"]
    ]
    has_background = classes[0]["id"] == 0
    return replace(
        base, swap=_mirror(classes), background=config["background"] if has_background else 0.0
    )


def _mirror(classes: tuple[dict[str, Any], ...]) -> tuple[int, ...]:
    """The channel each class becomes in the mirror: those named left and right change places. Empty
    where none are.
    """
    names = [str(c["name"]).lower() for c in classes]
    table = list(range(len(names)))
    for i, name in enumerate(names):
        for one, other in (("left", "right"), ("right", "left"), ("l_", "r_"), ("r_", "l_")):
            if name.startswith(one) or f" {one}" in name:
                twin = name.replace(one, other, 1)
                table[i] = names.index(twin) if twin in names else i
    return tuple(table) if table != list(range(len(names))) else ()
