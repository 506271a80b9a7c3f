"""`label`: regions in CLIP's space, names, merges, background, the run folder, and what is
refused.
"""

import json
import shutil
from pathlib import Path

import clip_kit
import fakes
import jax.numpy as jnp
import naming_kit
import numpy as np
import pytest

import sis_jax
from sis_jax.data.ontology import Ontology
from sis_jax.data.parts import Parts
from sis_jax.label import label
from sis_jax.models.clip_regions import pool_regions, to_pixels
from sis_jax.ops.resize import resize_bilinear
from sis_jax.runs import cli
from sis_jax.runs.configs.label import LabelConfig, Naming, Words
from sis_jax.stages import naming, regions
from sis_jax.stages.label import plan, resolve
from sis_jax.stages.teacher import Teacher
from sis_jax.types import SisError, UsageError

pytestmark = pytest.mark.integration

FACES_CLIP = str(Path(__file__).parents[1] / "ported_weights" / "faces-clip")
LIGHT = {"a white disc": "disc", "black": "ground"}


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    clip_kit.own_folders(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def clip():
    return naming_kit.two_words()


@pytest.fixture(scope="module")
def disc():
    return naming_kit.disc_parts()


# Regions


@pytest.mark.parametrize("align_corners", [False, True])
def test_pooling_is_that_of_upsampled_features(align_corners):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2, 3, 5, 4)).astype(np.float32)
    labels = rng.integers(0, 3, (2, 12, 10)).astype(np.uint8)
    labels[1, 6:] = 255  # filled up: no cluster
    large = np.asarray(
        resize_bilinear(
            jnp.asarray(features), (12, 10), align_corners=align_corners, antialias=False
        )
    )
    sums, count = pool_regions(jnp.asarray(features), jnp.asarray(labels), 3, align_corners)
    for cluster in range(3):
        np.testing.assert_allclose(
            sums[cluster], large[labels == cluster].sum(0), rtol=1e-4, atol=1e-4
        )
        assert count[cluster] == (labels == cluster).sum()


def test_pixels_are_those_of_the_preprocessing(clip):
    photos = (
        np.random.default_rng(1).integers(90, 160, (2, 10, 10, 3)).astype(np.uint8)
    )  # so that nothing is clipped on the way
    mine = to_pixels(
        jnp.asarray(photos / np.float32(127.5) - 1),
        (16, 16),
        (clip.preprocessing.mean, clip.preprocessing.std),
    )
    np.testing.assert_allclose(
        mine, clip.preprocess(photos), atol=1.5 / 255 / 0.26
    )  # Pillow rounds to 8 bits twice


def test_crops():
    image = np.full((8, 10, 3), 200, np.uint8)
    inside = np.zeros((8, 10), bool)
    inside[2:6, 0:2] = True
    crop = regions.masked_crop(image, inside)
    assert (
        crop.shape == (6, 6, 3)
        and (crop == 200).all(-1).sum() == 8
        and (crop == 127).all(-1).sum() == 28
    )
    assert (crop[1:5, 2:4] == 200).all()  # in the middle, as far as it can be


# Names


@pytest.mark.parametrize("mode", ["dense", "crop"])
def test_names(disc, clip, mode):
    gen, parts = disc
    named = label(parts, LIGHT, clip=clip, gen=gen, mode=mode, n=6)
    assert named.names == {0: "background", 1: "disc"} or set(named.names.values()) == {
        "disc",
        "ground",
    }
    table = {c["name"]: c for c in named.classes}
    white = table["disc"]
    mask = named.classify(named.masks) == white["id"]
    assert (mask == gen.truth(named.seeds, 0.7)).mean() > 0.97
    assert (
        white["prompts"] == ["a white disc"]
        and white["runner_up"] == "ground"
        and not white["unsure"]
    )
    assert 0.9 < white["score"] <= 1 and white["margin"] == pytest.approx(
        2 * white["score"] - 1, abs=1e-5
    )
    assert all(set(c["scores"]) == {"disc", "ground"} for c in named.clusters)


def test_the_score_is_the_one_of_the_equation(disc, clip):
    """Cosines are 1 and -1 but for patches on the edge; the softmax of 5 times them is told by
    hand.
    """
    gen, parts = disc
    teacher = Teacher.of(gen, parts)
    found = naming.name_parts(
        teacher, clip, Ontology((("white", "disc"), ("black", "ground"))), Naming(n=4)
    )
    np.testing.assert_allclose(np.abs(found.cosine), 1, atol=1e-4)
    np.testing.assert_allclose(found.probability.max(1), 1 / (1 + np.exp(-10)), rtol=1e-4)
    assert (
        found.table()["probability"][0] == pytest.approx(found.probability[0].tolist())
        and len(found.table()["clusters"]) == 2
    )


def test_one_name_makes_one_part(disc, clip):
    gen, _ = disc
    parts = sis_jax.discover(gen, k=4, layer="16x16", n=8, n_init=2)
    named = label(parts, LIGHT, clip=clip, gen=gen, n=6)
    assert sorted(n for n in named.names.values() if n != "background") in (
        ["disc", "ground"],
        ["disc"],
    )
    assert sum(len(c["clusters"]) for c in named.classes) == 4
    assert len([c for c in named.classes if c["name"] == "disc"]) == 1


