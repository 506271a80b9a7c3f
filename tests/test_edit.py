"""`edit`: soft masks, completed backgrounds, directions by name, text and component, the run
folder, photos, and what is refused.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import clip_kit
import cv2
import fakes
import jax.numpy as jnp
import naming_kit
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import sis_jax
from sis_jax.data.edits import Edit
from sis_jax.data.parts import Parts
from sis_jax.ops import compositing
from sis_jax.runs import cli
from sis_jax.runs.configs.edit import EditConfig
from sis_jax.stages import edit_directions as ways
from sis_jax.stages.directions import Direction
from sis_jax.stages.edit import plan
from sis_jax.types import Info, SisError, UsageError

pytestmark = pytest.mark.integration

edit = sis_jax.edit
QUICK = {"k": 2, "layer": "16x16", "n": 8, "n_init": 1}


class Room(fakes.Blocks):
    """A disc in front of a wall: w[0] is the disc's place, w[1] the wall's brightness, w[2] the
    disc's.
    """

    info = Info(name="room")

    def synthesize(self, w, noise="const", taps=()):
        _, features = super().synthesize(w * jnp.array([1.0, 0, 0, 0]), noise, taps)
        mask = self.inside(jnp.tanh(w[:, 0, 0]), jnp)[..., None]
        disc, wall = 0.5 + 0.3 * jnp.tanh(w[:, 0, 2]), -0.5 + 0.3 * jnp.tanh(w[:, 0, 1])
        image = jnp.where(mask, disc[:, None, None, None], wall[:, None, None, None])
        return jnp.broadcast_to(image, (*mask.shape[:3], 3)), features


def towards(place, wall, disc):
    """A direction that moves all three."""
    move = np.array([place, wall, disc, 0], np.float32)
    length = float(np.linalg.norm(move))
    return Direction(move / length, "everything", "", "by hand", length, 1.0)


@pytest.fixture(autouse=True)
def _quick(tmp_path, monkeypatch):
    clip_kit.own_folders(tmp_path, monkeypatch)
    monkeypatch.setattr(ways, "COMPONENTS_FROM", 500)


@pytest.fixture(scope="module")
def room():
    gen = Room(16)
    return gen, sis_jax.discover(gen, **QUICK)


@pytest.fixture
def weights(tiny_weights):
    return tiny_weights


@pytest.fixture
def run(tiny_run, tmp_path):
    out = shutil.copytree(tiny_run, tmp_path / "faces")
    parts = Parts.load(out)
    if not parts.background["found"]:  # random weights have no background of their own
        parts.rename({parts.classes[0]["id"]: None}).save(out / "parts")
    return out


# Compositing


def test_alpha_follows_the_mask_where_it_is_sure():
    inside = np.zeros((2, 32, 32), bool)
    inside[:, :, :16] = True
    sure = np.ones((2, 32, 32), np.float32)
    sure[1, :, 15] = 0  # the last column of the foreground is a guess
    alpha = compositing.soft_alpha(inside, sure, 1.0)
    assert (alpha[:, :, :10] == 1).all() and (alpha[:, :, 22:] == 0).all()
    assert (
        alpha[0, 5, 15] == pytest.approx(1 - alpha[0, 5, 16], abs=1e-5)
        and 0.5 < alpha[0, 5, 15] < 1
    )
    assert alpha[1, 5, 15] < alpha[0, 5, 15] - 0.1


def test_low_confidence_inside_leaves_no_hole():
    inside, sure = np.ones((1, 16, 16), bool), np.zeros((1, 16, 16), np.float32)
    assert (compositing.soft_alpha(inside, sure) == 1).all() and (
        compositing.soft_alpha(~inside, sure) == 0
    ).all()


def test_completion_fills_the_hole_only():
    image = np.full((32, 32, 3), 60, np.uint8)
    image[10:20, 10:20] = 250
    alpha = np.zeros((32, 32), np.float32)
    alpha[10:20, 10:20] = 1
    filled = compositing.complete(image, alpha, None)
    assert (np.abs(filled.astype(int) - 60) <= 3).all()
    seen = []
    loud = compositing.complete(
        image, alpha, lambda picture, hole: (seen.append(hole), np.full_like(picture, 7))[1]
    )
    assert seen[0].sum() == 12 * 12 and (loud[9:21, 9:21] == 7).all() and (loud[:9] == 60).all()
    with pytest.raises(UsageError, match="the inpainter returned float64"):
        compositing.complete(image, alpha, lambda picture, hole: picture / 2)
    assert (
        compositing.complete(image, np.ones((32, 32), np.float32), None) is not None
    )  # nothing to learn from: as it was


def test_the_hole_of_a_large_image_is_filled_at_fewer_pixels(monkeypatch):
    """The fourth power of the resolution is too long at 1024 pixels; the surroundings stay."""
    sizes, real = [], cv2.inpaint
    monkeypatch.setattr(cv2, "inpaint", lambda a, *rest: sizes.append(a.shape) or real(a, *rest))
    image = np.full((300, 600, 3), 80, np.uint8)
    image[:, :40] = np.arange(40, dtype=np.uint8)[:, None]
    hole = np.zeros((300, 600), bool)
    hole[101:219, 203:431] = True
    image[hole] = 250
    filled = compositing.inpaint(image, hole)
    assert sizes == [(128, 256, 3)]
    assert np.array_equal(filled[~hole], image[~hole])
    assert (np.abs(filled[hole].astype(int) - 80) < 9).all()


def test_compositing_equations():
    image, back = np.full((16, 16, 3), 200, np.uint8), np.full((16, 16, 3), 40, np.uint8)
    alpha = np.zeros((16, 16), np.float32)
    alpha[:, :8], alpha[:, 8] = 1, 0.25
    image[:, 8:] = 0  # what lay behind the foreground in its own picture
    out = compositing.composite(image, alpha, back)
    assert (out[:, :8] == 200).all() and (out[:, 9:] == 40).all()
    assert (
        np.abs(out[:, 8].astype(int) - (0.25 * 200 + 0.75 * 40)) <= 1
    ).all()  # the foreground's own colour at its edge, not the black behind it


def test_psnr():
    a = np.zeros((4, 4, 3), np.uint8)
    b = a.copy()
    b[0] = 51
    assert compositing.psnr(a, a) == float("inf") and np.isnan(
        compositing.psnr(a, b, np.zeros((4, 4), bool))
    )
    assert compositing.psnr(a, b, np.arange(16).reshape(4, 4) < 4) == pytest.approx(
        20 * np.log10(5)
    )


# The recipe


def test_background_is_kept_and_foreground_edited(room):
    gen, parts = room
    found = edit(
        parts, gen=gen, seed=(0, 1, 2), direction=towards(0.0, 3.0, 3.0), strength=(0.5, 1.0)
    )
    truth = gen.truth((0, 1, 2), 0.7)
    np.testing.assert_array_equal(found.alphas > 0.5, truth)
    assert found.images.shape == (3, 2, 16, 16, 3)
    assert (found.psnr > found.psnr_plain + 10).all() and found.summary()["gain_db"] > 10
    centre = (slice(None), slice(None), 7, 7)
    np.testing.assert_array_equal(
        found.images[centre], found.plain[centre]
    )  # the disc is the edited one
    np.testing.assert_array_equal(
        found.images[:, :, 0, 0], np.broadcast_to(found.originals[:, None, 0, 0], (3, 2, 3))
    )  # the wall is not
    assert (np.abs(found.plain[:, 1, 0, 0].astype(int) - found.originals[:, 0, 0]) > 10).all()


def test_an_outline_that_moves(room):
    """Where the disc was and is no longer, the completed wall shows."""
    gen, parts = room
    found = edit(parts, gen=gen, seed=0, direction=towards(4.0, 2.0, 0.0), strength=(-1.0, -2.0))
    left = (found.alphas[0] > 0.99) & (found.edited_alphas[0] < 0.01)
    assert left.any(axis=(1, 2)).all()
    wall = int(found.originals[0, 0, 0, 0])
    for j in range(2):
        assert (np.abs(found.images[0, j][left[j]].astype(int) - wall) <= 2).all()


def test_slots_and_strength_zero(room):
    gen, parts = room
    same = edit(parts, gen=gen, seed=3, strength=0.0)
    np.testing.assert_array_equal(same.plain[:, 0], same.originals)
    move = np.arange(1, 4, dtype=np.float32)
    np.testing.assert_array_equal(ways.in_layers(move, "1-2", 4), [0 * move, move, move, 0 * move])
    np.testing.assert_array_equal(ways.in_layers(move, "3", 4)[:, 0], [0, 0, 0, 1])
    for slots, said in (
        ("a", "expected numbers such as"),
        ("2-9", "layers 0 to 3"),
        ("3-1", "layers 0 to 3"),
    ):
        with pytest.raises(UsageError, match=said):
            ways.in_layers(move, slots, 4)


def test_a_foreign_inpainter(room):
    gen, parts = room
    found = edit(parts, gen=gen, seed=0, inpainter=lambda picture, hole: np.full_like(picture, 9))
    assert (found.backgrounds[0][found.alphas[0] > 0.99] == 9).all()


# Directions


def test_principal_components():
    class Long(Room):
        def map(self, z, truncation=1.0):
            return super().map(z, truncation) * jnp.array([1.0, 3.0, 0.5, 0.25])

    gen = Long(16)
    first, second = (ways.principal(gen, i) for i in (0, 1))
    assert (
        first.unit[1] > 0.99
        and first.displacement == pytest.approx(3, rel=0.1)
        and first.facts["share"] > 0.8
    )
    assert abs(second.unit[0]) > 0.95 and abs(first.unit @ second.unit) < 1e-5
    with pytest.raises(UsageError, match="w has 4 numbers, so give pca:0 to pca:3"):
        ways.principal(gen, 4)
    with pytest.raises(UsageError, match="no principal component"):
        ways.resolve("pca:x", gen, None)


def test_directions_of_a_run(room, tmp_path):
    gen, _ = room
    way = replace(towards(1, 0, 0), prompt="a photo of a person with glasses")
    (tmp_path / "parts").mkdir()
    way.save(tmp_path / "parts" / "rare.safetensors")
    replace(way, prompt="a hat").save(tmp_path / "directions" / "headwear.safetensors")
    for name in (
        "glasses",
        "a photo of a person with glasses",
        str(tmp_path / "parts" / "rare.safetensors"),
    ):
        np.testing.assert_array_equal(ways.resolve(name, gen, tmp_path).unit, way.unit)
    assert (
        ways.resolve("headwear", gen, tmp_path).prompt
        == ways.resolve("hat", gen, tmp_path).prompt
        == "a hat"
    )
    with pytest.raises(
        UsageError, match=r"unknown direction 'glases'; did you mean 'glasses'.*pca:N"
    ):
        ways.resolve("glases", gen, tmp_path)
    with pytest.raises(UsageError, match="holds no direction"):
        ways.resolve(str(tmp_path / "none.safetensors"), gen, tmp_path)
    with pytest.raises(UsageError, match=r"\[3\] numbers and w of room has 4"):
        ways.resolve(Direction(np.eye(3, dtype=np.float32)[0], "", "", "x"), gen, None)


def test_a_direction_from_text():
    """The lamp's light grows along its axis, which the fake CLIP can tell."""
    gen = naming_kit.Lamp()
    found = ways.resolve(
        "a lot of white",
        gen,
        None,
        clip=naming_kit.two_words(),
        neutral="black",
        n=400,
        truncation=1.0,
    )
    assert float(found.unit @ gen.axis) > 0.9 and found.displacement > 0


