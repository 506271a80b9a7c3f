"""The configuration of `sis_jax.label`, and the published setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, UseAppendAction, arg

from sis_jax.errors import UsageError
from sis_jax.runs.config import RESOLVED, Config, PythonOnly, Switch, spelled

if TYPE_CHECKING:
    from sis_jax.checkpoints.clip import CLIP
    from sis_jax.data.ontology import Ontology
    from sis_jax.data.parts import Parts
    from sis_jax.types import Generator
else:
    CLIP = Ontology = Parts = Generator = Any

RECIPES: dict[str, dict[str, Any]] = {
    # Section 3.2 and its code: ResNet-50x64 on images of 2048 pixels, bilinear with aligned
    # corners, one template, no neutral words, always a name.
    "paper": {
        "clip": "RN50x64",
        "size": 2048,
        "align_corners": True,
        "templates": ("This is a photo of a {}",),
        "margin": 0.0,
        "mode": "dense",
    }
}


@dataclass(frozen=True, kw_only=True)
class Words:
    """The text.

    Args:
        ontology: names of the parts, {prompt: class}; null is the background. A JSON file, "faces"
            (which ships), in Python also a dict; more in data/ontology.py.
        prompt: the same as words, "a photo of hair=hair"; "a wall=" is background. May be given
            several times, and beside an ontology.
        neutral: words that fit nothing in particular; a part that they fit best gets no name.
        templates: sentences for the prompts, "a photo of {}"; the average of several is more
            reliable than one.
    """

    ontology: Annotated[str | Path | Mapping[str, Any] | Ontology | None, spelled("FILE|faces")] = (
        field(default=None, kw_only=False)
    )
    prompt: UseAppendAction[tuple[str, ...]] = ()
    neutral: Annotated[tuple[str, ...], arg(help_behavior_hint="")] = ()
    templates: Annotated[tuple[str, ...], arg(help_behavior_hint="")] = ()


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How a part is compared with the text.

    Args:
        mode: "dense" averages CLIP's features over the pixels of a part, "crop" shows it cut-out
            parts.
        size: pixels of the shorter edge at which CLIP reads images in the mode "dense"; 0 is its
            own choice, usually twice its training resolution.
        n: samples to look at, from 1 on.
        margin: a name is given only where its probability is ahead of the next by this much, 0
            (always) to 1.
        seed: of the samples.
    """

    mode: Literal["dense", "crop"] = "dense"
    size: int = 0
    n: int = 50
    margin: float = 0.1
    align_corners: PythonOnly[bool] = field(default=False, metadata=RESOLVED)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UsageError(f"n is {self.n}, expected at least 1 sample (50 is the default)")
        if self.size < 0:
            raise UsageError(
                f"size is {self.size}, expected pixels, or 0 for the text model's own choice, "
                "usually twice its own size"
            )
        if not 0 <= self.margin <= 1:
            raise UsageError(
                f"margin is {self.margin}, expected a difference of probabilities from 0 (always "
                "a name) to 1"
            )
        if self.mode not in ("dense", "crop"):
            raise UsageError(f'mode is {self.mode!r}, expected "dense" or "crop"')


@dataclass(frozen=True)
class LabelConfig(Config):
    """Which parts, which text, and how they are compared.

    Args:
        run: the folder in which `discover` left its parts; in Python also parts.
        clip: text model, a name or a path. By default one made for the generator (faces64:
            "faces-clip") where ported_weights has it, else openai/clip-vit-base-patch32.
        gen: the generator of the parts, in Python; found by its name otherwise.
        edits: names by hand in place of text: the edits.json that the report downloads, in Python
            also its content; needs no text model, and takes no other option.
        recipe: "paper" is the setting of Segmentation in Style: RN50x64 on images of 2048 pixels.
            Settings given beside it win.
        overwrite: discard the names that another configuration gave.
    """

    verb: ClassVar[str] = "label"
    makes: ClassVar[str] = "these names"
    unrecorded: ClassVar[tuple[str, ...]] = (
        "run", "gen", "recipe", "prompt", "neutral", "templates", "overwrite"
    )  # fmt: skip

    run: Annotated[str | Path | Parts, Positional, spelled("RUN")]
    words: Words = field(default_factory=Words)
    _: KW_ONLY
    clip: Annotated[str | CLIP | None, spelled("NAME|PATH")] = None
    gen: PythonOnly[Generator | None] = None
    edits: Annotated[str | Path | Mapping[str, Any] | None, spelled("FILE")] = None
    recipe: str | None = None
    naming: Naming = field(default_factory=Naming)
    overwrite: Switch = False

    def record(self) -> dict[str, Any]:
        return {"edits": self.edits} if self.edits is not None else super().record()
