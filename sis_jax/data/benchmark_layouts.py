"""Benchmarks on disk: (root, split, grey_from) -> entries; LookupError names what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.io import loadmat

from sis_jax.data.ground_truth import fit_photo, read_photo
from sis_jax.data.mask_files import read_mask
from sis_jax.types import SisError, UsageError

# In the order of painting: later parts cover earlier ones.
CELEBA_PARTS = (
    "background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear",
    "mouth", "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth",
)  # fmt: skip
# The 8-class protocol was never published as a table; this is the mapping its users agreed on
# (datasetGAN_release issue 9).
CELEBA_8 = {
    "background": (0, 3, 14, 15, 16, 17, 18), "skin": (1,), "nose": (2,), "eye": (4, 5),
    "brow": (6, 7), "ear": (8, 9), "mouth": (10, 11, 12), "hair": (13,),
}  # fmt: skip
_VAL, _TEST = 162771, 182638  # first CelebA index of the validation and test identities
_IMAGES = (".jpg", ".jpeg", ".png")


class Entry(NamedTuple):
    """One image of a benchmark; load gives (image uint8[H W 3], mask uint8[h w])."""

    name: str
    load: Callable[[], tuple[np.ndarray, np.ndarray]]


def find(root: Path, *names: str, depth: int = 3) -> Path:
    """The folder or file of one of these names in `root` or some levels below."""
    level = [root]
    for _ in range(depth + 1):
        for folder in level:
            if folder.name in names:
                return folder
            for name in names:
                if (folder / name).exists():
                    return folder / name
        level = [
            d
            for folder in level
            for d in sorted(folder.iterdir())
            if d.is_dir() and not d.name.startswith(".")
        ][:2000]
    raise LookupError(f"there is no {' or '.join(names)}")


def _lines(path: Path) -> list[list[str]]:
    return [
        line.split()
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]


def _grey(photo: Path, mask: Path, grey_from: int) -> tuple[np.ndarray, np.ndarray]:
    return read_photo(photo), (read_mask(mask) >= grey_from).astype(np.uint8)


# -------------------------------------------------------------------------------------------- faces


def celebamask(root: Path, split: str, grey_from: int, table: Sequence[int]) -> list[Entry]:
    """CelebAMask-HQ at the masks' 512 pixels; table: the new id of each of the 19 ids."""
    photos, masks = find(root, "CelebA-HQ-img"), find(root, "CelebAMask-HQ-mask-anno")
    ids = sorted(int(p.stem) for p in photos.glob("*.jpg") if p.stem.isdigit())
    if split == "sis":
        ids = [i for i in ids if 28000 <= i < 30000]
    elif split != "all":
        mapping = photos.parent / "CelebA-HQ-to-CelebA-mapping.txt"
        if not mapping.is_file():
            raise LookupError(
                f'there is no {mapping.name}, which splits train, val and test (splits "sis" and '
                '"all" do without)'
            )
        original = {int(row[0]): int(row[1]) for row in _lines(mapping)[1:]}
        low, high = {"train": (0, _VAL), "val": (_VAL, _TEST), "test": (_TEST, 10**9)}[split]
        ids = [i for i in ids if low <= original.get(i, -1) < high]
    lookup = np.array(table, np.uint8)
    return [
        Entry(str(i), partial(_face, photos / f"{i}.jpg", masks / str(i // 2000), i, lookup))
        for i in ids
    ]


def _face(
    photo: Path, folder: Path, number: int, lookup: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    mask = None
    for class_id, part in enumerate(CELEBA_PARTS):
        file = folder / f"{number:05d}_{part}.png"
        if class_id and file.is_file():
            inside = read_mask(file) > 0
            mask = np.zeros(inside.shape, np.uint8) if mask is None else mask
            mask[inside] = class_id
    if mask is None:
        raise SisError(f"{folder} holds no part masks {number:05d}_*.png of {photo.name}")
    return fit_photo(photo.name, read_photo(photo), mask), lookup[mask]


# -------------------------------------------------------------------------------- birds and flowers


def cub(root: Path, split: str, grey_from: int) -> list[Entry]:
    """CUB-200-2011: grey levels count the annotators that agree, 255 = all."""
    index = find(root, "images.txt")
    photos, masks = index.parent / "images", find(root, "segmentations")
    wanted = _cub_wanted(index.parent, split)
    entries = []
    for number, name in (row[:2] for row in _lines(index)):
        if wanted is None or number in wanted:
            file = masks / Path(name).with_suffix(".png")
            entries.append(
                Entry(
                    Path(name).with_suffix("").as_posix(),
                    partial(_grey, photos / name, file, grey_from),
                )
            )
    return entries


def _cub_wanted(folder: Path, split: str) -> set[str] | None:
    if split == "all":
        return None
    names = (
        {"train": "1", "test": "0"}
        if not split.startswith("redo")
        else {"redo-train": "0", "redo-val": "1", "redo-test": "2"}
    )
    file = folder / (
        "train_test_split.txt" if not split.startswith("redo") else "train_val_test_split.txt"
    )
    if not file.is_file():
        raise LookupError(f"there is no {file.name}, which holds the split {split!r}")
    return {row[0] for row in _lines(file) if row[1] == names[split]}


def flowers(root: Path, split: str, grey_from: int) -> list[Entry]:
    """Oxford Flowers: background by the reference rule is red 0, green 0 or blue 254."""
    photos, segmented = find(root, "jpg"), find(root, "segmim")
    if split == "all":
        numbers = sorted(int(p.stem.split("_")[1]) for p in photos.glob("image_*.jpg"))
    else:
        key = {
            "train": "trnid", "val": "valid", "test": "tstid", "redo-test": "trnid",
            "redo-val": "valid", "redo-train": "tstid",
        }[split]  # fmt: skip
        numbers = loadmat(find(root, "setid.mat"))[key].ravel().tolist()
    return [
        Entry(
            f"image_{n:05d}",
            partial(_flower, photos / f"image_{n:05d}.jpg", segmented / f"segmim_{n:05d}.jpg"),
        )
        for n in numbers
    ]


def _flower(photo: Path, segmented: Path) -> tuple[np.ndarray, np.ndarray]:
    red, green, blue = np.moveaxis(read_photo(segmented), 2, 0)
    return read_photo(photo), (~((red == 0) | (green == 0) | (blue == 254))).astype(np.uint8)


# ----------------------------------------------------------------------------------- saliency, eyes


def saliency(
    root: Path, split: str, grey_from: int, folders: Mapping[str, tuple[str, str]]
) -> list[Entry]:
    """Images and grey masks in two folders, paired by stem."""
    photos, masks = (find(root, name) for name in folders[split])
    known = {
        p.stem: p
        for p in masks.iterdir()
        if p.suffix.lower() in _IMAGES and not p.name.startswith(".")
    }
    found = sorted(
        p for p in photos.iterdir() if p.suffix.lower() in _IMAGES and not p.name.startswith(".")
    )
    missing = [p.name for p in found if p.stem not in known]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(found)} photos in {photos} have no mask in {masks}, the "
            f"first is {missing[0]}"
        )
    return [Entry(p.stem, partial(_grey, p, known[p.stem], grey_from)) for p in found]


def openeds(root: Path, split: str, grey_from: int) -> list[Entry]:
    """OpenEDS: grey eye images 640 x 400 and label arrays, which the test split can lack."""
    folder = find(root, "Semantic_Segmentation_Dataset") / split
    photos, labels = folder / "images", folder / "labels"
    if not photos.is_dir():
        raise LookupError(f"there is no {photos.relative_to(folder.parent.parent)}")
    found = [p for p in sorted(photos.glob("*.png")) if (labels / f"{p.stem}.npy").is_file()]
    if not found:
        raise LookupError(f"{split} has images but no labels (try --split validation)")
    return [Entry(p.stem, partial(_eye, p, labels / f"{p.stem}.npy")) for p in found]


def _eye(photo: Path, label: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        ids = np.load(label, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise SisError(f"{label} cannot be read as an array: {error}") from None
    return read_photo(photo), ids.astype(np.uint8)


# ----------------------------------------------------------------------------------- pets, and TFDS


def pets(root: Path, split: str, grey_from: int) -> list[Entry]:
    """Oxford-IIIT Pet: trimap 1 pet, 2 background, 3 border; or a prepared TFDS folder."""
    try:
        trimaps = find(root, "trimaps")
    except LookupError:
        return list(_tfds(root, "oxford_iiit_pet", split, _TRIMAP))
    names = [
        row[0]
        for row in _lines(trimaps.parent / ("test.txt" if split == "test" else "trainval.txt"))
        if not row[0].startswith("#")
    ]
    photos = find(root, "images")
    return [Entry(n, partial(_pet, photos / f"{n}.jpg", trimaps / f"{n}.png")) for n in names]


_TRIMAP = np.full(256, 255, np.uint8)
_TRIMAP[[1, 2]] = 1, 0


def _pet(photo: Path, trimap: Path) -> tuple[np.ndarray, np.ndarray]:
    return read_photo(photo), _TRIMAP[read_mask(trimap)]


def birds_tfds(root: Path, split: str, grey_from: int) -> list[Entry]:
    """TFDS's caltech_birds2011."""
    return list(
        _tfds(root, "caltech_birds2011", split, (np.arange(256) >= grey_from).astype(np.uint8))
    )


def _tfds(root: Path, name: str, split: str, lookup: np.ndarray) -> Iterator[Entry]:
    """A prepared TFDS dataset; without TensorFlow only array_record can be read."""
    import tensorflow_datasets as tfds  # late: slow to import, only for this format

    infos = sorted(find(root, name).rglob("dataset_info.json"))
    if not infos:
        raise LookupError(f"{name} holds no dataset_info.json")
    builder: Any = tfds.builder_from_directory(str(infos[-1].parent))
    try:
        source = builder.as_data_source(split)
    except (NotImplementedError, ImportError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SisError(
            f'{infos[-1].parent} cannot be read ({first}); prepare it with tfds.builder("{name}", '
            'file_format="array_record")'
        ) from None
    for i in range(len(source)):
        yield Entry(f"{i:06d}", partial(_from_tfds, source, i, lookup))


def _from_tfds(source: Sequence, i: int, lookup: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    example = source[i]
    return np.asarray(example["image"]), lookup[np.asarray(example["segmentation_mask"])[..., 0]]
