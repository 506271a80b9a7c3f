"""`discover --rare` and `--ontology`: a class that hardly any sample shows becomes a part, and one
set of labels covers both kinds of samples.
"""

import json

import clip_kit
import fakes
import jax.numpy as jnp
import naming_kit
import numpy as np
import pytest
from PIL import Image

import sis_jax
from sis_jax.data.parts import Parts
from sis_jax.methods.segmentation_in_style import SegmentationInStyle
from sis_jax.models.moved import Moved, mixed
from sis_jax.runs import cli
from sis_jax.runs.configs.discover import RareClass
from sis_jax.stages import discover, rare
from sis_jax.stages.texts import check_rare
from sis_jax.types import SisError, UsageError

pytestmark = pytest.mark.integration

QUICK = {"k": 2, "layer": "16x16", "n": 16, "n_init": 2, "truncation": 1.0}
ASKED = {"rare": "a room with white", "neutral": "black", "rare_n": 300, "rare_share": 0.5}


class Night(naming_kit.Lamp):
    """Dark rooms with a floor; a lamp from the left, with features of its own, where `axis` . w is
    large.
    """

    def synthesize(self, w, noise="const", taps=()):
        edge = 4 + 4 * ((w[:, 0] @ self.axis) - 2.0)
        lit = (jnp.arange(16)[None, None] + 0.5 < edge[:, None, None]) & (
            jnp.arange(16)[None, :, None] < 12
        )
        lit = lit.astype(jnp.float32)
        floor = jnp.broadcast_to(
            (jnp.arange(16) >= 12).astype(jnp.float32)[None, :, None], lit.shape
        )
        images = jnp.broadcast_to((2 * lit - 1)[..., None], (*lit.shape, 3))
        features = jnp.stack(
            [4 * lit, floor * 4, 1 - lit - floor, 0.05 * w[:, 0, 3, None, None] + 0 * lit], -1
        )
        return images, dict.fromkeys(taps, features)

    def lit(self, z, moved):
        edge = 4 + 4 * ((np.asarray(z) @ self.axis + moved) - 2.0)
        return (np.arange(16)[None, None] + 0.5 < edge[:, None, None]) & (
            np.arange(16)[None, :, None] < 12
        )


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    clip_kit.own_folders(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def clip():
    return naming_kit.two_words()


@pytest.fixture(scope="module")
def found(clip):
    gen = Night()
    return gen, sis_jax.discover(gen, clip=clip, **QUICK, **ASKED)


def test_the_rare_class_is_a_part(found):
    gen, parts = found
    assert (
        "white" in parts.names.values()
        and len(parts.arrays["centers"]) == 3
        and len(parts.clusters) == 3
    )
    moved = mixed(gen, parts.arrays)
    assert isinstance(moved, Moved) and moved.share == 0.5
    away = float(np.asarray(moved.move) @ gen.axis)
    chosen = np.asarray(moved.chosen(gen.latents(parts.seeds)))
    truth = gen.lit(gen.latents(parts.seeds), away * chosen[:, None][:, 0])
    white = parts.classify(parts.masks) == next(i for i, n in parts.names.items() if n == "white")
    assert 0 < chosen.sum() < 8 and truth.any()
    assert (white & truth).sum() / (white | truth).sum() > 0.95


def test_shares_of_a_large_generator_draw_no_whole_image(monkeypatch):
    gen, seeds = fakes.tiny_stylegan2(256, channels=4), [0, 1, 2]
    method = SegmentationInStyle(k=2, layer="16x16", n=2, n_init=1, max_points=100, refine="none")
    fitted = method.fit(gen)
    whole = np.concatenate([labels for _, labels, _ in fitted.label_seeds(gen, seeds)])
    monkeypatch.setattr(SegmentationInStyle, "label_seeds", None)
    share = rare._share_of_last(fitted, gen, seeds)
    assert 0 < share < 0.5 and abs(share - (whole == 1).mean()) < 0.01


def test_the_other_labels_are_those_without_it(found):
    """On samples that are not moved, the first centres are as they were, and say the same."""
    gen, parts = found
    plain = sis_jax.discover(gen, **QUICK)
    np.testing.assert_allclose(parts.arrays["centers"][:2], plain.arrays["centers"], atol=1e-5)
    assert parts.background["found"] == plain.background["found"]


def test_a_run(found, clip, tmp_path):
    from sis_jax.stages.directions import Direction

    folder, out = naming_kit.save(clip, tmp_path / "clip"), tmp_path / "run"
    parts = sis_jax.discover(
        found[0],
        clip=str(folder),
        out=str(out),
        ontology={"white": "light", "black": "dark"},
        **QUICK,
        **ASKED,
    )
    facts = json.loads((out / "parts" / "rare.json").read_text())
    assert (
        facts["name"] == "white"
        and facts["share_moved"] > facts["share_plain"] + 0.1
        and facts["passing"] >= 0.9
    )
    assert facts["evidence"] > 0.5
    page, sheet = (
        (out / "report.html").read_text(),
        np.asarray(Image.open(out / "parts" / "rare.png")),
    )
    assert "samples before and after the move" in page and "“a room with white”: moved by" in page
    before, after, shown = (sheet[4 + i * 132 : 132 + i * 132] for i in range(3))
    assert after.mean() > before.mean() + 20 and np.ptp(before - before[..., :1]) == 0 < np.ptp(
        shown - shown[..., :1]
    )  # colour is the class
    direction = Direction.load(out / "parts" / "rare.safetensors")
    np.testing.assert_allclose(direction.move, parts.arrays["rare/move"], atol=1e-6)
    names = json.loads((out / "parts" / "names.json").read_text())
    assert (
        names["classes"] == ["light", "dark"] and not names["clusters"][facts["cluster"]]["named"]
    )
    assert "white" in parts.names.values()  # whatever the ontology calls it
    again = sis_jax.label(
        Parts.load(out), {"white": "light", "black": "dark"}, gen=found[0], clip=clip
    )
    assert "white" in again.names.values() and "light" not in again.names.values()
    assert mixed(found[0], Parts.load(out).arrays).share == 0.5
    command = json.loads((out / "run.json").read_text())["stages"]["discover"]["command"]
    assert "--rare 'a room with white'" in command and "--neutral black" in command


def test_no_other_cluster_gets_the_name_of_the_rare_class(found, clip):
    """An ontology that has the rare class, too, would give its name to whatever is a little like
    it.
    """
    gen, parts = found
    rare = next(c["clusters"] for c in parts.classes if c["name"] == "white")
    for again in (
        sis_jax.label(parts, {"white": "dark", "black": "white"}, gen=gen, clip=clip),
        sis_jax.discover(
            gen, clip=clip, ontology={"white": "dark", "black": "white"}, **QUICK, **ASKED
        ),
    ):
        assert next(c["clusters"] for c in again.classes if c["name"] == "white") == rare == [2]


@pytest.mark.parametrize("content", [b"junk", None])
def test_a_damaged_picture_or_number_leaves_the_report_whole(found, clip, tmp_path, content):
    from sis_jax.runs.page import write_page

    out = tmp_path / "run"
    sis_jax.discover(found[0], clip=clip, out=str(out), **QUICK, **ASKED)
    if content is None:
        facts = json.loads((out / "parts" / "rare.json").read_text())
        (out / "parts" / "rare.json").write_text(json.dumps(facts | {"displacement": "far"}))
    for name in ("rare.png", "gallery.png"):
        data = (out / "parts" / name).read_bytes()
        (out / "parts" / name).write_bytes(content or data[: len(data) // 2])
    page = write_page(out).read_text()
    assert ("moved by" in page) == (
        content is not None
    ) and "samples before and after the move" not in page


def test_dry_run(tmp_path, capsys):
    argv = [
        "faces64",
        "--k",
        "6",
        "--layer",
        "32x32",
        "--out",
        str(tmp_path / "run"),
        "--dry-run",
        "--rare",
        "a person with a hat",
    ]
    assert cli.run(sis_jax.discover, argv=argv) == 0
    assert "parts/rare.png" in capsys.readouterr().out
    assert cli.run(sis_jax.discover, argv=[*argv, "--rare-share", "9"]) == 2
    assert "--rare-share is 9.0, expected a share" in capsys.readouterr().err


def test_the_share_in_a_dataset(found, tmp_path):
    gen, parts = found
    shares = {}
    for mix in (0.0, None, 1.0):
        data = sis_jax.synthesize(gen, parts, n=48, val=0.0, mix=mix, out=str(tmp_path / str(mix)))
        white = next(i for i, n in parts.names.items() if n == "white")
        shares[mix] = np.mean([(e.mask == white).any() for e in data.split("train")])
    assert shares[0.0] < shares[None] < shares[1.0]
    plain = sis_jax.discover(gen, **QUICK)
    with pytest.raises(UsageError, match="no rare class to mix in"):
        sis_jax.synthesize(gen, plain, n=4, mix=0.5, out=str(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a person with glasses", "glasses"),
        ("a photo of a man wearing a hat", "hat"),
        ("a photo of a beard", "beard"),
        ("beard", "beard"),
    ],
)
def test_what_it_is_called(prompt, name):
    assert rare.class_name(prompt) == name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rare": "x", "neutral": "x"}, "expected two texts that differ"),
        ({"rare": " "}, "expected two texts that differ"),
        ({"rare_share": 0.0}, "--rare-share is 0.0"),
        ({"rare_n": 3}, "rare-n is 3"),
        ({"rare": "white with the "}, "would call the part 'the'"),
        ({"rare": "white with "}, "would call the part ''"),
        ({"rare": "white with background"}, "would call the part 'background'"),
        ({"rare": "white with part 1"}, "would call the part 'part 1'"),
        ({"k": 254}, "--k is 254, expected at most 253 with --rare"),
        ({"rare": None}, "--neutral sets how a rare class is found"),
        ({"clip": 5}, "clip is of type int"),
        ({"ontology": {}}, "the ontology is empty"),
        ({"clip": "nowhere"}, "Ways to a text model"),
    ],
)
def test_refused(found, clip, settings, said):
    with pytest.raises(UsageError) as error:
        sis_jax.discover(found[0], **QUICK | {"clip": clip} | ASKED | settings)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("rare", "n", "share"), [(5, 300, 0.5), ("a hat", 300.0, 0.5), ("a hat", 300, "0.5")]
)
def test_other_types_are_refused(rare, n, share):
    asked = RareClass(neutral="nothing")
    for name, value in {"rare": rare, "rare_n": n, "rare_share": share}.items():
        object.__setattr__(asked, name, value)  # past the types, which are checked in tests only
    with pytest.raises(UsageError, match="--rare"):
        check_rare(SegmentationInStyle(), asked)


