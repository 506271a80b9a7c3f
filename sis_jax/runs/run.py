"""The run folder: the request, its environment, and files that are whole or not there.


    with RunFolder.open("runs/faces") as run:
        with run.stage(config, generator=gen.info) as stage:
            if not stage.done:
                run.write_json("parts/classes.json", classes)

A stage that finished with the same configuration (`config.Config`) is done; another configuration
is refused unless `overwrite`. No JAX here.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sis_jax.data import draw
from sis_jax.data.files import (
    disk_errors,
    json_bytes,
    plain,
    read_run,
    remove_temporary,
    write_atomic,
)
from sis_jax.ops.progress import say
from sis_jax.runs.config import Config
from sis_jax.runs.lock import FolderLock
from sis_jax.types import Info, SisError, UsageError

_PACKAGES = ("sis_jax", "jax", "jaxlib", "flax", "numpy")
_NOTHING = (None, [], {})  # a field that is absent from an older record


@dataclass
class Stage:
    """One stage of a run while it is open.

    done: it finished before with this configuration: skip the work. resumed: it began before and
        did not finish. files: written so far, relative to the run. record: further keys for
        run.json. replaces: files of an earlier record, removed when this one begins. begun: it is
        on record.
    """

    name: str
    done: bool = False
    resumed: bool = False
    files: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    replaces: list[str] = field(default_factory=list)
    begun: bool = False


class RunFolder:
    """A run folder this process holds; made by `RunFolder.open`, to be closed (or use `with`)."""

    def __init__(self, path: Path, lock: FolderLock, overwrite: bool):
        self.path, self.overwrite = path, overwrite
        self._lock, self._stage = lock, None
        self._entry: dict[str, Any] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str], overwrite: bool = False) -> RunFolder:
        """Create the folder, or open one that has a run.json.

        overwrite: let a stage replace one of another configuration. Raises UsageError for a folder
            that holds other things, SisError where nothing can be written or another process is at
            work.
        """
        path = Path(path).expanduser()
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; a run needs a folder: give another --out")
        with disk_errors(path):
            if path.is_dir() and not (path / "run.json").exists():
                strangers = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
                if strangers:
                    raise UsageError(
                        f"{path} is not a run: it holds {strangers[0]!r} and no run.json; give a "
                        "new folder as --out"
                    )
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, FolderLock(path / ".lock"), overwrite)
            try:
                remove_temporary(path)
                if not (path / "run.json").exists():
                    run._save({"format": 1, "stages": {}})
                run.read()
            except BaseException:
                run.close()
                raise
        return run

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes in. Nothing can be written afterwards."""
        self._lock.release()

    def read(self) -> dict[str, Any]:
        """The content of run.json: {"format": 1, "stages": {name: record}}."""
        return read_run(self.path)

    @contextlib.contextmanager
    def stage(
        self,
        config: Config,
        *,
        given: Config | None = None,
        name: str = "",
        inputs: Mapping[str, str] | str = "",
        generator: Info | None = None,
        again: bool = False,
        late: bool = False,
    ) -> Iterator[Stage]:
        """Open a stage; leaving the block without an exception records it as done.

        config: resolved; its `record()` is stored and compared. given: as it was asked for, for the
            command line. name: by default the verb. inputs: digests of the files that the stage
            reads. generator: its name, sha256 and licence are recorded. again: a finished stage is
            opened as resumed. late: files that `overwrite` replaces stay until the first one is
            written.
        Raises UsageError, naming the first field that differs, for another configuration without
        `overwrite`.
        """
        name = name or config.verb
        resolved, inputs = plain(config.record()), plain(inputs)
        stage = self._begin(name, config, resolved, inputs, again)
        if stage.done:
            say(f"{self.path} already holds {config.makes}; give --overwrite to repeat the work")
            yield stage
            return
        entry = {"state": "started", "config": resolved, "inputs": inputs, "started": _now()}
        command = (given or config).command()
        self._stage, self._entry = stage, entry | {"command": command}
        started = time.perf_counter()
        if not (late and stage.replaces):
            self._start(stage)
        try:
            yield stage
            if not stage.begun:
                self._start(stage)
        except BaseException:
            # A stage that failed before it wrote anything leaves no trace: the next try may be
            # given other arguments.
            if stage.begun and not stage.files and not stage.resumed:
                with contextlib.suppress(Exception):
                    self._put(name, None)
            raise
        finally:
            self._stage = None
        made_with = _generator_record(generator)
        self._put(
            name,
            {
                **entry,
                "state": "done",
                "finished": _now(),
                "seconds": round(time.perf_counter() - started, 3),
                "command": command,
                "seeds": {k: v for k, v in resolved.items() if k == "seed"},
                "versions": versions(),
                "device": _device(),
                **({"generator": made_with} if made_with else {}),
                **plain(stage.record),
                "files": sorted(set(stage.files)),
            },
        )

    def _begin(
        self, name: str, config: Config, resolved: dict[str, Any], inputs: Any, again: bool
    ) -> Stage:
        """Compare with the record: done, resumed, new, or refused."""
        record = self.read()["stages"].get(name)
        if record is None:
            return Stage(name)
        before = _without_old_names(record.get("config", {}), config)
        change = difference(before, resolved) or difference(
            {"inputs": record.get("inputs", "")}, {"inputs": inputs}
        )
        files = record.get("files", [])
        if self.overwrite:
            return Stage(name, replaces=list(files))
        if change:
            key, old, new = change
            raise UsageError(
                f"{self.path} already has {name} with {key}={_show(old)}, now asked for "
                f"{_show(new)}; give another --out, or --overwrite to replace the old files"
            )
        if (
            not again
            and record.get("state") == "done"
            and all(self._inside(file).exists() for file in files)
        ):
            return Stage(name, done=True, files=list(files), record=record)
        return Stage(name, resumed=True)

    def _start(self, stage: Stage) -> None:
        """Put the open stage on record, and remove the files it replaces."""
        for file in stage.replaces:
            self._inside(file).unlink(missing_ok=True)
        stage.replaces, stage.begun = [], True
        self._put(stage.name, self._entry)

    def _put(self, name: str, entry: dict[str, Any] | None) -> None:
        """Set or remove one record."""
        content = self.read()
        content["stages"].pop(name, None)
        if entry is not None:
            content["stages"][name] = entry
        self._save(content)

    def _save(self, content: dict[str, Any]) -> None:
        write_atomic(self.path / "run.json", json_bytes(content), durable=True)

    def _inside(self, name: str | os.PathLike[str]) -> Path:
        """A path of this run, however it was spelled; never one outside it."""
        path = self.path / name
        if ".." in Path(name).parts or not path.absolute().is_relative_to(self.path.absolute()):
            raise UsageError(f"{os.fspath(name)!r} is outside the run folder {self.path}")
        return path

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Write RUN/name, whole or not at all, as a file of the open stage; returns the path."""
        if not self._lock.held:
            raise SisError(f"the run folder {self.path} was closed; open it again to write {name}")
        path = self._inside(name)
        if self._stage is not None and not self._stage.begun:
            self._start(self._stage)
        write_atomic(path, data)
        if self._stage is not None:
            self._stage.files.append(path.relative_to(self.path).as_posix())
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Like `write_bytes`, for JSON values (paths, dataclasses, NumPy too); NaN is null."""
        return self.write_bytes(name, json_bytes(value))

    def write_image(self, name: str, image: np.ndarray | Image.Image, **options: Any) -> Path:
        """Like `write_bytes`, for a PNG of uint8[h w 3], [h w] or a Pillow image; options: its."""
        return self.write_bytes(name, draw.png(image, **options))


