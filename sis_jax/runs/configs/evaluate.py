"""The configuration of `sis_jax.evaluate`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import Positional

from sis_jax.runs.config import Config, Switch, spelled

if TYPE_CHECKING:
    from sis_jax.ops.scoring import Segmenter
else:
    Segmenter = Any


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The photos and their ground truth.

    Args:
        images: photos, a folder, .zip or .npz; an .npz may hold the masks too.
        masks: their ground truth, paired by name; class ids in a palette or grey image, or black
            and white.
        benchmark: a published test set, instead of images and masks: celebamask-hq, cub, duts,
            ecssd, ...
        root: the folder the benchmark was unpacked to.
        split: of the benchmark; the default is the one papers test on.
        mask_values: whether masks hold class ids or grey values (from the protocol's threshold on,
            foreground).
        limit: only the first so many images.
    """

    images: str | None = None
    masks: str | None = None
    benchmark: str | None = None
    root: str | None = None
    split: str | None = None
    mask_values: Literal["auto", "ids", "grey"] = "auto"
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How masks are compared.

    Args:
        protocol: native, sis, l4f, voynov, melas or selfmask: how the published method measures;
            native changes neither photos nor masks.
        size: pixels of the shorter edge of the photos the network sees, 0 for their own; by default
            as the protocol defines.
        classes_map: {predicted name: name in the ground truth, or a list of them, or null}, as a
            JSON file or text; default: equal names.
        matching: also match classes with the labels' help, reported separately: hungarian,
            majority.
        resamples: of the 95 % bootstrap intervals over images; 0 for none.
        seed: of these resamples.
    """

    protocol: str = "native"
    size: int | None = None
    classes_map: Annotated[str | dict[str, Any] | None, spelled("FILE|JSON")] = None
    matching: tuple[str, ...] = ("hungarian", "majority")
    resamples: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class EvaluateConfig(Config):
    """Which masks, which ground truth, and how they are compared.

    Args:
        run: a run with a student, or "faces-student", which ships; in Python also the network
            itself.
        predictions: measure this folder of masks (<stem>.png beside classes.json, as predict writes
            it) instead of the student's.
        batch: photos at once, from 1 on.
        out: also write the metrics to this JSON file.
        overwrite: replace the numbers of another configuration under the same name.
    """

    verb: ClassVar[str] = "evaluate"
    makes: ClassVar[str] = "this evaluation"
    unrecorded: ClassVar[tuple[str, ...]] = ("run", "batch", "out", "overwrite")

    run: Annotated[str | Path | Segmenter | None, Positional, spelled("[RUN]")] = None
    _: KW_ONLY
    predictions: str | None = None
    batch: int = 16
    out: str | None = None
    overwrite: Switch = False
    truth: Truth = field(default_factory=Truth)
    measure: Measure = field(default_factory=Measure)
