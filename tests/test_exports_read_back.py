"""Exports as their users' readers take them: Ultralytics' rules, pycocotools, VOC's lists, TFDS."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO

from sis_jax.data import draw
from sis_jax.data.exports import formats
from sis_jax.data.exports.common import unique_names, yaml_text
from sis_jax.data.exports.tfds import labels_by_id
from sis_jax.types import SisError

ODD = [
    "a:b",
    "#x",
    "two\nlines",
    "é",
    "\U0001f600",
    "caf\udce9",
    "",
    "a:b",
    "<img onerror=x>",
    '"q"',
]
CLASSES = [{"id": i, "name": name} for i, name in enumerate(ODD, 1)]
PHOTOS = ["cats/1.jpg", "dogs/1.jpg", "plain.jpg", "caf\udce9.jpg", " spaced .jpg", "li\nne.jpg"]


def examples(images: bool):
    mask = np.zeros((16, 20), np.uint8)
    mask[3:9, 4:15] = 1
    mask[10:14, 2:9] = len(ODD)
    image = np.full((16, 20, 3), 90, np.uint8) if images else None
    return [(name, image, mask) for name in PHOTOS]


def write(tmp_path, kind, images=True):
    return formats.write(kind, examples(images), CLASSES, tmp_path / kind, split="photos")


def ultralytics(data: Path) -> dict:
    """A data.yaml as Ultralytics resolves it: without `path`, from the folder of the file; labels
    are where the last /images/ of a photo's path is /labels/.
    """
    content = yaml.safe_load(data.read_text("utf-8"))
    root = Path(content.get("path") or data.parent)
    found = {}
    for split in ("train", "val"):
        place = root / content[split]
        for image in sorted(place.iterdir()):
            label = f"{os.sep}labels{os.sep}".join(str(image).rsplit(f"{os.sep}images{os.sep}", 1))
            rows = Path(label.rsplit(".", 1)[0] + ".txt").read_text().split("\n")[:-1]
            found[image.name] = [np.array(row.split(), float) for row in rows]
    return {"names": content["names"], "labels": found}


def test_yolo_from_any_folder(tmp_path, monkeypatch):
    folder = write(tmp_path, "yolo")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    read = ultralytics(folder / "data.yaml")
    assert len(read["labels"]) == len(PHOTOS)
    for rows in read["labels"].values():
        assert {int(row[0]) for row in rows} == {0, len(ODD) - 1}
        assert all(len(row) >= 7 and len(row) % 2 and (row[1:] <= 1).all() for row in rows)
    assert [read["names"][i] for i in range(len(ODD))] == ODD


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools
def test_coco_of_masks_alone_leads_to_every_photo(tmp_path, capsys):
    folder = write(tmp_path, "coco", images=False)
    read = COCO(str(folder / "annotations/instances_photos.json"))
    assert [read.imgs[i]["file_name"] for i in sorted(read.imgs)] == PHOTOS
    assert len(read.anns) == 2 * len(PHOTOS)
    assert read.annToMask(read.anns[1]).sum() == 66
    with pytest.raises(SisError, match="cannot be called"):
        formats.write("coco", [("../x.jpg", None, examples(False)[0][2])], CLASSES, tmp_path / "x")


def voc(folder: Path, split: str):
    """A split as torchvision's VOCSegmentation reads it."""
    with (folder / "ImageSets/Segmentation" / f"{split}.txt").open(encoding="utf-8") as file:
        lines = file.readlines()
    for name in (line.strip() for line in lines):
        with Image.open(folder / "SegmentationClass" / f"{name}.png") as mask:
            yield name, np.array(mask), (folder / "JPEGImages" / f"{name}.png").is_file()


def test_voc_with_any_class_and_photo_name(tmp_path):
    folder = write(tmp_path, "voc")
    read = list(voc(folder, "photos"))
    assert len(read) == len(PHOTOS)
    assert all(there and (mask == examples(False)[0][2]).all() for _, mask, there in read)
    rows = [row.split(":") for row in (folder / "labelmap.txt").read_text("utf-8").splitlines()[1:]]
    assert len(rows) == len(ODD) + 1
    assert len({row[0] for row in rows}) == len(rows)
    colours = draw.palette()
    for i, (name, colour, parts, actions) in enumerate(rows):
        assert name
        assert not name.startswith("#")
        assert (colour, parts, actions) == (",".join(map(str, colours[i])), "", "")
    assert "labelmap.txt" in (folder / "README.md").read_text("utf-8")


def test_hugging_face_card_and_names(tmp_path):
    folder = write(tmp_path, "hf")
    head = (folder / "README.md").read_text("utf-8").split("---\n")[1]
    assert yaml.safe_load(head)["classes"] == ["background", *ODD]
    rows = (folder / "photos/metadata.jsonl").read_text("utf-8").splitlines()
    assert all((folder / "photos" / json.loads(row)["file_name"]).is_file() for row in rows)


def test_npz_holds_every_name(tmp_path):
    with np.load(write(tmp_path, "npz") / "photos.npz", allow_pickle=False) as file:
        assert len(set(file["name"].tolist())) == len(PHOTOS)
        assert file["labels"].tolist()[1:] == ODD


def test_labels_are_unique_whatever_they_are_called():
    for names in (["a", "a", "a (1)"], ["a", "a (2)", "a"], ["", " ", "class 0"]):
        labels = labels_by_id([{"id": i, "name": n} for i, n in enumerate(names)])
        assert len(set(labels)) == 3
    assert unique_names(["a:b", "a_b"], ":") == ["a_b", "a_b (1)"]


@pytest.mark.parametrize("text", [*ODD, "\x85\x7f\u2028", "\\", "yes", "1e3", " "])
def test_yaml_gives_back_the_text(text):
    assert yaml.safe_load(f"x: {yaml_text(text)}")["x"] == text


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_names_that_become_one_are_refused(tmp_path, kind):
    mask, image = np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.uint8)
    for pair in (("a/b.jpg", "a_b.jpg"), ("A.jpg", "a.JPG"), ("caf\u00e9", "cafe\u0301")):
        with pytest.raises(SisError, match="rename one"):
            formats.write(kind, [(name, image, mask) for name in pair], CLASSES, tmp_path / kind)
        assert not (tmp_path / kind).exists()