# The verb


def test_the_run_folder(run, capsys):
    code = cli.run(
        edit,
        argv=[
            str(run),
            "--seed",
            "3",
            "5",
            "--strength",
            "-1",
            "2",
            "--direction",
            "pca:1",
            "--quiet",
        ],
    )
    assert code == 0
    folder = run / "edits" / "pca-1"
    assert capsys.readouterr().out.split() == [str(folder / "edit.png"), str(folder / "edit.json")]
    names = {p.name for p in folder.iterdir()}
    assert {
        "edit.png",
        "edit.json",
        "edit.safetensors",
        "direction.safetensors",
        "seed-3.png",
        "seed-5_+2.png",
        "seed-5_-1_plain.png",
    } <= names
    facts = json.loads((folder / "edit.json").read_text())
    assert len(facts["edits"]) == 4 and set(facts["summary"]) == {
        "background_psnr",
        "background_psnr_plain",
        "gain_db",
        "pictures",
    }
    record = json.loads((run / "run.json").read_text())["stages"]["edits/pca-1"]
    assert (
        record["state"] == "done"
        and "--strength -1.0 2.0" in record["command"]
        and record["measured"] == facts["summary"]
    )
    before = (folder / "edit.json").stat().st_mtime_ns
    again = edit(str(run), seed=(3, 5), strength=(-1.0, 2.0), direction="pca:1")
    assert (folder / "edit.json").stat().st_mtime_ns == before and again.names == (
        "seed 3",
        "seed 5",
    )
    with pytest.raises(UsageError, match="already has edits/pca-1 with"):
        edit(str(run), seed=4, direction="pca:1")
    assert edit(str(run), seed=4, direction="pca:1", name="other").names == ("seed 4",)
    assert (run / "edits" / "other").is_dir() and (run / "report.html").is_file()


