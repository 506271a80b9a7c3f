"""`predict` and the student in use: any photo in, a mask of its own size out; what cannot be read
is named and the rest is done.
"""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import sis_jax
from sis_jax import __main__ as door
from sis_jax import parallel
from sis_jax.checkpoints import catalogue
from sis_jax.checkpoints.student import _starts
from sis_jax.models import students
from sis_jax.runs import cli
from sis_jax.stages.student import Student
from sis_jax.types import Info, SisError, UsageError

pytestmark = pytest.mark.integration

ROOT = Path(sis_jax.__file__).parents[1]
CLASSES = tuple(
    {"id": i, "name": n, "colour": "#000000", "prompts": [], "clusters": [i]}
    for i, n in enumerate(("background", "skin", "hair"))
)


@pytest.fixture(scope="module")
def student():
    config = students.StudentConfig("unet-small", 3, 8)
    return Student(
        students.build(config, np.random.default_rng(3)),
        config,
        CLASSES,
        32,
        Info("toy", "none needed"),
    )


@pytest.fixture(scope="module")
def folder(student, tmp_path_factory):
    return student.save(tmp_path_factory.mktemp("student") / "toy")


def photo(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (h, w, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos as people have them: turned by EXIF, transparent, 16-bit, grey, wide, in a sub-folder,
    and one broken.
    """
    place = tmp_path_factory.mktemp("photos")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo(40, 60)).save(place / "turned.jpg", exif=exif)
    Image.fromarray(np.dstack([photo(33, 47), np.full((33, 47), 128, np.uint8)])).save(
        place / "clear.png"
    )
    Image.fromarray(photo(30, 30)[..., 0].astype(np.uint16) * 257).save(place / "grey16.png")
    Image.fromarray(photo(20, 90)[..., 0]).save(place / "wide.png")
    (place / "below").mkdir()
    Image.fromarray(photo(32, 32)).save(place / "below/inner.png")
    (place / "broken.jpg").write_bytes(b"no picture")
    return place


def test_masks_have_the_photos_own_size(folder, photos, tmp_path):
    masks = sis_jax.predict(str(folder), str(photos), out=str(tmp_path / "out"), batch=2)
    sizes = {name: m.mask.shape for name, m in zip(masks.names, masks)}
    assert sizes == {
        "below/inner.png": (32, 32),
        "clear.png": (33, 47),
        "grey16.png": (30, 30),
        "turned.jpg": (60, 40),
        "wide.png": (20, 90),
    }
    assert [n for n, _ in masks.skipped] == ["broken.jpg"]
    with Image.open(tmp_path / "out/turned.png") as picture:
        assert picture.mode == "P" and picture.size == (40, 60)
    assert [c["name"] for c in json.loads((tmp_path / "out/classes.json").read_text())] == [
        "background",
        "skin",
        "hair",
    ]


def test_memory_and_disk_agree(student, photos, tmp_path):
    there = sis_jax.predict(student, str(photos), out=str(tmp_path / "out"))
    here = sis_jax.predict(student, str(photos), batch=1)
    for a, b in zip(there, here):
        assert a.name == b.name and (a.mask == b.mask).mean() > 0.999
    assert here.show().size[1] > 3 * 128


def test_scores_are_probabilities_and_masks_their_winners(student):
    image = photo(40, 52)
    scores = student.scores([image])[0]
    assert scores.shape == (40, 52, 3)
    np.testing.assert_allclose(scores.sum(-1), 1, atol=1e-5)
    assert (student.masks([image])[0] == scores.argmax(-1)).mean() > 0.999


class Bright(nnx.Module):
    """Foreground where a photo is light."""

    def __call__(self, x, tape=None):
        light = 20 * x.mean(-1, keepdims=True)
        return jnp.concatenate([-light, light], -1)


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (48, 48)])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_photos_that_are_not_square(fit, shape, tmp_path):
    """Padding is not part of the mask, stretching is undone: light pixels are found in place."""
    image = np.full((*shape, 3), 20, np.uint8)
    image[: shape[0] // 2, 8:24] = 240
    config = students.StudentConfig("unet-small", 2, 8)
    student = Student(Bright(), config, CLASSES[:2], 32, fit=fit)
    (mask,) = student.masks([image], flip=False)
    assert (mask == (image[..., 0] > 128)).mean() > 0.95 and mask.shape == shape
    (scores,) = student.scores([image], flip=False)
    assert (mask == scores.argmax(-1)).mean() > 0.99
    net = students.build(config, np.random.default_rng(0))
    kept = sis_jax.load_student(replace(student, network=net).save(tmp_path / "s"))
    assert kept.fit == fit


def test_channels_are_class_ids_where_the_background_is_missing(student):
    without = replace(student, classes=tuple(c | {"id": c["id"] + 1} for c in CLASSES))
    image = photo(32, 32)
    scores = without.scores([image])[0]
    assert scores.shape[-1] == 4 and not scores[..., 0].any()
    np.testing.assert_array_equal(without.masks([image])[0], student.masks([image])[0] + 1)


def test_company_and_order_do_not_matter(student):
    images = [photo(32, 32, 0), photo(48, 32, 1), photo(32, 32, 2)]
    together = student.scores(images)
    for image, want in zip(images, together):
        np.testing.assert_allclose(student.scores([image])[0], want, atol=1e-5)


def test_any_number_of_photos_runs_in_two_programs_per_shape(student, monkeypatch):
    rows = []
    real = parallel.map_devices

    def counted(*args, **kwargs):
        run = real(*args, **kwargs)
        return lambda params, blocks: rows.append(blocks.shape[1]) or run(params, blocks)

    monkeypatch.setattr(parallel, "map_devices", counted)
    for n in (1, 2, 3, 5, 8, 40):
        assert len(student.masks([photo(32, 32, i) for i in range(n)], flip=False)) == n
    assert set(rows) <= {1, 4}


def test_mirrored_photos_get_mirrored_masks(student):
    image = photo(32, 32)
    scores = student.scores([image, image[:, ::-1]], flip=True)
    np.testing.assert_allclose(scores[0], scores[1][:, ::-1], atol=1e-4)


def test_large_photos_are_cut_and_put_together(student):
    """Every pixel is covered, and far from the seams a tile sees what the whole photo sees but for
    the picture's mean.
    """
    image = np.tile(photo(32, 32), (10, 10, 1))
    cut = student.scores([image], size=320, tile=256)[0]
    np.testing.assert_allclose(cut.sum(-1), 1, atol=1e-4)
    whole = student.scores([image], size=320)[0]
    assert np.abs(cut - whole).mean() < 0.02
    for length in (257, 300, 1000):
        starts = _starts(length, 256)
        assert starts[0] == 0 and starts[-1] == length - 256 and max(np.diff(starts)) <= 256 - 64


def test_arrays_lists_and_pillow_images(student):
    rgba, grey = np.dstack([photo(20, 24), np.full((20, 24), 255, np.uint8)]), photo(18, 18)[..., 0]
    masks = sis_jax.predict(student, [photo(16, 20), rgba, grey, Image.fromarray(photo(30, 22))])
    assert [m.mask.shape for m in masks] == [
        (16, 20),
        (20, 24),
        (18, 18),
        (30, 22),
    ] and masks.names == ("0000", "0001", "0002", "0003")
    assert len(sis_jax.predict(student, np.stack([photo(16, 16)] * 3))) == 3
    assert student.predict(photo(16, 20))[0].mask.shape == (16, 20)
    with pytest.raises(UsageError, match=r"float64\[4, 4, 3\]"):
        sis_jax.predict(student, np.zeros((4, 4, 3)))


def test_soft_scores_and_cutouts_on_disk(student, photos, tmp_path):
    sis_jax.predict(
        student, str(photos / "clear.png"), out=str(tmp_path / "o"), soft=True, cutouts=True
    )
    with np.load(tmp_path / "o/clear.npz") as z:
        assert z["scores"].shape == (33, 47, 3)
    with Image.open(tmp_path / "o/clear-cutout.png") as picture:
        assert picture.mode == "RGBA" and picture.size == (47, 33)


def test_coco(student, photos, tmp_path):
    sis_jax.predict(student, str(photos), out=str(tmp_path / "coco"), format="coco")
    found = [
        p for p in (tmp_path / "coco").rglob("*.json") if "annotations" in json.loads(p.read_text())
    ]
    assert len(found) == 1 and len(json.loads(found[0].read_text())["images"]) == 5


def test_other_peoples_folders_are_safe(student, photos, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/holiday.png").write_bytes(b"x")
    with pytest.raises(UsageError, match="holds other files"):
        sis_jax.predict(student, str(photos), out=str(tmp_path / "mine"), overwrite=True)
    sis_jax.predict(student, str(photos), out=str(tmp_path / "out"))
    with pytest.raises(UsageError, match="other settings"):
        sis_jax.predict(student, str(photos), out=str(tmp_path / "out"), flip=False)
    sis_jax.predict(student, str(photos), out=str(tmp_path / "out"), flip=False, overwrite=True)
    with pytest.raises(UsageError, match="is inside the folder of the photos"):
        sis_jax.predict(student, str(photos), out=str(photos / "masks"))


def test_the_same_command_goes_on_where_it_stopped(student, photos, tmp_path, monkeypatch):
    whole = sis_jax.predict(student, str(photos), out=str(tmp_path / "out"))
    (tmp_path / "out/turned.png").unlink()
    looked_at = []
    real = Student.look
    monkeypatch.setattr(Student, "look", lambda *a, **b: looked_at.append(1) or real(*a, **b))
    again = sis_jax.predict(student, str(photos), out=str(tmp_path / "out"))
    assert (
        len(looked_at) == 1
        and again.names == whole.names
        and (tmp_path / "out/turned.png").is_file()
    )


def test_borders_follow_the_photo_unless_asked_not_to(student, tmp_path):
    """The scores of a toy change where half of a photo is even."""
    image = photo(64, 64)
    image[:, 32:] = 255
    with_edges, without = (student.scores([image], edges=e)[0] for e in (True, False))
    assert np.abs(with_edges - without).max() > 0.01
    np.testing.assert_allclose(with_edges.sum(-1), 1, atol=1e-5)
    found = sis_jax.predict(student, image, edges=False)
    np.testing.assert_array_equal(next(iter(found)).mask, without.argmax(-1))


def test_what_cannot_work_leaves_no_folder(student, photos, tmp_path):
    for options in ({"tile": 0}, {"size": 3}, {"batch": 0}):
        with pytest.raises(UsageError):
            sis_jax.predict(student, str(photos), out=str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()
    (tmp_path / "r").mkdir()
    (tmp_path / "r/run.json").write_text("{}")
    with pytest.raises(UsageError, match="is a run folder"):
        sis_jax.predict(student, str(tmp_path / "r"), out=str(tmp_path / "out"))


def test_two_photos_of_one_stem_are_told(student, tmp_path):
    for name in ("a.png", "a.jpg"):
        Image.fromarray(photo(20, 20)).save(tmp_path / name)
    with pytest.raises(UsageError, match=r"a\.jpg and a\.png would both be written"):
        sis_jax.predict(student, str(tmp_path), out=str(tmp_path.parent / "never"))
    assert not (tmp_path.parent / "never").exists()


def test_no_photos_and_no_student(student, tmp_path):
    with pytest.raises(UsageError, match="no photos"):
        sis_jax.predict(student, str(tmp_path))
    with pytest.raises(UsageError, match="list is empty"):
        sis_jax.predict(student, [])
    with pytest.raises(UsageError, match="holds no student"):
        sis_jax.predict(str(tmp_path), photo(8, 8))
    (tmp_path / "student.jax").write_bytes(b"")
    with pytest.raises(UsageError, match=r"student\.jax is a file"):
        sis_jax.load_student(tmp_path / "student.jax")


def test_the_student_that_ships_finds_faces_by_its_name_alone(tmp_path, monkeypatch):
    shipped = sis_jax.load_student()
    assert shipped.info.name == "faces-student" and "non-commercial" in shipped.info.licence
    assert [c["name"] for c in shipped.classes] == ["background", "hair and clothes", "face"]
    faces = sis_jax.load_generator().sample(seeds=range(8), truncation=0.5).to_uint8()
    found = np.stack(shipped.masks(list(faces)))
    assert (found[:, 28:40, 28:36] == 2).mean() > 0.9  # noses and mouths
    assert (found[:, :4, [0, 1, 2, -3, -2, -1]] == 0).mean() > 0.5  # the upper corners
    assert 0.4 < (found > 0).mean() < 0.85

    Image.fromarray(faces[0]).save(tmp_path / "face.png")
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(sis_jax.predict("faces-student", "face.png")[0].mask, found[0])


def test_a_student_is_taken_for_nothing_else(student, tmp_path, monkeypatch, capsys):
    with pytest.raises(UsageError, match="faces-student is a student, which takes photos"):
        sis_jax.load_generator("faces-student")
    with pytest.raises(UsageError, match="faces64 holds no student"):
        sis_jax.load_student("faces64")
    with pytest.raises(
        UsageError, match="unknown student 'face-student'; did you mean 'faces-student'"
    ):
        sis_jax.load_student("face-student")
    monkeypatch.chdir(tmp_path)
    assert door.main(["export", "faces-student", "--format", "jax"]) == 2
    assert "no run here to write into: give --out" in capsys.readouterr().err and not list(
        tmp_path.iterdir()
    )
    assert door.main(["export", "faces-student", "--format", "jax", "--dry-run"]) == 2
    assert "no run here to write into: give --out" in capsys.readouterr().err
    assert (
        door.main(["export", "face-student", "--format", "jax"]) == 2
        and "did you mean 'faces-student'" in capsys.readouterr().err
    )
    (tmp_path / "faces-student").mkdir()  # such as masks that were written there
    assert sis_jax.load_student("faces-student").side == 192
    student.save("faces-student", "float16")  # a folder of that name here comes first
    near = sis_jax.load_student("faces-student")
    assert near.info.name == student.info.name
    for a, b in zip(near.scores([photo(32, 32)]), student.scores([photo(32, 32)])):
        np.testing.assert_allclose(a, b, atol=0.01)


def test_the_portable_file_gives_the_same_probabilities(student, tmp_path):
    from jax import export

    call = export.deserialize(bytearray(student.export(tmp_path / "s.jaxexport").read_bytes())).call
    for count in (1, 3):
        images = np.stack([photo(32, 32, i) for i in range(count)])
        np.testing.assert_allclose(
            call(images), np.stack(student.scores(list(images), flip=False, edges=False)), atol=1e-5
        )


def test_onnx_gives_the_same_probabilities(student, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("jax2onnx")
    session = runtime.InferenceSession(student.export(tmp_path / "s.onnx"))
    for count in (1, 3):
        images = np.stack([photo(32, 32, i) for i in range(count)])
        (found,) = session.run(["probabilities"], {"images": images})
        np.testing.assert_allclose(
            found, np.stack(student.scores(list(images), flip=False, edges=False)), atol=1e-5
        )
    facts = session.get_modelmeta().custom_metadata_map
    assert (
        json.loads(facts["classes"]) == list(student.classes) and int(facts["side"]) == student.side
    )


def test_the_student_is_exported_from_the_shell(student, tmp_path, capsys, monkeypatch):
    student.save(tmp_path / "student")
    words = ["export", str(tmp_path), "--format"]
    assert door.main([*words, "jax"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "exports/student.jax")
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    (folder := tmp_path / "folder.jax").mkdir()
    for more, said in (
        (["jax"], "is there already: add --overwrite"),
        (["jax", "--out", str(tmp_path / "s.bin")], "ends in .jax"),
        (["jax", "--n", "3"], "belong to --format blanks"),
        (["onnx"], "pip install -e '.[onnx]'"),
        (["jax", "--overwrite", "--out", str(folder)], "is a folder, but the student is one file"),
        (["JAX"], "did you mean 'jax'?"),
    ):
        assert door.main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    inside = str(tmp_path / "exports/student.jax" / "s.jax")
    assert (
        door.main([*words, "jax", "--out", inside]) == 1 and str(inside) in capsys.readouterr().err
    )
    assert [p.name for p in (tmp_path / "exports").iterdir()] == ["student.jax"]


def test_a_student_of_another_version_is_told(student, tmp_path, monkeypatch):
    place = student.save(tmp_path / "later")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"version": 99}))
    with pytest.raises(UsageError, match=r"has version 99, this sis_jax reads version 1"):
        sis_jax.load_student(place)
    monkeypatch.setenv("SIS_JAX_WEIGHTS", str(tmp_path))
    assert "version 99" in str(catalogue.inventory()["later"])


def test_damaged_weights_are_told(student, tmp_path):
    place = student.save(tmp_path / "s")
    data = bytearray((place / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (place / "model.safetensors").write_bytes(data)
    with pytest.raises(SisError, match="damaged or was changed"):
        sis_jax.load_student(place)


def test_the_command_ends_with_1_and_names_what_was_skipped(folder, photos, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")} | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-W", "error", "-m", "sis_jax.predict", str(folder), str(photos)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "o")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1 and done.stdout.strip() == str(tmp_path / "o")
    assert (
        "1 of 6 photos could not be read: broken.jpg" in done.stderr
        and "Traceback" not in done.stderr
    )
    missing = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert missing.returncode == 2 and "give --out DIR" in missing.stderr


def test_pillow_does_not_warn_of_large_photos(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    (tmp_path / "photos").mkdir()
    Image.fromarray(photo(40, 60)).save(tmp_path / "photos/large.png")
    words = [str(folder), str(tmp_path / "photos"), "--out", str(tmp_path / "masks"), "--quiet"]
    assert cli.run(importlib.import_module("sis_jax.predict").predict, words) == 0
