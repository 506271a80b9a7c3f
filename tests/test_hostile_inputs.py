"""Mutated photos, masks, archives, JSON, ontologies and run folders: a result or one sentence, no
traceback, no file outside.
"""

import io
import json
import random
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import configured, tiny_stylegan2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save

import sis_jax
from sis_jax.checkpoints import load_generator, save_generator
from sis_jax.checkpoints.student import Student
from sis_jax.data.blanks import read_blanks
from sis_jax.data.edits import Edit
from sis_jax.data.files import plain, read_run
from sis_jax.data.folder import Dataset, classes_json
from sis_jax.data.ground_truth import open_pairs
from sis_jax.data.mask_files import read_mask
from sis_jax.data.ontology import ontology_of
from sis_jax.data.part_names import new_class
from sis_jax.data.parts import Parts
from sis_jax.data.photos import Photos
from sis_jax.methods.segmentation_in_style import SegmentationInStyle
from sis_jax.methods.settings import restored
from sis_jax.models import students
from sis_jax.models.students import StudentConfig
from sis_jax.runs.metrics import Metrics
from sis_jax.runs.page import write_page
from sis_jax.runs.run import RunFolder
from sis_jax.types import Info, SisError

_SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
BLOBS = (".safetensors", ".csv", ".jsonl")
SCORES = (
    "mean_iou", "iou_foreground", "iou_background", "iou_image_mean", "accuracy",
    "accuracy_image_mean", "f1", "f_beta", "max_f", "border_mean_iou",
)  # fmt: skip
PIXELS = np.random.default_rng(0).integers(0, 255, (12, 10, 3), dtype=np.uint8)


def encoded(kind, pixels=PIXELS, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def archive(kind):
    buffer = io.BytesIO()
    names = ("a.jpg", "b/c.png", "../d.jpg")
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
            for name in names:
                file.writestr(name, encoded("JPEG"))
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w:gz" if kind == "tar.gz" else "w") as file:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(encoded("JPEG"))
            file.addfile(info, io.BytesIO(encoded("JPEG")))
        link = tarfile.TarInfo("l.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        file.addfile(link)
    return buffer.getvalue()


def npz():
    buffer = io.BytesIO()
    parts = [encoded("PNG"), encoded("JPEG")]
    offsets = np.cumsum([0, *map(len, parts)])
    blob = np.frombuffer(b"".join(parts), np.uint8)
    np.savez(buffer, img_blob=blob, img_off=offsets, mask_blob=blob, mask_off=offsets)
    return buffer.getvalue()


def exif():
    block = Image.Exif()
    block[0x0112] = 6
    return block


FILES = {
    "a.jpg": encoded("JPEG", exif=exif()),
    "a.png": encoded("PNG", np.dstack([PIXELS, PIXELS[..., 0]])),
    "a.tif": encoded("TIFF", PIXELS[..., 0].astype(np.float32)),
    "a.gif": encoded("GIF"),
    "a.webp": encoded("WEBP"),
    "p.zip": archive("zip"),
    "p.tar": archive("tar"),
    "p.tar.gz": archive("tar.gz"),
    "p.npz": npz(),
}
ARRAYS = {
    "originals": (1, 4, 4, 3), "backgrounds": (1, 4, 4, 3), "plain": (1, 1, 4, 4, 3),
    "images": (1, 1, 4, 4, 3), "alphas": (1, 4, 4), "edited_alphas": (1, 1, 4, 4),
}  # fmt: skip
TENSORS = save({k: np.zeros(s, "f4" if "alpha" in k else "u1") for k, s in ARRAYS.items()})
TEXTS = {
    "edit.json": {"names": ["a"], "strengths": [1.0], "direction": "d", "summary": {}},
    "classes.json": [{"id": 0, "name": "background"}, {"id": 1, "name": "a", "colour": "#c0392b"}],
    "metadata.jsonl": {"file_name": "images/0.png", "mask_file_name": "masks/0.png", "seed": 1},
    "blanks.json": {
        "resolution": 4, "generator": {"name": "x", "sha256": "y"}, "truncation": 0.7,
        "pictures": [{"seed": 1, "image": "images/1.png", "mask": "m/1.png", "mask_sha256": ""}],
    },
    "run.json": {"format": 1, "stages": {"discover": {"config": {}}}},
    "ontology.json": {"classes": {"hair": ["hair"], "face": ["skin"]}, "background": ["a wall"]},
}  # fmt: skip
DEEP = "[" * 100_000
STRANGE = (
    None, True, 0, -1, 300, 2**70, 1e308, float("nan"), "", "../../x", "/etc/x", "C:x", "a\0b",
    "\udce9", "x" * 5000, [], {}, [[]], {"id": 1}, DEEP,
)  # fmt: skip
METRICS = {
    "name": "a", "paper": {}, "foreground": {"intervals": {}} | dict.fromkeys(SCORES, 0.5),
    "zero_label": {"mean_iou": 0.5, "mean_iou_interval": [0, 1], "accuracy": 1.0,
                   "accuracy_interval": None},
}  # fmt: skip


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, repeated, left out or moved."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        at = rng.randrange(len(data) or 1)
        kind = rng.randrange(4)
        if kind == 0 and data:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.choice((1, 4, 64))]
        elif kind == 2:
            data[at : at + 4] = rng.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF)).to_bytes(4, "little")
        else:
            data[at:at] = data[: rng.choice((2, 30))]
    return bytes(data)