def test_what_is_written_is_what_is_returned(run, tmp_path):
    found = edit(str(run), seed=(1, 2))
    assert isinstance(found.show(1), Image.Image)
    other = Edit.load(found.save(tmp_path / "copy"))
    for field in ("originals", "plain", "images", "backgrounds", "alphas", "edited_alphas"):
        np.testing.assert_array_equal(getattr(other, field), getattr(found, field))
    with Image.open(tmp_path / "copy" / "seed-1.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), found.originals[0])
    with pytest.raises(UsageError, match="holds no edit"):
        Edit.load(tmp_path / "none")
    for damage in (
        {"names": ["one"] * 9},
        {"names": [1] * len(found)},
        {"strengths": []},
        {"strengths": ["x"]},
        {"direction": 3},
    ):
        file = tmp_path / "copy" / "edit.json"
        whole = file.read_text()
        file.write_text(json.dumps(json.loads(whole) | damage))
        with pytest.raises(UsageError, match="holds no edit that can be read"):
            Edit.load(tmp_path / "copy")
        file.write_text(whole)
    file = tmp_path / "copy" / "edit.safetensors"
    for alphas in (found.alphas * np.nan, found.alphas[:, :4], found.alphas[:1]):
        save_file(load_file(file) | {"alphas": alphas}, file)
        with pytest.raises(UsageError, match=r"(?s)holds no edit that can be read.*alphas"):
            Edit.load(tmp_path / "copy")


def test_a_seed_looks_the_same_in_any_company(run):
    parts, gen = (
        Parts.load(run),
        sis_jax.load_generator(
            json.loads((run / "run.json").read_text())["stages"]["discover"]["config"]["gen"]
        ),
    )
    many, one = (edit(parts, gen=gen, seed=s) for s in ((7, 8, 9), 8))
    np.testing.assert_array_equal(many.images[1], one.images[0])


def test_photos(run, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("sis_jax.stages.project.STATISTICS", 64)
    gen = sis_jax.load_generator(str(weights))
    for seed in (1, 2):
        Image.fromarray(gen.sample([seed], truncation=0.7).to_uint8()[0]).save(
            tmp_path / f"p{seed}.png"
        )
    files = (str(tmp_path / "p1.png"), str(tmp_path / "p2.png"))
    found = edit(str(run), photo=files, steps=3, direction="pca:0")
    assert found.names == ("p1.png", "p2.png")
    for i, file in enumerate(files):
        with Image.open(file) as picture:
            np.testing.assert_array_equal(found.originals[i], np.asarray(picture))
        hole = compositing.hole_of(found.alphas[i])
        np.testing.assert_array_equal(
            found.backgrounds[i][~hole], found.originals[i][~hole]
        )  # the photo's own pixels
    record = json.loads((run / "run.json").read_text())["stages"]["edits/pca-0"]
    assert record["config"]["photo"] == list(files) and "seed" not in record["config"]
    with pytest.raises(UsageError, match="there is no file"):
        edit(str(run), photo=str(tmp_path / "none.png"), name="x")
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    with pytest.raises(SisError, match="none of the 1 photos"):
        edit(str(run), photo=str(tmp_path / "broken.jpg"), name="x")
    assert not (run / "edits" / "x").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"direction": "glasses"}, "unknown direction 'glasses'"),
        ({"seed": ()}, "expected one or more numbers"),
        ({"seed": -1}, "seed is"),
        ({"strength": ()}, "strength is"),
        ({"strength": float("nan")}, "strength is"),
        ({"truncation": 3.0}, "truncation is 3"),
        ({"slots": "99"}, "slots is '99'"),
        ({"n": 3}, "n is 3"),
    ],
)
def test_refused(room, settings, said):
    gen, parts = room
    with pytest.raises(UsageError, match=said):
        edit(parts, gen=gen, **settings)


