"""The configuration of `sis_jax.discover`; the settings of the methods are in
`methods/settings.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tyro.conf import Positional

from sis_jax.runs.config import Config, Switch, spelled, without

if TYPE_CHECKING:
    from sis_jax.checkpoints.clip import CLIP
    from sis_jax.types import Generator
else:
    CLIP = Generator = Any


@dataclass(frozen=True, kw_only=True)
class RareClass:
    """A part that is generated too rarely to be found.

    Args:
        rare: the part as a text, "a person with glasses": samples are moved towards it until it
            becomes a part.
        neutral: the same text without it, "a person".
        rare_n: samples to learn its direction from, from 20 on.
        rare_share: share of the samples, above 0 up to 1, that are moved in data made from the
            parts.
    """

    rare: str | None = None
    neutral: str = "a photo"
    rare_n: int = 2000
    rare_share: float = 0.5


@dataclass(frozen=True)
class DiscoverConfig(Config):
    """Which generator, and how its parts are found.

    Args:
        gen: a generator, the name of one, a weights folder, or a checkpoint file; the default one
            ships with the library.
        out: run folder to write (parts, gallery, report); in Python nothing is written without it.
        method: how the parts are found; the method's own settings are flags too. "auto" is furrygan
            where the generator draws masks itself and neither a recipe, a rare class nor a setting
            of segmentation_in_style is given, else segmentation_in_style.
        recipe: settings by name; "paper" is the published one of Segmentation in Style. Settings
            given beside it win where they differ from the usual defaults.
        ontology: names for the parts, {prompt: class}, a JSON file or in Python a dict; `python -m
            sis_jax.label` has more options.
        clip: text model for names and rare classes, a name or a path; by default as in `label`.
        seed: of samples and clustering, from 0 on.
        overwrite: replace the results of another configuration in `out`.
        settings: those of the method chosen.
    """

    verb: ClassVar[str] = "discover"
    makes: ClassVar[str] = "these parts"
    choice: ClassVar[str] = "method"
    elsewhere: ClassVar[Mapping[str, str]] = {
        "level": "--level belongs to synthesize, distill and run; discover finds both levels"
    }

    gen: Annotated[str | Path | Generator | None, Positional, spelled("[GEN]")] = None
    _: KW_ONLY
    out: str | None = None
    method: str = "auto"
    recipe: str | None = None
    ontology: Annotated[str | Mapping[str, Any] | None, spelled("FILE|faces")] = None
    clip: Annotated[str | CLIP | None, spelled("NAME|PATH")] = None
    seed: int = 0
    overwrite: Switch = False
    settings: Any = None
    rare_class: RareClass = field(default_factory=RareClass)

    def record(self) -> dict[str, Any]:
        unused = () if self.rare_class.rare else (f.name for f in fields(RareClass))
        return without(super().record(), unused)
