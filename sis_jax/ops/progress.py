"""Progress bars and notes on stderr: in the command line, in Python with SIS_JAX_PROGRESS=1."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

_progress_shown = os.environ.get("SIS_JAX_PROGRESS", "0") not in ("0", "", "off")


@contextlib.contextmanager
def showing_progress(shown: bool = True) -> Iterator[None]:
    """Progress bars inside the `with` block."""
    global _progress_shown
    before, _progress_shown = _progress_shown, shown
    try:
        yield
    finally:
        _progress_shown = before


def say(text: str) -> None:
    """A line on stderr above any bar; nothing where progress is quiet."""
    if _progress_shown:
        tqdm.write(text, file=sys.stderr)


def progress(
    total: int, desc: str, unit: str, items: Iterable[Any] | None = None, *, hidden: bool = False
) -> Any:
    """A tqdm bar on stderr with rate and time left: iterate over it, or `.update(n)` and close it.

    total: the number of units. desc: name of the work. unit: of one unit. items: one a unit, given
        on by the bar. hidden: no bar whatever else was chosen.
    """
    # A log file wants a line now and then, a terminal wants a moving bar.
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        items, desc, total, unit=f" {unit}", file=sys.stderr, mininterval=interval,
        disable=hidden or not _progress_shown, dynamic_ncols=True,
    )  # fmt: skip
