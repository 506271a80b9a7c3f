"""Another thing than the one asked for: the sentence names both, and what to type."""

import json
import re
import zipfile

import fakes
import parts_kit
import pytest
from PIL import Image

import sis_jax
from sis_jax import discover
from sis_jax.checkpoints import load_generator, save_generator
from sis_jax.data.files import read_run
from sis_jax.data.folder import Dataset
from sis_jax.data.masks import Masks
from sis_jax.data.parts import Parts
from sis_jax.export import export
from sis_jax.runs import cli
from sis_jax.runs.configs.predict import PredictConfig
from sis_jax.runs.page import write_page
from sis_jax.runs.run import RunFolder
from sis_jax.stages.predict import summary
from sis_jax.types import UsageError


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder: photos/, photos.zip, a run r, and a weights folder gen."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save("photos/a.jpg")
    with zipfile.ZipFile("photos.zip", "w") as archive:
        archive.write("photos/a.jpg", "a.jpg")
    parts_kit.write_run(parts_kit.quarters(), tmp_path / "r")
    write_page("r")
    return tmp_path


@pytest.fixture
def unfinished(here):
    """A run whose discover was killed."""
    asked = vars(discover)["door"].build({"gen": "faces64", "out": "u"}, {})
    with pytest.raises(KeyboardInterrupt), RunFolder.open("u") as run, run.stage(asked) as stage:
        run.write_bytes("parts/samples/00_image.png", b"")
        assert not stage.done
        raise KeyboardInterrupt
    return "u"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("photos/", "photos/ holds photos, expected a generator: .*sis_jax run photos/ --out RUN"),
        ("photos/", "predict faces-student photos/ --out DIR"),
        ("photos.zip", "photos.zip holds photos"),
        ("photos/a.jpg", "a.jpg is a photo, expected a generator: .*predict faces-student"),
        ("r", "r is a run, expected a generator: continue with python -m sis_jax.synthesize r"),
    ],
)
def test_no_generator(here, given, said):
    with pytest.raises(UsageError, match=said):
        load_generator(given)


def test_a_training_has_a_generator(here):
    save_generator(fakes.tiny_stylegan2(16), here / "t/generator")
    (here / "t/run.json").write_text('{"format": 1, "stages": {}}')
    with pytest.raises(UsageError, match="t is a run, expected a generator: give t/generator"):
        load_generator("t")
    with pytest.raises(UsageError, match="t/generator is a generator, expected a run"):
        sis_jax.synthesize("t/generator")


def test_a_folder_of_neither_photos_nor_weights(here):
    (here / "other").mkdir()
    (here / "other/notes.txt").write_text("")
    with pytest.raises(UsageError, match="other is no weights folder"):
        load_generator("other")


def test_discover_ends_with_2(here, capfd):
    assert cli.run(discover, ["photos/", "--out", "x"]) == 2
    assert "expected a generator" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("q", "there is no folder q$"),
        ("runs1/faces", "there is no folder runs1/faces$"),
        ("photo", "there is no folder photo; did you mean 'photos'"),
        ("r/report.html", "r/report.html is a file: give its folder r$"),
        ("photos.zip", "photos.zip is a file: give a run folder"),
    ],
)
@pytest.mark.parametrize("read", [Parts.load, Dataset.open, read_run])
def test_no_run(here, given, said, read):
    with pytest.raises(UsageError, match=said):
        read(given)


@pytest.mark.parametrize(
    "work",
    [
        sis_jax.synthesize,
        sis_jax.edit,
        export,
        lambda run: sis_jax.label(run, prompt=("hair=hair", "a wall=")),
        lambda run: sis_jax.distill(run, steps=2),
    ],
)
def test_a_generator_is_no_run(here, work):
    with pytest.raises(UsageError, match=r"faces64 is a generator, expected a run: .*discover"):
        work("faces64")


def test_a_folder_that_is_no_run(here):
    with pytest.raises(UsageError, match="photos holds no parts: expected the run folder"):
        sis_jax.synthesize("photos")


@pytest.mark.parametrize("work", [sis_jax.synthesize, sis_jax.distill])
def test_an_unfinished_discover(unfinished, work):
    with pytest.raises(UsageError, match=r"did not finish in u: .* sis_jax.discover faces64 --out"):
        work(unfinished)


@pytest.mark.parametrize(
    "command",
    [
        "rm -rf x", "python -m sis_jax.discover \x1b[2J", "python -m sis_jax.discover; rm -rf x",
        "python -m sis_jax.discover $(id)", "python -m sis_jax_evil", "python -m 'sis_jax", 7,
    ],
)  # fmt: skip
def test_a_command_from_elsewhere_is_not_repeated(unfinished, here, command):
    record = json.loads((here / "u/run.json").read_text())
    record["stages"]["discover"]["command"] = command
    (here / "u/run.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"again, it resumes$"):
        Parts.load("u")


def test_no_student(here):
    with pytest.raises(UsageError, match=r"r holds no student: .*or take faces-student"):
        sis_jax.load_student("r")
    with pytest.raises(UsageError, match=r"no folder .*s; did you mean"):
        (here / "s1").mkdir()
        sis_jax.load_student("./s")


def test_an_address_is_no_folder_of_photos():
    with pytest.raises(UsageError, match=r"https://a\.b/c\.jpg is an address: download"):
        sis_jax.predict("faces-student", "https://a.b/c.jpg", out="x")


def test_masks_of_nothing_have_no_summary():
    classes = ({"id": 0, "name": "background"},)
    asked = PredictConfig("r", "photos", out="m")
    assert summary(Masks(classes, (), (("a", "damaged"),), None), asked) == []
    assert summary(Masks(classes, ("a",)), asked)


def test_flags_of_other_verbs(capfd):
    assert cli.run(discover, ["--level", "1"]) == 2
    assert "--level belongs to synthesize" in capfd.readouterr().err
    assert cli.run(sis_jax.predict, ["faces-student", "photos"]) == 2
    assert "give --out DIR" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        (discover, "out ontology seed recipe method dry-run"),
        (sis_jax.distill, "out recipe photos dry-run"),
        (sis_jax.predict, "out format cutouts dry-run"),
    ],
)
def test_the_first_box_of_help(verb, flags, capfd):
    assert cli.run(verb, ["--help"]) == 0
    page = capfd.readouterr().out
    first = page.partition("─ options ─")[2].partition("╰")[0]
    assert all(f"--{flag} " in first for flag in flags.split())
    assert len(re.findall(r"^│ (?:-h, )?--", first, re.MULTILINE)) <= 12
    assert "--no-overwrite" not in page and "None}" not in page


def test_the_settings_of_the_method_are_the_second_box(capfd):
    assert cli.run(discover, ["--help"]) == 0
    second = capfd.readouterr().out.partition("─ method options ─")[2].partition("╰")[0]
    assert re.findall(r"^│ --(\w+)", second, re.MULTILINE)[:3] == ["k", "layer", "n"]
