"""Parts that a method found in a generator, with names, colours and facts per cluster."""

from __future__ import annotations

import hashlib
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
from sis_jax.data.decode import Unusable, load_image
from sis_jax.data.files import (
    check_folder,
    command_of,
    json_bytes,
    parse_json,
    read_run,
    write_atomic,
)
from sis_jax.data.folder import checked_classes
from sis_jax.data.part_names import BACKGROUND, UNSAID, finer_named, followed, grouped, new_class
from sis_jax.types import Info, SisError, UsageError

_UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, Unusable
)  # fmt: skip
FINER = "finer/"  # names of arrays of the finer level begin so


@dataclass(frozen=True)
class Parts:
    """Parts of a generator's images.

    method, settings, arrays: the method, its resolved hyper-parameters and what it learned.
        classes: {"id", "name", "colour", "clusters", "prompts", "score", "margin", "runner_up",
        "guess", "unsure"}; id 0 is the background, absent where none was found. The last six are
        the text model's (`named`); guess is the likeliest name where the score was too low.
        clusters: facts per cluster (share, confidence, agreement across seeds, share of the frame,
        class_id; scores: probability per class). samples: uint8[n h w 3] images, masks: their
        clusters, seeds: theirs, confidence: per image, 0..1. finer: the same foreground in finer
        parts or None; its clusters have "parent", the cluster here that holds their pixels.
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
    finer: Parts | None = None

    def level(self, level: int) -> Parts:
        """One level alone: 0 is the background and the coarse parts, 1 splits the foreground into
        finer ones; UsageError where there is no such level.
        """
        levels = (self,) if self.finer is None else (self, self.finer)
        if level not in range(len(levels)):
            known = "0 or 1" if self.finer else "0, the only one; discover without k finds two"
            raise UsageError(f"level is {level!r}, expected {known}")
        return replace(levels[level], finer=None)

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
        """Give parts names: {3: "hair", 7: "hair", 11: None} merges two and sends one to the
        background.

        Keys are class ids; a merged class keeps its smallest id and loses the text model's scores.
        The finer level follows: "hair 1", "hair 2". UsageError for an unknown id, a name that is no
        text or the background's, and where no part is left.
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
            elif name == label:
                raise UsageError(
                    f"part {entry['id']} cannot be called {label!r}, as the background is: give "
                    "None (null in edits.json) to send it there"
                )
            elif name in groups:
                groups[name]["clusters"] = sorted(groups[name]["clusters"] + entry["clusters"])
            else:
                by_hand = entry["id"] in names and name != entry["name"]
                groups[name] = entry | {"name": name} | (UNSAID if by_hand else {})
        if not groups and any(entry["id"] != BACKGROUND for entry in self.classes):
            raise UsageError("these names send every part to the background: keep at least one")
        first = [new_class(BACKGROUND, label, sorted(background))] if background else []
        return self.with_classes((*first, *groups.values()))

    def merge(self, ids: Iterable[int], name: str | None = None) -> Parts:
        """Make one part of several: parts.merge([3, 7], "hair"); UsageError for unknown ids."""
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

    def named(
        self,
        verdicts: Mapping[int, Mapping[str, Any]],
        finer: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> Parts:
        """Parts with the names that a text model gave their clusters; clusters of one name become
        one.

        verdicts: cluster -> {"name" (None is the background), "score", "margin", "runner_up",
            "named", "prompts", "scores"}. A cluster that is not `named` stays in its part, which is
            marked unsure, and called by its number again if a text model named it before. finer:
            the same of the finer level, whose parts stay apart: "face 1", "face 2".
        """
        parts = self._scored(verdicts)
        parts = parts.with_classes(grouped(parts.classes, parts.clusters, verdicts))
        if parts.finer is None or finer is None:
            return parts
        below = parts.finer._scored(finer)
        classes = finer_named(parts.classes, below.classes, below.clusters, finer)
        return replace(parts, finer=below.with_classes(classes))

    def _scored(self, verdicts: Mapping[int, Mapping[str, Any]]) -> Parts:
        clusters = tuple(
            c | {"scores": dict(verdicts[c["id"]]["scores"])} if c["id"] in verdicts else c
            for c in self.clusters
        )
        return replace(self, clusters=clusters)

    def _known(self, ids: Iterable[int]) -> None:
        for key in ids:
            if key not in self.names:
                raise UsageError(
                    f"there is no part {key}; there are "
                    f"{', '.join(f'{i} ({n})' for i, n in self.names.items())}"
                )

    def with_classes(self, classes: tuple[dict[str, Any], ...]) -> Parts:
        owner = {cluster: c["id"] for c in classes for cluster in c["clusters"]}
        lost = next((c["id"] for c in self.clusters if c["id"] not in owner), None)
        if lost is not None:
            raise SisError(f"cluster {lost} of these parts is in no class: discover again")
        clusters = tuple(
            c | {"class_id": owner[c["id"]], "background": owner[c["id"]] == BACKGROUND}
            for c in self.clusters
        )
        finer = self.finer
        if finer is not None:
            finer = finer.with_classes(
                followed(self.classes, classes, finer.classes, finer.clusters)
            )
        return replace(self, classes=classes, clusters=clusters, finer=finer)

    def digest(self) -> str:
        """SHA-256 of everything that masks depend on besides the generator."""
        digest = hashlib.sha256(
            repr(sorted((c["id"], tuple(c["clusters"])) for c in self.classes)).encode()
        )
        for name in sorted(self.arrays):
            digest.update(self.arrays[name].tobytes())
        return digest.hexdigest()

    def show(self, count: int = 8) -> Image.Image:
        """Samples over their parts over both; in two levels samples, coarse and finer parts."""
        n = min(count, len(self.samples))
        if n == 0:
            raise SisError("these parts carry no samples to show: they were made without a gallery")
        shown, masks = draw.cells(self.samples[:n]), draw.cells(self.classify(self.masks[:n]))
        finer = self.finer and draw.cells(self.finer.classify(self.finer.masks[:n]))
        labels = [f"seed {s}" for s in self.seeds[:n]]
        return Image.fromarray(draw.sample_grid(shown, masks, labels, finer=finer))

    def _repr_png_(self) -> bytes | None:
        return draw.png(self.show()) if len(self.samples) else None

    # files

    def files(self) -> dict[str, bytes]:
        """Everything `save` writes, by name: images of the samples, arrays, classes, the sweep."""
        out: dict[str, bytes] = {}
        for i, (image, mask) in enumerate(zip(self.samples, self.classify(self.masks))):
            out[f"samples/{i:02d}_image.png"] = draw.png(image)
            out[f"samples/{i:02d}_mask.png"] = draw.png(draw.palette_png(mask))
        if len(self.samples):
            out["gallery.png"] = draw.png(self.show(len(self.samples)), optimize=True)
        if self.sweep:
            out["sweep.json"] = json_bytes(self.sweep)
        arrays = dict(self.arrays) | {"samples/clusters": self.masks}
        facts = self._facts_of_level() | {
            "method": self.method,
            "settings": self.settings,
            "seed": self.seed,
            "samples": self._shown(),
            "generator": asdict(self.generator),
        }
        if self.finer is not None:
            for i, mask in enumerate(self.finer.classify(self.finer.masks)):
                out[f"samples/{i:02d}_finer.png"] = draw.png(draw.palette_png(mask))
            arrays |= dict(self.finer.arrays) | {f"{FINER}samples/clusters": self.finer.masks}
            facts["finer"] = self.finer._facts_of_level() | {"samples": self.finer._shown()}
        out["parts.safetensors"] = save({k: np.ascontiguousarray(v) for k, v in arrays.items()})
        out["classes.json"] = json_bytes(facts)
        return out

    def _facts_of_level(self) -> dict[str, Any]:
        """What classes.json holds of each level, beside the samples."""
        return {k: getattr(self, k) for k in ("classes", "clusters", "background", "warnings")}

    def _shown(self) -> list[dict[str, Any]]:
        return [{"seed": s, "confidence": c} for s, c in zip(self.seeds, self.confidence)]

    def _with_level(
        self, facts: Mapping[str, Any], arrays: dict[str, np.ndarray], masks: np.ndarray
    ) -> Parts:
        """The same with one level as classes.json holds it; ValueError where it holds none."""
        _check_level(facts, masks)
        return replace(
            self, arrays=arrays, masks=masks, background=facts["background"],
            **{k: tuple(facts[k]) for k in ("classes", "clusters", "warnings")},
            seeds=tuple(s["seed"] for s in facts["samples"]),
            confidence=tuple(s["confidence"] for s in facts["samples"]),
        )  # fmt: skip

    def save(self, folder: str | Path) -> Path:
        """Write the parts into a folder; `Parts.load` reads them back."""
        for name, data in self.files().items():
            write_atomic(Path(folder) / name, data)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Parts:
        """Parts from a run folder or its `parts/`. Raises UsageError where there are none."""
        folder = Path(folder)
        check_folder(folder)
        place = folder / "parts" if (folder / "parts" / "classes.json").exists() else folder
        try:
            facts = parse_json((place / "classes.json").read_text(encoding="utf-8"))
            arrays = load_file(place / "parts.safetensors")
            images = [
                np.asarray(load_image(place / f"samples/{i:02d}_image.png").convert("RGB"))
                for i in range(len(facts["samples"]))
            ]
            table = place / "sweep.json"
            sweep = parse_json(table.read_text(encoding="utf-8")) if table.exists() else None
            if not (sweep is None or isinstance(sweep, dict)):
                raise ValueError("the sweep is no object")
            _check_origin(facts)
            whole = cls(
                method=facts["method"], settings=facts["settings"], arrays={},
                classes=(), clusters=(), background={}, generator=Info(**facts["generator"]),
                seed=facts["seed"],
                sweep=sweep,
                samples=np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8),
            )  # fmt: skip
            finer = arrays.pop(f"{FINER}samples/clusters", None)
            masks = arrays.pop("samples/clusters")
            if finer is None:
                return whole._with_level(facts, arrays, masks)
            coarse = {k: v for k, v in arrays.items() if not k.startswith(FINER)}
            known = {c["id"] for c in facts["clusters"]}
            if not all(c["parent"] in known for c in facts["finer"]["clusters"]):
                raise ValueError("a cluster of the finer level has no parent")
            return replace(
                whole._with_level(facts, coarse, masks),
                finer=replace(whole._with_level(facts["finer"], arrays, finer), sweep=None),
            )
        except _UNREADABLE as error:
            if not (place / "classes.json").exists():
                raise UsageError(no_parts(folder)) from None
            why = (
                f"{Path(error.filename).name} is not there"
                if isinstance(error, FileNotFoundError) and error.filename
                else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            )
            raise UsageError(
                f"{folder} holds no parts that can be read ({why}): run python -m "
                f"sis_jax.discover --out {folder}, with --overwrite if it exists"
            ) from None