def test_a_method_without_centres_is_refused_before_anything_is_computed(clip, tmp_path):
    with pytest.raises(
        UsageError, match=r"needs parts that are cluster centres: .* got LatentDirection"
    ):
        sis_jax.discover(
            Night(), method="latent_direction", clip=clip, out=str(tmp_path / "run"), **ASKED
        )
    assert not (tmp_path / "run").exists()


def test_a_class_that_changes_no_feature(clip):
    """The text model sees it, the features do not: no cluster grows."""

    class Blind(Night):
        def synthesize(self, w, noise="const", taps=()):
            images, features = super().synthesize(w, noise, taps)
            return images, {
                t: f.at[..., 0].set(0).at[..., 2].set(1 - f[..., 1] / 4).at[..., 3].set(0)
                for t, f in features.items()
            }

    with pytest.raises(
        SisError, match=r"no cluster grows when samples are moved towards 'a room with white'"
    ):
        sis_jax.discover(Blind(), clip=clip, **QUICK, **ASKED)


class Day(naming_kit.Lamp):
    """Dark rooms; where `axis` . w is large, the upper quarter is white, and the lower half has
    features of its own, which nobody sees.
    """

    seen = 1.0

    def synthesize(self, w, noise="const", taps=()):
        day = (w[:, 0] @ self.axis > 1.5).astype(jnp.float32)[:, None, None]
        rows = jnp.broadcast_to(jnp.arange(16)[None, :, None], (len(w), 16, 16))
        lamp, ground = day * (rows < 4), day * (rows >= 8)
        images = jnp.broadcast_to((2 * lamp - 1)[..., None], (*lamp.shape, 3))
        own = jnp.stack(
            [
                4 * lamp * self.seen,
                4 * ground,
                1 - lamp * self.seen - ground,
                jnp.where(rows < 8, 2.0, -2.0),
            ],
            -1,
        )
        return images, dict.fromkeys(taps, own)


