"""Mutated photos, masks, archives, JSON and ontologies: a result or one sentence, no traceback, no
file outside.
"""

import io
import json
import random
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save

from sis_jax.data.blanks import read_blanks
from sis_jax.data.edits import Edit
from sis_jax.data.files import read_run
from sis_jax.data.folder import Dataset
from sis_jax.data.ground_truth import open_pairs
from sis_jax.data.mask_files import read_mask
from sis_jax.data.ontology import ontology_of
from sis_jax.data.photos import Photos
from sis_jax.types import SisError

_SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
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
STRANGE = (
    None,
    True,
    -1,
    1e308,
    "../../x",
    "/etc/x",
    "C:x",
    "a\0b",
    "\udce9",
    "x" * 5000,
    [],
    {},
    [[]],
)


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
    survives(lambda: Photos.open(path, 8, min_size=0, threads=1))
    if name.startswith("a."):
        survives(lambda: read_mask(path))
    else:
        survives(lambda: list(open_pairs(path, path if name == "p.npz" else place / "masks")))
    path.unlink()


def open_text(place, seed):
    rng = random.Random(seed)
    name = rng.choice(list(TEXTS))
    text = json.dumps(twisted(TEXTS[name], rng))
    data = text.encode() if rng.random() < 0.7 else mutated(text.encode(), rng)
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
    yield root / "in-here"
    assert sorted(path.name for path in root.iterdir()) == ["in-here", "mine"]
    assert (root / "mine").read_text() == "mine"


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200, **_SETTINGS)
def test_mutated_files(place, seed):
    open_file(place, seed)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200, **_SETTINGS)
def test_twisted_json(place, seed):
    open_text(place, seed)


@pytest.mark.slow
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20_000, **_SETTINGS)
def test_twenty_thousand_mutations(place, seed):
    (open_file if seed % 2 else open_text)(place, seed)
