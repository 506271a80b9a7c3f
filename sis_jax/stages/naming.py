"""Parts named from text: what a text model sees of each cluster against an ontology's prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sis_jax.checkpoints.catalogue import folders
from sis_jax.checkpoints.clip import CLIP, load_clip
from sis_jax.data.ontology import NEUTRAL, Ontology
from sis_jax.data.parts import BACKGROUND, Parts
from sis_jax.models.moved import rare_cluster
from sis_jax.ops import class_scores
from sis_jax.runs.configs.label import Naming
from sis_jax.stages.regions import Pooled, pooled
from sis_jax.stages.teacher import Teacher
from sis_jax.types import SisError, UsageError

_OURS = ("The text model", "The text '", 'The text "')  # how the warnings of this file begin


@dataclass(frozen=True)
class Named:
    """Named parts, and the table behind: rows are clusters, columns classes (None: background).

    prompts: cosine of every cluster with every prompt. own: the name, with its facts, of a cluster
    that no class names alone: a mixture of classes, at the finer level a finer class. finer: the
    table of the level below.
    """

    parts: Parts
    classes: tuple[str | None, ...]
    cosine: Float[np.ndarray, "k c"]
    probability: Float[np.ndarray, "k c"]
    verdicts: list[class_scores.Verdict]
    clip: str
    prompts: Float[np.ndarray, "k p"]
    own: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    finer: Named | None = None

    def table(self, own: str = "mixture") -> dict[str, Any]:
        """The table as JSON holds it, where None is the background; `own` is the key of the names
        in `self.own`.
        """
        rows = [
            {
                "cluster": i,
                "best": self.classes[v.best],
                "score": v.score,
                "margin": v.margin,
                "named": v.named,
                **({own: self.own[i]["name"]} if i in self.own else {}),
            }
            for i, v in enumerate(self.verdicts)
        ]
        return {
            "rule": class_scores.RULE,
            "clip": self.clip,
            "classes": list(self.classes),
            "clusters": rows,
            "cosine": self.cosine.tolist(),
            "probability": self.probability.tolist(),
            **({"finer": self.finer.table("finer_class")} if self.finer else {}),
        }


@dataclass(frozen=True)
class Query:
    """The words, their embeddings by the text model, and the margin that a name needs."""

    ontology: Ontology
    texts: Float[np.ndarray, "p d"]
    clip: CLIP
    margin: float

    @property
    def scale(self) -> float:
        """Nats per unit of cosine."""
        return float(self.clip.logit_scale)

    def decided(
        self, probability: Float[np.ndarray, "k c"], margin: float
    ) -> list[class_scores.Verdict]:
        neutral = [i for i, c in enumerate(self.ontology.classes) if c == NEUTRAL]
        return class_scores.decide(probability, margin, neutral)


def load_text_model(clip: Any, gen_name: str) -> CLIP:
    """A CLIP from a user's input: one, a name, a path, or None for the usual one."""
    if isinstance(clip, CLIP):
        return clip
    if clip is not None and not isinstance(clip, str | Path):
        raise UsageError(
            f"clip is of type {type(clip).__name__}, expected a text model (sis_jax.load_clip), "
            "its name or its path"
        )
    try:
        return load_clip(str(clip) if clip is not None else default_clip(gen_name))
    except UsageError as error:
        raise type(error)(
            f"{str(error).rstrip('.')}. Ways to a text model: (1) --clip faces-clip, which ships "
            "and knows aligned faces only; (2) with a network, "
            "--clip openai/clip-vit-base-patch32; (3) without one, copy that model's folder, or "
            "OpenAI's ViT-B-32.pt, into ported_weights/ and give "
            f"its name or path as --clip; (4) train one, scripts/faces_clip/train.py"
        ) from None


def default_clip(gen_name: str) -> str:
    """The text model made for this generator ("faces-clip" for "faces64"), else the usual one."""
    small = f"{gen_name.rstrip('0123456789')}-clip"
    return small if small in folders() else "openai/clip-vit-base-patch32"


def name_parts(teacher: Teacher, clip: CLIP, ontology: Ontology, how: Naming) -> Named:
    """Names for the clusters of both levels: pooled regions against prompts."""
    texts, cut = encode_prompts(clip, ontology)
    query = Query(ontology, texts, clip, how.margin)
    coarse, fine = pooled(teacher, clip, how)
    table, below = _compared(teacher.parts, coarse, query), None
    if teacher.parts.finer is not None and fine is not None:
        below = _separated(_compared(teacher.parts.finer, fine, query), query)
        table = _with_mixtures(table, below, query)
    stated = _statements(table, ontology)
    named = teacher.parts.named(stated, below and _statements(below, ontology))
    parts = _described(named, stated, query, cut)
    if parts.finer is not None:
        parts = replace(parts, finer=replace(parts.finer, background=parts.background))
    return replace(table, parts=parts, finer=below)