def test_refused_parts(room, tmp_path):
    gen, parts = room
    with pytest.raises(UsageError, match="no background to keep"):
        edit(replace(parts, classes=tuple(c for c in parts.classes if c["id"])), gen=gen)
    with pytest.raises(UsageError, match="background and nothing else"):
        edit(replace(parts, classes=parts.classes[:1]), gen=gen)
    with pytest.raises(UsageError, match="need their generator"):
        edit(parts)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no parts that can be read"):
        edit(str(tmp_path / "empty"))


def test_dry_run(tmp_path, capsys):
    assert (
        cli.run(
            edit, argv=[str(tmp_path / "r"), "--direction", "a person with glasses", "--dry-run"]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "edits/a-person-with-glasses/edit.png" in said and said.count("not estimated") == 2
    assert not (tmp_path / "r").exists()


def test_an_estimate_grows_with_the_images(run):
    few, many = (plan(EditConfig(str(run), seed=tuple(range(16 * n)))) for n in (1, 1000))
    assert many["seconds"] > 3 * few["seconds"] > 0 and not (run / "edits").exists()
    assert few["memory_bytes"] > 2**26
    assert "seconds" not in plan(EditConfig(str(run), photo="me.jpg"))


def test_the_paths_that_are_printed_are_those_that_were_written(run, capsys):
    """A direction that the run keeps has two names, its own and its prompt; a file has a third."""
    from sis_jax.checkpoints import load_generator

    gen = load_generator(
        json.loads((run / "run.json").read_text())["stages"]["discover"]["config"]["gen"]
    )
    (run / "directions").mkdir()
    file = replace(
        ways.principal(gen, 0), prompt="a person with a hat", method="segmentation_in_style"
    ).save(run / "directions" / "mine.safetensors")
    for asked, folder in (("mine", "mine"), ("hat", "hat"), (str(file), "mine")):
        assert cli.run(edit, argv=[str(run), "--direction", asked, "--overwrite"]) == 0
        printed = capsys.readouterr().out.split()
        assert printed == [
            str(run / "edits" / folder / f) for f in ("edit.png", "edit.json")
        ] and all(Path(p).is_file() for p in printed)
