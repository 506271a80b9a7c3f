"""Parts named from text: dense CLIP features per cluster against the prompts of an ontology."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from sis_jax import parallel
from sis_jax.checkpoints.catalogue import folders
from sis_jax.checkpoints.clip import CLIP, load_clip
from sis_jax.data.ontology import NEUTRAL, Ontology
from sis_jax.data.parts import BACKGROUND, Parts
from sis_jax.models.clip_regions import dense_map, pool_regions
from sis_jax.models.moved import mixed, rare_cluster
from sis_jax.ops import class_scores, plan
from sis_jax.ops.progress import progress
from sis_jax.ops.sampling import Probe, one_ahead, probe, sample_seeds
from sis_jax.runs.configs.label import Naming
from sis_jax.stages.teacher import Teacher
from sis_jax.types import SisError, UsageError

BATCH = 8  # images in the CLIP at a time on a CPU, at most
CROPS = 16  # crops per cluster in the mode "crop"
_PAD = 255  # no cluster has this number


@dataclass(frozen=True)
class Named:
    """Named parts, and the table behind: rows are clusters, columns classes (None: background).

    prompts: cosine of every cluster with every prompt. finer_class: of the clusters that have one.
    finer: the table of the level below.
    """

    parts: Parts
    classes: tuple[str | None, ...]
    cosine: Float[np.ndarray, "k c"]
    probability: Float[np.ndarray, "k c"]
    verdicts: list[class_scores.Verdict]
    clip: str
    prompts: Float[np.ndarray, "k p"]
    finer_class: Mapping[int, str] = field(default_factory=dict)
    finer: Named | None = None

    def table(self) -> dict[str, Any]:
        """The table as JSON holds it; None is the background."""
        rows = [
            {
                "cluster": i,
                "best": self.classes[v.best],
                "score": v.score,
                "margin": v.margin,
                "named": v.named,
                **({"finer_class": self.finer_class[i]} if i in self.finer_class else {}),
            }
            for i, v in enumerate(self.verdicts)
        ]
        numbers = {"cosine": self.cosine.tolist(), "probability": self.probability.tolist()}
        return {
            "rule": class_scores.RULE,
            "clip": self.clip,
            "classes": list(self.classes),
            "clusters": rows,
            **numbers,
            **({"finer": self.finer.table()} if self.finer else {}),
        }


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
    coarse, fine = _pooled(teacher, clip, how)
    table = _compared(teacher.parts, coarse, clip, ontology, how, texts)
    stated, finer, below = _statements(table, ontology), None, None
    if teacher.parts.finer is not None and fine is not None:
        below = _compared(teacher.parts.finer, fine, clip, ontology, how, texts)
        below, finer = _separated(below, ontology, float(clip.logit_scale), how.margin)
    parts = _described(teacher.parts.named(stated, finer), stated, ontology, cut, clip)
    if parts.finer is not None:
        parts = replace(parts, finer=replace(parts.finer, background=parts.background))
    return replace(table, parts=parts, finer=below)


def _compared(
    parts: Parts,
    pooled: _Pooled,
    clip: CLIP,
    ontology: Ontology,
    how: Naming,
    texts: Float[np.ndarray, "p d"],
) -> Named:
    """The table for the clusters of one level, whose parts have their old names yet."""
    regions, count = pooled
    cosine, probability = class_scores.class_scores(
        regions, texts, ontology.owner(), float(clip.logit_scale)
    )
    classes = ontology.classes
    neutral = [i for i, c in enumerate(classes) if c == NEUTRAL]
    kept = rare_cluster(parts.arrays)
    open_to = probability
    if kept is not None:  # the name it was found by is taken, and it keeps that one
        taken = next(c["name"] for c in parts.classes if kept in c["clusters"])
        open_to = probability * [c != taken for c in classes]
    verdicts = class_scores.decide(open_to, how.margin, neutral)
    verdicts = [
        replace(v, named=v.named and bool(seen) and i != kept)
        for i, (v, seen) in enumerate(zip(verdicts, count > 0))
    ]
    prompts = class_scores.unit(regions) @ class_scores.unit(texts).T
    return Named(parts, classes, cosine, probability, verdicts, clip.info.name, prompts)


def _separated(
    table: Named, ontology: Ontology, scale: float, margin: float
) -> tuple[Named, dict[int, dict[str, Any]]]:
    """(the table of the finer level, what `Parts.named` takes); parts of the foreground are
    compared with each other too.
    """
    classes, probability, verdicts = table.classes, table.probability.copy(), [*table.verdicts]
    hidden = {i for c in table.parts.classes if c["id"] == BACKGROUND for i in c["clusters"]}
    inside = [i for i, row in enumerate(table.prompts) if i not in hidden and row.any()]
    if not inside:  # no sample shows any of them
        return table, _statements(table, ontology)
    logits = scale * table.prompts
    probability[inside] = class_scores.apart(logits[inside], ontology.owner())
    lead = max(margin, class_scores.FINER_MARGIN) if margin else 0.0
    neutral = [i for i, c in enumerate(classes) if c == NEUTRAL]
    decided = class_scores.decide(probability[inside], lead, neutral)
    for i, verdict in zip(inside, decided):
        verdicts[i] = verdict
    table = replace(table, probability=probability, verdicts=verdicts)
    stated, own_names = _statements(table, ontology), {}
    for number, name in enumerate(classes):
        rows = [i for i in inside if verdicts[i].named and verdicts[i].best == number]
        if len(rows) > 1 and ontology.finer_of(name):
            for row, own in _finer_names(logits[rows], ontology, name, margin):
                stated[rows[row]] |= own
                own_names[rows[row]] = own["name"]
    return replace(table, finer_class=own_names), stated


def _finer_names(
    logits: Float[np.ndarray, "k p"], ontology: Ontology, name: str | None, margin: float
) -> list[tuple[int, dict[str, Any]]]:
    """[(region, what `Parts.named` takes of it)] for those of one class that have a finer one."""
    below = ontology.finer_of(name)
    names = list(below)
    texts = [text for several in below.values() for text in several]
    owner = np.array([i for i, several in enumerate(below.values()) for _ in several])
    usual = names.index(name) if name in below else None
    columns = [ontology.texts.index(text) for text in texts]
    found = []
    for i, v in enumerate(class_scores.finer(logits[:, columns], owner, usual, margin)):
        if v is not None:
            own, second = names[v.best], None if v.second is None else names[v.second]
            facts = {"score": v.score, "margin": v.margin, "runner_up": second}
            found.append((i, {"name": own, "prompts": below[own], **facts}))
    return found


def _statements(table: Named, ontology: Ontology) -> dict[int, dict[str, Any]]:
    """What `Parts.named` takes: every cluster but that of a rare class."""
    kept = rare_cluster(table.parts.arrays)
    return {
        c["id"]: _statement(table.verdicts[c["id"]], table.probability[c["id"]], ontology)
        for c in table.parts.clusters
        if c["id"] != kept
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
    parts: Parts, stated: dict[int, dict[str, Any]], ontology: Ontology, cut: list[str], clip: CLIP
) -> Parts:
    """Warnings, and the background where the ontology has words for it."""
    warnings = [w for w in parts.warnings if not w.startswith(_OURS)] + cut
    if not any(v["named"] for v in stated.values()):
        why = (
            f"{_OURS[0]} {clip.info.name} named no part: no class was ahead of the next by the "
            "margin."
        )
        warnings.append(f"{why} Give other words, --mode crop, or a larger text model with --clip.")
    background = parts.background
    if None in ontology.classes:
        found = any(c["id"] == BACKGROUND for c in parts.classes)
        why = "by text: " + ", ".join(map(repr, ontology.prompts_of(None)))
        background = (
            {"found": True, "why": why}
            if found
            else {**background, "found": False, "why": f"{why} fits no part"}
        )
        if found:
            warnings = [
                w
                for w in warnings
                if not (
                    w.startswith("The background was not found")
                    or "only just taken for background" in w
                )
            ]
    if parts.classes and [c["id"] for c in parts.classes] == [BACKGROUND]:
        raise SisError(
            "every part was named background: give the background other words, a larger --margin, "
            "or classes that fit the images"
        )
    return replace(parts, warnings=tuple(dict.fromkeys(warnings)), background=background)


_OURS = ("The text model", "The text '", 'The text "')


# Regions

_Pooled = tuple[Float[np.ndarray, "k d"], Num[np.ndarray, "k"]]  # per cluster; how much it is of


def _pooled(teacher: Teacher, clip: CLIP, how: Naming) -> tuple[_Pooled, _Pooled | None]:
    """Regions of the clusters, and of those of the finer level where there is one."""
    finer = None if teacher.parts.finer is None else Teacher.of(teacher.gen, teacher.parts.finer)
    if how.mode == "crop":
        return _crop_regions(teacher, clip, how), finer and _crop_regions(finer, clip, how)
    if finer is None:
        return _means(*_dense_sums(teacher, clip, how)), None
    total, count = _dense_sums(finer, clip, how)
    # A cluster is all of the finer ones in it
    inside = np.zeros((_clusters(teacher.parts), len(count)))
    for cluster in finer.parts.clusters:
        inside[cluster["parent"], cluster["id"]] = 1
    return _means(inside @ total, inside @ count), _means(total, count)


def _clusters(parts: Parts) -> int:
    return 1 + max(cluster for c in parts.classes for cluster in c["clusters"])


def _means(total: Float[np.ndarray, "k d"], count: Float[np.ndarray, "k"]) -> _Pooled:
    return (total / np.maximum(count, 1)[:, None]).astype(np.float32), count


def _dense_sums(teacher: Teacher, clip: CLIP, how: Naming) -> tuple[np.ndarray, np.ndarray]:
    """Sums over all pixels of all samples of each cluster, [k, d], and the numbers of pixels."""
    k = _clusters(teacher.parts)
    total, count = np.zeros((k, clip.config.embed_dim)), np.zeros(k)
    with progress(how.n, "names", "sample") as bar:
        for n, found in _read(teacher, clip, how):
            for sums, pixels in zip(*map(np.asarray, found)):  # in order, whatever the devices
                total, count = total + sums.astype(np.float64), count + pixels
            bar.update(n)
    return total, count


def trial(teacher: Teacher, clip: CLIP, how: Naming) -> Probe:
    """The speed of the mode "dense", from a second's worth of samples."""
    finer = teacher.parts.finer
    deepest = teacher if finer is None else Teacher.of(teacher.gen, finer)

    def batches() -> Iterator[np.ndarray]:
        for n, found in _read(deepest, clip, how):
            jax.block_until_ready(found)
            yield np.empty(n)

    return probe(batches())


