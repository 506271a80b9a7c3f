"""The values of `edit --direction`: a principal component of w, a stored direction, or a text.

Principal components are GANSpace's (Härkönen et al. 2020, arXiv 2004.02546, section 2.1), signed so
that the largest entry is positive.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from sis_jax.ops.sampling import collect, sample_seeds
from sis_jax.stages.directions import Direction, learn, with_strength
from sis_jax.stages.naming import load_text_model
from sis_jax.stages.rare import class_name
from sis_jax.training.projection import map_body
from sis_jax.types import Generator, UsageError, unknown_name

if TYPE_CHECKING:
    from sis_jax.checkpoints.clip import CLIP

COMPONENTS_FROM = 10_000  # samples
LISTED = 5  # components among the names that an error suggests
_SEED = 5  # of those samples


def principal(gen: Generator, component: int) -> Direction:
    """Component `component` of w over 10 000 samples; displacement: one standard deviation."""
    w = collect(gen, sample_seeds(_SEED, COMPONENTS_FROM), map_body, batch=500)
    if not 0 <= component < w.shape[1]:
        raise UsageError(
            f"there is no direction pca:{component}: w has {w.shape[1]} numbers, so give pca:0 to "
            f"pca:{w.shape[1] - 1}"
        )
    values, vectors = np.linalg.eigh(np.cov(w.T))
    unit = vectors[:, -1 - component]
    unit = (unit * np.sign(unit[np.argmax(np.abs(unit))])).astype(np.float32)
    spread = float(np.sqrt(max(values[-1 - component], 0)))
    return Direction(
        unit,
        f"pca:{component}",
        "",
        "ganspace",
        spread,
        spread,
        facts={"share": float(values[-1 - component] / values.sum())},
    )


def stored(run: Path | None) -> dict[str, Path]:
    """The directions that a run keeps, {name: file}: of `--rare`, edits and RUN/directions/."""
    if run is None:
        return {}
    found: dict[str, Path] = {}
    files = [
        run / "parts" / "rare.safetensors",
        *sorted((run / "directions").glob("*.safetensors")),
    ]
    for file in [*files, *sorted((run / "edits").glob("*/direction.safetensors"))]:
        if file.is_file():
            prompt = Direction.load(file).prompt
            names = {
                prompt,
                class_name(prompt),
                file.parent.name if file.stem == "direction" else file.stem,
            }
            found = {
                name: file for name in names if name
            } | found  # the first that has a name keeps it
    return {name: file for name, file in found.items() if not name.startswith("pca:")}


def resolve(
    asked: str | Path | Direction,
    gen: Generator,
    run: Path | None,
    *,
    clip: str | CLIP | None = None,
    neutral: str = "a photo",
    n: int = 2000,
    truncation: float = 0.7,
) -> Direction:
    """The direction that was asked for; UsageError for an unknown or misshapen one."""
    direction = (
        asked
        if isinstance(asked, Direction)
        else _named(str(asked).strip(), gen, run, clip, neutral, n, truncation)
    )
    width = np.asarray(gen.map(gen.latents([0]))).shape[-1]
    if direction.unit.shape != (width,):
        raise UsageError(
            f"the direction {direction.prompt!r} has {list(direction.unit.shape)} numbers and w "
            f"of {gen.info.name} has {width}: it is of another generator"
        )
    return direction


def _named(
    asked: str, gen: Generator, run: Path | None, clip: Any, neutral: str, n: int,
    truncation: float,
) -> Direction:  # fmt: skip
    if asked.startswith("pca:"):
        number = asked.removeprefix("pca:")
        if not number.isdigit():
            raise UsageError(
                f"direction {asked!r} is no principal component: give pca:0, pca:1, ..."
            )
        return principal(gen, int(number))
    known = stored(run)
    if asked in known:
        return Direction.load(known[asked])
    if asked.endswith(".safetensors"):
        return Direction.load(asked)
    if clip is not None or " " in asked:
        text = load_text_model(clip, gen.info.name)
        found = learn(gen, text, asked, neutral, n=n, truncation=truncation, seed=1)
        return with_strength(gen, text, found, truncation=truncation)
    raise unknown_name(
        "direction",
        asked,
        [*known, *(f"pca:{i}" for i in range(LISTED))],
        "Give one of the run's, pca:N, a .safetensors file, or a whole phrase for a text model.",
    )


def amount(direction: Direction) -> float:
    """How far strength 1 goes, in W: the learnt displacement, else one deviation, else 1."""
    return direction.displacement or direction.spread or 1.0


def in_layers(
    move: Float[np.ndarray, "w"], slots: str | None, total: int
) -> Float[np.ndarray, "s w"]:
    """`move` in the W+ layers "0-3", "5" or None (all), 0 elsewhere; UsageError for others."""
    first, last = 0, total - 1
    if slots is not None:
        a, dash, b = slots.partition("-")
        if not (a.strip().isdigit() and (b.strip().isdigit() if dash else True)):
            raise UsageError(
                f"slots is {slots!r}, expected numbers such as 0-3 or 5; w has layers 0 to "
                f"{total - 1}"
            )
        first, last = int(a), int(b) if dash else int(a)
        if not first <= last < total:
            raise UsageError(
                f"slots is {slots!r}, but w has layers 0 to {total - 1}, coarse to fine"
            )
    inside = (np.arange(total) >= first) & (np.arange(total) <= last)
    return (inside[:, None] * move).astype(np.float32)
