"""Blanks: generated pictures exported for painting, masks read back in whatever way an editor saved
them, and learned by `discover`.
"""

import json
import shutil

import fakes
import numpy as np
import pytest
from PIL import Image

from sis_jax import __main__ as door
from sis_jax.data import draw
from sis_jax.data.blanks import read_blanks
from sis_jax.data.parts import Parts, classes_from
from sis_jax.discover import discover
from sis_jax.export import export
from sis_jax.methods.datasetgan import DatasetGAN
from sis_jax.methods.labels4free import Labels4Free
from sis_jax.ops.sampling import sample_seeds
from sis_jax.stages.inputs import digests, gather
from sis_jax.synthesize import synthesize
from sis_jax.types import SisError, UsageError

pytestmark = pytest.mark.integration

SIDE = 16


@pytest.fixture(scope="module")
def generator(tiny_weights):
    """A generator as a weights folder, so that it has a digest."""
    return str(tiny_weights)


@pytest.fixture(scope="module")
def run(generator, tmp_path_factory):
    """A run with a dataset of 12 pictures."""
    place = tmp_path_factory.mktemp("runs") / "run"
    discover(generator, out=str(place), k=3, layer="8x8", n=4, n_init=1)
    synthesize(str(place), n=12, val=0.25)
    return place


@pytest.fixture
def blanks(run, tmp_path):
    return export(run, format="blanks", out=str(tmp_path / "blanks"), n=4)


def paint(folder, colours=None, rows=slice(0, 3)):
    """Class 1 where the picture is brighter than its median, as RGB pictures."""
    (folder / "classes.json").write_text(
        json.dumps(
            [{"id": 0, "name": "background"}, {"id": 1, "name": "bright", "colour": "#ff0000"}]
        )
    )
    table = np.array(colours or [[0x7A] * 3, [255, 0, 0]], np.uint8)
    for file in sorted((folder / "images").iterdir())[rows]:
        grey = np.asarray(Image.open(file)).mean(-1)
        Image.fromarray(table[(grey > np.median(grey)).astype(int)]).save(
            folder / "masks" / file.name
        )


def test_what_is_written(run, blanks):
    seeds = sample_seeds(1, 4)
    assert sorted(p.name for p in blanks.iterdir()) == sorted(
        [
            "README.md",
            ".sis-export.json",
            "blanks.json",
            "classes.gpl",
            "classes.json",
            "images",
            "masks",
        ]
    )
    facts = json.loads((blanks / "blanks.json").read_text())
    assert (
        [p["seed"] for p in facts["pictures"]] == seeds
        and facts["truncation"] == 0.7
        and facts["resolution"] == SIDE
    )
    assert len(facts["generator"]["sha256"]) == 64
    for seed in seeds:
        mask = Image.open(blanks / "masks" / f"{seed}.png")
        assert mask.mode == "P" and (np.asarray(mask) == 255).all()
        number = f"{seed - 100_000:06d}.png"
        assert np.array_equal(
            Image.open(blanks / "images" / f"{seed}.png"),
            Image.open(run / "data" / "train" / "images" / number),
        )
    assert "0 | background" in (blanks / "README.md").read_text() and (
        blanks / "classes.gpl"
    ).read_text().startswith("GIMP Palette")


def test_filled_blanks_hold_the_masks_of_the_run(run, tmp_path):
    folder = export(run, format="blanks", out=str(tmp_path / "filled"), n=3, filled=True)
    found = read_blanks(folder)
    for i in range(3):
        assert np.array_equal(
            found.masks[i], Image.open(run / "data" / "train" / "masks" / f"{i:06d}.png")
        )
    (folder / "masks" / f"{found.seeds[1]}.png").unlink()  # not checked by the painter
    assert (read_blanks(folder).masks[1] == 255).all()


def test_from_the_shell_and_what_it_refuses(run, blanks, tmp_path, capsys):
    assert (
        door.main(
            ["export", str(run), "--format", "blanks", "--n", "2", "--out", str(tmp_path / "two")]
        )
        == 0
    )
    assert capsys.readouterr().out.strip() == str(tmp_path / "two")
    for words, told in (
        (["--format", "blanks", "--n", "500"], "has 9 images in its split train, asked for 500"),
        (["--format", "blanks", "--n", "0"], "expected at least 1 image"),
        (["--format", "npz", "--filled"], "belong to --format blanks"),
        (["--format", "blank"], "did you mean 'blanks'"),
        (["--format", "blanks", "--n", "2", "--out", str(blanks)], "is not empty"),
    ):
        assert door.main(["export", str(run), *words]) == 2
        assert told in capsys.readouterr().err
    shutil.copytree(run / "data", tmp_path / "bare" / "data")
    with pytest.raises(UsageError, match=r"no run\.json that states which generator"):
        export(tmp_path / "bare", format="blanks")