def _read(
    teacher: Teacher, clip: CLIP, how: Naming
) -> Iterator[tuple[int, tuple[Float[Array, "d k c"], Num[Array, "d k"]]]]:
    """Stream (samples, results of `_sums` on each device) of the mode "dense", in batches."""
    k, stream = _clusters(teacher.parts), _labelled(teacher, how)
    first = next(stream)
    static = {
        "size": _size(how.size, first[0].shape[1:3], clip), "align_corners": how.align_corners,
        "colours": (clip.preprocessing.mean, clip.preprocessing.std), "k": k,
    }  # fmt: skip
    here = parallel.local_devices()
    most = BATCH if here[0].platform == "cpu" else None
    rows, needed = plan.rows_at_once(
        _sums, (None, 0, 0), (clip.network, *first), here[0].platform, most, **static
    )
    here = plan.devices_at_once(needed + plan.size_of(clip.network), here)
    what = f"reading {rows} images with {clip.info.name}"
    plan.check_room(needed, here, what, "a smaller text model, or --size")
    network = parallel.replicate(clip.network, here)
    run = parallel.map_devices(_sums, (None, 0, 0), 0, devices=here, **static)

    def begun() -> Iterator[tuple[int, tuple[Array, Array]]]:
        for *both, n in _filled(chain([first], stream), rows * len(here)):
            yield n, run(network, *(parallel.shard(a, len(here))[0] for a in both))

    return one_ahead(begun())


