"""Directions in latent space from text: moving w along one raises CLIP's score of a prompt.

    glasses = directions.learn(gen, clip, "a person with glasses", neutral="a person")
    glasses = directions.with_strength(gen, clip, glasses)

A direction is a unit vector; how far to go is kept separately, as `displacement`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sis_jax.checkpoints.clip import CLIP
from sis_jax.data.files import parse_json, write_atomic
from sis_jax.methods.base import OUTLINE, small_image
from sis_jax.models.clip import CLIPNetwork
from sis_jax.models.clip_regions import Colours, to_pixels
from sis_jax.ops import class_scores
from sis_jax.ops.linear_models import logistic_regression, roc_area
from sis_jax.ops.sampling import Probe, collect, image_of, map_samples, probe, sample_seeds
from sis_jax.types import Generator, SisError, UsageError

PASS = 0.9  # share of moved samples that must pass
LEAST_N = 20  # samples to learn from
TRIED = 64  # samples that a displacement is tried on
STEPS, MOST = 12, 6.0  # displacements that are tried, up to so many deviations of w


@dataclass(frozen=True)
class Direction:
    """A direction in W. unit: of length 1; displacement: how far to go, 0 = not chosen; spread:
    deviation of w . unit.

    threshold: score that a sample must have to pass. facts: how it was learned, numbers only.
    """

    unit: Float[np.ndarray, "w"]
    prompt: str
    neutral: str
    method: str
    displacement: float = 0.0
    spread: float = 0.0
    threshold: float = 0.0
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def move(self) -> Float[np.ndarray, "w"]:
        """displacement times unit: the vector added to w."""
        return (self.displacement * self.unit).astype(np.float32)

    def save(self, path: str | Path) -> Path:
        """Write a .safetensors file that `load` reads."""
        write_atomic(Path(path), self.to_bytes())
        return Path(path)

    def to_bytes(self) -> bytes:
        """The files of `save`."""
        return save(
            {"unit": self.unit},
            {"direction": json.dumps({k: v for k, v in asdict(self).items() if k != "unit"})},
        )

    @classmethod
    def load(cls, path: str | Path) -> Direction:
        """Read the files of `save`; UsageError where there are none."""
        try:
            with safe_open(path, framework="np") as file:
                stored = parse_json((file.metadata() or {})["direction"])
                known = {f.name: stored[f.name] for f in fields(cls) if f.name in stored}
                return cls(unit=file.get_tensor("unit"), **known)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise UsageError(
                f"{path} holds no direction ({error}): learn one with "
                "sis_jax.stages.directions.learn(...).save(path)"
            ) from None


def scores(
    gen: Generator,
    clip: CLIP,
    prompt: str,
    neutral: str,
    seeds: Sequence[int],
    *,
    truncation: float = 1.0,
    move: Float[np.ndarray, "w"] | None = None,
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n w"]]:
    """(score, w) of samples: cosine with the prompt minus that with the neutral one, and w [n w]
    before `move` was added to all layers.
    """
    how = _scoring(gen, clip, prompt, neutral, truncation, move)
    shown = f"scores of {prompt[:30]!r}"
    cosines, w = collect(gen, list(seeds), _score_body, shown=shown, **how)
    score = cosines[:, 0] - cosines[:, 1]
    if not np.isfinite(score).all():
        raise SisError(
            "the text model gave NaN or infinite scores: its weights or the generator's are damaged"
        )
    return score, w


def trial(
    gen: Generator, clip: CLIP, prompt: str, neutral: str, *, truncation: float = 1.0
) -> Probe:
    """The speed of `scores`, from a second's worth of samples."""
    how = _scoring(gen, clip, prompt, neutral, truncation, None)
    return probe(map_samples(gen, range(2**12), _score_body, **how))


