"""Blanks: generated images to be annotated by hand, and the masks read back.

blanks/
├── images/100000.png    the image of seed 100000
├── masks/100000.png     8-bit palette image to paint on, pixel = class id, 255 = not annotated
├── classes.json         [{"id": 0, "name": "background", "colour": "#7a7a7a"}, ...], to be edited
├── classes.gpl          the same colours, for editors that read GIMP palettes
├── blanks.json          whose images these are: generator with sha256, psi, size, seeds
└── README.md            how to paint
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sis_jax.data import draw
from sis_jax.data.exports.formats import new_folder
from sis_jax.data.files import json_bytes, parse_json, read_run, utf8
from sis_jax.data.folder import Dataset
from sis_jax.data.names import below
from sis_jax.types import SisError, UsageError

FACTS, CLASSES = "blanks.json", "classes.json"
IGNORE = draw.IGNORE
NOT_PAINTED = int(draw.colour(IGNORE)[1:], 16)
_MOST = 2**32  # pixels of all masks together
_AGAIN = "make the folder again with python -m sis_jax export RUN --format blanks"


@dataclass(frozen=True)
class Blanks:
    """Annotated images uint8[n r r 3] (None where they are gone), masks uint8[n r r] of class ids,
    255 = not annotated.

    seeds, truncation: how the generator drew them; generator: its name and sha256. names: {class
        id: name}.
    """

    path: Path
    images: UInt8[np.ndarray, "n r r 3"] | None
    masks: UInt8[np.ndarray, "n r r"]
    seeds: tuple[int, ...]
    names: dict[int, str]
    generator: dict[str, str]
    truncation: float


# writing


def write_blanks(
    run: str | Path,
    folder: str | Path,
    *,
    n: int = 16,
    filled: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the first `n` images of a run's dataset for annotation; returns the folder.

    filled: start from the run's masks, not from empty ones. Raises UsageError for a run without a
        dataset, or a folder that holds other things or annotated masks.
    """
    if n < 1:
        raise UsageError(f"n is {n}, expected at least 1 image to annotate (16 is the paper's)")
    dataset = Dataset.open(run)
    generator, truncation = _origin(dataset)
    split = dataset.split("train")
    if n > len(split):
        raise UsageError(
            f"{dataset.path} has {len(split)} images in its split train, asked for {n}: give a "
            "smaller --n"
        )
    _refuse_annotated(Path(folder))
    classes = [
        {"id": c["id"], "name": c["name"], "colour": c.get("colour") or draw.colour(c["id"])}
        for c in dataset.classes
    ]
    if not any(c["id"] == 0 for c in classes):
        classes.insert(0, {"id": 0, "name": "background", "colour": draw.colour(0)})
    with new_folder(folder, "blanks", overwrite) as place:
        rows = [_write_one(place, example, filled) for example in split[:n]]
        facts = {
            "format": 1,
            "generator": generator,
            "truncation": truncation,
            "resolution": split[0].image.shape[0],
        }
        (place / FACTS).write_bytes(json_bytes(facts | {"filled": filled, "pictures": rows}))
        (place / CLASSES).write_bytes(json_bytes(classes))
        (place / "classes.gpl").write_bytes(utf8(_gimp_palette(classes)))
        (place / "README.md").write_bytes(utf8(_readme(dataset, classes, n, filled)))
    return Path(folder)


def _origin(dataset: Dataset) -> tuple[dict[str, str], float]:
    """Whose images these are: the generator on record, and psi."""
    home = dataset.path.parent
    try:
        record = read_run(home)["stages"]["synthesize"]
        return dict(record["generator"]), float(record["config"]["truncation"])
    except (UsageError, KeyError, TypeError):
        raise UsageError(
            f"{home} has no run.json that states which generator drew its images: give a RUN that "
            "python -m sis_jax.synthesize wrote"
        ) from None


def _write_one(place: Path, example: Any, filled: bool) -> dict[str, Any]:
    if example.seed is None:
        raise UsageError(
            f"the image {example.name} has no seed on record, so its features cannot be made "
            "again: write the dataset anew"
        )
    name = f"{example.seed}.png"
    mask = draw.png(
        draw.palette_png(example.mask if filled else np.full_like(example.mask, IGNORE))
    )
    for kind, data in (("images", draw.png(example.image)), ("masks", mask)):
        (place / kind).mkdir(exist_ok=True)
        (place / kind / name).write_bytes(data)
    return {
        "seed": example.seed,
        "image": f"images/{name}",
        "mask": f"masks/{name}",
        "mask_sha256": hashlib.sha256(mask).hexdigest(),
    }


