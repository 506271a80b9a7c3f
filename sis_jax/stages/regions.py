"""What a text model sees of the clusters: features averaged over the pixels of each, or crops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from sis_jax import parallel
from sis_jax.checkpoints.clip import CLIP
from sis_jax.data.parts import Parts
from sis_jax.models.clip_regions import dense_map, pool_regions
from sis_jax.models.moved import mixed
from sis_jax.ops import class_scores, plan
from sis_jax.ops.progress import progress
from sis_jax.ops.sampling import Probe, one_ahead, probe, sample_seeds
from sis_jax.runs.configs.label import Naming
from sis_jax.stages.teacher import Teacher

BATCH = 8  # images in the CLIP at a time on a CPU, at most
CROPS = 16  # crops per cluster in the mode "crop"
_PAD = 255  # no cluster has this number

Pooled = tuple[Float[np.ndarray, "k d"], Num[np.ndarray, "k"]]  # per cluster; how much it is of


def pooled(teacher: Teacher, clip: CLIP, how: Naming) -> tuple[Pooled, Pooled | None]:
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


def _means(total: Float[np.ndarray, "k d"], count: Float[np.ndarray, "k"]) -> Pooled:
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


def _crop_regions(teacher: Teacher, clip: CLIP, how: Naming) -> Pooled:
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