def test_the_background_from_text(disc, clip):
    gen, parts = disc
    named = label(parts, {"white": "disc", "black": None}, clip=clip, gen=gen, n=6)
    assert (
        named.names == {0: "background", 1: "disc"}
        and named.background["found"]
        and "'black'" in named.background["why"]
    )
    turned = label(parts, {"white": None, "black": "ground"}, clip=clip, gen=gen, n=6)
    ground = turned.classify(turned.masks) == turned_id(turned, "ground")
    assert (ground != gen.truth(turned.seeds, 0.7)).mean() > 0.97 and turned.names[
        0
    ] == "background"


def turned_id(parts, name):
    return next(i for i, n in parts.names.items() if n == name)


def test_a_background_that_fits_nothing(disc, clip):
    gen, parts = disc
    named = label(
        parts, {"white": "disc", "black": "ground", "a wall": None}, clip=clip, gen=gen, n=6
    )
    assert (
        0 not in named.names
        and not named.background["found"]
        and "'a wall' fits no part" in named.background["why"]
    )
    with pytest.raises(SisError, match="every part was named background"):
        label(parts, {"white": None, "black": None, "a wall": "wall"}, clip=clip, gen=gen, n=6)


def test_parts_that_nothing_fits_stay_as_they_were(disc, clip):
    gen, parts = disc
    named = label(parts, {"a dog": "dog", "a cat": "cat"}, clip=clip, gen=gen, n=6)
    assert named.names == parts.names and all(
        c["unsure"] and c["margin"] == 0 for c in named.classes
    )
    assert any("named no part" in w for w in named.warnings)
    again = label(named, LIGHT, clip=clip, gen=gen, n=6)
    assert "disc" in again.names.values() and not any("named no part" in w for w in again.warnings)


def test_neutral_words_take_what_they_fit(disc, clip):
    gen, parts = disc
    named = label(
        parts, {"black": "ground", "a dog": "dog"}, neutral=("white",), clip=clip, gen=gen, n=6
    )
    free = next(c for c in named.classes if c["unsure"])
    assert free["name"] == "part 1" and "ground" in named.names.values()
    assert free["score"] < 0.1 and free["runner_up"] == "(neutral)"  # not unsure with a high score


def test_a_margin_that_is_not_reached(disc):
    gen, parts = disc
    weak = naming_kit.two_words(scale=0.5)
    assert "disc" in label(parts, LIGHT, clip=weak, gen=gen, n=6, margin=0.3).names.values()
    assert label(parts, LIGHT, clip=weak, gen=gen, n=6, margin=0.5).names == parts.names
    guess = next(
        c for c in label(parts, LIGHT, clip=weak, gen=gen, n=6, margin=0.5).classes if c["id"] == 1
    )
    assert guess["guess"] == "disc" and guess["unsure"]


def test_long_prompts_say_what_was_cut(disc, clip):
    gen, parts = disc
    long = "white one two three four five six seven eight nine ten eleven twelve"
    named = label(parts, {long: "disc", "black": "ground"}, clip=clip, gen=gen, n=4)
    told = next(w for w in named.warnings if "longer than the 12 tokens" in w)
    assert (
        told.endswith("cut off was 'ten eleven twelve'. Shorten it.")
        and "disc" in named.names.values()
    )


def test_batches_change_nothing(disc, clip, monkeypatch):
    gen, parts = disc
    teacher, words = (Teacher.of(gen, parts), Ontology((("white", "disc"), ("black", "ground"))))
    one = naming.name_parts(teacher, clip, words, Naming(n=11))
    monkeypatch.setattr(regions, "BATCH", 3)
    other = naming.name_parts(teacher, clip, words, Naming(n=11))
    np.testing.assert_allclose(one.cosine, other.cosine, atol=1e-5)


def test_the_papers_setting():
    resolved = resolve(LabelConfig("run", recipe="paper"))
    assert resolved.clip == "RN50x64" and resolved.words.templates
    assert resolved.naming == Naming(size=2048, margin=0.0, align_corners=True)
    given = LabelConfig("run", recipe="paper", naming=Naming(size=512))
    assert resolve(given).naming == Naming(size=512, margin=0.0, align_corners=True)
    with pytest.raises(UsageError, match="'paper'"):
        resolve(LabelConfig("run", recipe="papre"))


def test_resnets_name_too(disc):
    gen, parts = disc
    clip = sis_jax.load_clip(clip_kit.GOLDENS / "openai_rn_tiny.pt")
    found, _ = regions.pooled(Teacher.of(gen, parts), clip, Naming(n=3))
    assert (
        found[0].shape == (2, clip.config.embed_dim)
        and np.isfinite(found[0]).all()
        and found[1].sum() == 3 * 16 * 16
    )


# Refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n": 0}, "n is 0"),
        ({"margin": 1.5}, "margin is 1.5"),
        ({"size": -1}, "size is -1"),
        ({"ontology": {}}, "the ontology is empty"),
        ({"recipe": "paperr"}, "unknown recipe"),
        (
            {"clip": "openai/clip-vit-base-patch33"},
            "Ways to a text model: (1) --clip faces-clip, which ships",
        ),
        ({"clip": "nothing here"}, "unknown CLIP 'nothing here'"),
    ],
)
def test_refused(disc, settings, said):
    gen, parts = disc
    asked = {"ontology": LIGHT, "gen": gen, "n": 4} | settings
    with pytest.raises(UsageError) as error:
        label(parts, asked.pop("ontology"), **asked)
    assert said in str(error.value)


def test_parts_of_a_generator_that_is_not_found(disc, clip):
    with pytest.raises(UsageError, match=r"not found by its name .*gen=gen"):
        label(disc[1], LIGHT, clip=clip)
    with pytest.raises(UsageError, match="no folder nowhere"):
        label("nowhere", LIGHT, clip=clip)


# A run folder


@pytest.fixture
def run(tiny_run, tmp_path):
    """A finished `discover` of a tiny network, and a CLIP in a folder."""
    shutil.copytree(tiny_run, tmp_path / "run")
    return tmp_path / "run", naming_kit.save(naming_kit.two_words(), tmp_path / "clip")


def test_a_run(run, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(cli, "enable_compilation_cache", lambda: None)
    folder, clip = run
    (tmp_path / "o.json").write_text(json.dumps(LIGHT))
    words = [
        str(folder),
        "--ontology",
        str(tmp_path / "o.json"),
        "--clip",
        str(clip),
        "--n",
        "6",
        "--margin",
        "0",
    ]
    assert cli.run(label, argv=words) == 0
    assert capfd.readouterr().out.split() == [
        str(folder / n) for n in ("parts/classes.json", "parts/names.json", "report.html")
    ]
    named, table = Parts.load(folder), json.loads((folder / "parts" / "names.json").read_text())
    assert (
        set(named.names.values()) <= {"disc", "ground"}
        and table["classes"] == ["disc", "ground"]
        and len(table["probability"]) == 3
    )
    page = (folder / "report.html").read_text()
    assert "Runner-up" in page and "python -m sis_jax.label" in page

    before = (folder / "run.json").read_bytes()
    assert cli.run(label, argv=words) == 0 and "already holds these names" in capfd.readouterr().err
    assert (folder / "run.json").read_bytes() == before
    assert (
        cli.run(label, argv=[*words, "--seed", "1"]) == 2
        and "seed=0, now asked for 1" in capfd.readouterr().err
    )
    assert cli.run(label, argv=[*words, "--seed", "1", "--overwrite"]) == 0
    assert Parts.load(folder).masks.shape == named.masks.shape


def test_a_request_that_fails_takes_no_names_away(run):
    folder, clip = run
    label(str(folder), LIGHT, clip=str(clip), n=6, margin=0.0)
    before = {p: p.read_bytes() for p in folder.rglob("*.json")}
    with pytest.raises(UsageError, match="faces-clip does not know 'giraffe'"):
        label(
            str(folder),
            {"a giraffe": "giraffe", "a wall": None},
            clip=FACES_CLIP,
            n=6,
            overwrite=True,
        )
    assert {p: p.read_bytes() for p in folder.rglob("*.json")} == before


def test_names_after_the_parts_were_found_again(run, tiny_weights):
    """`discover --overwrite` takes the names away; the same `label` gives them again."""
    folder, clip = run
    asked = {"clip": str(clip), "n": 6, "margin": 0.0}
    label(str(folder), LIGHT, **asked)
    sis_jax.discover(tiny_weights, out=str(folder), **fakes.TINY_PARTS, overwrite=True)
    assert not set(Parts.load(folder).names.values()) & {"disc", "ground"}
    assert set(label(str(folder), LIGHT, **asked).names.values()) & {"disc", "ground"}


def test_dry_run(run, capfd):
    """A trial with the text model that is there; nothing is written or downloaded."""
    folder, clip = run
    before = sorted(p.name for p in folder.rglob("*"))
    asked = [str(folder), "--prompt", "a=b", "--prompt", "c=d", "--dry-run"]
    assert cli.run(label, argv=asked) == 0
    said = capfd.readouterr().out
    assert "parts/names.json" in said and said.count("not estimated") == 2
    assert cli.run(label, argv=[*asked, "--clip", str(clip)]) == 0
    assert "not estimated" not in capfd.readouterr().out
    assert sorted(p.name for p in folder.rglob("*")) == before


def test_an_estimate_grows_with_the_samples(run):
    folder, clip = run
    words = Words(ontology=LIGHT)
    few, many = (
        plan(LabelConfig(str(folder), words, naming=Naming(n=n), clip=str(clip)))
        for n in (1, 100_000)
    )
    assert many["seconds"] > 3 * few["seconds"] > 0
    assert few["memory_bytes"] > 2**26