def _refuse_annotated(folder: Path) -> None:
    """Hours of painting are not replaced by an option."""
    if not (folder / FACTS).is_file():
        return
    for row in _facts(folder)["pictures"]:
        mask = folder / row["mask"]
        if mask.is_file() and hashlib.sha256(mask.read_bytes()).hexdigest() != row["mask_sha256"]:
            raise UsageError(
                f"{mask} has been annotated, so {folder} is not replaced: move it away, or give "
                "another --out"
            )


def _gimp_palette(classes: Sequence[Mapping[str, Any]]) -> str:
    rows = [(c["colour"], c["name"]) for c in classes] + [(draw.colour(IGNORE), "not annotated")]
    colours = [
        f"{' '.join(str(v).rjust(3) for v in bytes.fromhex(c.removeprefix('#')))}  {name}"
        for c, name in rows
    ]
    return "\n".join(["GIMP Palette", "Name: sis_jax classes", "#", *colours]) + "\n"


def _readme(dataset: Dataset, classes: Sequence[Mapping[str, Any]], n: int, filled: bool) -> str:
    table = "\n".join(f"| {c['id']} | {c['name']} | `{c['colour']}` |" for c in classes)
    start = (
        "The masks hold the run's parts. Correct them, and delete the mask files you did not "
        "check: only masks that are here are learned."
        if filled
        else "The masks are empty. Paint as many images as you like, 5 to 16 go far; what stays "
        "unannotated is not learned."
    )
    return (
        f"# {n} generated images to annotate\n\nEvery `masks/SEED.png` belongs to "
        f"`images/SEED.png` and has its size. {start}\n\n"
        "1. Edit `classes.json`: the names you want, one line per class, any ids from 0 to 254; "
        "0 is the background. A class without a colour "
        f"gets the one of its id.\n"
        "2. Open a mask, put its image on a layer below, and paint with a hard pencil (no soft "
        "edges, no resizing, no JPEG) in the colours "
        "of the classes. Save as PNG: palette, RGB and grey images of class ids are all read. "
        f"`{draw.colour(IGNORE)}` and transparent pixels are not "
        f"annotated.\n"
        "3. `python -m sis_jax.discover GEN --method datasetgan --masks THIS_FOLDER --out RUN`, "
        "with the generator that drew the images.\n\n"
        f"| id | class | colour |\n|---|---|---|\n{table}\n\nThe background must be annotated too, "
        "roughly is enough. `blanks.json` ties the masks to the "
        f"generator and must stay.\n\nLicence: {dataset.licence}\n"
    )


# reading


def read_blanks(folder: str | Path) -> Blanks:
    """Annotated images, masks checked; a missing mask file counts as not annotated.

    Raises UsageError, naming the file, for a foreign folder, a mask of another size or with unknown
    colours, and where at most one class was annotated.
    """
    folder = Path(folder).expanduser()
    facts = _facts(folder)
    resolution = facts["resolution"]
    classes = _classes(folder)
    masks = np.full((len(facts["pictures"]), resolution, resolution), IGNORE, np.uint8)
    for i, row in enumerate(facts["pictures"]):
        if (folder / row["mask"]).is_file():
            masks[i] = _mask(folder / row["mask"], resolution, classes)
    used = np.unique(masks[masks != IGNORE])
    if not used.size:
        raise UsageError(
            f"no pixel of the masks in {folder / 'masks'} is annotated: paint at least two "
            "classes, see README.md there"
        )
    if used.size == 1:
        raise UsageError(
            f"only the class {classes[int(used[0])][0]!r} is annotated in {folder}: paint at least "
            "two, the background among them"
        )
    files = [folder / row["image"] for row in facts["pictures"]]
    images = (
        np.stack([_image(f, resolution) for f in files])
        if all(f.is_file() for f in files)
        else None
    )
    seeds = tuple(row["seed"] for row in facts["pictures"])
    names = {i: name for i, (name, _) in classes.items()}
    return Blanks(folder, images, masks, seeds, names, facts["generator"], facts["truncation"])


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts = parse_json((folder / FACTS).read_text(encoding="utf-8"))
        kept = {
            "resolution": int(facts["resolution"]),
            "generator": dict(facts["generator"]),
            "truncation": float(facts["truncation"]),
        }
        rows = [
            {k: row[k] for k in ("image", "mask", "mask_sha256")} | {"seed": int(row["seed"])}
            for row in facts["pictures"]
        ]
        for row in rows:
            below(folder, row["image"], folder / FACTS)
            below(folder, row["mask"], folder / FACTS)
        resolution = kept["resolution"]
        if not rows or resolution < 1 or resolution**2 * len(rows) > _MOST:
            raise ValueError(f"{len(rows)} images of {kept['resolution']} pixels")
        return kept | {"pictures": rows}
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{folder} is no folder of blanks (it has no {FACTS}): make one with python -m "
            "sis_jax export RUN --format blanks"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SisError(
            f"{folder / FACTS} cannot be read ({type(error).__name__}: {error}): {_AGAIN}"
        ) from None