def _scoring(
    gen: Generator, clip: CLIP, prompt: str, neutral: str, truncation: float,
    move: Float[np.ndarray, "w"] | None,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `map_samples` beside generator, seeds and `_score_body`."""
    texts = class_scores.unit(np.asarray(clip.encode_text([prompt, neutral])))
    shift = np.zeros((), np.float32) if move is None else np.asarray(move, np.float32)
    seen = max(OUTLINE, 1 << (clip.config.vision.image_size - 1).bit_length())
    return {
        "truncation": truncation, "shared": (clip.network, texts, shift),
        "colours": (clip.preprocessing.mean, clip.preprocessing.std),
        "small": small_image(gen, seen),
    }  # fmt: skip


def _score_body(
    gen: Any, z: Array, truncation: Array, network: CLIPNetwork, texts: Array, move: Array,
    *, colours: Colours, small: str | None,
) -> tuple[Float[Array, "b t"], Float[Array, "b w"]]:  # fmt: skip
    """(cosines with the texts [t d], w of the first W+ layer). small: the name of an image on the
    way to the whole one that is large enough for the text model.
    """
    w = gen.map(z, truncation)
    size = network.config.vision.image_size
    x = network.visual(to_pixels(image_of(gen, w + move, small), (size, size), colours))
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-12) @ texts.T, w[:, 0]


def learn(
    gen: Generator,
    clip: CLIP,
    prompt: str,
    neutral: str = "a photo",
    *,
    n: int = 5000,
    truncation: float = 0.7,
    quantile: float = 0.05,
    seed: int = 0,
) -> Direction:
    """Logistic regression in W between samples that the text fits and the others, weighted alike
    (Segmentation in Style, section 3.4).

    A sample fits when its score is in the top `quantile`. The penalty c = 1 / (n v), v the mean
    variance of w, brings the normal near the line between the two means; a weak one separates along
    directions of little variance, and moving along those shows little: with it none of eight texts
    brought 90 % of 64 samples to pass within six deviations, with this all did. Raises UsageError
    where no sample fits, or all do.
    """
    if n < LEAST_N:
        raise UsageError(f"n is {n}, expected at least {LEAST_N} samples (5000 is the paper's)")
    if not 0 < quantile < 1:
        raise UsageError(
            f"the share of samples is {quantile}, expected more than 0 and less than 1 (0.05 takes "
            "one in twenty)"
        )
    score, w = scores(gen, clip, prompt, neutral, sample_seeds(seed, n), truncation=truncation)
    # A little below the quantile, so that samples that tie with it count.
    threshold = float(np.quantile(score, 1 - quantile)) - 1e-6
    y = score > threshold
    if not 0 < y.sum() < n:
        raise UsageError(
            f"{y.sum()} of {n} samples have a score above {threshold:.3f}: nothing to learn "
            f"{prompt!r} from; {histogram(score)}"
        )
    found = logistic_regression(w, y, c=1 / (n * float(w.var(0).mean())))
    facts = {
        "n": n,
        "positives": int(y.sum()),
        "length": found.size,
        "auc": roc_area(w @ found.normal, y),
    }
    spread = float((w @ found.normal).std())
    return Direction(
        found.normal, prompt, neutral, "segmentation_in_style", 0.0, spread, threshold, facts
    )


def with_strength(
    gen: Generator, clip: CLIP, direction: Direction, *, truncation: float = 0.7
) -> Direction:
    """The direction with the smallest displacement at which 90 % of samples pass its threshold.

    Raises SisError with the scores' histogram where 6 deviations of w do not get there.
    """
    seeds, passing, score = sample_seeds(7, TRIED), [], np.zeros(0)
    for i in range(1, STEPS + 1):
        away = MOST * direction.spread * i / STEPS
        score, _ = scores(
            gen, clip, direction.prompt, direction.neutral, seeds,
            truncation=truncation, move=away * direction.unit,
        )  # fmt: skip
        passing.append(float((score > direction.threshold).mean()))
        if passing[-1] >= PASS:
            return replace(
                direction,
                displacement=float(away),
                facts=direction.facts | {"passing": passing[-1], "deviations": MOST * i / STEPS},
            )
    raise SisError(
        f"{direction.prompt!r} was not reached: at the largest displacement "
        f"{100 * passing[-1]:.0f} % of {TRIED} samples pass, at best {100 * max(passing):.0f} %, "
        f"needed 90 % above {direction.threshold:.3f}; {histogram(score)}. Give other prompts, or "
        "learn from more samples (discover --rare-n, edit --n)"
    )


def histogram(score: Float[np.ndarray, "n"], bins: int = 8) -> str:
    """Scores in words: "scores: -0.02 to 0.00: 31, ..."."""
    counts, edges = np.histogram(score, bins)
    return "scores: " + ", ".join(
        f"{a:.3f} to {b:.3f}: {n}" for a, b, n in zip(edges, edges[1:], counts)
    )