def twisted(value, rng: random.Random):
    """A JSON value with one part replaced, left out or repeated."""
    if rng.random() < 0.25 or not isinstance(value, (dict, list)) or not value:
        return rng.choice(STRANGE)
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    key, part = rng.choice(items)
    copy = dict(items)
    if rng.random() < 0.15:
        del copy[key]
    else:
        copy[key] = twisted(part, rng)
    return copy if isinstance(value, dict) else list(copy.values())


def text_of(value) -> bytes:
    """A JSON file; in place of `DEEP`, lists in lists that no parser goes down to."""
    return json.dumps(value).replace(json.dumps(DEEP), DEEP).encode()


def survives(work):
    """A result, or one sentence."""
    try:
        work()
    except SisError as error:
        assert str(error)
        assert "\n" not in str(error)


def open_file(place, seed):
    rng = random.Random(seed)
    name = rng.choice(list(FILES))
    path = place / "in" / name
    path.write_bytes(mutated(FILES[name], rng))
    survives(lambda: Photos.open(path, 8, min_size=0))
    if name.startswith("a."):
        survives(lambda: read_mask(path))
    else:
        survives(lambda: list(open_pairs(path, path if name == "p.npz" else place / "masks")))
    path.unlink()


def open_text(place, seed):
    rng = random.Random(seed)
    name = rng.choice(list(TEXTS))
    text = text_of(twisted(TEXTS[name], rng))
    data = text if rng.random() < 0.7 else mutated(text, rng)
    files = {file: json.dumps(value).encode() for file, value in TEXTS.items()} | {name: data}
    for file, content in files.items():
        target = place / "data" / ("train/" if file == "metadata.jsonl" else "") / file
        target.write_bytes(content)
    tensors = TENSORS if rng.random() < 0.5 else mutated(TENSORS, rng)
    (place / "data/edit.safetensors").write_bytes(tensors)
    for work in (
        lambda: list(Dataset.open(place / "data").split("train")),
        lambda: Dataset.open(place / "data").names,
        lambda: Edit.load(place / "data").files(),
        lambda: read_blanks(place / "data"),
        lambda: read_run(place / "data"),
        lambda: ontology_of(place / "data/ontology.json"),
        lambda: list(open_pairs(place / "data/train/images", place / "data/train/masks")),
    ):
        survives(work)


def open_run(place, seed):
    """A file of a run folder, or of the weights beside it, changed; then all that reads it."""
    rng = random.Random(seed)
    run = place / "run"
    path = rng.choice(sorted(p for p in run.rglob("*") if p.suffix in (".json", ".png", *BLOBS)))
    whole = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(text_of(twisted(json.loads(whole), rng)))
    if path.suffix != ".json" or rng.random() < 0.2:
        path.write_bytes(mutated(path.read_bytes(), rng))
    readers = {
        "parts": lambda: used(Parts.load(run)),
        "data": lambda: list(Dataset.open(run).split("train")),
        "student": lambda: Student.load(run).ids,
        "weights": lambda: load_generator(run / "weights"),
        "metrics": lambda: Metrics.load(run / "metrics/a.json").rows(),
        "run.json": lambda: stage_of(run),
    }
    survives(readers[path.relative_to(run).parts[0]])
    if rng.random() < 0.2:
        survives(lambda: write_page(run))
    path.write_bytes(whole)
    (run / "run.json").write_bytes(run.with_name("run.json").read_bytes())


def used(parts):
    """What stages do with parts."""
    for level in (0, 1)[: 1 + (parts.finer is not None)]:
        one = parts.level(level)
        one.rename(dict.fromkeys(list(one.names)[:1], "b"))
        one.classify(one.masks)
    parts.files()


