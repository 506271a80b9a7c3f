"""The configuration of `sis_jax.synthesize`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tyro.conf import Positional

from sis_jax.runs.config import RESOLVED, Config, PythonOnly, Switch, spelled, without

if TYPE_CHECKING:
    from sis_jax.data.parts import Parts
    from sis_jax.types import Generator
else:
    Parts = Generator = Any


@dataclass(frozen=True, kw_only=True)
class Images:
    """How the images are drawn.

    Args:
        truncation: psi of the images, 0 to 2; by default that of the samples the parts were learned
            from.
        mix: share of the images, 0 to 1, that are moved towards the rare class found by `discover
            --rare`; by default the share given there.
        seed: the images' seeds are seed * 100000, + 1, ...; discover took those of seed 0.
    """

    truncation: float | None = None
    mix: float | None = None
    seed: int = 1


@dataclass(frozen=True)
class SynthesizeConfig(Config):
    """Which parts, how many images, and how they are drawn.

    Args:
        run: the folder in which `discover` left its parts; in Python also a generator, with its
            parts as the second argument.
        parts: in Python, the parts of the generator given as `run`.
        n: images in all, from 2 on.
        out: where to write, a run folder or its `data`; by default the run itself.
        level: of the parts, where there are two: 0 is the coarse one, 1 the finer.
        val: share of the images that goes into the split "val", 0 to below 1.
        soft: also store each pixel's confidence (8-bit grey, `certainty/`).
        overwrite: discard a dataset that was made with other settings.
    """

    verb: ClassVar[str] = "synthesize"
    makes: ClassVar[str] = "this dataset"
    unrecorded: ClassVar[tuple[str, ...]] = ("run", "parts", "out", "overwrite")

    run: Annotated[str | Path | Generator, Positional, spelled("RUN")]
    parts: PythonOnly[Parts | None] = None
    _: KW_ONLY
    n: int = 10_000
    out: str | None = None
    level: int = 0
    val: float = 0.05
    soft: Switch = False
    overwrite: Switch = False
    images: Images = field(default_factory=Images)
    classes: PythonOnly[tuple[str, ...]] = field(default=(), metadata=RESOLVED)  # of the parts

    def record(self) -> dict[str, Any]:
        # Records of earlier versions have no level.
        return without(super().record(), () if self.level else ("level",))