def _sums(
    network: Any, images: Array, labels: Array, *, size: tuple[int, int], colours: Any,
    align_corners: bool, k: int,
) -> tuple[Array, Array]:  # fmt: skip
    """Per cluster, the sum of the dense features over its pixels, and their number."""
    pixels = images.astype(jnp.float32) / 127.5 - 1
    features = dense_map(network, pixels, size=size, colours=colours, align_corners=align_corners)
    return pool_regions(features, labels, k, align_corners)


def _size(asked: int, shape: Sequence[int], clip: CLIP) -> tuple[int, int]:
    """Rows and columns at which images are read, in steps of the network; 0: its own choice."""
    stride, native = clip.network.visual.stride, clip.config.vision.image_size
    short = asked or clip.preprocessing.dense or 2 * native
    steps = [max(1, round(short * edge / min(shape) / stride)) for edge in shape]
    return steps[0] * stride, steps[1] * stride


def _filled(
    stream: Iterable[tuple[np.ndarray, np.ndarray]], rows: int
) -> Iterator[tuple[UInt8[np.ndarray, "b h w 3"], UInt8[np.ndarray, "b h w"], int]]:
    """Images with clusters, always `rows` of them, and how many are real: the last ones are filled
    up with images of no cluster.
    """
    singles = ((i, c) for images, labels in stream for i, c in zip(images, labels))
    while some := list(islice(singles, rows)):
        images, labels = (np.stack(a) for a in zip(*some))
        missing = [(0, rows - len(images)), (0, 0), (0, 0)]
        yield (
            np.pad(images, [*missing, (0, 0)]),
            np.pad(labels, missing, constant_values=_PAD),
            len(images),
        )


