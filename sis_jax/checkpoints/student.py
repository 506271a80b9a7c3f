"""The student on disk and in use: config.json, model.safetensors and a card in one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8
from PIL import Image

from sis_jax import parallel
from sis_jax.checkpoints import catalogue, files, hub
from sis_jax.checkpoints.build import arrays_of, build
from sis_jax.checkpoints.student_export import write
from sis_jax.data.decode import CROPS, Fit, pad_before, padded
from sis_jax.data.files import check_folder, json_bytes, parse_json, utf8, write_atomic
from sis_jax.data.folder import checked_classes
from sis_jax.data.threads import in_threads
from sis_jax.models import students
from sis_jax.models.students import to_float
from sis_jax.ops import plan
from sis_jax.ops.enlarge import Box, enlarged, winners
from sis_jax.ops.guided_filter import guided
from sis_jax.types import Info, SisError, UsageError, unknown_name

TILE = 1024  # pixels: a photo that is larger, at the size the network works at, is cut
_OVERLAP = 64
_FINE = 4  # times the resolution of the network: how finely borders follow the photo
_GRID = 16  # edges are rounded to this, so that photos of like shape share a compilation
ROWS = 16  # photos per device at a time, at most
# Four would be a tenth faster, but a photo's bytes must not depend on how many a stop left over.
CPU_ROWS = 1


@dataclass(frozen=True)
class Student:
    """A trained segmenter. classes: as in classes.json, channel i is the class classes[i].

    side: shorter edge in pixels of the images it was trained on. facts: its origin, for the card.
    fit: how a photo that is not square is shown to the network. crop: as it is, for a network that
        learned from centred squares; pad, stretch: as the square it learned from.
    """

    network: nnx.Module
    config: students.StudentConfig
    classes: tuple[dict[str, Any], ...]
    side: int
    info: Info = field(default_factory=Info)
    facts: dict[str, Any] = field(default_factory=dict)
    fit: Fit = "crop"

    @property
    def ids(self) -> UInt8[np.ndarray, "k"]:
        """The class id of each channel."""
        return np.array([c["id"] for c in self.classes], np.uint8)

    def scores(
        self,
        images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
        *,
        flip: bool = True,
        size: int | None = None,
        tile: int = TILE,
        edges: bool = True,
    ) -> list[Float[np.ndarray, "_ _ k"]]:
        """Class probabilities at each photo's own size, channel = class id.

        flip: mean with the mirror image. size: shorter edge in pixels (or that of the square of
            `fit`) for the network; by default that of training. tile: a photo that is then still
            larger is cut into overlapping tiles. edges: let borders follow the photo's edges
            (`ops/guided_filter.py`).
        """
        return self._of_each(self.full_scores, images, flip, size, tile, edges)

    def masks(
        self,
        images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
        *,
        flip: bool = True,
        size: int | None = None,
        tile: int = TILE,
        edges: bool = True,
    ) -> list[UInt8[np.ndarray, "_ _"]]:
        """Masks of class ids at each photo's own size. Arguments as in `scores`."""
        return self._of_each(self.mask, images, flip, size, tile, edges)

    def _of_each(
        self, finish: Callable[..., np.ndarray], images: Sequence[np.ndarray], flip: bool,
        size: int | None, tile: int, edges: bool,
    ) -> list[np.ndarray]:  # fmt: skip
        looks = list(in_threads(lambda image: self.look(image, size, edges=edges), images))
        small = self.probabilities([look.seen for look in looks], flip=flip, tile=tile)
        return list(in_threads(lambda pair: finish(*pair), zip(small, looks)))

    @classmethod
    def load(cls, name_or_path: str | os.PathLike | None = None) -> Any:
        """The student in a run or a folder, one in ported_weights/ by name, or one on the Hugging
        Face hub ("owner/model"); None is the one that ships.

        Raises UsageError where there is none, SisError where it is damaged.
        """
        path = find(name_or_path)
        place = path / "student" if (path / "student" / files.CONFIG).is_file() else path
        try:
            raw = parse_json((place / files.CONFIG).read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            check_folder(path)
            raise UsageError(
                f"{path} holds no student: train one with python -m sis_jax.distill {path}, or "
                f"take {catalogue.DEFAULT_STUDENT}"
            ) from None
        except (OSError, ValueError) as error:
            raise SisError(
                f"{place / files.CONFIG} cannot be read ({error}): distil again"
            ) from None
        if not isinstance(raw, dict) or raw.get("format") != files.STUDENT_FORMAT:
            raise UsageError(
                f"{place} holds no student: its {files.CONFIG} does not state "
                f'"format": "{files.STUDENT_FORMAT}"'
            )
        files.check_version(place, raw, "distil again")
        try:
            config, classes, side, facts = _fields(raw)
            header = files.Folder("student", raw["name"], raw["licence"], {}, sha256=raw["sha256"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SisError(f"{place / files.CONFIG} is damaged ({error}): distil again") from None
        arrays, digest = files.read_arrays(place, header)
        info = Info(raw["name"], raw["licence"], "distilled by sis_jax", digest)
        network = build(lambda: students.build(config), arrays, str(place), info)
        fit = raw.get("fit", "crop")
        if fit not in tuple(CROPS):
            raise unknown_name("fit of the student", str(fit), CROPS)
        return cls(network, config, classes, side, info, facts, fit)

    def save(self, folder: str | Path, dtype: str = "float32") -> Path:
        """Write config.json, model.safetensors ("float16": half the size) and README.md."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        digest = files.write_arrays(folder / files.MODEL, arrays_of(self.network), dtype)
        write_atomic(folder / files.CARD, utf8(self._card()))
        content = {
            "format": files.STUDENT_FORMAT, "version": files.VERSION,
            "network": asdict(self.config), "side": self.side, "classes": list(self.classes),
            "name": self.info.name, "licence": self.info.licence,
            "sha256": {files.MODEL: digest}, "facts": self.facts,
        }  # fmt: skip
        content |= {} if self.fit == "crop" else {"fit": self.fit}
        write_atomic(folder / files.CONFIG, json_bytes(content))
        return folder

    def export(self, path: str | Path) -> Path:
        """Write the network as one file that works without this library: .onnx, else a JAX
        function.

        It maps uint8[b side side 3] to probabilities float32[b side side k], channels as in
        `classes`; `jax.export.deserialize(bytes).call(images)` runs the JAX function. Raises
        UsageError for ONNX without the package jax2onnx.
        """
        facts = {
            "name": self.info.name,
            "licence": self.info.licence,
            "side": str(self.side),
            "classes": json.dumps(list(self.classes)),
        }
        graph, params = nnx.split(self.network)

        def run(images: jax.Array) -> jax.Array:
            return _probabilities(params, images, graph=graph, flip=False, swap=())

        return write(run, self.side, Path(path), facts)

    def check(self, size: int | None = None, tile: int = TILE) -> None:
        """UsageError for a size or tile that cannot work."""
        if (size is not None and size < 16) or tile < 4 * _OVERLAP:
            raise UsageError(
                f"size is {size} and tile {tile}, expected at least 16 and {4 * _OVERLAP} pixels"
            )

    # the three steps of `scores` and `masks`, for streams of photos; the first and the last run in
    # threads, the one between on the devices

    def look(
        self, image: UInt8[np.ndarray, "_ _ 3"], size: int | None = None, *, edges: bool = True
    ) -> Look:
        """A photo as the network sees it, and what else its mask needs."""
        self.check(size)
        image, side = np.asarray(image), self.side if size is None else size
        seen = _brought_to(image, side, self.fit)
        return Look(seen, image.shape[:2], _at_most(image, _FINE * side) if edges else None)

    def probabilities(
        self, seen: Sequence[UInt8[np.ndarray, "_ _ 3"]], *, flip: bool = True, tile: int = TILE
    ) -> list[Float[np.ndarray, "_ _ k"]]:
        """Probabilities per channel of `seen` photos, at that size; those of one shape together."""
        self.check(tile=tile)
        out: list[Any] = [None] * len(seen)
        shapes: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(seen):
            shapes.setdefault(image.shape, []).append(i)
        for shape, members in shapes.items():
            if max(shape[:2]) > tile:
                for i in members:
                    out[i] = self._tiled(seen[i], flip, tile)
                continue
            for i, scores in zip(members, self._forward([seen[i] for i in members], flip)):
                out[i] = scores
        return out

    def mask(self, scores: Float[np.ndarray, "_ _ k"], look: Look) -> UInt8[np.ndarray, "_ _"]:
        """Class ids at a photo's own size, from its `probabilities`."""
        return self.ids[winners(*self._placed_in(scores, look))]

    def full_scores(
        self, scores: Float[np.ndarray, "_ _ k"], look: Look
    ) -> Float[np.ndarray, "_ _ c"]:
        """Probability per class id at a photo's own size, from its `probabilities`."""
        full = np.zeros((*look.size, int(self.ids.max()) + 1), np.float32)
        full[..., self.ids] = enlarged(*self._placed_in(scores, look))
        return full

    def _placed_in(
        self, scores: np.ndarray, look: Look
    ) -> tuple[np.ndarray, tuple[int, int], Box | None]:
        """(scores, the photo's size, the part of the scores that is the photo)."""
        part = self._part(scores, look.size)
        if look.guide is None:
            return scores, look.size, part
        return guided(look.seen, scores, look.guide, part), look.size, None

    @cached_property
    def _placed(self) -> tuple[Any, Any]:
        """(structure, weights on every device)."""
        graph, params = nnx.split(self.network)
        return graph, parallel.replicate(params)

    def _forward(self, images: Sequence[np.ndarray], flip: bool) -> Iterator[np.ndarray]:
        """Images of one shape, in blocks of one row or as planned: two programs at most."""
        graph, params = self._placed
        devices = parallel.local_devices()
        static = {"graph": graph, "flip": flip, "swap": mirrored(self.classes)}
        platform = devices[0].platform
        rows, needed = plan.rows_at_once(
            _probabilities, (None, 0), (params, images[0][None]), platform,
            CPU_ROWS if platform == "cpu" else ROWS, **static,
        )  # fmt: skip
        used = plan.devices_at_once(needed, devices)
        what = f"labelling {rows} photos of {images[0].shape[0]} pixels"
        plan.check_room(needed, used, what, "a smaller --size")
        run = parallel.map_devices(_probabilities, (None, 0), 0, devices=used, **static)
        at = 0
        while at < len(images):
            many = 2 * (len(images) - at) >= rows * len(used)
            chunk = np.stack(images[at : at + (rows if many else 1) * len(used)])
            blocks, _ = parallel.shard(chunk, len(used), rows if many else 1)
            yield from parallel.unshard(np.asarray(run(params, blocks)), len(chunk))
            at += len(chunk)

    def _tiled(self, image: np.ndarray, flip: bool, tile: int) -> np.ndarray:
        """Overlapping tiles, each fading out towards its border."""
        h, w = image.shape[:2]
        places = [
            np.s_[top : top + tile, left : left + tile]
            for top in _starts(h, tile)
            for left in _starts(w, tile)
        ]
        total = np.zeros((h, w, len(self.classes)), np.float32)
        weight = np.zeros((h, w, 1), np.float32)
        for place, scores in zip(places, self._forward([image[p] for p in places], flip)):
            fade = _fade(scores.shape[0])[:, None, None] * _fade(scores.shape[1])[None, :, None]
            total[place] += fade * scores
            weight[place] += fade
        return total / weight

    def _part(self, scores: np.ndarray, size: tuple[int, int]) -> Box | None:
        """The part of the scores that is a photo of size [h w]; None for all of them."""
        if self.fit != "pad":
            return None
        scale, (top, left) = scores.shape[0] / max(size), pad_before(size)
        return scale * left, scale * top, scale * (left + size[1]), scale * (top + size[0])

    def _card(self) -> str:
        rows = {
            "network": f"{self.config.arch}, {self.side} pixels",
            "classes": ", ".join(c["name"] for c in self.classes),
            **self.facts,
        }
        table = "\n".join(f"| {k} | {v} |" for k, v in rows.items())
        return (
            "---\nlibrary_name: sis_jax\ntags: [jax, flax, image-segmentation]\n---\n# "
            f"{self.info.name}\n\nA segmenter for photos, distilled by `sis_jax` "
            f"from a generator's parts without labels.\n\nLicence: {self.info.licence}\n\n| | "
            f"|\n|---|---|\n{table}\n\n"
            "Load it: `sis_jax.load_student(PATH)`; use it: `python -m sis_jax.predict RUN "
            "PHOTOS --out DIR`.\n"
        )


class Look(NamedTuple):
    """A photo on its way to a mask. seen: what the network sees. size: its own, [h w]. guide: the
    photo whose edges the borders follow, None where they do not.
    """

    seen: UInt8[np.ndarray, "_ _ 3"]
    size: tuple[int, int]
    guide: UInt8[np.ndarray, "_ _ 3"] | None


def load_student(name_or_path: str | os.PathLike | None = None) -> Student:
    """As `Student.load`."""
    return Student.load(name_or_path)


def find(name_or_path: str | os.PathLike | None) -> Path:
    """The folder of a name or path; UsageError with the known names."""
    text = catalogue.DEFAULT_STUDENT if name_or_path is None else catalogue.text_of(name_or_path)
    path, known = Path(text), catalogue.students()
    if text in known and not any(
        (place / files.CONFIG).is_file() for place in (path, path / "student")
    ):
        return known[text]
    if hosted := hub.folder_of(text):
        return hosted
    if text and (path.exists() or os.sep in text):
        return path
    if text in catalogue.folders():
        raise UsageError(
            f"{text} holds no student, it draws or names images: give "
            f"{', '.join([*known, 'a run'])}"
        )
    catalogue.check_installed(text)
    raise unknown_name(
        "student",
        text,
        known,
        "Give one of these, a run in which python -m sis_jax.distill left one, or its folder.",
    )


def mirrored(classes: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    """The channel of each class in the mirror: left and right swap. Empty where nothing does."""
    names = [str(c["name"]).lower() for c in classes]
    table = list(range(len(names)))
    for i, name in enumerate(names):
        for one, other in (("left", "right"), ("right", "left"), ("l_", "r_"), ("r_", "l_")):
            if name.startswith(one) or f" {one}" in name:
                twin = name.replace(one, other, 1)
                table[i] = names.index(twin) if twin in names else i
    return tuple(table) if table != list(range(len(names))) else ()


def _probabilities(
    params: Any, images: jax.Array, *, graph: Any, flip: bool, swap: tuple[int, ...]
) -> jax.Array:
    network, x = nnx.merge(graph, params), to_float(images)
    out = jax.nn.softmax(network(x))
    if not flip:
        return out
    other = jax.nn.softmax(network(x[:, :, ::-1]))[:, :, ::-1]
    return (out + (other[..., jnp.asarray(swap)] if swap else other)) / 2


def _at_most(image: np.ndarray, side: int) -> np.ndarray:
    """The photo with a shorter edge of `side` pixels where its own is longer."""
    h, w = image.shape[:2]
    if min(h, w) <= side:
        return image
    h, w = (round(edge * side / min(h, w)) for edge in (h, w))
    return np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BOX))


def _fields(
    raw: dict[str, Any],
) -> tuple[students.StudentConfig, tuple[dict[str, Any], ...], int, dict[str, Any]]:
    """Network, classes, resolution and facts of a config.json; ValueError for a damaged one."""
    network, usual = raw["network"], students.StudentConfig()
    if any(type(value) is not type(getattr(usual, key, None)) for key, value in network.items()):
        raise ValueError("a field of its network is of another kind")
    config, classes = students.StudentConfig(**network), checked_classes(raw["classes"])
    if len(classes) != config.classes:
        raise ValueError(f"{len(classes)} classes for {config.classes} channels")
    side, texts, facts = raw["side"], (raw["name"], raw["licence"]), raw.get("facts", {})
    if type(side) is not int or not _GRID <= side <= 2**16:
        raise ValueError(f"its resolution is {str(side)[:20]}")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("its name or licence is no text")
    if not isinstance(raw["sha256"], dict) or not isinstance(facts, dict):
        raise ValueError("its digests or facts are no object")
    return config, classes, side, facts


def _brought_to(image: np.ndarray, side: int, fit: Fit) -> np.ndarray:
    """The photo with a shorter edge of about `side`, edges multiples of 16; for a fit, a square."""
    image = padded(image) if fit == "pad" else image
    h, w = image.shape[:2]
    edges = (side, side) if fit == "stretch" else (s * side / min(h, w) for s in (h, w))
    new_h, new_w = (max(_GRID, _GRID * round(edge / _GRID)) for edge in edges)
    if (new_h, new_w) == (h, w):
        return image
    whole = h % new_h == 0 and w % new_w == 0
    rule = (
        Image.Resampling.BOX
        if whole
        else Image.Resampling.BILINEAR
        if new_h > h
        else Image.Resampling.LANCZOS
    )
    return np.asarray(Image.fromarray(image).resize((new_w, new_h), rule))


def _starts(length: int, tile: int) -> list[int]:
    """Where tiles begin: evenly spread, overlapping by at least 64 pixels."""
    if length <= tile:
        return [0]
    count = -(-(length - _OVERLAP) // (tile - _OVERLAP))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _fade(length: int) -> np.ndarray:
    """1 in the middle, falling to almost nothing over the last pixels."""
    at = np.arange(length, dtype=np.float32)
    return np.minimum(np.minimum(at + 1, length - at) / _OVERLAP, 1.0)