def no_parts(folder: Path) -> str:
    """The sentence for a folder without parts: why there are none, and what to type."""
    try:
        record = read_run(folder)["stages"].get("discover", {})
    except UsageError:
        record = {}
    if record.get("state") == "started":
        command = command_of(record)
        again = "give its command again, it resumes" + (f": {command}" if command else "")
        return f"discover did not finish in {folder}: {again}"
    if not (folder / "run.json").exists() and any(folder.iterdir()):
        return f"{folder} holds no parts: expected the run folder that discover wrote, its --out"
    return (
        f"{folder} holds no parts that can be read (classes.json is not there): run python -m "
        f"sis_jax.discover --out {folder}, with --overwrite if it exists"
    )


def _check_origin(facts: Mapping[str, Any]) -> None:
    """ValueError where the method or the generator is not described."""
    texts = (facts["method"], *facts["generator"].values())
    if not all(isinstance(text, str) for text in texts) or type(facts["seed"]) is not int:
        raise ValueError("the method or the generator is not described")
    if not isinstance(facts["settings"], dict):
        raise ValueError("the settings are no object")


def _check_level(facts: Mapping[str, Any], masks: np.ndarray) -> None:
    """ValueError where the classes, clusters or samples of a level are none."""
    classes, clusters = checked_classes(facts["classes"]), facts["clusters"]
    numbers = [n for c in classes for n in c["clusters"]] + [c["id"] for c in clusters]
    if not all(type(n) is int and 0 <= n < 256 for n in numbers):
        raise ValueError("clusters are numbered from 0 to 255")
    if not isinstance(facts["background"], dict):
        raise ValueError("the background is not described")
    if not all(isinstance(w, str) for w in facts["warnings"]):
        raise ValueError("a warning is no text")
    for sample in facts["samples"]:
        confidence = sample["confidence"]
        if type(sample["seed"]) is not int or type(confidence) not in (int, float, type(None)):
            raise ValueError("a sample has no seed or no confidence")
    if masks.dtype != np.uint8 or masks.ndim != 3 or len(masks) != len(facts["samples"]):
        raise ValueError(f"the masks of the samples are {masks.dtype}{list(masks.shape)}")


def classes_from(clusters: list[dict[str, Any]], found: bool) -> tuple[dict[str, Any], ...]:
    """One class per cluster, largest first; the background's clusters together as class 0."""
    back = [c["id"] for c in clusters if c["background"]] if found else []
    rest = sorted((c for c in clusters if c["id"] not in back), key=lambda c: -c["share"])
    first = [new_class(BACKGROUND, "background", back)] if back else []
    return (
        *first,
        *(
            new_class(i, c.get("name") or f"part {i}", [c["id"]])
            for i, c in enumerate(rest, start=1)
        ),
    )
