"""Directions in latent space from text: moving w along one raises CLIP's score of a prompt.

    # Segmentation in Style, section 3.4
    glasses = directions.learn(gen, clip, "a person with glasses", neutral="a person")
    # InterFaceGAN
    glasses = directions.learn_extremes(gen, clip, "a person with glasses", keep=(male,))
    # StyleCLIP: latent optimisation, then global directions
    w, losses = directions.optimise(gen, clip, "a person with glasses", seeds=range(4))
    table = directions.Relevance.measure(gen, clip, folder="relevance/")
    styles = table.edit(...)

A direction is a unit vector; how far to go is kept separately, as `displacement`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from sis_jax.checkpoints.clip import CLIP
from sis_jax.data.files import write_atomic
from sis_jax.models import clip_directions as bodies
from sis_jax.ops import class_scores
from sis_jax.ops.linear_models import linear_svm, logistic_regression, project_out, roc_area
from sis_jax.ops.progress import progress
from sis_jax.ops.sampling import collect, sample_seeds
from sis_jax.types import Generator, SisError, UsageError

PASS = 0.9  # share of moved samples that must pass
PUBLISHED_THRESHOLD = 0.25
LEAST_N = 20  # samples to learn from


@dataclass(frozen=True)
class Direction:
    """A direction in W. unit: of length 1; displacement: how far to go, 0 = not chosen yet; spread:
    deviation of w . unit over samples.

    threshold: score that a sample must have to pass. facts: how it was learned, numbers only.
    """

    unit: Float[np.ndarray, "w"]
    prompt: str
    neutral: str
    method: str
    displacement: float = 0.0
    spread: float = 0.0
    threshold: float = 0.0
    published: bool = False
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def move(self) -> Float[np.ndarray, "w"]:
        """displacement times unit: the vector added to w."""
        return (self.displacement * self.unit).astype(np.float32)

    def without(self, *others: Direction) -> Direction:
        """The part of this direction that leaves the scores of the others unchanged (InterFaceGAN's
        conditional manipulation).
        """
        return (
            replace(self, unit=project_out(self.unit, np.stack([o.unit for o in others])))
            if others
            else self
        )

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
                return cls(
                    unit=file.get_tensor("unit"), **json.loads((file.metadata() or {})["direction"])
                )
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
    published: bool = False,
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n w"]]:
    """(score, w) of samples: the cosine with the prompt minus that with the neutral prompt; w of
    the first W+ layer, before `move` was added to all layers.

    published: the raw cosine with the prompt alone, and images as the published code feeds them.
    """
    texts = class_scores.unit(np.asarray(clip.encode_text([prompt, neutral])))
    shift = np.zeros((), np.float32) if move is None else np.asarray(move, np.float32)
    cosines, w = collect(
        gen, list(seeds), bodies.score_body, truncation=truncation,
        shared=(clip.network, texts, shift), shown=f"scores of {prompt[:30]!r}",
        colours=_colours(clip), published=published,
    )  # fmt: skip
    score = cosines[:, 0] - (0 if published else cosines[:, 1])
    if not np.isfinite(score).all():
        raise SisError(
            "the text model gave NaN or infinite scores: its weights or the generator's are damaged"
        )
    return score, w


def _colours(clip: CLIP) -> tuple:
    return clip.preprocessing.mean, clip.preprocessing.std


def learn(
    gen: Generator,
    clip: CLIP,
    prompt: str,
    neutral: str = "a photo",
    *,
    n: int = 5000,
    truncation: float | None = None,
    quantile: float = 0.05,
    published: bool = False,
    seed: int = 0,
) -> Direction:
    """Logistic regression in W between samples that the text fits and the others, both kinds
    weighted alike (Segmentation in Style, section 3.4).

    A sample counts as fitting when its score is in the top `quantile`, and the regression is
    penalised so much (c = 1 / (n v), v the mean variance of w) that its normal is near the line
    between the means of the two groups. A weakly penalised one separates them along directions of
    little variance, and moving along those shows little: of eight texts on the default generator
    none brought 90 % of 64 samples to pass within six deviations, with this all eight did (n 2000;
    seven with n 3000 and another seed).
    published: it counts when its cosine with the prompt is above 0.25, on images as the published
        code feeds them, and c is 1, as in the paper's code (which stops before it converged; this
        does not). truncation: of the samples learned from, by default 0.7; published: 1. Raises
        UsageError where no sample fits, or all do.
    """
    truncation = truncation if truncation is not None else (1.0 if published else 0.7)
    _check(n, quantile)
    score, w = scores(
        gen,
        clip,
        prompt,
        neutral,
        sample_seeds(seed, n),
        truncation=truncation,
        published=published,
    )
    # A little below the quantile, so that samples that tie with it count.
    threshold = PUBLISHED_THRESHOLD if published else float(np.quantile(score, 1 - quantile)) - 1e-6
    y = score > threshold
    if not 0 < y.sum() < n:
        raise UsageError(
            f"{y.sum()} of {n} samples have a score above {threshold:.3f}: nothing to learn "
            f"{prompt!r} from; {histogram(score)}"
        )
    found = logistic_regression(w, y, c=1.0 if published else 1 / (n * float(w.var(0).mean())))
    facts = {
        "n": n,
        "positives": int(y.sum()),
        "length": found.size,
        "auc": roc_area(w @ found.normal, y),
    }
    return Direction(
        found.normal,
        prompt,
        neutral,
        "segmentation_in_style",
        0.0,
        float((w @ found.normal).std()),
        threshold,
        published,
        facts,
    )


def learn_extremes(
    gen: Generator,
    clip: CLIP,
    prompt: str,
    neutral: str = "a photo",
    *,
    n: int = 5000,
    truncation: float = 1.0,
    share: float = 0.02,
    keep: Sequence[Direction] = (),
    seed: int = 0,
) -> Direction:
    """A linear support vector machine between the samples that the text fits best and worst
    (InterFaceGAN, section 3; the scores are CLIP's here).

    share: of the samples, taken from each end. 70 % of both ends are learned from, the rest gives
        facts["validation"]. keep: directions that the result shall leave as they are. Raises
        UsageError for numbers that cannot work.
    """
    _check(n, share)
    score, w = scores(gen, clip, prompt, neutral, sample_seeds(seed, n), truncation=truncation)
    ends = min(int(share * n), n // 2)
    if ends < 4:
        raise UsageError(
            f"{share:g} of {n} samples are {ends}: too few to learn from; raise n or share until "
            "there are 4"
        )
    order = np.argsort(score, kind="stable")
    rng = np.random.default_rng(seed)
    low, high = rng.permutation(order[:ends]), rng.permutation(order[-ends:])
    cut = round(0.7 * ends)
    rows, held = np.concatenate([low[:cut], high[:cut]]), np.concatenate([low[cut:], high[cut:]])
    found = linear_svm(w[rows], np.arange(2 * cut) >= cut)
    facts = {
        "n": n,
        "each": ends,
        "length": found.size,
        "validation": found.accuracy(w[held], np.arange(len(held)) >= ends - cut),
    }
    middle = float(score[order[:ends]].max() + score[order[-ends:]].min()) / 2
    learned = Direction(
        found.normal, prompt, neutral, "interfacegan", 0.0, 0.0, middle, False, facts
    ).without(*keep)
    return replace(learned, spread=float((w @ learned.unit).std()))


def _check(n: int, share: float) -> None:
    if n < LEAST_N:
        raise UsageError(f"n is {n}, expected at least {LEAST_N} samples (5000 is the paper's)")
    if not 0 < share < 1:
        raise UsageError(
            f"the share of samples is {share}, expected more than 0 and less than 1 (0.05 takes "
            "one in twenty)"
        )


def with_strength(
    gen: Generator,
    clip: CLIP,
    direction: Direction,
    *,
    truncation: float = 0.7,
    n: int = 64,
    steps: int = 12,
    most: float = 6.0,
    seed: int = 7,
) -> Direction:
    """The direction with the smallest displacement at which 90 % of samples pass its threshold.

    steps: displacements tried, evenly up to `most` deviations of w along the direction. Raises
        SisError with the histogram of the scores at the largest one where it is not reached.
    """
    seeds, passing, score = sample_seeds(seed, n), [], np.zeros(0)
    for i in range(1, steps + 1):
        away = most * direction.spread * i / steps
        score, _ = scores(
            gen,
            clip,
            direction.prompt,
            direction.neutral,
            seeds,
            truncation=truncation,
            move=away * direction.unit,
            published=direction.published,
        )
        passing.append(float((score > direction.threshold).mean()))
        if passing[-1] >= PASS:
            return replace(
                direction,
                displacement=float(away),
                facts=direction.facts | {"passing": passing[-1], "deviations": most * i / steps},
            )
    raise SisError(
        f"{direction.prompt!r} was not reached: at the largest displacement "
        f"{100 * passing[-1]:.0f} % of {n} samples pass, at best "
        f"{100 * max(passing):.0f} %, needed 90 % above {direction.threshold:.3f}; "
        f"{histogram(score)}. "
        "Give other prompts, or learn from more samples (discover --rare-n, edit --n)"
    )


def histogram(score: Float[np.ndarray, "n"], bins: int = 8) -> str:
    """Scores in words: "scores: -0.02 to 0.00: 31, ..."."""
    counts, edges = np.histogram(score, bins)
    return "scores: " + ", ".join(
        f"{a:.3f} to {b:.3f}: {n}" for a, b, n in zip(edges, edges[1:], counts)
    )


def optimise(
    gen: Generator,
    clip: CLIP,
    prompt: str,
    seeds: Iterable[int] = range(4),
    *,
    truncation: float = 0.7,
    steps: int = 40,
    rate: float = 0.1,
    pull: float = 0.008,
    published: bool = False,
    batch: int = 4,
) -> tuple[Float[np.ndarray, "n s w"], Float[np.ndarray, "n steps"]]:
    """(w in W+, losses) of samples changed until they fit the prompt: StyleCLIP's latent
    optimisation (its identity loss is left out).

    steps: 40 (the notebook's) to 300 (the script's). rate: Adam's peak. pull: weight of the squared
        distance from where it began.
    """
    if steps < 1:
        raise UsageError(f"steps is {steps}, expected at least 1 (40 to 300 are usual)")
    text = class_scores.unit(np.asarray(clip.encode_text([prompt])))[0]
    return collect(
        gen, list(seeds), bodies.optimise_body, truncation=truncation, shared=(clip.network, text),
        batch=batch, colours=_colours(clip), published=published, steps=steps, rate=rate, pull=pull,
    )  # fmt: skip


@dataclass(frozen=True)
class Relevance:
    """The effect of every style channel on CLIP's embedding: StyleCLIP's table (section 6.1).

    layers: name and number of channels, in order. rows: unit vectors in CLIP's space, one per
        channel. mean, deviation: of the channels over samples.
    """

    layers: tuple[tuple[str, int], ...]
    rows: Float[np.ndarray, "c d"]
    mean: Float[np.ndarray, "c"]
    deviation: Float[np.ndarray, "c"]

    @classmethod
    def measure(
        cls,
        gen: Any,
        clip: CLIP,
        folder: str | Path,
        *,
        n: int = 100,
        statistics: int = 2000,
        truncation: float = 0.7,
        limit: int = 128,
        chunk: int = 32,
        seed: int = 5,
    ) -> Relevance:
        """Measure it, `chunk` channels at a time; each chunk is kept in `folder` and is not
        measured again.

        n: samples per channel. statistics: samples for means and deviations (the paper takes 100
            000). limit: layers up to these pixels. Raises UsageError for a generator without style
            space, or a folder that holds another table.
        """
        if not hasattr(gen, "styles"):
            raise UsageError(
                f"{gen.info.name} has no style space: global directions need a StyleGAN2; use "
                "directions.learn instead"
            )
        names = bodies.layer_names(gen, limit)
        place = _Chunks(Path(folder), {
            "generator": gen.info.sha256, "clip": clip.info.sha256, "n": n,
            "statistics": statistics, "truncation": truncation, "layers": list(names),
            "chunk": chunk, "seed": seed,
        })  # fmt: skip
        styles = collect(
            gen, sample_seeds(seed, statistics), bodies.styles_body, truncation=truncation,
            batch=64, layers=names,
        )  # fmt: skip
        mean, deviation = styles.mean(0), styles.std(0)
        widths = [gen.synthesis.layer(name).affine.bias.shape[0] for name in names]
        parts = [
            (name, at, min(at + chunk, width))
            for name, width in zip(names, widths)
            for at in range(0, width, chunk)
        ]
        starts = dict(zip(names, np.cumsum([0, *widths])))
        bar, rows = progress(len(parts), "style channels", "chunk"), []
        for name, first, last in parts:
            c = slice(starts[name] + first, starts[name] + last)
            far = 5 * deviation[c]
            rows.append(
                place.get(
                    f"{name}-{first}",
                    lambda a=(name, first, last, c, far): _relevance(
                        gen, clip, a, mean, n, truncation, seed
                    ),
                )
            )
            bar.update()
        bar.close()
        return cls(tuple(zip(names, widths)), np.concatenate(rows), mean, deviation)

    def edit(
        self,
        clip: CLIP,
        prompt: str,
        neutral: str,
        *,
        threshold: float = 0.13,
        strength: float = 4.0,
    ) -> tuple[dict[str, Float[np.ndarray, "c"]], int]:
        """(offset of the style vectors of each layer, number of channels): section 6.2.

        threshold: beta, channels that are less relevant stay as they are; strength: alpha, in
            deviations of the most relevant one. Raises UsageError that states the largest relevance
            where no channel reaches the threshold.
        """
        target, plain = class_scores.ensemble(
            np.asarray(clip.encode_text([prompt, neutral]))[:, None]
        )
        relevance = self.rows @ class_scores.unit(target - plain)
        chosen = np.abs(relevance) >= threshold
        if not chosen.any():
            raise UsageError(
                f"no style channel has a relevance of {threshold:g} for {prompt!r}, the largest "
                f"is {np.abs(relevance).max():.3f}: lower it"
            )
        change = (
            np.where(chosen, relevance, 0) / np.abs(relevance).max() * self.deviation * strength
        )
        ends = np.cumsum([width for _, width in self.layers])
        return dict(
            zip([name for name, _ in self.layers], np.split(change.astype(np.float32), ends[:-1]))
        ), int(chosen.sum())


def _relevance(
    gen: Any, clip: CLIP, part: tuple, mean: np.ndarray, n: int, truncation: float, seed: int
) -> Float[np.ndarray, "c d"]:
    name, first, last, c, far = part
    shared = (clip.network, np.arange(first, last), mean[c] - far, mean[c] + far)
    found = collect(
        gen, sample_seeds(seed + 1, n), bodies.relevance_body, truncation=truncation,
        shared=shared, layer=name, colours=_colours(clip),
    )  # fmt: skip
    return class_scores.unit(found.mean(0))


class _Chunks:
    """Arrays kept in a folder, one file each, with a note of their origin."""

    def __init__(self, folder: Path, what: dict[str, Any]):
        note = folder / "table.json"
        text = json.dumps(what, indent=1, sort_keys=True)
        if note.exists() and note.read_text("utf-8") != text:
            raise UsageError(
                f"{folder} holds the table of another generator, text model or setting: give "
                "another folder, or remove it"
            )
        write_atomic(note, text.encode())
        self.folder, self._write = folder, write_atomic

    def get(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array, made and kept where it is not there yet."""
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            self._write(file, save({"rows": np.ascontiguousarray(make())}))
        return load_file(file)["rows"]
