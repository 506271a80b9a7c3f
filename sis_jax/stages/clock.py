"""The time that a run has taken over all its calls, kept in a hidden file of its folder."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from time import perf_counter

from sis_jax.data.files import write_atomic
from sis_jax.types import SisError

FILE = ".seconds"
EVERY = 10.0  # seconds between two writes: a killed call loses no more of its count


class Clock:
    """Counts from its creation on, after what `folder` has on record; inside `with` it records.

    again: count from zero.
    """

    def __init__(self, folder: Path, again: bool):
        self._folder, self._began, self._stop = folder, perf_counter(), threading.Event()
        self._before = 0.0 if again else _recorded(folder / FILE)
        self._thread = threading.Thread(target=self._keep, daemon=True)

    @property
    def seconds(self) -> float:
        """Of this call and of all before it."""
        return self._before + perf_counter() - self._began

    def __enter__(self) -> Clock:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._record()

    def _keep(self) -> None:
        while not self._stop.wait(EVERY):
            self._record()

    def _record(self) -> None:
        # A count that cannot be written is no reason to stop a run.
        with contextlib.suppress(SisError, OSError):
            if (self._folder / "run.json").is_file():
                write_atomic(self._folder / FILE, f"{self.seconds:.1f}\n".encode())


def _recorded(file: Path) -> float:
    try:
        return max(float(file.read_text()), 0.0)
    except (OSError, ValueError):
        return 0.0
