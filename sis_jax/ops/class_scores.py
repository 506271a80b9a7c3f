"""From similarities to names: a softmax over classes per region, and the lead of the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

MARGIN = 0.1
FINER_MARGIN = 0.5  # of the finer parts, unless every part is to be named
NEAR = 0.5  # nats that a region may be behind the one that a finer class fits best
HELD = 0.03  # of the area of a coarse part, from which a class of its finer parts is in its name
RULE = (
    "A part is named only where the first class is ahead of the second by at least the margin "
    "(difference of probabilities) and is none of the neutral words; otherwise it keeps its name "
    "and is marked unsure. For finer parts half of the evidence is what a part has more of than "
    f"the others, and the margin is {FINER_MARGIN} or more; a finer class names the part that it "
    "fits best. A coarse part whose finer parts are of several classes has all their names."
)


@dataclass(frozen=True)
class Verdict:
    """The class of a region: `best` with probability `score`, ahead of `second` by `margin`, which
    is below zero where neutral words fit better.
    """

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
    best = _of_classes(unit(regions) @ unit(prompts).T, owner)
    return best, softmax(scale * best)


def _of_classes(
    x: Float[np.ndarray, "k p"], owner: Int[np.ndarray, "p"]
) -> Float[np.ndarray, "k c"]:
    """The value of each class's best prompt."""
    return np.stack([x[:, owner == c].max(1) for c in range(int(owner.max()) + 1)], axis=1)


def apart(
    logits: Float[np.ndarray, "k p"], owner: Int[np.ndarray, "p"]
) -> Float[np.ndarray, "k c"]:
    """Probability of every class for every region, half of the evidence being what the region has
    more of than the others: to each logit of a prompt its lead over the mean of the regions is
    added.
    """
    return softmax(_of_classes(2 * logits - logits.mean(0), owner))


def finer(
    logits: Float[np.ndarray, "k p"],
    owner: Int[np.ndarray, "p"],
    usual: int | None,
    margin: float = MARGIN,
) -> list[Verdict | None]:
    """For regions of one class the finer class of each, None where there is none.

    owner: finer class of each prompt. usual: the one that stands for the rest of the class. A
        finer class is found in the region that it fits best, beside the others, and in those hardly
        behind; where several are found in one, the likeliest is taken if it leads by the margin.
    """
    more, likely = _of_classes(logits - logits.mean(0), owner), _of_classes(logits, owner)
    least = 0.0 if usual is None else np.maximum(more[:, [usual]], 0)
    here = (more >= more.max(0) - NEAR) & (more > least)
    if usual is not None:
        here[:, usual] = False
    found: list[Verdict | None] = []
    for some, row in zip(here, likely):
        if not some.any():
            found.append(None)
            continue
        (verdict,) = decide(softmax(np.where(some, row, -np.inf))[None], margin)
        found.append(verdict if verdict.named else None)
    return found


def softmax(x: Float[np.ndarray, "*n c"]) -> Float[np.ndarray, "*n c"]:
    """exp(x) / sum exp(x) over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def decide(
    probability: Float[np.ndarray, "k c"], margin: float = MARGIN, neutral: Sequence[int] = ()
) -> list[Verdict]:
    """A decision per region, by `RULE`. neutral: class numbers that are no name: never the first
    class, but one that the first may be behind.
    """
    verdicts = []
    for row in probability:
        order = np.argsort(-row, kind="stable").tolist()
        best = next(i for i in order if i not in neutral)
        order.remove(best)
        second = order[0] if order else None
        ahead = float(row[best] - (row[second] if second is not None else 0.0))
        verdicts.append(Verdict(best, second, float(row[best]), ahead, ahead >= margin))
    return verdicts