class Elsewhere(Day):
    """What is white has no features of its own."""

    seen = 0.0


@pytest.mark.parametrize(
    ("gen", "rows", "told"), [(Day(), slice(0, 4), False), (Elsewhere(), slice(8, 16), True)]
)
def test_what_the_text_model_sees_is_taken_and_not_what_grows_beside_it(clip, gen, rows, told):
    """Half of the picture changes with a quarter that the text is about. Where only that half can
    be found, the parts say so.
    """
    parts = sis_jax.discover(gen, clip=clip, **QUICK | {"k": 3}, **ASKED)
    white = parts.classify(parts.masks) == next(i for i, n in parts.names.items() if n == "white")
    where = np.zeros(white.shape, bool)
    where[:, rows] = True
    assert white.any() and (white & where).sum() > 0.95 * white.sum()
    assert told == any(
        "comes from the cluster called 'white': it may be something else" in said
        for said in parts.warnings
    )


def test_a_dry_run_counts_the_scores(clip):
    """The estimate grows with the samples that the direction is learned from."""

    def estimated(**asked):
        config = vars(sis_jax.discover)["door"].build(
            {"gen": Night(), "clip": clip, **asked}, QUICK
        )
        return discover.plan(config)

    few, many = (estimated(**ASKED | {"rare_n": n}) for n in (100, 10**6))
    assert many["seconds"] > few["seconds"] + 5
    assert few["memory_bytes"] > 10**8
