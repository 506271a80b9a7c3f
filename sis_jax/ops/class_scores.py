"""From similarities to names: a softmax over classes per region, and the lead of the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

MARGIN = 0.1
RULE = (
    "A part is named only where the first class is ahead of the second by at least the margin "
    "(difference of probabilities) and is none of the "
    "neutral words; otherwise it keeps its name and is marked unsure."
)


@dataclass(frozen=True)
class Verdict:
    """The class of a region: `best` with probability `score`, ahead of `second` by `margin`."""

    best: int
    second: int | None
    score: float
    margin: float
    named: bool


def unit(x: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
    """Rows of unit length; a row of zeros stays one."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def ensemble(texts: Float[np.ndarray, "prompts templates d"]) -> Float[np.ndarray, "prompts d"]:
    """One unit vector per prompt from its templates: normalised, averaged, normalised."""
    return unit(unit(texts).mean(1))


def class_scores(
    regions: Float[np.ndarray, "k d"],
    prompts: Float[np.ndarray, "p d"],
    owner: Int[np.ndarray, "p"],
    scale: float,
) -> tuple[Float[np.ndarray, "k c"], Float[np.ndarray, "k c"]]:
    """(cosine, probability) of every class for every region: softmax of `scale` times the cosine of
    the class's best prompt.

    owner: class number of each prompt, 0..c-1. The best prompt, not the sum: a class must not gain
        by being described more often. A region of zeros gets equal probabilities.
    """
    cosine = unit(regions) @ unit(prompts).T
    classes = int(owner.max()) + 1
    best = np.stack([cosine[:, owner == c].max(1) for c in range(classes)], axis=1)
    return best, softmax(scale * best)


def softmax(x: Float[np.ndarray, "*n c"]) -> Float[np.ndarray, "*n c"]:
    """exp(x) / sum exp(x) over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def decide(
    probability: Float[np.ndarray, "k c"], margin: float = MARGIN, neutral: Sequence[int] = ()
) -> list[Verdict]:
    """A decision per region, by `RULE`. neutral: class numbers that are no name."""
    verdicts = []
    for row in probability:
        order = np.argsort(-row, kind="stable")
        best, second = int(order[0]), int(order[1]) if len(order) > 1 else None
        ahead = float(row[best] - (row[second] if second is not None else 0.0))
        verdicts.append(
            Verdict(best, second, float(row[best]), ahead, ahead >= margin and best not in neutral)
        )
    return verdicts
