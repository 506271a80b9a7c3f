"""Published test sets as they are on disk; `open_benchmark` gives a `GroundTruth`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sis_jax.data.benchmark_layouts import (
    CELEBA_8,
    CELEBA_PARTS,
    Entry,
    birds_tfds,
    celebamask,
    cub,
    flowers,
    openeds,
    pets,
    saliency,
)
from sis_jax.data.ground_truth import BINARY, GroundTruth
from sis_jax.types import SisError, UsageError, unknown_name

_FACES = (
    "CelebAMask-HQ/{CelebA-HQ-img/0.jpg, CelebAMask-HQ-mask-anno/0/00000_skin.png, "
    "CelebA-HQ-to-CelebA-mapping.txt}"
)
_FACES_TERMS = "CelebAMask-HQ: non-commercial research and education only"
_FACE_SPLITS = ("test", "val", "train", "sis", "all")


@dataclass(frozen=True)
class Spec:
    """One benchmark. splits: the first is the default. layout: the expected contents."""

    title: str
    classes: tuple[dict[str, Any], ...]
    splits: tuple[str, ...]
    read: Callable[[Path, str, int], Sequence[Entry]]
    layout: str
    licence: str
    note: str = ""


def _named(names: Sequence[str]) -> tuple[dict[str, Any], ...]:
    return tuple({"id": i, "name": name} for i, name in enumerate(names))


BENCHMARKS: dict[str, Spec] = {
    "celebamask-hq": Spec(
        "CelebAMask-HQ, 19 classes",
        _named(CELEBA_PARTS),
        _FACE_SPLITS,
        partial(celebamask, table=tuple(range(19))),
        _FACES,
        _FACES_TERMS,
        'split "sis" is images 28000 to 29999, those of Segmentation in Style; "test" goes by the '
        "original CelebA split.",
    ),
    "celebamask-hq-8": Spec(
        "CelebAMask-HQ, 8 classes of DatasetGAN",
        _named(list(CELEBA_8)),
        _FACE_SPLITS,
        partial(
            celebamask,
            table=tuple(
                next(i for i, g in enumerate(CELEBA_8.values()) if p in g) for p in range(19)
            ),
        ),
        _FACES,
        _FACES_TERMS,
        "Glasses, hats, jewellery, neck and cloth count as background here, so its foreground is "
        "the bare head.",
    ),
    "celebamask-hq-fg": Spec(
        "CelebAMask-HQ, foreground",
        BINARY,
        _FACE_SPLITS,
        partial(celebamask, table=(0, *[1] * 18)),
        _FACES,
        _FACES_TERMS,
    ),
    "cub": Spec(
        "CUB-200-2011",
        BINARY,
        ("test", "train", "redo-test", "redo-val", "redo-train", "all"),
        cub,
        "CUB_200_2011/{images/, images.txt, train_test_split.txt} and segmentations/",
        "CUB-200-2011: non-commercial research",
        'the unsupervised literature tests on the 1,000 images of "redo-test" '
        "(train_val_test_split.txt), not on the official split.",
    ),
    "duts": Spec(
        "DUTS",
        BINARY,
        ("test", "train"),
        partial(
            saliency,
            folders={
                "test": ("DUTS-TE-Image", "DUTS-TE-Mask"),
                "train": ("DUTS-TR-Image", "DUTS-TR-Mask"),
            },
        ),
        "DUTS-TE/{DUTS-TE-Image/*.jpg, DUTS-TE-Mask/*.png}",
        "DUTS: research",
    ),
    "ecssd": Spec(
        "ECSSD",
        BINARY,
        ("test",),
        partial(saliency, folders={"test": ("images", "ground_truth_mask")}),
        "images/*.jpg and ground_truth_mask/*.png",
        "ECSSD: research",
    ),
    "dut-omron": Spec(
        "DUT-OMRON",
        BINARY,
        ("test",),
        partial(saliency, folders={"test": ("DUT-OMRON-image", "pixelwiseGT-new-PNG")}),
        "DUT-OMRON-image/*.jpg and pixelwiseGT-new-PNG/*.png",
        "DUT-OMRON: research",
    ),
    "flowers": Spec(
        "Oxford Flowers 102",
        BINARY,
        ("redo-test", "redo-val", "redo-train", "train", "val", "test", "all"),
        flowers,
        "jpg/image_00001.jpg, segmim/segmim_00001.jpg, setid.mat",
        "Oxford Flowers 102: research",
        "ReDO and its followers train on the official test list and test on the official train "
        'list: "redo-test".',
    ),
    "openeds": Spec(
        "OpenEDS 2019",
        _named(["background", "sclera", "iris", "pupil"]),
        ("test", "validation", "train"),
        openeds,
        "Semantic_Segmentation_Dataset/{train, validation, test}/{images/*.png, labels/*.npy}",
        "OpenEDS: research, on request",
    ),
    "oxford-iiit-pet": Spec(
        "Oxford-IIIT Pet",
        BINARY,
        ("test", "train"),
        pets,
        "images/*.jpg, annotations/{trimaps/*.png, test.txt, trainval.txt}; or a TFDS folder with "
        "oxford_iiit_pet in array_record",
        "Oxford-IIIT Pet: CC BY-SA 4.0",
        "the border of the trimap is ignored.",
    ),
    "caltech-birds2011": Spec(
        "CUB-200-2011 from TFDS",
        BINARY,
        ("test", "train"),
        birds_tfds,
        "a TFDS folder with caltech_birds2011 in array_record",
        "CUB-200-2011: non-commercial research",
    ),
}

# Published numbers, by (benchmark, protocol): where the number stands in the result, and the
# number.
PAPER: dict[tuple[str, str], dict[str, float]] = {
    ("celebamask-hq-fg", "sis"): {
        "iou_foreground": 0.9158,
        "iou_background": 0.8058,
        "mean_iou": 0.8608,
    },
    ("celebamask-hq-fg", "l4f"): {"iou_foreground": 0.92, "iou_background": 0.80, "mean_iou": 0.86},
    ("celebamask-hq", "sis"): {"zero_label.mean_iou": 0.625},
    ("celebamask-hq-8", "sis"): {"zero_label.mean_iou": 0.731},
    ("openeds", "sis"): {"zero_label.mean_iou": 0.8239},
    ("cub", "voynov"): {"max_f": 0.794, "iou_image_mean": 0.683, "accuracy_image_mean": 0.930},
    ("cub", "melas"): {"max_f": 0.783, "iou_image_mean": 0.664, "accuracy_image_mean": 0.921},
    ("flowers", "voynov"): {"max_f": 0.760, "iou_image_mean": 0.540, "accuracy_image_mean": 0.765},
    ("duts", "voynov"): {"max_f": 0.608, "iou_image_mean": 0.498, "accuracy_image_mean": 0.878},
    ("ecssd", "voynov"): {"max_f": 0.782, "iou_image_mean": 0.672, "accuracy_image_mean": 0.899},
    ("dut-omron", "voynov"): {
        "max_f": 0.549,
        "iou_image_mean": 0.453,
        "accuracy_image_mean": 0.856,
    },
    ("duts", "melas"): {"f_beta": 0.614, "iou_image_mean": 0.528, "accuracy_image_mean": 0.893},
    ("ecssd", "melas"): {"f_beta": 0.806, "iou_image_mean": 0.713, "accuracy_image_mean": 0.915},
    ("dut-omron", "melas"): {"iou_image_mean": 0.509},
    ("duts", "selfmask"): {"iou_image_mean": 0.626, "accuracy_image_mean": 0.923},
    ("ecssd", "selfmask"): {"iou_image_mean": 0.781, "accuracy_image_mean": 0.944},
    ("dut-omron", "selfmask"): {"iou_image_mean": 0.582, "accuracy_image_mean": 0.901},
}


def canonical(name: str) -> str:
    """A benchmark's name as the table has it; UsageError names the nearest."""
    found = (
        name.strip()
        .lower()
        .replace("_", "-")
        .replace("cub-200-2011", "cub")
        .replace("oxford-flowers102", "flowers")
    )
    if found not in BENCHMARKS:
        raise unknown_name("benchmark", name, BENCHMARKS)
    return found


