"""Classes that a generator draws too rarely to get a cluster, found by text (Segmentation in Style, section 3.4).

Samples are moved along the direction of a prompt until nearly all show the class, and clustered once more. Of the new clusters, the one whose share grows
most when plain samples are moved is the class. Its centre is put beside those found without moving, so that one set of labels covers both; and from
then on the generator moves only a share of its samples, so that a student sees the class, and sees pictures without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from sis_jax import directions
from sis_jax.core import cli
from sis_jax.core.features import sample_seeds
from sis_jax.core.types import Generator, SisError, UsageError
from sis_jax.nn.moved import mixed, moved
from sis_jax.weights.clip_model import CLIP

LOOKED_AT = 64  # samples on which shares are compared
LEAST_GROWTH = 2e-3  # of the pixels: less is noise


@dataclass(frozen=True)
class Rare:
    """A fitted method with one more cluster, the generator that draws it often enough, and how it was found.

    cluster: number of the new one. before, after: its share of the pixels of plain and of moved samples.
    """

    fitted: Any
    gen: Any
    direction: directions.Direction
    cluster: int
    name: str
    before: float
    after: float


def add_rare(
    gen: Generator, fitted: Any, clip: CLIP, prompt: str, neutral: str, *, n: int, share: float, seed: int, published: bool = False
) -> Rare:
    """One more cluster for what `prompt` says, in parts that `fitted` found in `gen`.

    n: samples to learn the direction from. share: of the samples that are moved later on. Raises UsageError for a method without cluster centres, SisError
    where the direction leads nowhere or no cluster grows.
    """
    if "centers" not in getattr(fitted, "arrays_", {}):
        raise UsageError(f"--rare needs parts that are cluster centres: use --method segmentation_in_style, not {type(fitted).__name__}")
    if not 0 < share <= 1:
        raise UsageError(f"rare_share is {share}, expected a share of the samples above 0, up to 1 (0.5 moves every second one)")
    direction = directions.learn(gen, clip, prompt, neutral, n=n, seed=seed + 1, published=published)
    direction = directions.with_strength(gen, clip, direction, truncation=fitted.truncation)
    cli.say(f"{prompt!r}: moved by {direction.displacement:.2f}, {100 * direction.facts['passing']:.0f} % of samples pass")
    everywhere: Any = moved(gen, direction.move)
    found = _resolved(fitted).fit(everywhere, seed)
    seeds = sample_seeds(seed + 2, LOOKED_AT)
    shares = [_shares(found, g, seeds) for g in (gen, everywhere)]
    best = int(np.argmax(shares[1] - shares[0]))
    before, after = float(shares[0][best]), float(shares[1][best])
    if after - before < LEAST_GROWTH:
        raise SisError(
            f"no cluster grows when samples are moved towards {prompt!r} (at most from {100 * before:.2f} to {100 * after:.2f} % of the pixels): "
            f"raise k, or take a finer layer"
        )
    arrays = fitted.arrays_ | {"centers": np.concatenate([fitted.arrays_["centers"], _translated(found, fitted, best)[None]])}
    arrays |= {"rare/move": np.asarray(direction.move), "rare/share": np.full(1, share, np.float32)}
    together = mixed(gen, arrays)
    joined = _joined(fitted, arrays, found.clusters_[best]["agreement"], together, sample_seeds(seed, fitted.n))
    return Rare(joined, together, direction, len(fitted.clusters_), class_name(prompt), before, after)


def class_name(prompt: str) -> str:
    """What a prompt calls the rare thing: "a photo of a person with glasses" is "glasses"."""
    for word in (" with ", " wearing ", " of "):
        if word in prompt:
            prompt = prompt.split(word)[-1]
    for article in ("a ", "an ", "the "):
        prompt = prompt.removeprefix(article)
    return prompt.strip()


def _resolved(fitted: Any) -> Any:
    """The method with the settings it ended up with, not yet fitted."""
    return type(fitted)(**{f.name: getattr(fitted, f.name) for f in fields(fitted) if f.init})


def _shares(fitted: Any, gen: Generator, seeds: Sequence[int]) -> Float[np.ndarray, "k"]:
    count = np.zeros(len(fitted.clusters_))
    for _, labels, _ in fitted.label_seeds(gen, list(seeds)):
        count += np.bincount(labels.ravel(), minlength=len(count))
    return count / count.sum()


def _translated(found: Any, base: Any, cluster: int) -> Float[np.ndarray, "d"]:
    """A centre of one fit in the coordinates of another: each scales features by the samples it saw."""
    theirs, ours = found.arrays_, base.arrays_
    scale = np.where(theirs["scale"] == 0, 1, theirs["scale"])  # columns that take no part
    raw = theirs["centers"][cluster] / scale + theirs["mean"]
    return ((raw - ours["mean"]) * ours["scale"]).astype(np.float32)


def _joined(fitted: Any, arrays: dict[str, np.ndarray], agreement: float, gen: Generator, seeds: list[int]) -> Any:
    """A fitted copy with one more cluster, described on samples of which some are moved; what was background stays it."""
    joined = fitted.restored(arrays)
    before = [dict(c) for c in fitted.clusters_]
    learned = {"clusters_": [*before, {"id": len(before), "agreement": float(agreement)}], "background_": {}, "sweep_": fitted.sweep_}
    for name, value in learned.items():
        object.__setattr__(joined, name, value)
    joined._describe(gen, seeds)
    for cluster, old in zip(joined.clusters_, before):
        cluster["background"] = old["background"]
    joined.clusters_[-1]["background"] = False
    joined.background_.update(fitted.background_)
    return joined


def described(rare: Rare) -> dict[str, Any]:
    """What was done, as JSON holds it."""
    d = replace(rare.direction)
    return {
        "prompt": d.prompt, "neutral": d.neutral, "name": rare.name, "cluster": rare.cluster, "displacement": d.displacement,
        "share_plain": rare.before, "share_moved": rare.after, "threshold": d.threshold, **d.facts,
    }  # fmt: skip