def _labelled(
    teacher: Teacher, how: Naming
) -> Iterator[tuple[UInt8[np.ndarray, "b h w 3"], UInt8[np.ndarray, "b h w"]]]:
    seeds = sample_seeds(how.seed, how.n)
    # A rare class shows in the samples that it is drawn into only
    gen = mixed(teacher.gen, teacher.parts.arrays)
    for images, labels, _ in teacher.fitted.label_seeds(gen, seeds, teacher.truncation):
        yield np.asarray(images), np.asarray(labels)


def _crop_regions(teacher: Teacher, clip: CLIP, how: Naming) -> _Pooled:
    """Mean unit embeddings of up to `CROPS` masked crops of each cluster, and how many."""
    crops: list[list[np.ndarray]] = [[] for _ in range(_clusters(teacher.parts))]
    for images, labels in _labelled(teacher, how):
        for image, label in zip(images, labels):
            for cluster in np.unique(label):
                if len(crops[cluster]) < CROPS and (label == cluster).mean() > 1e-3:
                    crops[cluster].append(masked_crop(image, label == cluster))
    flat = [crop for several in crops for crop in several]
    encode = partial(clip.encode_image, batch=4 * BATCH)
    embedded = (
        class_scores.unit(np.asarray(encode(clip.preprocess(flat))))
        if flat
        else np.zeros((0, clip.config.embed_dim), np.float32)
    )
    ends = np.cumsum([0, *map(len, crops)])
    means = [
        embedded[a:b].mean(0) if b > a else np.zeros(embedded.shape[1], np.float32)
        for a, b in pairwise(ends)
    ]
    return np.stack(means), np.diff(ends)


def masked_crop(
    image: UInt8[np.ndarray, "h w 3"], inside: np.ndarray, border: float = 0.1
) -> UInt8[np.ndarray, "s s 3"]:
    """A square around a region of uint8[h w 3], with a border; grey outside the region."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    edge = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    edge += 2 * max(1, round(border * edge))
    top, left = (int(a[0] + a[-1] + 1 - edge) // 2 for a in (rows, columns))
    masked = np.where(inside[..., None], image, 127).astype(np.uint8)
    padded = np.pad(masked, [(edge, edge), (edge, edge), (0, 0)], constant_values=127)
    return padded[top + edge : top + 2 * edge, left + edge : left + 2 * edge]
