"""The loop around every training step, and the checkpoints from which it resumes to the same bits.

    checkpoints = Checkpoints(folder, config)
    run = checkpoints.restore(state) or Training(state)
    for step, facts in loop(run, step_fn, batches, Course(steps=1000, every=100), checkpoints):
        run.curve.append({"step": step, "quality": measure(run.state)} | facts)

`step_fn(state, step, batch)` returns the next state and its measurements, as arrays on the device:
nothing waits for them between two snapshots. Batch t and the random numbers of step t depend on
(seed, t) alone, so a training that was stopped and resumed equals one that was not.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from sis_jax import parallel
from sis_jax.data.files import disk_errors, plain
from sis_jax.ops import plan
from sis_jax.ops.progress import progress, say
from sis_jax.types import SisError, UsageError

FORMAT = 2  # of a checkpoint's meta; the older one has no number

StepFn = Callable[[Any, int, Any], tuple[Any, Mapping[str, Any]]]


@dataclass
class Training:
    """A training as it stands: all that a resumed one needs.

    state: pytree of arrays that `step_fn` takes and returns. step: steps done in this phase. curve:
        measurements, rows for JSON. facts: whatever else must survive, up to date after every step.
        kept: further pytrees by name, such as the best weights. seconds: spent in `loop`. offset:
        number of the checkpoint at step 0 of this phase.
    """

    state: PyTree
    step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, PyTree] = field(default_factory=dict)
    seconds: float = 0.0
    offset: int = 0

    @property
    def number(self) -> int:
        """Number of the checkpoint of this moment."""
        return self.offset + self.step

    def next_phase(self, state: PyTree) -> None:
        """Begin again at step 0 from `state`; curve, facts and kept states stay."""
        self.offset, self.step, self.state = self.number + 1, 0, state


class Checkpoints:
    """The last state of a training in a folder, replaced as a whole.

    folder: where Orbax writes, None keeps nothing. config: settings that a checkpoint must share,
        for JSON. discard: remove that of another configuration instead of raising UsageError.
    """

    def __init__(self, folder: Path | None, config: Any, *, discard: bool = False):
        self.folder, self.discard = folder, discard
        text = json.dumps(plain(config), sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self._manager: Any = None

    def latest(self) -> int | None:
        """Number of the last checkpoint, None where there is none."""
        if self.folder is None or not self.folder.is_dir():
            return None
        return self._open().latest_step()

    def save(self, run: Training) -> None:
        """Write the training unless it is the last checkpoint; SisError for a full disk."""
        if self.folder is None or self.latest() == run.number:
            return
        ocp = _orbax()
        meta = {
            "format": FORMAT, "config": self.digest, "step": run.step, "seconds": run.seconds,
            "curve": run.curve, "facts": run.facts, "kept": list(run.kept),
        }  # fmt: skip
        arrays = jax.tree.map(np.asarray, {"state": run.state, **run.kept})
        args = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(plain(meta))
        )
        with disk_errors(self.folder):
            manager = self._open()
            _check_room(self.folder, sum(a.nbytes for a in jax.tree.leaves(arrays)))
            manager.save(run.number, args=args)
            manager.wait_until_finished()

    def restore(self, state: PyTree, **kept: PyTree) -> Training | None:
        """The training as it was saved, with NumPy arrays, or None.

        state, kept: arrays or their shapes in the structure to restore. Raises UsageError where
            another configuration or network wrote it.
        """
        number = self.latest()
        if number is None:
            return None
        meta = self._read(number, "meta", _orbax().args.JsonRestore())
        older = "format" not in meta
        if (older and self.discard) or meta.get("config", self.digest) != self.digest:
            return self._refuse("another configuration")
        meta = _as_now(meta) if older else meta
        like = {"state": state} | {name: kept[name] for name in meta["kept"]}
        arrays = self._arrays(number, jax.eval_shape(lambda tree: tree, like), older)
        if arrays is None:
            return self._refuse("another network, or is damaged")
        step = int(meta["step"])
        return Training(
            arrays.pop("state"), step, list(meta["curve"]), dict(meta["facts"]), arrays,
            float(meta["seconds"]), number - step,
        )  # fmt: skip

    def close(self) -> None:
        """Let go of the folder; SisError for a full disk, on which a save can end here."""
        if self._manager is not None and self.folder is not None:
            manager, self._manager = self._manager, None
            with disk_errors(self.folder):
                manager.close()

    def _open(self) -> Any:
        if self._manager is None:
            assert self.folder is not None
            options = _orbax().CheckpointManagerOptions(max_to_keep=1, create=False, **_alone())
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                # Orbax would remove these in a thread, which may run until after `close`.
                for half_written in self.folder.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(half_written, ignore_errors=True)
                self._manager = _orbax().CheckpointManager(self.folder.absolute(), options=options)
        return self._manager

    def _arrays(self, number: int, shapes: dict[str, Any], older: bool) -> dict[str, Any] | None:
        """The arrays of a checkpoint in the structure of `shapes`, None where they do not fit."""
        stored = _optax_as_lists(shapes) if older else shapes
        # NumPy arrays of no memory stand for the shapes: Orbax then gives NumPy arrays back.
        like = jax.tree.map(lambda s: np.broadcast_to(np.zeros((), s.dtype), s.shape), stored)
        restore = _orbax().args.StandardRestore
        try:
            if older and "state" in self._open().item_metadata(number):  # a generator's
                found = self._read(number, "state", restore(like["state"]))
            else:
                found = self._read(number, "arrays", restore(like))
        except (ValueError, KeyError, TypeError):  # Orbax: the structure differs
            return None
        leaves, expected = jax.tree.leaves(found), jax.tree.leaves(shapes)
        if any(a.shape != b.shape for a, b in zip(leaves, expected)):
            return None
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    def _read(self, number: int, item: str, how: Any) -> Any:
        return self._open().restore(number, args=_orbax().args.Composite(**{item: how}))[item]

    def _refuse(self, other: str) -> None:
        """Raise UsageError, or remove the folder where the caller asked for that."""
        assert self.folder is not None
        self.close()
        if not self.discard:
            raise UsageError(
                f"the checkpoint in {self.folder} was written for {other}: give another --out, or "
                "--overwrite to start again"
            )
        shutil.rmtree(self.folder)


@dataclass(frozen=True)
class Course:
    """How long a training goes on, and how it is watched.

    steps: in all. every: steps between two snapshots. stop: asked after every step; True ends the
        training with a snapshot. losses: facts that must be finite at a snapshot, as the state
        must; else SisError with the `cure`. name, unit: of the progress bar, with the number of
        units per step. show: text beside the bar from the last row of the curve.
    """

    steps: int
    every: int
    stop: Callable[[], bool] = lambda: False
    losses: tuple[str, ...] = ("loss",)
    cure: str = ""
    name: str = "training"
    unit: tuple[str, int] = ("step", 1)
    show: Callable[[dict[str, Any]], str] = lambda row: ""


def loop(
    run: Training,
    step_fn: StepFn,
    batches: Callable[[int], Iterable[Any]],
    course: Course,
    checkpoints: Checkpoints,
    devices: parallel.Devices = 1,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train on from `run.step`; yield (step, facts) at every snapshot and at the last step.

    The caller's block appends a row to `run.curve` and may replace `run.state`; then the checkpoint
    is written. Ctrl-C, and SIGTERM where the program handles it, wait for the end of the step: it
    is saved, then the signal takes effect.
    step_fn: (state, step, batch) -> (next state, facts: scalar arrays). batches: first step -> the
        batches from there on. devices: where the state is laid out.
    """
    steps, each = course.steps, course.unit[1]
    if run.step >= steps:
        return
    run.state = on_devices(run.state, devices)
    began, stream = time.perf_counter() - run.seconds, iter(batches(run.step))
    with progress(steps * each, course.name, course.unit[0]) as bar:
        bar.update(run.step * each)
        measured: Mapping[str, Any] = {}
        while run.step < steps:
            batch, before = next(stream), measured
            with _interrupt_after() as interrupted:
                run.state, measured = step_fn(run.state, run.step, batch)
                run.step += 1
            jax.block_until_ready(before)  # one step ahead: each that waits has memory of its own
            bar.update(each)
            due = run.step % course.every == 0 or run.step == steps or course.stop()
            if not due and not interrupted:
                continue
            facts = {key: float(value) for key, value in measured.items()}
            _check_finite(run, facts, course, checkpoints)
            run.seconds = time.perf_counter() - began
            if due:
                yield run.step, facts
                run.seconds = time.perf_counter() - began
                bar.set_postfix_str(course.show(run.curve[-1]) if run.curve else "")
            checkpoints.save(run)
            if interrupted:
                signal.raise_signal(interrupted[0])
            if course.stop():
                break
    plan.give_back()  # what comes next has blocks of other sizes


