"""Every stage at toy size, and a stop at any of its file operations: what `test_faults.py` and
`kill_stages.py` share.
"""

import contextlib
import csv
import json
import os
import re
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import fakes
import numpy as np
from PIL import Image

import sis_jax
from sis_jax.checkpoints import save_generator
from sis_jax.export import export
from sis_jax.models import students
from sis_jax.run import run

ROOT = Path(__file__).parents[1]
STUDENT = {
    "student": "unet-small", "steps": 4, "batch": 8, "width": 8, "snapshot": 2, "trim": 0.0,
    "adapt_steps": 2, "rounds": 1,
}  # fmt: skip
GENERATOR = {
    "resolution": 8, "batch": 8, "channel_base": 64, "channel_max": 8, "latent": 8,
    "mapping_layers": 1, "holdout": 4, "snapshot": 8,
}  # fmt: skip
METHODS = {
    "segmentation_in_style": fakes.TINY_PARTS,
    "style_mixing": {"variants": 6, "clusters": 4, "k": 2, "n": 8, "n_init": 2},
    "latent_direction": {"steps": 4, "batch": 4},
    "labels4free": {
        "steps": 4, "batch": 8, "check": 2, "start": 0.0, "stage": "4x4", "tries": 1
    },
    "datasetgan": {"members": 2, "steps": 20, "batch": 64, "max_points": 600},
}  # fmt: skip
_CLOCKS = {"started", "finished", "seconds", "training_seconds", "training_device", "device"}


class Toys:
    """Inputs of all stages below `place`, made when they are first asked for.

    A stage is a pair: the folder before it, and the work on a copy of that folder.
    """

    def __init__(self, place: Path):
        self.place = place
        self.weights, self.photos = str(place / "tiny"), str(place / "photos")
        if place.exists():
            return
        save_generator(fakes.tiny_stylegan2(16), place / "tiny")
        rng = np.random.default_rng(0)
        for i in range(24):
            path = place / f"photos/{i // 12}/{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (20, 18, 3), dtype=np.uint8)).save(path)

    def before(self, stage: str) -> Path:
        """The folder before a stage, to copy."""
        needs = {
            **dict.fromkeys(("label", "synthesize", "edit"), "segmentation_in_style"),
            **dict.fromkeys(("distill", "export"), "synthesize"),
            **dict.fromkeys(("predict", "evaluate"), "student"),
            "student": "synthesize",
        }
        return self.after(needs[stage]) if stage in needs else self._made("nothing", os.mkdir)

    def after(self, stage: str) -> Path:
        """The folder after an uninterrupted stage."""

        def make(folder: Path) -> None:
            shutil.copytree(self.before(stage), folder)
            self.work(stage)(folder)

        return self._made(stage, make)

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        folder = self.place / "runs" / name / "faces"
        if not folder.exists():
            folder.parent.mkdir(parents=True)
            make(folder)
        return folder

    def work(self, stage: str) -> Callable[[Path], object]:
        """What a stage does in its folder."""
        if stage in METHODS:
            return lambda folder: self._discover(folder, stage)
        return getattr(self, f"_{stage}")

    def _discover(self, folder: Path, method: str = "segmentation_in_style") -> None:
        extra = {"masks": str(self.after("blanks"))} if method == "datasetgan" else {}
        settings = METHODS[method] | extra
        sis_jax.discover(self.weights, out=str(folder), method=method, **settings)

    def _blanks(self, folder: Path) -> None:
        data = str(self.after("synthesize"))
        export(data, format="blanks", n=4, filled=True, out=str(folder), overwrite=True)

    def _label(self, folder: Path) -> None:
        clip = str(ROOT / "ported_weights" / "faces-clip")
        sis_jax.label(str(folder), "faces", clip=clip, n=2, size=64)

    def _synthesize(self, folder: Path) -> None:
        sis_jax.synthesize(str(folder), n=20, val=0.1, soft=True)

    def _distill(self, folder: Path) -> None:
        sis_jax.distill(str(folder), photos=self.photos, **STUDENT)

    def _student(self, folder: Path) -> None:
        """One that learned nothing."""
        classes = sis_jax.Parts.load(folder).classes
        config = students.StudentConfig("unet-small", len(classes), 8)
        network = students.build(config, np.random.default_rng(3))
        sis_jax.Student(network, config, classes, 16, sis_jax.Info("toy", "none needed")).save(
            folder / "student"
        )

    def _predict(self, folder: Path) -> None:
        student = sis_jax.load_student(folder)
        options = {"soft": True, "cutouts": True, "batch": 5}
        sis_jax.predict(student, self.photos, out=str(folder / "masks"), **options)

    def _evaluate(self, folder: Path) -> None:
        data = folder / "data/val"
        sis_jax.evaluate(str(folder), images=str(data / "images"), masks=str(data / "masks"))

    def _edit(self, folder: Path) -> None:
        sis_jax.edit(str(folder), seed=(1, 2), strength=(1.0, -1.0))

    def _export(self, folder: Path) -> None:
        for form in ("coco", "tfds", "blanks"):
            export(str(folder), format=form, overwrite=True)

    def _train_generator(self, folder: Path) -> None:
        sis_jax.train_generator(self.photos, out=str(folder), images=16, **GENERATOR)

    def _run(self, folder: Path) -> None:
        sizes = {"discover": fakes.TINY_PARTS, "distill": STUDENT}
        with contextlib.ExitStack() as stack:
            for verb, small in sizes.items():
                door = partial(_smaller, getattr(sis_jax, verb), small)
                stack.enter_context(patch.object(sis_jax, verb, door))
            run(self.weights, out=str(folder), photos=self.photos, n=20)