def stage_of(run):
    with RunFolder.open(run) as folder, folder.stage(configured("discover", k=3)):
        pass


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders to write into, and a file beside them that nothing may touch."""
    root = tmp_path_factory.mktemp("hostile")
    for folder in ("in", "masks", "data/train/images", "data/train/masks"):
        (root / "in-here" / folder).mkdir(parents=True)
    (root / "in-here/masks/a.png").write_bytes(encoded("PNG", PIXELS[..., 0] // 200))
    for kind in ("images", "masks"):
        (root / f"in-here/data/train/{kind}/0.png").write_bytes(encoded("PNG", PIXELS[..., 0] * 0))
    (root / "mine").write_text("mine")
    make_run(root / "in-here/run")
    yield root / "in-here"
    assert sorted(path.name for path in root.iterdir()) == ["in-here", "mine"]
    assert (root / "mine").read_text() == "mine"


def make_run(run):
    """A run folder with parts in two levels, a dataset, a student, metrics and its generator."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
    masks = rng.integers(0, 3, (2, 16, 16), dtype=np.uint8)
    clusters = tuple({"id": i, "class_id": i, "share": 0.3, "parent": i} for i in range(3))
    level = Parts(
        "segmentation_in_style", {"k": 3}, {"centers": np.zeros((3, 4), np.float32)},
        tuple(new_class(i, f"part {i}", [i]) for i in range(3)), clusters, {"found": True},
        Info("tiny"), 0, {"rows": [{"layer": "16x16", "k": 3, "score": 0.5}]}, ("a warning",),
        images, masks, (1, 2), (0.5, 0.6),
    )  # fmt: skip
    with RunFolder.open(run) as folder, folder.stage(configured("discover", k=3)):
        for name, data in replace(level, finer=replace(level, sweep=None)).files().items():
            folder.write_bytes(f"parts/{name}", data)
    config = StudentConfig("unet-small", 3, 8)
    network = students.build(config, np.random.default_rng(3))
    Student(network, config, level.classes, 16, Info("toy", "none")).save(run / "student")
    save_generator(tiny_stylegan2(16), run / "weights")
    for folder, name, data in (
        ("metrics", "a.json", text_of(METRICS)),
        ("data", "classes.json", classes_json(level.classes)),
        ("data/train", "metadata.jsonl", text_of(TEXTS["metadata.jsonl"])),
        ("data/train/images", "0.png", encoded("PNG")),
        ("data/train/masks", "0.png", encoded("PNG", PIXELS[..., 0] // 100)),
        ("student", "curves.csv", b"step,loss\n1,0.5\n2,0.4\n"),
    ):
        (run / folder).mkdir(parents=True, exist_ok=True)
        (run / folder / name).write_bytes(data)
    run.with_name("run.json").write_bytes((run / "run.json").read_bytes())


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200, **_SETTINGS)
def test_mutated_files(place, seed):
    open_file(place, seed)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200, **_SETTINGS)
def test_twisted_json(place, seed):
    open_text(place, seed)


@pytest.mark.integration
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, **_SETTINGS)
def test_changed_run_folders(place, seed):
    open_run(place, seed)


def test_json_is_parsed_in_one_place():
    """`parse_json` takes whatever anybody wrote; Python's own lets a RecursionError out."""
    package = Path(sis_jax.__file__).parent
    found = [path.name for path in package.rglob("*.py") if "json.load" in path.read_text("utf-8")]
    assert found == ["files.py"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("k", "x"), ("n", True), ("n", 2.5), ("truncation", "1"), ("truncation", float("nan")),
     ("layer", 3), ("normalize", "all"), ("smooth", None), ("unknown", 1)],
)  # fmt: skip
def test_settings_of_parts_from_elsewhere(name, value):
    with pytest.raises(SisError, match=f"hold {name} = "):
        restored(SegmentationInStyle, {name: value})


def test_settings_come_back_as_they_were():
    method = SegmentationInStyle(k="auto", layer="16x16", truncation=1)
    assert restored(SegmentationInStyle, plain(vars(method))) == method


def test_blanks_of_any_size_are_not_made_room_for(tmp_path):
    facts = TEXTS["blanks.json"] | {"resolution": 100_000}
    (tmp_path / "blanks.json").write_bytes(text_of(facts))
    with pytest.raises(SisError, match="100000 pixels"):
        read_blanks(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20_000, **_SETTINGS)
def test_twenty_thousand_mutations(place, seed):
    (open_run, open_file, open_text, open_file, open_text)[seed % 5](place, seed)
