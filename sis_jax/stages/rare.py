"""Classes drawn too rarely to get a cluster, found by text (Segmentation in Style, section 3.4).

Samples are moved along the direction of a prompt until nearly all show the class, and clustered
again. The centre of the new cluster is put beside the others, and the generator then moves a share
of its samples.
The paper recognises the cluster by its share. But a direction also moves things that go with the
class (hats are worn outdoors: the sky grows), so here the pixels of a cluster are put back as they
were, and the cluster that takes most of the text model's score with it, and hardly shows in plain
samples, is the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from sis_jax.checkpoints.clip import CLIP
from sis_jax.data import draw
from sis_jax.methods.base import Fitted
from sis_jax.models.moved import mixed, moved
from sis_jax.ops import class_scores
from sis_jax.ops.cluster_labels import with_centre
from sis_jax.ops.progress import say
from sis_jax.ops.sampling import sample_seeds
from sis_jax.stages import directions
from sis_jax.types import Generator, SisError

LOOKED_AT = 32  # samples on which clusters are compared
LEAST_GROWTH = 2e-3  # of the pixels: less is noise
PICTURED = 8  # samples in rare.png
TRIED = 5  # clusters that hold most of the score
LEAST_EVIDENCE = 0.15  # of the score's rise: a class whose cluster holds less is called unsure


@dataclass(frozen=True)
class Rare:
    """A fitted method with one more cluster, and the generator that draws it often enough.

    cluster: its number. before, after: its share of the pixels of plain and moved samples.
        evidence: share of the score's rise that is lost when its pixels are put back.
    """

    fitted: Fitted
    gen: Any
    direction: directions.Direction
    cluster: int
    name: str
    before: float
    after: float
    evidence: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warning where the text model hardly sees the class in its cluster."""
        if self.evidence >= LEAST_EVIDENCE:
            return ()
        return (
            f"Only {100 * max(self.evidence, 0):.0f} % of the score of {self.direction.prompt!r} "
            f"comes from the cluster called {self.name!r}: it may be something else that changes "
            "with it. Look at parts/rare.png; raise k, take a finer layer, or give other prompts.",
        )


def add_rare(
    gen: Generator,
    fitted: Fitted,
    clip: CLIP,
    prompt: str,
    neutral: str,
    *,
    n: int,
    share: float,
    seed: int,
) -> Rare:
    """One more cluster for the class that `prompt` names, in parts that `fitted` found in `gen`.

    n: samples to learn the direction from. share: of the samples moved later on. Raises SisError
        where the direction leads nowhere or no cluster grows.
    """
    psi = fitted.method.truncation
    direction = directions.learn(gen, clip, prompt, neutral, n=n, truncation=psi, seed=seed + 1)
    direction = directions.with_strength(gen, clip, direction, truncation=psi)
    say(
        f"{prompt!r}: moved by {direction.displacement:.2f}, "
        f"{100 * direction.facts['passing']:.0f} % of samples pass"
    )
    everywhere: Any = moved(gen, direction.move)
    found = fitted.method.fit(everywhere, seed)
    joined, (before, after), evidence, agreement = _chosen(
        gen, everywhere, fitted, found, clip, direction, sample_seeds(seed + 2, LOOKED_AT)
    )
    arrays = {
        **joined.arrays,
        "rare/move": np.asarray(direction.move),
        "rare/share": np.full(1, share, np.float32),
    }
    together = mixed(gen, arrays)
    fitted = _joined(fitted, arrays, agreement, together, sample_seeds(seed, fitted.method.n))
    return Rare(
        fitted,
        together,
        direction,
        len(fitted.clusters) - 1,
        class_name(prompt),
        before,
        after,
        evidence,
    )


def _chosen(
    gen: Generator,
    everywhere: Any,
    fitted: Fitted,
    found: Fitted,
    clip: CLIP,
    direction: directions.Direction,
    seeds: list[int],
) -> tuple[Fitted, tuple[float, float], float, float]:
    """(fitted with one more centre, its share of plain and of moved samples, evidence, agreement):
    the cluster of `found` with the largest product of evidence and newness. SisError where none
    grows.
    """
    evidence = _evidence(gen, everywhere, found, clip, direction, seeds)
    order = np.argsort(-evidence)[:TRIED]
    centres = [_translated(found, fitted, int(c)) for c in order]
    beside = [replace(fitted, arrays=with_centre(dict(fitted.arrays), c)) for c in centres]
    shares = [(_share_of_last(b, gen, seeds), _share_of_last(b, everywhere, seeds)) for b in beside]
    new = [
        (after - before) / after if after - before >= LEAST_GROWTH else -1.0
        for before, after in shares
    ]
    if max(new) < 0:
        changed = ", ".join(
            f"{100 * before:.2f} to {100 * after:.2f} %" for before, after in shares
        )
        raise SisError(
            f"no cluster grows when samples are moved towards {direction.prompt!r} (of the "
            f"pixels, from {changed}): raise k, or take a finer layer"
        )
    best = int(
        np.argmax([float(evidence[c]) * n if n > 0 else -np.inf for c, n in zip(order, new)])
    )
    return (
        beside[best],
        shares[best],
        float(evidence[order[best]]),
        float(found.clusters[order[best]]["agreement"]),
    )