def _compared(parts: Parts, regions: Pooled, query: Query) -> Named:
    """The table for the clusters of one level, whose parts have their old names yet."""
    features, count = regions
    ontology, texts = query.ontology, query.texts
    cosine, probability = class_scores.class_scores(features, texts, ontology.owner(), query.scale)
    kept, open_to = rare_cluster(parts.arrays), probability
    if kept is not None:  # the name it was found by is taken, and it keeps that one
        taken = next(c["name"] for c in parts.classes if kept in c["clusters"])
        open_to = probability * [c != taken for c in ontology.classes]
    verdicts = [
        replace(v, named=v.named and bool(seen) and i != kept)
        for i, (v, seen) in enumerate(zip(query.decided(open_to, query.margin), count > 0))
    ]
    prompts = class_scores.unit(features) @ class_scores.unit(texts).T
    name = query.clip.info.name
    return Named(parts, ontology.classes, cosine, probability, verdicts, name, prompts)


def _separated(table: Named, query: Query) -> Named:
    """The table of the finer level, where parts of the foreground are compared with each other
    too.
    """
    hidden = {i for c in table.parts.classes if c["id"] == BACKGROUND for i in c["clusters"]}
    inside = [i for i, row in enumerate(table.prompts) if i not in hidden and row.any()]
    if not inside:  # no sample shows any of them
        return table
    probability, verdicts, own = table.probability.copy(), [*table.verdicts], {}
    logits = query.scale * table.prompts
    probability[inside] = class_scores.apart(logits[inside], query.ontology.owner())
    lead = max(query.margin, class_scores.FINER_MARGIN) if query.margin else 0.0
    for i, verdict in zip(inside, query.decided(probability[inside], lead)):
        verdicts[i] = verdict
    for number, name in enumerate(table.classes):
        rows = [i for i in inside if verdicts[i].named and verdicts[i].best == number]
        if len(rows) > 1 and query.ontology.finer_of(name):
            found = _finer_names(logits[rows], name, query)
            own |= {rows[row]: facts for row, facts in found.items()}
    return replace(table, probability=probability, verdicts=verdicts, own=own)


def _finer_names(
    logits: Float[np.ndarray, "k p"], name: str | None, query: Query
) -> dict[int, dict[str, Any]]:
    """{region: what `Parts.named` takes of it} for those of one class that have a finer one."""
    below = query.ontology.finer_of(name)
    names = list(below)
    columns = [query.ontology.texts.index(text) for several in below.values() for text in several]
    owner = np.repeat(np.arange(len(below)), [len(several) for several in below.values()])
    usual = names.index(name) if name in below else None
    verdicts = class_scores.finer(logits[:, columns], owner, usual, query.margin)
    return {
        i: {
            "name": names[v.best],
            "prompts": below[names[v.best]],
            "score": v.score,
            "margin": v.margin,
            "runner_up": None if v.second is None else names[v.second],
        }
        for i, v in enumerate(verdicts)
        if v is not None
    }


def _with_mixtures(table: Named, below: Named, query: Query) -> Named:
    """The coarse table, where a part whose finer parts are of several classes has all their names.
    One that holds background by text, too, is left unnamed. A margin of 0 asks for one class each.
    """
    verdicts, own = [*table.verdicts], {}
    for cluster, held in enumerate(_classes_held(table, below, query) if query.margin else []):
        if len(held) < 2:
            continue
        if None in (table.classes[c] for c in held):
            verdicts[cluster] = replace(verdicts[cluster], named=False)
        else:
            own[cluster] = _mixture(table.probability[cluster], held, query)
    return replace(table, verdicts=verdicts, own=own)


def _classes_held(table: Named, below: Named, query: Query) -> list[list[int]]:
    """For each coarse cluster the classes of its named finer ones, those of the largest area
    first; a finer one counts where its class also fits by itself, not only beside the others.
    """
    behind = query.scale * (below.cosine.max(1, keepdims=True) - below.cosine)
    area, total = np.zeros_like(table.probability), np.zeros(len(table.verdicts))
    for cluster in below.parts.clusters:
        i, parent, verdict = cluster["id"], cluster["parent"], below.verdicts[cluster["id"]]
        total[parent] += cluster["share"]
        if verdict.named and behind[i, verdict.best] <= class_scores.NEAR:
            area[parent, verdict.best] += cluster["share"]
    held = (area > 0) & (area >= class_scores.HELD * total[:, None])
    order = np.argsort(-area, axis=1, kind="stable")
    return [[int(c) for c in row if some[c]] for row, some in zip(order, held)]