def _smaller(door: Callable[..., object], small: dict, *words: object, **options) -> object:
    return door(*words, **options | small)


STAGES = (
    *METHODS, "label", "synthesize", "distill", "predict", "evaluate", "edit", "export",
    "train_generator", "run",
)  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    """Every file by name, without clocks and without the checkpoints of trainings."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {
        name: _timeless(name, path.read_bytes()).replace(os.fsencode(folder), b"")
        for name, path in sorted(files.items())
        if not re.search("checkpoints/|parts/training/|^\\.seconds$", name)
    }


def _timeless(name: str, data: bytes) -> bytes:
    if name.endswith("run.json"):
        return json.dumps(_without(json.loads(data), _CLOCKS)).encode()
    if "array_record" in name:
        return str(len(data)).encode()  # every process orders the fields of an example anew
    if name.endswith("report.html"):
        return b""  # made from the other files, with their clocks
    if name.endswith("curves.csv"):
        rows = list(csv.DictReader(data.decode().splitlines()))
        return json.dumps([_without(row, _CLOCKS) for row in rows]).encode()
    return re.sub(rb"training \| [\d,]+ s", b"", data) if name.endswith(".md") else data


def _without(value: object, keys: set[str]) -> object:
    if isinstance(value, dict):
        return {k: _without(v, keys) for k, v in value.items() if k not in keys}
    return [_without(v, keys) for v in value] if isinstance(value, list) else value


def free_port() -> int:
    """A port for a process that starts later: below those that the system gives to others."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("localhost", port))
            return port
    raise OSError("no port is free")


_NOBODY = 2**31 - 1  # no process has this number


class Killed(BaseException):
    """The process is gone."""


class Faults:
    """Counts the file operations below `root`; from operation `at` on, each one fails with
    `error`: by default also those of clean-up, as if the process had been killed there.

    Python's audit events announce every operation before it happens. The file that was opened last
    is cut in half unless its renaming was announced: not all of it had reached the disk. Threads
    that the block leaves behind stay stopped.
    """

    def __init__(self, root: Path):
        self.root, self.names = os.fspath(root), []
        self.at: int | None = None
        self.error: OSError | None = None
        self.active, self._opened = False, ""
        self._halving = threading.local()  # its own truncation is an operation, too
        self._order = threading.RLock()  # of announcements; collecting garbage makes some, too
        self._stopped: dict[int, threading.Thread] = {}
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def stopping(self, at: int | None = None, error: OSError | None = None):
        """Count inside the block, and stop at operation `at`."""
        self.names, self.at, self.error, self._opened = [], at, error, ""
        self.active, before = True, set(threading.enumerate())
        try:
            yield
        finally:
            left = set(threading.enumerate()) - before
            for thread in left:  # they die, too
                threading.Thread.join(thread, timeout=5)  # Orbax's own raises what they did
            if at is not None:
                self._stopped |= {t.ident: t for t in left if t.ident and t.is_alive()}
            self.active = False
            self._bury()

    def _bury(self) -> None:
        """What was left behind is that of a process that is no longer."""
        for path in list(Path(self.root).rglob(f".*.{os.getpid()}[-.]*")):
            name = path.name.replace(f".{os.getpid()}", f".{_NOBODY}")
            with contextlib.suppress(FileNotFoundError):
                path.rename(path.with_name(name))

    def _hook(self, event: str, args: tuple) -> None:
        if event not in _EVENTS or hasattr(self._halving, "now"):
            return
        stopped = self._stopped.get(threading.get_ident())
        if stopped is not None and stopped.is_alive() and self._ours(event, args):
            raise Killed
        if not self.active or not self._ours(event, args):
            return
        with self._order:
            self._announced(event, os.fspath(args[0]))

    def _announced(self, event: str, path: str) -> None:
        self.names.append(f"{event} {path}")
        if self.at is None or len(self.names) <= self.at:
            if event == "open":
                self._opened = path
            elif path == self._opened:
                self._opened = ""
            return
        if self.error is not None:
            if event in ("os.remove", "os.rmdir"):  # a full disk takes these
                return
            raise self.error
        self._halve()
        raise Killed

    def _halve(self) -> None:
        if not self._opened:
            return
        self._halving.now = True
        with contextlib.suppress(FileNotFoundError):  # announced, and not yet there
            os.truncate(self._opened, os.path.getsize(self._opened) // 2)
        del self._halving.now
        self._opened = ""

    def _ours(self, event: str, args: tuple) -> bool:
        if event == "open":
            flags = args[2] if isinstance(args[2], int) else 0
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            return bool(writes) and isinstance(args[0], str) and args[0].startswith(self.root)
        relative = event in ("os.remove", "os.rmdir") and args[-1] not in (-1, None)
        return relative or os.fspath(args[0]).startswith(self.root)


_EVENTS = (
    "open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink",
    "os.truncate",
)  # fmt: skip