def test_painted_masks_are_never_replaced(run, blanks):
    export(run, format="blanks", out=str(blanks), n=2, overwrite=True)  # nothing was painted yet
    paint(blanks)
    with pytest.raises(UsageError, match="has been annotated"):
        export(run, format="blanks", out=str(blanks), n=2, overwrite=True)
    assert read_blanks(blanks).masks.min() == 0


def saved(ids, mode):
    """The same mask as editors save it."""
    picture = draw.palette_png(ids)
    if mode == "reordered":  # 0 and 1 change places in the palette
        values = np.where(ids == 0, 1, np.where(ids == 1, 0, ids)).astype(np.uint8)
        table = draw.palette().copy()
        table[[0, 1]] = table[[1, 0]]
        picture = Image.fromarray(values)
        picture.putpalette(table.ravel().tolist())
    elif mode == "own colours":  # another palette altogether: the values count
        picture.putpalette(np.random.default_rng(0).integers(30, 250, 768).tolist())
    elif mode == "grey":
        picture = Image.fromarray(ids)
    elif mode == "transparent":
        pixels = np.dstack([draw.palette()[ids], np.where(ids == 255, 0, 255).astype(np.uint8)])
        pixels[ids == 255, :3] = 77
        picture = Image.fromarray(pixels)
    elif mode in ("RGB", "RGBA"):
        picture = picture.convert(mode)
    return picture


@pytest.mark.parametrize(
    "mode", ["P", "reordered", "own colours", "grey", "RGB", "RGBA", "transparent"]
)
def test_masks_are_read_however_they_were_saved(blanks, mode):
    ids = np.random.default_rng(1).choice([0, 1, 5, 255], (SIDE, SIDE)).astype(np.uint8)
    (blanks / "classes.json").write_text(
        json.dumps([{"id": i, "name": f"c{i}"} for i in (0, 1, 5)])
    )
    file = sorted((blanks / "masks").iterdir())[2]
    saved(ids, mode).save(file)
    found = read_blanks(blanks)
    assert np.array_equal(found.masks[2], ids) and (found.masks[[0, 1, 3]] == 255).all()
    assert (
        found.names == {0: "c0", 1: "c1", 5: "c5"}
        and found.images is not None
        and found.images.shape == (4, SIDE, SIDE, 3)
    )


def _soft(folder):
    file = next((folder / "masks").iterdir())
    Image.open(file).convert("RGB").resize(
        (SIDE, SIDE), Image.Resampling.BILINEAR, (0.5, 0.5, SIDE - 0.5, SIDE - 0.5)
    ).save(file)


def _write(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda f: (f / "blanks.json").write_text('{"pictures": [5]}'),
            SisError,
            "blanks.json cannot be read",
        ),
        (lambda f: (f / "classes.json").write_text("{}"), UsageError, "lists no classes"),
        (
            lambda f: (f / "classes.json").write_text(
                '[{"id": 0, "name": "a", "colour": "#141414"}]'
            ),
            UsageError,
            "colour #141414, expected",
        ),
        (
            lambda f: [Image.open(m).resize((32, 32)).save(m) for m in (f / "masks").iterdir()],
            UsageError,
            "is 32x32, expected 16x16",
        ),
        (
            lambda f: Image.new("RGB", (SIDE, SIDE), (1, 2, 3)).save(next((f / "masks").iterdir())),
            UsageError,
            "colour #010203: paint with",
        ),
        (
            lambda f: Image.new("L", (SIDE, SIDE), 9).save(next((f / "masks").iterdir())),
            UsageError,
            "256 pixels of no class.*grey value 9",
        ),
        (
            lambda f: next((f / "masks").iterdir()).write_bytes(b"no picture"),
            SisError,
            "cannot be read as a PNG",
        ),
        (
            lambda f: [m.unlink() for m in (f / "masks").iterdir()],
            UsageError,
            "no pixel of the masks",
        ),
        (
            lambda f: [Image.new("L", (SIDE, SIDE), 1).save(m) for m in (f / "masks").iterdir()],
            UsageError,
            "only the class 'bright'",
        ),
        (_write("classes.json", "{"), UsageError, "classes.json cannot be read.*expected"),
        (
            _write("classes.json", '[{"id": 0, "name": "a"}, {"id": 0, "name": "b"}]'),
            UsageError,
            "two classes with the id",
        ),
        (_write("classes.json", '[{"id": 255, "name": "a"}]'), UsageError, "ids go from 0 to 254"),
        (lambda f: (f / "classes.json").unlink(), UsageError, "classes.json is missing; expected"),
        (_write("blanks.json", "[]"), SisError, "blanks.json cannot be read"),
        (lambda f: (f / "blanks.json").unlink(), UsageError, "is no folder of blanks"),
    ],
)
def test_bad_blanks(blanks, spoil, error, message):
    paint(blanks)
    spoil(blanks)
    with pytest.raises(error, match=message):
        read_blanks(blanks)


def test_soft_edges_are_told(blanks):
    paint(blanks, rows=slice(0, 4))
    _soft(blanks)
    with pytest.raises(UsageError, match=r"pixels of no class.*paint with a hard pencil"):
        read_blanks(blanks)