def _check_room(folder: Path, size: int) -> None:
    """OSError where the disk lacks these bytes: Orbax would find out in a hundred threads at once.

    A file system that does not know its size has room.
    """
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < size:
        raise OSError(errno.ENOSPC, "no room for a checkpoint")


def on_devices(state: PyTree, devices: parallel.Devices = 1) -> PyTree:
    """The arrays with strong types, one copy on each device: the first step compiles for all."""
    return parallel.replicate(jax.tree.map(lambda a: jnp.asarray(a, a.dtype), state), devices)


def as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    """These columns of a curve, with a header; empty where a row lacks one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _check_finite(
    run: Training, facts: Mapping[str, float], course: Course, checkpoints: Checkpoints
) -> None:
    bad = [f"{name} is {facts[name]}" for name in course.losses if not np.isfinite(facts[name])]
    if not bad and not _finite(run.state):  # the loss was that of the weights before this step
        bad = ["a weight is no finite number"]
    if bad:
        kept = "" if checkpoints.latest() is None else "; the last checkpoint is good"
        raise SisError(f"training diverged at step {run.step} ({bad[0]}){kept}: {course.cure}")


def _finite(state: PyTree) -> bool:
    floats = (a for a in jax.tree.leaves(state) if jnp.issubdtype(a.dtype, jnp.floating))
    return all(np.isfinite(np.asarray(a)).all() for a in floats)


@contextmanager
def _interrupt_after() -> Iterator[list[int]]:
    """Ctrl-C or a handled SIGTERM in the block (main thread) waits; a second one does not."""
    caught: list[int] = []
    usual: dict[int, Callable[[int, Any], Any]] = {}
    if threading.current_thread() is threading.main_thread():
        both = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        usual = {number: handler for number, handler in both.items() if callable(handler)}

    def later(number: int, frame: Any) -> None:
        if caught:
            usual[number](number, frame)
        caught.append(number)
        say("finishing the step, then saving; a second signal stops at once")

    for number in usual:
        signal.signal(number, later)
    try:
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _as_now(meta: dict[str, Any]) -> dict[str, Any]:
    """The meta of a checkpoint from before `FORMAT`, in today's names."""
    facts = {name: meta[name] for name in ("phase", "round", "verdict") if name in meta}
    kept = [name for name in meta.get("held", ()) if name != "state"]
    return {"seconds": 0.0} | meta | {"facts": facts, "kept": kept}


def _optax_as_lists(tree: PyTree) -> PyTree:
    """The structure of checkpoints from before `FORMAT`: Optax state as a list of its leaves."""

    def is_tuple(node: Any) -> bool:
        return isinstance(node, tuple)

    return jax.tree.map(
        lambda node: jax.tree.leaves(node) if is_tuple(node) else node, tree, is_leaf=is_tuple
    )


def _alone() -> dict[str, Any]:
    """Options by which Orbax waits for no other process of a job: only one trains at a time."""
    if jax.process_count() == 1:
        return {}
    me = jax.process_index()
    return {
        "multiprocessing_options": _orbax().options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=str(me)
        )
    }


def _orbax() -> Any:
    import orbax.checkpoint as ocp  # late: takes a second to import

    return ocp
