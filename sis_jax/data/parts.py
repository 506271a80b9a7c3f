"""Parts that a method found in a generator, with names, colours and facts per cluster; on disk
`parts/parts.safetensors` and `classes.json`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from sis_jax.data import draw
from sis_jax.data.files import plain, write_atomic
from sis_jax.data.part_names import grouped
from sis_jax.types import Info, SisError, UsageError

BACKGROUND = 0


@dataclass(frozen=True)
class Parts:
    """Parts of a generator's images.

    method, settings, arrays: the method, its resolved hyper-parameters and what it learned.
    classes: {"id", "name", "colour", "clusters", "prompts", "score", "margin", "runner_up",
        "guess", "unsure"}; id 0 is the background, absent where none was found. The last six are
        the text model's (`named`): probability of the name, lead over the runner-up; guess is the
        likeliest name where the score was too low (unsure).
    clusters: facts per cluster (share, confidence, agreement across seeds, share of the frame,
        class_id; scores: probability per class).
    samples: uint8[n h w 3] images to look at, masks: their clusters, seeds: theirs, confidence:
        per image, 0..1.
    """

    method: str
    settings: dict[str, Any]
    arrays: dict[str, np.ndarray]
    classes: tuple[dict[str, Any], ...]
    clusters: tuple[dict[str, Any], ...]
    background: dict[str, Any]
    generator: Info
    seed: int = 0
    sweep: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    samples: UInt8[np.ndarray, "n h w 3"] = field(
        default_factory=lambda: np.zeros((0, 1, 1, 3), np.uint8), repr=False
    )
    masks: UInt8[np.ndarray, "n h w"] = field(
        default_factory=lambda: np.zeros((0, 1, 1), np.uint8), repr=False
    )
    seeds: tuple[int, ...] = ()
    confidence: tuple[float, ...] = ()

    @property
    def names(self) -> dict[int, str]:
        """Class id -> name."""
        return {c["id"]: c["name"] for c in self.classes}

    def class_of(self) -> UInt8[np.ndarray, "256"]:
        """Look-up table from cluster to class id."""
        table = np.zeros(256, np.uint8)
        for entry in self.classes:
            table[entry["clusters"]] = entry["id"]
        return table

    def classify(self, clusters: Integer[np.ndarray, "*n h w"]) -> UInt8[np.ndarray, "*n h w"]:
        """Masks of cluster numbers as masks of class ids."""
        return self.class_of()[clusters]

    def rename(self, names: Mapping[int, str | None]) -> Parts:
        """Give parts names: {3: "hair", 7: "hair", 11: None} merges two under one name and sends
        one to the background.

        Keys are class ids; a merged class keeps its smallest id. A name given by hand is final:
        the text model's scores of the part are dropped. Raises UsageError for an id that does not
        exist, or a name that is no text.
        """
        self._known(names)
        for key, name in names.items():
            if name is not None and (not isinstance(name, str) or not name.strip()):
                raise UsageError(
                    f"the name of part {key} must be a text, or None for the background, got "
                    f"{name!r}"
                )
        groups: dict[str, dict[str, Any]] = {}
        background: list[int] = []
        label = names.get(BACKGROUND) or self.names.get(BACKGROUND, "background")
        for entry in self.classes:
            name = names.get(entry["id"], entry["name"])
            if name is None or entry["id"] == BACKGROUND:
                background += entry["clusters"]
            elif name in groups:
                groups[name]["clusters"] = sorted(groups[name]["clusters"] + entry["clusters"])
            else:
                by_hand = entry["id"] in names and name != entry["name"]
                groups[name] = entry | {"name": name} | (_UNSAID if by_hand else {})
        first = [_class(BACKGROUND, label, sorted(background))] if background else []
        return self._with_classes((*first, *groups.values()))

    def merge(self, ids: Iterable[int], name: str | None = None) -> Parts:
        """Make one part of several, by id: parts.merge([3, 7], "hair"); without a name it takes
        that of the first. UsageError for unknown ids.
        """
        ids = list(ids)
        self._known(ids)
        if len(set(ids)) < 2:
            raise UsageError(
                f"merge needs two parts or more, got {ids}; to name one, use parts.rename({{3: "
                f"'hair'}})"
            )
        return self.rename(
            dict.fromkeys(ids, name or self.names[ids[0]])
            if BACKGROUND not in ids
            else dict.fromkeys(ids)
        )

    def drop(self, ids: int | Iterable[int]) -> Parts:
        """Send parts to the background, by id: parts.drop([3, 7]). UsageError for unknown ids."""
        return self.rename(dict.fromkeys([ids] if isinstance(ids, int) else list(ids)))

    def named(self, said: Mapping[int, Mapping[str, Any]]) -> Parts:
        """Parts with the names that a text model gave their clusters; clusters of one name become
        one part.

        said: cluster -> {"name" (None is the background), "score", "margin", "runner_up", "named",
            "prompts", "scores"}. A cluster that is not `named` stays in the part it was in, which
            is marked unsure; if that part had its name from a text model before, it is called by
            its number again.
        """
        clusters = tuple(
            c | {"scores": dict(said[c["id"]]["scores"])} if c["id"] in said else c
            for c in self.clusters
        )
        return replace(self, clusters=clusters)._with_classes(grouped(self.classes, clusters, said))

    def _known(self, ids: Iterable[int]) -> None:
        for key in ids:
            if key not in self.names:
                raise UsageError(
                    f"there is no part {key}; there are "
                    f"{', '.join(f'{i} ({n})' for i, n in self.names.items())}"
                )

    def _with_classes(self, classes: tuple[dict[str, Any], ...]) -> Parts:
        owner = {cluster: c["id"] for c in classes for cluster in c["clusters"]}
        clusters = tuple(
            c | {"class_id": owner[c["id"]], "background": owner[c["id"]] == BACKGROUND}
            for c in self.clusters
        )
        return replace(self, classes=classes, clusters=clusters)

    def digest(self) -> str:
        """SHA-256 of everything that masks depend on besides the generator: the learned arrays, and
        which cluster belongs to which class.
        """
        digest = hashlib.sha256(
            repr(sorted((c["id"], tuple(c["clusters"])) for c in self.classes)).encode()
        )
        for name in sorted(self.arrays):
            digest.update(self.arrays[name].tobytes())
        return digest.hexdigest()

    def show(self, count: int = 8) -> Image.Image:
        """Samples over their parts over both, as one image; a notebook draws it."""
        n = min(count, len(self.samples))
        if n == 0:
            raise SisError("these parts carry no samples to show: they were made without a gallery")
        shown, masks = draw.cells(self.samples[:n]), draw.cells(self.classify(self.masks[:n]))
        return Image.fromarray(
            draw.sample_grid(shown, masks, [f"seed {s}" for s in self.seeds[:n]])
        )

    # files

    def files(self) -> dict[str, bytes]:
        """Everything `save` writes, by name: images of the samples, arrays, classes, the sweep."""
        out: dict[str, bytes] = {}
        for i, (image, mask) in enumerate(zip(self.samples, self.classify(self.masks))):
            out[f"samples/{i:02d}_image.png"] = _png(image)
            out[f"samples/{i:02d}_mask.png"] = _png(mask)
        if len(self.samples):
            gallery = io.BytesIO()
            self.show(len(self.samples)).save(gallery, "PNG", optimize=True)
            out["gallery.png"] = gallery.getvalue()
        if self.sweep:
            out["sweep.json"] = _json(self.sweep)
        arrays = {k: np.ascontiguousarray(v) for k, v in self.arrays.items()} | {
            "samples/clusters": np.ascontiguousarray(self.masks)
        }
        out["parts.safetensors"] = save(arrays)
        facts = {
            k: getattr(self, k)
            for k in ("classes", "clusters", "background", "warnings", "method", "settings", "seed")
        }
        shown = [{"seed": s, "confidence": c} for s, c in zip(self.seeds, self.confidence)]
        out["classes.json"] = _json(facts | {"samples": shown, "generator": asdict(self.generator)})
        return out

    def save(self, folder: str | Path) -> Path:
        """Write the parts into a folder; `Parts.load` reads them back."""
        for name, data in self.files().items():
            write_atomic(Path(folder) / name, data)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Parts:
        """Parts from a run folder or its `parts/`. Raises UsageError where there are none."""
        folder = Path(folder)
        place = folder / "parts" if (folder / "parts" / "classes.json").exists() else folder
        try:
            facts = json.loads((place / "classes.json").read_text(encoding="utf-8"))
            arrays = load_file(place / "parts.safetensors")
            masks = arrays.pop("samples/clusters")
            images = [
                np.asarray(Image.open(place / f"samples/{i:02d}_image.png").convert("RGB"))
                for i in range(len(masks))
            ]
            table = place / "sweep.json"
            return cls(
                method=facts["method"], settings=facts["settings"], arrays=arrays,
                classes=tuple(facts["classes"]), clusters=tuple(facts["clusters"]),
                background=facts["background"], generator=Info(**facts["generator"]),
                seed=facts["seed"], warnings=tuple(facts["warnings"]),
                sweep=json.loads(table.read_text(encoding="utf-8")) if table.exists() else None,
                samples=np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8),
                masks=masks, seeds=tuple(s["seed"] for s in facts["samples"]),
                confidence=tuple(s["confidence"] for s in facts["samples"]),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            why = (
                f"{Path(error.filename).name} is not there"
                if isinstance(error, FileNotFoundError) and error.filename
                else f"{type(error).__name__}: {error}"
            )
            raise UsageError(
                f"{folder} holds no parts that can be read ({why}): run python -m "
                f"sis_jax.discover --out {folder}, with --overwrite if it exists"
            ) from None


_UNSAID: dict[str, Any] = {
    "prompts": [],
    "score": None,
    "margin": None,
    "runner_up": None,
    "guess": None,
    "unsure": False,
}


def _class(class_id: int, name: str, clusters: list[int]) -> dict[str, Any]:
    return {
        "id": class_id,
        "name": name,
        "colour": draw.colour(class_id),
        "clusters": clusters,
        **_UNSAID,
    }


def classes_from(clusters: list[dict[str, Any]], found: bool) -> tuple[dict[str, Any], ...]:
    """One class per cluster, largest first; the background's clusters together as class 0, if it
    was found at all.

    A cluster whose method already knows its "name" keeps it.
    """
    back = [c["id"] for c in clusters if c["background"]] if found else []
    rest = sorted((c for c in clusters if c["id"] not in back), key=lambda c: -c["share"])
    first = [_class(BACKGROUND, "background", back)] if back else []
    return (
        *first,
        *(_class(i, c.get("name") or f"part {i}", [c["id"]]) for i, c in enumerate(rest, start=1)),
    )


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    (draw.palette_png(picture) if picture.ndim == 2 else Image.fromarray(picture)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def _json(value: Any) -> bytes:
    return (json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n").encode()