def test_painted_blanks_become_parts_with_their_names(generator, blanks, tmp_path):
    paint(blanks)
    out = tmp_path / "painted"
    settings = {"members": 2, "steps": 40, "batch": 64, "max_points": 500}
    parts = discover(
        generator,
        out=str(out),
        method="datasetgan",
        masks=str(blanks),
        classifier="linear",
        **settings,
    )
    assert parts.names == {0: "background", 1: "bright"} and parts.background["found"]
    assert [
        c["name"] for c in json.loads((out / "parts" / "painted.json").read_text())["classes"]
    ] == ["background", "bright"]
    again = Parts.load(out)
    assert classes_from(list(again.clusters), True)[1]["name"] == "bright"
    data = synthesize(str(out), n=20, val=0.5)
    masks = {split: np.stack([e.mask for e in data.split(split)]) for split in data.splits}
    assert set(np.unique(masks["train"])) == {0, 1}
    assert np.array_equal(
        masks["train"][:10],
        np.stack([e.mask for e in synthesize(str(out), n=20, val=0.5).split("train")])[:10],
    )


def test_more_painting_makes_other_parts(generator, blanks, tmp_path):
    """The masks are part of what was asked for: the same folder with more in it is not done, and
    saving a mask again changes nothing.
    """
    paint(blanks)
    ask = {
        "out": str(tmp_path / "run"),
        "method": "datasetgan",
        "masks": str(blanks),
        "classifier": "linear",
        "members": 1,
        "steps": 5,
    }
    discover(generator, **ask)
    record = (tmp_path / "run" / "run.json").read_bytes()
    paint(blanks, colours=[[0x7A] * 3 + [255], [255, 0, 0, 255]])
    discover(generator, **ask)
    assert (tmp_path / "run" / "run.json").read_bytes() == record
    paint(blanks, rows=slice(3, 4))
    with pytest.raises(
        UsageError,
        match=r"inputs.masks='768 painted pixels \(\w+\)', now asked for '1,024 painted pixels "
        r".*--overwrite",
    ):
        discover(generator, **ask)
    discover(generator, **ask, overwrite=True)
    assert len(json.loads((tmp_path / "run" / "parts" / "painted.json").read_text())["seeds"]) == 4
    with pytest.raises(UsageError, match="no folder of blanks"):
        discover(generator, **ask | {"masks": str(tmp_path)}, overwrite=True)
    assert Parts.load(tmp_path / "run").names[1] == "bright"  # what cannot be read replaces nothing


def test_digest_of_photos_sees_names_sizes_and_number(tmp_path):
    gen, method = fakes.tiny_stylegan2(), Labels4Free(photos=str(tmp_path / "photos"))
    (tmp_path / "photos").mkdir()
    with pytest.raises(UsageError, match="there is no file or folder"):
        digests(Labels4Free(photos=str(tmp_path / "none")), gen)
    found = []
    for name, size in (("a.png", 16), ("b.png", 16), ("a.png", 24)):
        Image.new("RGB", (size, size)).save(tmp_path / "photos" / name)
        found.append(digests(method, gen)["photos"])
    assert len(set(found)) == 3 and found[0].startswith("1 photos in photos (")
    (tmp_path / "photos" / "c.png").symlink_to("gone.png")
    assert digests(method, gen)["photos"].startswith("3 photos in photos (")
    assert digests(Labels4Free(), gen) == digests(DatasetGAN(), gen) == gen.info.sha256


def test_blanks_of_something_else_are_refused(generator, blanks):
    from sis_jax.checkpoints import load_generator

    paint(blanks)
    gen = load_generator(generator)
    method = DatasetGAN(masks=str(blanks))
    found = gather(method, gen, generator, None)["inputs"]
    assert (
        found.annotated.shape == (4, SIDE, SIDE)
        and found.annotated_seeds == tuple(sample_seeds(1, 4))
        and found.annotated_names[1] == "bright"
    )
    with pytest.raises(UsageError, match=r"drawn by the generator .*, this one is"):
        facts = json.loads((blanks / "blanks.json").read_text())
        (blanks / "blanks.json").write_text(
            json.dumps(facts | {"generator": facts["generator"] | {"sha256": "0" * 64}})
        )
        gather(method, gen, generator, None)
    (blanks / "blanks.json").write_text(json.dumps(facts))
    with pytest.raises(UsageError, match=r"drawn at psi 0.7, not 0.5: give --truncation 0.7"):
        gather(DatasetGAN(masks=str(blanks), truncation=0.5), gen, generator, None)
    with pytest.raises(UsageError, match="16 pixels, tiny draws 32"):
        gather(method, fakes.tiny_stylegan2(32), None, None)
    with pytest.raises(UsageError, match=r"is not the image that tiny draws for it"):
        gather(method, fakes.tiny_stylegan2(seed=5), None, None)  # a generator without a digest
    assert gather(DatasetGAN(), gen, generator, None)["inputs"].annotated is None