def class_name(prompt: str) -> str:
    """The name of the rare class in a prompt: "a photo of a person with glasses" is "glasses"."""
    for word in (" with ", " wearing ", " of "):
        if word in prompt:
            prompt = prompt.split(word)[-1]
    prompt = prompt.strip()
    for article in ("a ", "an ", "the "):
        prompt = prompt.removeprefix(article)
    return prompt.strip()


def _evidence(
    gen: Generator,
    everywhere: Any,
    found: Fitted,
    clip: CLIP,
    direction: directions.Direction,
    seeds: Sequence[int],
) -> Float[np.ndarray, "k"]:
    """Per cluster of moved samples, the share of the score's rise lost without its pixels."""
    texts = class_scores.unit(np.asarray(clip.encode_text([direction.prompt, direction.neutral])))

    def score(images: np.ndarray) -> float:
        return float(
            (
                class_scores.unit(np.asarray(clip.encode_image(clip.preprocess(images))))
                @ (texts[0] - texts[1])
            ).mean()
        )

    plain = np.concatenate([images for images, _, _ in found.label_seeds(gen, list(seeds))])
    batches = [(images, labels) for images, labels, _ in found.label_seeds(everywhere, list(seeds))]
    there, labels = (np.concatenate(x) for x in zip(*batches))
    moved_score = score(there)
    lost = [
        moved_score - score(np.where((labels == c)[..., None], plain, there))
        for c in range(len(found.clusters))
    ]
    return np.asarray(lost) / max(moved_score - score(plain), 1e-6)


def _share_of_last(fitted: Fitted, gen: Generator, seeds: Sequence[int]) -> float:
    return fitted.method.describe(fitted.arrays, gen, seeds)[0][-1]["share"]


def _translated(found: Fitted, base: Any, cluster: int) -> Float[np.ndarray, "d"]:
    """A centre of one fit in the coordinates of another, which scales features by its samples."""
    theirs, ours = found.arrays, base.arrays
    scale = np.where(theirs["scale"] == 0, 1, theirs["scale"])  # columns that take no part
    raw = theirs["centers"][cluster] / scale + theirs["mean"]
    return ((raw - ours["mean"]) * ours["scale"]).astype(np.float32)


def _joined(
    fitted: Fitted, arrays: dict[str, np.ndarray], agreement: float, gen: Generator,
    seeds: list[int],
) -> Fitted:  # fmt: skip
    """`fitted` with one more cluster, described on partly moved samples; background as before."""
    facts, _ = fitted.method.describe(arrays, gen, seeds)
    new = {"id": len(fitted.clusters), "agreement": float(agreement)}
    clusters = tuple(
        old | fact | {"background": old.get("background", False)}
        for old, fact in zip((*fitted.clusters, new), facts, strict=True)
    )
    return replace(fitted, arrays=arrays, clusters=clusters)


def sheet(rare: Rare, class_id: int) -> Image.Image:
    """Samples before and after the move, and the class after it, to judge the direction by."""
    plain: Any = rare.gen.gen
    everywhere: Any = moved(rare.gen.gen, rare.direction.move)
    seeds = sample_seeds(0, PICTURED)
    before = np.concatenate([images for images, _, _ in rare.fitted.label_seeds(plain, seeds)])
    after, labels = (
        np.concatenate(x)
        for x in zip(*[(i, c) for i, c, _ in rare.fitted.label_seeds(everywhere, seeds)])
    )
    shown = draw.overlay(after, np.where(labels == rare.cluster, class_id, 0))
    cells = draw.cells(np.concatenate([before, after, shown]))
    return Image.fromarray(draw.grid(cells, PICTURED))


def described(rare: Rare) -> dict[str, Any]:
    """The facts of the search, as JSON."""
    d = rare.direction
    return {
        "prompt": d.prompt, "neutral": d.neutral, "name": rare.name, "cluster": rare.cluster,
        "displacement": d.displacement, "share_plain": rare.before, "share_moved": rare.after,
        "evidence": rare.evidence, "threshold": d.threshold, **d.facts,
    }  # fmt: skip