def open_benchmark(
    name: str,
    root: str | Path,
    split: str | None = None,
    *,
    grey_from: int = 128,
    limit: int | None = None,
) -> GroundTruth:
    """A benchmark's split, ready to iterate.

    name: of `BENCHMARKS`. root: the folder it was unpacked to, or one above. split: by default the
        one papers test on. grey_from: grey ground-truth values from here on are foreground. limit:
        first so many images. Raises UsageError for an unknown name, split or folder, SisError for
        damaged files.
    """
    name = canonical(name)
    spec, root = BENCHMARKS[name], Path(root).expanduser()
    split = spec.splits[0] if split is None else split
    if split not in spec.splits:
        raise unknown_name(f"split of {name}", split, spec.splits)
    if not root.is_dir():
        raise UsageError(
            f"there is no folder {root}; give --root with the folder that holds {spec.layout}"
        )
    try:
        entries = list(spec.read(root, split, grey_from))[:limit]
    except LookupError as error:
        raise UsageError(
            f"{root} does not hold {spec.title}: {error.args[0]}; expected {spec.layout}"
        ) from None
    if not entries:
        raise UsageError(
            f"{root} holds no images of the split {split!r} of {spec.title}; expected {spec.layout}"
        )

    def load(i: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            return entries[i].load()
        except OSError as error:
            raise SisError(f"{entries[i].name} of {spec.title} cannot be read: {error}") from None

    found = GroundTruth(
        f"{name}/{split}",
        spec.classes,
        tuple(e.name for e in entries),
        load,
        licence=spec.licence,
        note=spec.note,
    )
    return replace(found, classes=tuple(dict(c) for c in spec.classes))