def _mixture(row: Float[np.ndarray, "c"], held: Sequence[int], query: Query) -> dict[str, Any]:
    """What `Parts.named` takes of a mixture: "hair with clothes", likely by all its classes."""
    classes = query.ontology.classes
    first, *others = (str(classes[c]) for c in held)
    rest = [i for i in range(len(classes)) if i not in held]
    second = max(rest, key=lambda i: row[i], default=None)
    score = float(row[held].sum())
    return {
        "name": f"{first} with {' and '.join(others)}",
        "prompts": [text for c in held for text in query.ontology.prompts_of(classes[c])],
        "score": score,
        "margin": score - (0.0 if second is None else float(row[second])),
        "runner_up": None if second is None else _shown(classes[second]),
        "named": True,
    }


def _statements(table: Named, ontology: Ontology) -> dict[int, dict[str, Any]]:
    """What `Parts.named` takes: every cluster but that of a rare class."""
    kept = rare_cluster(table.parts.arrays)
    return {
        i: _statement(table.verdicts[i], table.probability[i], ontology) | {**table.own.get(i, {})}
        for i in (c["id"] for c in table.parts.clusters)
        if i != kept
    }


def check_words(clip: CLIP, texts: Sequence[str]) -> None:
    """UsageError for words that a text model of few words never learned."""
    strange = clip.tokenizer.strange(texts)
    if strange:
        raise UsageError(
            f"{clip.info.name} does not know {', '.join(map(repr, strange[:3]))}: use words that "
            "its README.md lists, or a model that knows more, "
            f"with a network --clip openai/clip-vit-base-patch32"
        )


def encode_prompts(clip: CLIP, ontology: Ontology) -> tuple[Float[np.ndarray, "p d"], list[str]]:
    """A unit vector per prompt over its templates, and a sentence for every prompt that was cut."""
    filled, cut = ontology.filled(), []
    flat = [text for several in filled for text in several]
    check_words(clip, flat)
    for text in clip.cut(flat):
        read = _readable(clip, text)
        lost = text[len(read) :].strip()
        reads = f"the {clip.config.text.context} tokens that {clip.info.name} reads"
        cut.append(f"The text {text!r} is longer than {reads}: cut off was {lost!r}. Shorten it.")
        flat = [read if t == text else t for t in flat]
    embedded = np.asarray(clip.encode_text(flat))
    return class_scores.ensemble(embedded.reshape(len(filled), -1, embedded.shape[-1])), cut


def _readable(clip: CLIP, text: str) -> str:
    """The longest beginning of a text, in whole words, that is read to its end."""
    words = text.split(" ")
    low, high = 0, len(words)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if clip.cut(" ".join(words[:middle])) else (middle, high)
    return " ".join(words[:low]) if low else text[:1]


def _statement(
    verdict: class_scores.Verdict, row: Float[np.ndarray, "c"], ontology: Ontology
) -> dict[str, Any]:
    classes = [_shown(c) for c in ontology.classes]
    name = ontology.classes[verdict.best]
    return {
        "name": name,
        "score": verdict.score,
        "margin": verdict.margin,
        "runner_up": None if verdict.second is None else classes[verdict.second],
        "named": verdict.named,
        "prompts": ontology.prompts_of(name),
        "scores": {c: float(p) for c, p in zip(classes, row)},
    }


def _shown(name: str | None) -> str:
    return "background" if name is None else name


def _described(
    parts: Parts, stated: Mapping[int, Mapping[str, Any]], query: Query, cut: Sequence[str]
) -> Parts:
    """Warnings, and the background where the ontology has words for it."""
    if parts.classes and [c["id"] for c in parts.classes] == [BACKGROUND]:
        raise SisError(
            "every part was named background: give the background other words, a larger --margin, "
            "or classes that fit the images"
        )
    warnings = [w for w in parts.warnings if not w.startswith(_OURS)] + [*cut]
    if not any(v["named"] for v in stated.values()):
        warnings.append(
            f"{_OURS[0]} {query.clip.info.name} named no part: no class was ahead of the next by "
            "the margin. Give other words, --mode crop, or a larger text model with --clip."
        )
    background = parts.background
    if None in query.ontology.classes:
        why = "by text: " + ", ".join(map(repr, query.ontology.prompts_of(None)))
        if any(c["id"] == BACKGROUND for c in parts.classes):
            background = {"found": True, "why": why}
            warnings = [w for w in warnings if not _doubts_background(w)]
        else:
            background = {**background, "found": False, "why": f"{why} fits no part"}
    return replace(parts, warnings=tuple(dict.fromkeys(warnings)), background=background)


def _doubts_background(warning: str) -> bool:
    return (
        warning.startswith("The background was not found")
        or "only just taken for background" in warning
    )