def _without_old_names(record: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """An earlier version's record in today's names, without fields that are no longer compared."""
    renamed = {config.renamed.get(name, name): value for name, value in record.items()}
    return {name: v for name, v in renamed.items() if name and name not in config.unrecorded}


def difference(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> tuple[str, Any, Any] | None:
    """The first field in which two records differ: (name, old, new); absent equals empty."""
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found = difference(a, b, f"{prefix}{key}.")
            if found:
                return found
        elif a != b and not (a in _NOTHING and b in _NOTHING):
            return prefix + key, a, b
    return None


def versions() -> dict[str, str]:
    """The versions a result depends on, read without importing the packages."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _device() -> str:
    """The devices of JAX, if the process uses JAX at all; this module does not import it."""
    jax = sys.modules.get("jax")
    if jax is None:
        return f"{platform.machine()} CPU, without JAX"
    devices = jax.devices()
    kind = devices[0].device_kind
    return f"{len(devices)} x {kind if kind != 'cpu' else platform.machine() + ' CPU'}"


def _generator_record(info: Info | None) -> dict[str, Any]:
    if info is None:
        return {}
    return {key: getattr(info, key, "") for key in ("name", "sha256", "licence", "source")}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _show(value: Any) -> str:
    text = repr(value) if value is not None else "nothing"
    return text if len(text) <= 60 else text[:57] + "..."
