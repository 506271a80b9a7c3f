"""The configuration of `sis_jax.report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional

from sis_jax.runs.config import Config, spelled


@dataclass(frozen=True)
class ReportConfig(Config):
    """Which run.

    Args:
        run: the run folder, as `--out` named it.
    """

    verb: ClassVar[str] = "report"

    run: Annotated[str | Path, Positional, spelled("RUN")]
