"""Exports: what other people's readers get back is what went in, and a folder appears whole or not
at all.
"""

import json
import struct
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from pycocotools.coco import COCO

from sis_jax import __main__ as door
from sis_jax.data.exports import formats
from sis_jax.data.exports.polygons import fill, polygons
from sis_jax.data.folder import Dataset, Example, SplitWriter, classes_json, write_chunks
from sis_jax.data.ground_truth import open_pairs
from sis_jax.export import export
from sis_jax.types import SisError, UsageError

CLASSES = [{"id": 1, "name": "hair"}, {"id": 3, "name": "skin: tone"}]


def example(i: int) -> Example:
    """A ring of class 1 with a hole, two pieces of class 3, a row of ignore."""
    y, x = np.mgrid[:32, :40]
    r = np.hypot(x - 20, y - 16)
    mask = np.where((r < 11 + i % 3) & (r > 5), 1, 0).astype(np.uint8)
    mask[2:5, 2:9] = mask[28:31, 30:38] = 3
    mask[0] = 255
    image = np.random.default_rng(i).integers(0, 256, (32, 40, 3)).astype(np.uint8)
    return Example(f"{i:06d}", image, mask, seed=100 + i, confidence=0.5 + 0.01 * i)


SPLITS = {"train": [example(i) for i in range(5)], "val": [example(i) for i in range(5, 7)]}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Every format once: name -> folder."""
    place = tmp_path_factory.mktemp("exports")
    return {
        name: formats.write(
            name,
            {k: iter(v) for k, v in SPLITS.items()},
            CLASSES,
            place / name,
            card="# Rings\n",
            licence="CC0-1.0",
        )
        for name in formats.FORMATS
    }


@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_export_has_a_card_and_its_classes(written, name):
    card = (written[name] / "README.md").read_text()
    assert "# Rings" in card
    assert "Licence: CC0-1.0" in card
    assert f"format `{name}`" in card
    assert json.loads((written[name] / "classes.json").read_text()) == CLASSES
    assert [p.name for p in written[name].rglob(".*")] == [".sis-export.json"]


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # raised inside pycocotools.mask.decode
def test_coco(written, capsys):
    coco = COCO(str(written["coco"] / "annotations" / "instances_train.json"))
    capsys.readouterr()  # the reader prints
    assert [(c["id"], c["name"]) for c in coco.loadCats(coco.getCatIds())] == [
        (1, "hair"),
        (3, "skin: tone"),
    ]
    assert len(coco.getImgIds()) == 5
    for number, expected in zip(coco.getImgIds(), SPLITS["train"], strict=True):
        (record,) = coco.loadImgs(number)
        assert (record["file_name"], record["seed"]) == (f"{expected.name}.png", expected.seed)
        image = np.asarray(Image.open(written["coco"] / "train" / record["file_name"]))
        np.testing.assert_array_equal(image, expected.image)
        found = coco.loadAnns(coco.getAnnIds(number))
        assert len(found) == 2  # one per class, although class 3 has two pieces
        mask = np.zeros_like(expected.mask)
        for a in found:
            mask[coco.annToMask(a) > 0] = a["category_id"]
            y, x = np.nonzero(expected.mask == a["category_id"])
            assert a["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            assert a["area"] == len(x)
        np.testing.assert_array_equal(mask, np.where(expected.mask == 255, 0, expected.mask))
    ids = [a["id"] for a in coco.loadAnns(coco.getAnnIds())]
    assert sorted(ids) == list(range(1, 11))


def test_coco_of_masks_alone_with_scores(tmp_path):
    one = example(0)
    scores = np.zeros((32, 40, 4), np.float32)
    scores[..., 1], scores[..., 3] = 0.25, np.linspace(0, 1, 40)
    folder = formats.write(
        "coco", [("sub/photo.jpg", None, one.mask, scores)], CLASSES, tmp_path / "c", split="photos"
    )
    content = json.loads((folder / "annotations" / "instances_photos.json").read_text())
    assert content["images"][0]["file_name"] == "sub/photo.jpg"
    assert not (folder / "photos").exists()
    found = {a["category_id"]: a["score"] for a in content["annotations"]}
    assert found[1] == 0.25
    assert found[3] == pytest.approx(scores[..., 3][one.mask == 3].mean(), abs=1e-5)


def test_voc(written):
    folder = written["voc"]
    names = (folder / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    assert names == ["val_000005", "val_000006"]
    for name, expected in zip(names, SPLITS["val"], strict=True):
        mask = Image.open(folder / "SegmentationClass" / f"{name}.png")
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.asarray(mask), expected.mask)
        np.testing.assert_array_equal(
            np.asarray(Image.open(folder / "JPEGImages" / f"{name}.png")), expected.image
        )
    rows = [row.split(":") for row in (folder / "labelmap.txt").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == ["background", "hair", "skin_ tone"]
    assert all(len(row) == 4 for row in rows)


def test_yolo_says_what_it_loses(written):
    folder = written["yolo"]
    assert "train: images/train" in (folder / "data.yaml").read_text()
    assert '1: "skin: tone"' in (folder / "data.yaml").read_text()
    hits, union = np.zeros(2), np.zeros(2)
    for split, examples in SPLITS.items():
        for e in examples:
            drawn = np.zeros_like(e.mask)
            lines = (folder / "labels" / split / f"{e.name}.txt").read_text().splitlines()
            assert [line.split()[0] for line in lines] == ["0", "1", "1"]
            for line in lines:
                number, *values = line.split()
                points = np.array(values, float).reshape(-1, 2)
                assert points.min() >= 0
                assert points.max() <= 1
                drawn[fill([points * [40, 32]], 32, 40)] = (1, 3)[int(number)]
            for k, c in enumerate((1, 3)):
                seen = e.mask != 255
                hits[k] += (seen & (drawn == c) & (e.mask == c)).sum()
                union[k] += (seen & ((drawn == c) | (e.mask == c))).sum()
    assert (hits / union > 0.95).all()
    assert (
        f"mean IoU of {(hits / union).mean():.4f} over 2 classes"
        in (folder / "README.md").read_text()
    )


def test_polygons_without_tolerance_are_exact():
    rng = np.random.default_rng(0)
    for _ in range(20):
        region = np.kron(rng.random((6, 7)) < 0.5, np.ones((2, 1), bool)) ^ (
            rng.random((12, 7)) < 0.2
        )
        shapes = polygons(region, tolerance=0)
        np.testing.assert_array_equal(fill(shapes, 12, 7), region)


def test_polygons_of_a_large_smooth_shape_are_short_and_close():
    y, x = np.mgrid[:200, :200]
    region = np.hypot(x - 100, y - 100) < 80
    (shape,) = polygons(region)
    assert len(shape) < 150  # 640 pixel edges
    again = fill([shape], 200, 200)
    assert (again & region).sum() / (again | region).sum() > 0.998


def test_hugging_face_layout(written):
    folder = written["hf"]
    assert (
        (folder / "README.md").read_text().startswith("---\ntask_categories:\n- image-segmentation")
    )
    for split, examples in SPLITS.items():
        rows = [
            json.loads(line)
            for line in (folder / split / "metadata.jsonl").read_text().splitlines()
        ]
        for row, e in zip(rows, examples, strict=True):
            assert (row["seed"], row["confidence"]) == (e.seed, e.confidence)
            np.testing.assert_array_equal(
                np.asarray(Image.open(folder / split / row["file_name"])), e.image
            )
            np.testing.assert_array_equal(
                np.asarray(Image.open(folder / split / row["mask_file_name"])), e.mask
            )
    assert len(Dataset.open(folder).split("val")) == 2  # it is a data folder of this library too


def test_npz_reads_without_pickle_and_as_truth(written):
    with np.load(written["npz"] / "train.npz", allow_pickle=False) as file:
        assert file["name"].tolist() == [e.name for e in SPLITS["train"]]
        assert file["seed"].tolist() == [e.seed for e in SPLITS["train"]]
        assert file["label_ids"].tolist() == [0, 1, 3]
        assert file["img_blob"].dtype == np.uint8
    truth = open_pairs(written["npz"] / "train.npz")
    assert truth.classes[2] == {"id": 3, "name": "skin: tone"}
    for (name, image, mask), e in zip(truth, SPLITS["train"], strict=True):
        assert name == e.name
        np.testing.assert_array_equal(image, e.image)
        np.testing.assert_array_equal(mask, e.mask)


def test_tfds_reads_array_record_without_tensorflow(written):
    builder = tfds.builder_from_directory(str(written["tfds"]))
    for split, examples in SPLITS.items():
        source = builder.as_data_source(split)
        assert len(source) == len(examples)
        for row, e in zip(source, examples):
            assert (row["name"].decode(), row["seed"]) == (e.name, e.seed)
            assert row["confidence"] == pytest.approx(e.confidence)
            np.testing.assert_array_equal(row["image"], e.image)
            np.testing.assert_array_equal(row["mask"][..., 0], e.mask)
    assert builder.info.features["mask"].names == ["background", "hair", "unused 2", "skin: tone"]
    assert "tensorflow" not in sys.modules


def test_tfrecord_framing(written):
    """Each record: length, masked CRC-32C of the length, bytes, masked CRC of the bytes; the
    checksums are recomputed bit by bit.
    """

    def masked(data: bytes) -> int:
        crc = 0xFFFFFFFF
        for byte in data:
            crc ^= byte
            for _ in range(8):
                crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        crc ^= 0xFFFFFFFF
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    info = json.loads((written["tfrecord"] / "dataset_info.json").read_text())
    assert info["fileFormat"] == "tfrecord"
    (file,) = written["tfrecord"].glob("sis_masks-val.tfrecord-*")
    data, records = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body = data[12 : 12 + length]
        assert struct.unpack("<I", data[8:12])[0] == masked(data[:8])
        assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked(body)
        records.append(body)
        data = data[16 + length :]
    assert len(records) == 2
    assert b"000005" in records[0]


def test_an_example_with_only_a_mask(tmp_path):
    only = [("a", None, example(0).mask)]
    for name in ("hf", "tfds"):
        with pytest.raises(UsageError, match=f"the format {name} keeps images"):
            formats.write(name, only, CLASSES, tmp_path / name)
        assert not list(tmp_path.iterdir())  # no half folder
    for name in ("voc", "yolo", "npz"):
        assert formats.write(name, only, CLASSES, tmp_path / name).is_dir()
    with np.load(tmp_path / "npz" / "train.npz", allow_pickle=False) as file:
        assert "img_blob" not in file.files


def test_a_stream_that_breaks_leaves_what_was_there(tmp_path):
    def broken():
        yield example(0)
        raise RuntimeError("boom")

    formats.write("voc", [example(1)], CLASSES, tmp_path / "out")
    with pytest.raises(RuntimeError, match="boom"):
        formats.write("voc", broken(), CLASSES, tmp_path / "out", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in (tmp_path / "out" / "SegmentationClass").iterdir()] == ["000001.png"]


def test_overwriting_replaces_exports_only(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="holds other things"):
        formats.write("voc", [example(0)], CLASSES, tmp_path / "mine", overwrite=True)
    formats.write("npz", [example(0)], CLASSES, tmp_path / "out")
    with pytest.raises(UsageError, match="is not empty; give another --out, or --overwrite"):
        formats.write("voc", [example(0)], CLASSES, tmp_path / "out")
    formats.write("voc", [example(0)], CLASSES, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "train.npz").exists()
    assert (tmp_path / "out" / "labelmap.txt").exists()


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (
            [("a", None, np.full((4, 4), 2, np.uint8))],
            "a holds class id 2, which is not among the classes",
        ),
        ([("a", None, np.zeros((4, 4), np.int64))], r"mask of a is int64\[4, 4\], expected uint8"),
        ([("a", np.zeros((4, 5, 3), np.uint8), np.zeros((4, 4), np.uint8))], "image of a"),
        ([("a", None, np.zeros((4, 4), np.uint8))] * 2, "two images are called 'a'"),
        ([("../a", None, np.zeros((4, 4), np.uint8))], "cannot be called"),
    ],
)
def test_data_that_do_not_fit(tmp_path, examples, message):
    with pytest.raises(SisError, match=message):
        formats.write("coco", examples, CLASSES, tmp_path / "x")


def test_unknown_format(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'coco'"):
        formats.write("cocoa", [], CLASSES, tmp_path / "x")


# -------------------------------------------------------------------------------------- the command


@pytest.fixture
def run(tmp_path):
    data = tmp_path / "run" / "data"
    data.mkdir(parents=True)
    (data / "classes.json").write_bytes(classes_json(CLASSES))
    (data / "README.md").write_text("# Rings\n\nLicence: CC0-1.0\n")
    for split, examples in SPLITS.items():
        writer = SplitWriter(data / split, len(examples), 4)
        for chunk in writer.chunks():
            write_chunks([(writer, chunk)], iter(examples[chunk.start : chunk.stop]))
        writer.finish()
    return tmp_path / "run"


def test_export_of_a_run_from_the_shell(run, capsys):
    assert door.main(["export", str(run), "--format", "npz"]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == str(run / "exports" / "npz")
    names = {p.name for p in (run / "exports" / "npz").iterdir()}
    assert names == {"train.npz", "val.npz", "classes.json", "README.md", ".sis-export.json"}
    assert door.main(["export", str(run), "--format", "npz"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert door.main(["export", str(run / "data"), "--format", "npzz"]) == 2
    assert "did you mean 'npz'" in capsys.readouterr().err


def test_export_in_python(run, tmp_path):
    folder = export(run, format="hf", out=str(tmp_path / "copy"))
    for name, examples in SPLITS.items():
        for found, expected in zip(Dataset.open(folder).split(name), examples, strict=True):
            np.testing.assert_array_equal(found.image, expected.image)
            np.testing.assert_array_equal(found.mask, expected.mask)
    with pytest.raises(UsageError, match="holds no dataset"):
        export(tmp_path / "copy" / "train")