def _classes(folder: Path) -> dict[int, tuple[str, int]]:
    """{id: (name, colour as 0xrrggbb)}."""
    file, found = folder / CLASSES, {}
    want = (
        f'expected [{{"id": 0, "name": "background"}}, {{"id": 1, "name": "hair", "colour": '
        f'"{draw.colour(1)}"}}, ...]'
    )
    try:
        entries = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(entries, list) or not entries:
            raise UsageError(f"{file} lists no classes; {want}")
        for entry in entries:
            number, name = int(entry["id"]), str(entry["name"]).strip()
            colour = int(
                str(entry.get("colour") or draw.colour(min(max(number, 0), IGNORE))).removeprefix(
                    "#"
                ),
                16,
            )
            if not 0 <= number < IGNORE or not name:
                raise UsageError(
                    f"{file} has the class {entry}: ids go from 0 to 254 and every class has a name"
                )
            if not 0 <= colour <= 0xFFFFFF or colour == NOT_PAINTED:
                raise UsageError(
                    f"{file} gives {name!r} the colour {entry['colour']}, expected #rrggbb and "
                    f"not {draw.colour(IGNORE)}, not annotated"
                )
            if (
                number in found
                or name in {n for n, _ in found.values()}
                or colour in {c for _, c in found.values()}
            ):
                raise UsageError(
                    f"{file} has two classes with the id, name or colour of {name!r}: make them "
                    "differ, or remove one"
                )
            found[number] = (name, colour)
    except FileNotFoundError:
        raise UsageError(f"{file} is missing; {want}") from None
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{file} cannot be read ({type(error).__name__}: {error}); {want}"
        ) from None
    return found


def _mask(
    path: Path, size: int, classes: Mapping[int, tuple[str, int]]
) -> UInt8[np.ndarray, "r r"]:
    """Class ids of a mask: by colour, since editors reorder palettes, else by value."""
    image = _open(path, size)
    known = np.zeros(256, bool)
    known[[IGNORE, *classes]] = True
    values = np.asarray(image) if image.mode in ("P", "L") else None
    if image.mode == "L" and known[values].all():
        return np.asarray(values, np.uint8)
    pixels = np.asarray(image.convert("RGBA")).astype(np.int32)
    codes = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    ids = np.full(codes.shape, -1)
    for number, (_, colour) in classes.items():
        ids[codes == colour] = number
    ids[(codes == NOT_PAINTED) | (pixels[..., 3] < 128)] = IGNORE
    if (ids >= 0).all():
        return ids.astype(np.uint8)
    if image.mode == "P" and known[values].all():  # saved with a palette of its own
        return np.asarray(values, np.uint8)
    row, column = np.argwhere(ids < 0)[0]
    shown = (
        f"grey value {values[row, column]}"
        if image.mode == "L" and values is not None
        else f"colour #{codes[row, column]:06x}"
    )
    colours = ", ".join(f"#{c:06x} {name}" for name, c in list(classes.values())[:8])
    raise UsageError(
        f"{path} has {int((ids < 0).sum())} pixels of no class, the first in row {row}, column "
        f"{column} with the {shown}: paint with a hard pencil "
        f"in the colours of classes.json ({colours})"
    )


def _image(path: Path, size: int) -> UInt8[np.ndarray, "r r 3"]:
    return np.asarray(_open(path, size).convert("RGB"))


def _open(path: Path, size: int) -> Image.Image:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.size == (size, size):
                image.load()
                return image.copy()
            width, height = image.size
    except Exception as error:  # decoders fail in many ways on damaged files
        raise SisError(
            f"{path} cannot be read as a PNG image: {' '.join(str(error).split())[:120]}"
        ) from None
    raise UsageError(
        f"{path} is {width}x{height}, expected {size}x{size} like its image: paint without "
        "resizing or cropping"
    )
