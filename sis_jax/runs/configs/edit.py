"""The configuration of `sis_jax.edit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, arg

from sis_jax.runs.config import Config, PythonOnly, Switch, spelled, without

if TYPE_CHECKING:
    import numpy as np

    from sis_jax.checkpoints.clip import CLIP
    from sis_jax.data.parts import Parts
    from sis_jax.stages.directions import Direction
    from sis_jax.types import Generator

    Photos = str | tuple[str, ...] | np.ndarray
else:
    CLIP = Parts = Direction = Generator = Photos = Any


@dataclass(frozen=True, kw_only=True)
class Move:
    """The direction, and how far along it.

    Args:
        direction: "pca:0" is the strongest principal component of W, pca:1 the next; the name of a
            direction stored in the run (that of `discover --rare`, earlier edits, RUN/directions/);
            a .safetensors file; or a text, "a person with glasses", which needs a text model.
        strength: one number or several; negative goes the other way. 1 is the displacement that a
            direction was learned with, or one standard deviation of W along it.
        slots: which W+ layers are moved, "0-3" (shape) or "4-9" (colour); all by default.
        clip: text model for a text, a name or a path; by default as in `label`.
        neutral: the text without the wanted property, "a person".
        n: samples from which a text's direction is learned, from 20 on.
    """

    direction: Annotated[str | Direction, spelled("NAME|FILE|TEXT", default="pca:0")] = "pca:0"
    strength: float | tuple[float, ...] = 1.0
    slots: str | None = None
    clip: Annotated[str | CLIP | None, spelled("NAME|PATH")] = None
    neutral: str = "a photo"
    n: int = 2000


@dataclass(frozen=True, kw_only=True)
class Projection:
    """How photos are projected into the generator.

    Args:
        space: "w+" comes closer to the photo, "w" can be edited better.
        steps: of the optimisation.
        lpips: files with the weights of LPIPS on VGG16 (two as published, or one), used in place of
            the discriminator's features.
    """

    space: Literal["w", "w+"] = "w+"
    steps: int = 200
    lpips: Annotated[tuple[str, ...], arg(help_behavior_hint="")] = ()


@dataclass(frozen=True)
class EditConfig(Config):
    """Which images, and how they are changed.

    Args:
        run: the folder in which `discover` left its parts; in Python also parts, with their
            generator as gen=, and nothing is written.
        seed: the images to edit, one number or several, from 0 on.
        photo: real photos in place of seeds, a file, several or a folder; in Python also uint8[n r
            r 3] at the generator's resolution.
        truncation: psi of the images, 0 to 2; by default that of the samples the parts were learned
            from.
        name: of the folder below RUN/edits; by default made from the direction.
        gen: the generator of the parts, in Python; found by its name otherwise.
        inpainter: in Python, (image uint8[h w 3], hole bool[h w]) -> image; completes backgrounds
            in place of OpenCV's inpainting.
        overwrite: replace an edit of this name that was made with other settings.
    """

    verb: ClassVar[str] = "edit"
    makes: ClassVar[str] = "this edit"
    unrecorded: ClassVar[tuple[str, ...]] = (
        "run", "clip", "neutral", "n", "name", "gen", "overwrite"
    )  # fmt: skip
    renamed: ClassVar[Mapping[str, str | None]] = {"seeds": "seed"}

    run: Annotated[str | Path | Parts, Positional, spelled("RUN")]
    _: KW_ONLY
    seed: int | tuple[int, ...] = 0
    photo: Annotated[Photos | None, spelled("FILE [FILE ...]", tuple[str, ...])] = None
    truncation: float | None = None
    name: str | None = None
    gen: PythonOnly[Generator | None] = None
    inpainter: PythonOnly[Callable[..., Any] | str | None] = None
    overwrite: Switch = False
    move: Move = field(default_factory=Move)
    projection: Projection = field(default_factory=Projection)

    def record(self) -> dict[str, Any]:
        unused = ("seed",) if self.photo is not None else (f.name for f in fields(Projection))
        return without(super().record(), unused)
