"""The configuration of `python -m sis_jax run`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import Positional

from sis_jax.errors import UsageError
from sis_jax.runs.config import Config, Switch, spelled


@dataclass(frozen=True, kw_only=True)
class StageSizes:
    """What `budget` or the platform decides where it is not given here.

    Args:
        resolution: pixels of the images of a generator trained here, a power of two.
        train_images: photos shown to its discriminator in all.
        start_from: where its training begins: a generator with its discriminator (a name, a folder,
            a checkpoint file), whose terms its weights then share, or "none" for random weights; by
            default faces64 on a CPU, where hours are too short to begin with nothing.
        n: generated images with masks.
        steps: of the student's training on them.
    """

    resolution: int | None = None
    train_images: int | None = None
    start_from: str | None = None
    n: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class RunConfig(Config):
    """A generator or photos in; a student, masks of the photos and a report out.

    Args:
        source: a generator (name, weights folder, checkpoint file), or photos to train one on (a
            folder or archive); the default generator without it.
        out: run folder of all stages; a generator is trained in its sub-folder `training`.
        budget: time for all stages, such as 2h, 30m or 5400 seconds: the sizes of all stages are
            chosen to fit it, from the speed of this machine. Without it they are those of the
            platform.
        photos: real photos for the student to adapt to, and to predict masks of; by default those
            the generator was trained on here.
        fit: photos that are not square: "crop" cuts the largest centred square, "pad" repeats
            their border up to a square, "stretch" squeezes them into one; by default crop where
            they are nearly square, and stretch. Masks are always those of the whole photo.
        level: of the parts that these masks, and so the student's, show: 0 is the coarse one, 1 the
            finer.
        seed: of every stage.
        overwrite: discard the results of other settings in `out`.
    """

    verb: ClassVar[str] = "run"
    makes: ClassVar[str] = "this plan"
    later: ClassVar[Mapping[str, Any]] = {"level": 0, "start_from": None}

    source: Annotated[str | None, Positional, spelled("[GEN|PHOTOS]")] = None
    _: KW_ONLY
    out: str
    budget: str | None = None
    photos: str | None = None
    fit: Literal["crop", "pad", "stretch"] | None = None
    level: Literal[0, 1] = 0
    seed: int = 0
    overwrite: Switch = False
    sizes: StageSizes = field(default_factory=StageSizes)

    def seconds(self) -> float | None:
        """The budget in seconds, None without one. Raises UsageError where it is no time."""
        if self.budget is None:
            return None
        number = r"(\d+(?:\.\d+)?)"
        pattern = rf"(?:{number}h)?(?:{number}m(?:in)?)?(?:{number}s?)?"
        found = re.fullmatch(pattern, self.budget.strip())
        parts = [float(part or 0) for part in found.groups()] if found else [0.0]
        seconds = sum(part * unit for part, unit in zip(parts, (3600, 60, 1)))
        if not seconds > 0:
            raise UsageError(
                f"budget is {self.budget!r}, expected a time: 2h, 30m, 1h30m or 5400 (seconds)"
            )
        return seconds

    def command(self) -> str:
        return super().command().replace("sis_jax.run", "sis_jax run", 1)
