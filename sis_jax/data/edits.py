"""Edited images with their background kept, and its PSNR: `Edit`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from sis_jax.data import draw
from sis_jax.data.files import json_bytes, parse_json, write_atomic
from sis_jax.data.names import flat, key, twins
from sis_jax.ops import compositing
from sis_jax.types import SisError, UsageError

_ARRAYS = ("originals", "plain", "images", "backgrounds", "alphas", "edited_alphas")


@dataclass(frozen=True)
class Edit:
    """n images, each edited with s strengths.

    originals: before (or photos). plain: the generated images of the moved latent. images: the
        foreground of that on the original's own, completed background (backgrounds). alphas,
        edited_alphas: foreground in 0..1. direction: in words.
    """

    names: tuple[str, ...]
    strengths: tuple[float, ...]
    direction: str
    originals: UInt8[np.ndarray, "n h w 3"]
    plain: UInt8[np.ndarray, "n s h w 3"]
    images: UInt8[np.ndarray, "n s h w 3"]
    backgrounds: UInt8[np.ndarray, "n h w 3"]
    alphas: Float[np.ndarray, "n h w"]
    edited_alphas: Float[np.ndarray, "n s h w"]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def outside(self) -> Bool[np.ndarray, "n s h w"]:
        """Pixels that are background before and after: outside both masks."""
        return (self.alphas[:, None] < 0.5) & (self.edited_alphas < 0.5)

    @property
    def psnr(self) -> Float[np.ndarray, "n s"]:
        """Of the background against the original in dB: inf for no change, NaN for no pixel."""
        return self._psnr(self.images)

    @property
    def psnr_plain(self) -> Float[np.ndarray, "n s"]:
        """The same for the plain edit."""
        return self._psnr(self.plain)

    def _psnr(self, edited: np.ndarray) -> np.ndarray:
        rows = [
            [compositing.psnr(o, e, where) for e, where in zip(row, places)]
            for o, row, places in zip(self.originals, edited, self.outside)
        ]
        return np.array(rows)

    def summary(self) -> dict[str, Any]:
        """Background PSNR over all images together, kept and plain, and the gain in dB."""
        there = np.broadcast_to(self.originals[:, None], self.images.shape)[self.outside]
        kept, plain_ = (compositing.psnr(a[self.outside], there) for a in (self.images, self.plain))
        return {
            "background_psnr": kept,
            "background_psnr_plain": plain_,
            "gain_db": kept - plain_,
            "pictures": len(self),
        }

    def table(self) -> list[dict[str, Any]]:
        """One row per image and strength."""
        return [
            {
                "name": name,
                "strength": strength,
                "background_psnr": float(self.psnr[i, j]),
                "background_psnr_plain": float(self.psnr_plain[i, j]),
                "foreground_share": float((self.alphas[i] >= 0.5).mean()),
                "edited_share": float((self.edited_alphas[i, j] >= 0.5).mean()),
            }
            for i, name in enumerate(self.names)
            for j, strength in enumerate(self.strengths)
        ]

    def show(self, count: int = 8) -> Image.Image:
        """Per image and strength: original, plain edit, edit, both masks, completed background."""
        kept, plain_ = self.psnr, self.psnr_plain
        cells, labels = [], []
        for i in range(min(count, len(self))):
            for j, strength in enumerate(self.strengths):
                masks = [_grey(self.alphas[i]), _grey(self.edited_alphas[i, j])]
                cells += [
                    self.originals[i],
                    self.plain[i, j],
                    self.images[i, j],
                    *masks,
                    self.backgrounds[i],
                ]
                labels += [
                    self.names[i],
                    f"plain {strength:+g}: {plain_[i, j]:.1f} dB",
                    f"kept: {kept[i, j]:.1f} dB",
                ]
                labels += ["mask before", "mask after", "background"]
        small = [draw.cells(cell[None])[0] for cell in cells]
        return Image.fromarray(draw.grid(small, 6, labels=labels, font_size=11))

    # files

    def files(self) -> dict[str, bytes]:
        """Everything `save` writes, by name."""
        facts = {
            "names": self.names,
            "strengths": self.strengths,
            "direction": self.direction,
            "summary": self.summary(),
            "edits": self.table(),
        }
        out = {
            "edit.png": draw.png(self.show(len(self))),
            "edit.safetensors": save({k: np.ascontiguousarray(getattr(self, k)) for k in _ARRAYS}),
        }
        for i, stem in enumerate(_stems(self.names, self.strengths)):
            out[f"{stem}.png"] = draw.png(self.originals[i])
            for j, strength in enumerate(self.strengths):
                out[f"{stem}_{strength:+g}.png"] = draw.png(self.images[i, j])
                out[f"{stem}_{strength:+g}_plain.png"] = draw.png(self.plain[i, j])
        # Last: it marks the folder as complete
        return out | {"edit.json": json_bytes(facts)}

    def save(self, folder: str | Path) -> Path:
        """Write images, masks and the PSNRs into a folder; `Edit.load` reads them back."""
        for name, data in self.files().items():
            write_atomic(Path(folder) / name, data)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Edit:
        """Read the files of `save`. UsageError where none can be read."""
        try:
            facts = parse_json((Path(folder) / "edit.json").read_text("utf-8"))
            arrays = load_file(Path(folder) / "edit.safetensors")
            edit = cls(
                tuple(facts["names"]),
                tuple(facts["strengths"]),
                facts["direction"],
                **{k: arrays[k] for k in _ARRAYS},
            )
            _check(edit)
            return edit
        except (
            OSError, ValueError, KeyError, TypeError, SafetensorError,
        ) as error:  # fmt: skip
            why = " ".join(str(error).split())[:200]
            raise UsageError(
                f"{folder} holds no edit that can be read ({why}): run python -m sis_jax.edit, "
                "with --overwrite"
            ) from None


def _check(edit: Edit) -> None:
    """ValueError where names, numbers or shapes do not fit `Edit`."""
    n, s, (h, w) = len(edit.names), len(edit.strengths), edit.originals.shape[1:3]
    each, moved = (n, h, w), (n, s, h, w)
    shapes = {
        "originals": (*each, 3),
        "backgrounds": (*each, 3),
        "plain": (*moved, 3),
        "images": (*moved, 3),
    }
    masks = {"alphas": each, "edited_alphas": moved}
    words = [*edit.names, edit.direction]
    if not (
        n
        and s
        and all(isinstance(t, str) for t in words)
        and all(isinstance(t, int | float) and np.isfinite(t) for t in edit.strengths)
    ):
        raise ValueError("its names or strengths are damaged")
    for field, shape in (shapes | masks).items():
        found = getattr(edit, field)
        usable = (
            found.dtype == np.uint8
            if field in shapes
            else found.dtype.kind == "f" and (np.abs(found - 0.5) < 0.501).all()  # NaN is not
        )
        if found.shape != shape or not usable:
            raise ValueError(f"its {field} are damaged")


def _stems(names: tuple[str, ...], strengths: tuple[float, ...]) -> list[str]:
    """File names for images; numbered where two would be the same."""
    stems = [
        flat(
            re.sub(r"[^\w.-]+", "-", Path(n).with_suffix("").as_posix() if "." in n else n).strip(
                "-."
            )
            or "picture"
        )
        for n in names
    ]
    keys = ["edit", *map(key, stems)]  # "edit" is the sheet of all of them
    made = [s if keys.count(key(s)) == 1 else f"{s}-{i}" for i, s in enumerate(stems)]
    endings = [f"_{s:+g}{kind}" for s in dict.fromkeys(strengths) for kind in ("", "_plain")]
    files = [s + end for s in made for end in ("", *endings)]
    return made if twins(files) is None else [f"{i:03d}-{s}" for i, s in enumerate(stems)]


def _grey(alpha: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    return np.repeat((255 * alpha + 0.5).astype(np.uint8)[..., None], 3, axis=2)


def keep_background(
    names: tuple[str, ...],
    strengths: tuple[float, ...],
    direction: str,
    originals: UInt8[np.ndarray, "n h w 3"],
    alphas: Float[np.ndarray, "n h w"],
    edited: UInt8[np.ndarray, "n s h w 3"],
    edited_alphas: Float[np.ndarray, "n s h w"],
    inpainter: compositing.Inpainter | None = None,
) -> Edit:
    """Complete each background once, and put every edited foreground on it."""
    if not len(originals):
        raise SisError("there is nothing to edit: no image was given")
    backgrounds = np.stack(
        [compositing.complete(o, a, inpainter) for o, a in zip(originals, alphas)]
    )
    images = np.empty_like(edited)
    for i, j in np.ndindex(edited.shape[:2]):
        back = compositing.behind(originals[i], backgrounds[i], alphas[i], edited_alphas[i, j])
        images[i, j] = compositing.composite(edited[i, j], edited_alphas[i, j], back)
    return Edit(
        names, strengths, direction, originals, edited, images, backgrounds, alphas, edited_alphas
    )
