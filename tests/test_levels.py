"""Parts in two levels: names, files, and masks of the finer level."""

import dataclasses
import json

import jax
import naming_kit
import numpy as np
import pytest

import sis_jax
from sis_jax.data.files import read_run
from sis_jax.data.ontology import Ontology, ontology_of
from sis_jax.data.part_names import finer_classes
from sis_jax.data.parts import Parts, classes_from
from sis_jax.ops import class_scores, levels
from sis_jax.ops.cluster_labels import label_maps
from sis_jax.runs.configs.distill import DistillConfig, Source
from sis_jax.runs.configs.label import Naming
from sis_jax.stages import distill as distill_stage
from sis_jax.stages.naming import Named, Query, _separated, _statements, _with_mixtures, name_parts
from sis_jax.stages.teacher import Teacher
from sis_jax.types import Info, UsageError

COARSE = [(0.5, False), (0.3, True), (0.2, False)]  # (share, background) of each cluster
FINER = [(0, 0.1), (0, 0.4), (1, 0.3), (2, 0.12), (2, 0.08)]  # (parent, share)
PARENT = np.array([p for p, _ in FINER])


@pytest.fixture
def parts():
    """Coarse clusters 0, 1 (background) and 2; the first and the last are split in two."""
    rng = np.random.default_rng(0)
    clusters = [{"id": i, "share": s, "background": b} for i, (s, b) in enumerate(COARSE)]
    finer = [{"id": i, "share": s, "parent": p} for i, (p, s) in enumerate(FINER)]
    masks = rng.integers(0, len(FINER), (2, 16, 16)).astype(np.uint8)
    arrays = {"centers": rng.standard_normal((3, 4)).astype(np.float32)}
    both = Parts(
        method="segmentation_in_style",
        settings={"k": 3},
        arrays=arrays,
        classes=classes_from(clusters, True),
        clusters=tuple(clusters),
        background={"found": True, "why": "it is"},
        generator=Info("tiny", "none needed", "made here", "abc"),
        samples=rng.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8),
        masks=PARENT[masks].astype(np.uint8),
        seeds=(0, 1),
        confidence=(0.5, 0.25),
    )
    below = dataclasses.replace(
        both,
        arrays=arrays | {"finer/parent": PARENT.astype(np.int32)},
        classes=finer_classes(both.classes, finer),
        clusters=tuple(finer),
        masks=masks,
        confidence=(0.25, 0.125),
    )
    return dataclasses.replace(both, finer=below).with_classes(both.classes)


def verdict(name, named=True):
    facts = {"score": 0.9, "margin": 0.8, "runner_up": "x", "prompts": [f"a {name}"], "scores": {}}
    return {"name": name, "named": named, **facts}


def test_a_level_is_parts_of_one_level(parts):
    coarse, finer = parts.level(0), parts.level(1)
    assert coarse.names == {0: "background", 1: "part 1", 2: "part 2"} and coarse.finer is None
    assert finer.names == {
        0: "background", 1: "part 1.1", 2: "part 1.2", 3: "part 2.1", 4: "part 2.2"
    }  # fmt: skip
    assert [c["clusters"] for c in finer.classes] == [[2], [1], [0], [3], [4]]  # the largest first
    assert coarse.digest() == parts.digest() != finer.digest()
    outlines = [(p.classify(p.masks) == 0) for p in (coarse, finer)]
    np.testing.assert_array_equal(*outlines)
    with pytest.raises(UsageError, match="level is 2, expected 0 or 1"):
        parts.level(2)
    with pytest.raises(UsageError, match="level is 1, expected 0, the only one; discover without"):
        coarse.level(1)


def test_the_finer_level_follows_a_renaming(parts):
    renamed = parts.rename({1: "face"})
    assert renamed.level(1).names == {
        0: "background", 1: "face 1", 2: "face 2", 3: "part 2.1", 4: "part 2.2"
    }  # fmt: skip
    merged = parts.merge([1, 2], "head").level(1)
    assert list(merged.names.values())[1:] == ["head 1", "head 2", "head 3", "head 4"]
    dropped = parts.drop(2).level(1)
    assert list(dropped.names) == [0, 1, 2] and dropped.classes[0]["clusters"] == [2, 3, 4]
    assert [c["background"] for c in dropped.clusters] == [False, False, True, True, True]
    mine = dataclasses.replace(parts, finer=parts.level(1).rename({1: "nose"}))
    assert list(mine.rename({1: "face"}).level(1).names.values())[1:3] == ["nose", "face"]


def test_text_names_both_levels(parts):
    said = {0: verdict("face"), 1: verdict(None), 2: verdict("hair")}
    finer = {i: verdict("face") for i in (0, 1)} | {2: verdict(None)}
    finer |= {3: verdict("clothes"), 4: verdict(None)}
    named = parts.named(said, finer)
    assert named.names == {0: "background", 1: "face", 2: "hair"}
    below = named.level(1)
    assert below.names == {0: "background", 1: "face 1", 2: "face 2", 3: "clothes", 4: "part 2"}
    assert [c["unsure"] for c in below.classes] == [False, False, False, False, True]
    again = named.named(said, {i: verdict("face", named=False) for i in range(5)}).level(1)
    assert list(again.names.values())[3:] == ["part 2.1", "part 2.2"]  # a wrong name is worse


def test_finer_parts_are_compared_with_each_other(parts):
    """One is a mouth, since it has more of lips than the other face; one is between two classes."""
    face = {"face": ["skin"], "mouth": ["lips"]}
    words = ontology_of({"classes": {"face": face, "hair": ["hair"]}, "background": ["a wall"]})
    cosine = np.array(  # skin, lips, hair, a wall
        [[0.9, 0, 0.1, 0], [0.9, 0.5, 0.1, 0], [0, 0, 0, 0.9], [0.1, 0, 0.9, 0], [0.6, 0, 0.5, 0]]
    )
    probability = class_scores.softmax(10 * cosine[:, [0, 2, 3]])
    verdicts = class_scores.decide(probability)
    assert [words.classes[v.best] for v in verdicts] == ["face", "face", None, "hair", "face"]
    best = cosine[:, [0, 2, 3]]
    table = Named(parts.finer, words.classes, best, probability, verdicts, "x", cosine)
    table = _separated(table, query_of(words))
    said = _statements(table, words)
    assert [said[i]["name"] for i in range(4)] == ["face", "mouth", None, "hair"]
    assert [said[i]["named"] for i in range(5)] == [True] * 4 + [False]
    assert said[1]["prompts"] == ["lips"] and said[4]["score"] < 0.6
    rows = table.table("finer_class")["clusters"]
    assert [row.get("finer_class") for row in rows][:2] == [None, "mouth"]


def query_of(words):
    clip = dataclasses.replace(naming_kit.two_words(), info=Info("x"))
    return Query(words, np.zeros((len(words.texts), 3), np.float32), clip, 0.1)


@pytest.mark.parametrize(
    ("finer", "name", "named"),
    [
        ([4.0, 0, 0], "hair", True),  # of one class
        ([0, 4.0, 0], "hair with clothes", True),
        ([1.0, 0.99, 0], "hair", True),  # not clear enough to be named
        ([0, 0, 4.0], "hair", False),  # it holds background
        ([6.0, 5.0, 0], "hair", True),  # clothes beside the other, hair by itself
    ],
)
def test_a_coarse_part_of_several_classes_has_all_their_names(parts, finer, name, named):
    words = ontology_of({"hair": "hair", "clothes": "clothes", "a wall": None})
    scale = query_of(words).scale

    def table(parts, logits, verdicts=None):
        logits = np.array(logits, float)
        likely = class_scores.softmax(logits)
        decided = verdicts or class_scores.decide(likely)
        return Named(parts, words.classes, logits / scale, likely, decided, "x", logits / scale)

    coarse = table(parts, [[0, 0, 4.0], [0, 0, 4.0], [4.0, 0, 0]])
    below = table(parts.finer, [[0, 0, 4.0]] * 3 + [[4.0, 0, 0], finer])
    if finer[0] > 4:  # what `_separated` makes of it
        below.verdicts[4] = class_scores.Verdict(1, 0, 0.9, 0.8, True)
    mixed = _with_mixtures(coarse, below, query_of(words))
    said = _statements(mixed, words)[2]
    assert (said["name"], said["named"]) == (name, named)
    assert mixed.table()["clusters"][2].get("mixture") == (name if "with" in name else None)
    if "with" in name:
        assert said["prompts"] == ["hair", "clothes"] and said["runner_up"] == "background"
        assert said["score"] == pytest.approx(mixed.probability[2, :2].sum())


def test_text_may_take_a_cluster_from_the_background(parts):
    said = {0: verdict(None), 1: verdict("sea"), 2: verdict("hair")}
    below = parts.named(said, {}).level(1)
    assert below.classes[0]["clusters"] == [0, 1]
    assert {c["name"]: c["clusters"] for c in below.classes[1:]} == {
        "sea": [2], "hair 1": [3], "hair 2": [4]
    }  # fmt: skip


def test_both_levels_are_saved(parts, tmp_path):
    back = Parts.load(parts.save(tmp_path / "both"))
    for one, other in ((parts.level(i), back.level(i)) for i in (0, 1)):
        assert one.classes == other.classes and one.clusters == other.clusters
        assert (one.confidence, one.seeds) == (other.confidence, other.seeds)
        assert one.arrays.keys() == other.arrays.keys() and one.digest() == other.digest()
        np.testing.assert_array_equal(one.masks, other.masks)
        np.testing.assert_array_equal(one.samples, other.samples)
    facts = json.loads((tmp_path / "both" / "classes.json").read_text())
    assert [c["parent"] for c in facts["finer"]["clusters"]] == PARENT.tolist()
    assert (tmp_path / "both" / "samples" / "01_finer.png").is_file()
    alone = Parts.load(parts.level(1).save(tmp_path / "finer"))
    assert alone.finer is None and alone.digest() == parts.level(1).digest()


def test_the_gallery_shows_both(parts):
    coarse, both = (np.asarray(p.show()) for p in (parts.level(0), parts))
    assert coarse.shape == both.shape and (coarse != both).any()


# How the finer level is learned


def blobs(rng, centers, samples=8, each=30):
    """Points [n d] around the centres, the same for every sample, and the number of the centre."""
    number = np.tile(np.repeat(np.arange(len(centers)), each), samples)
    return centers[number] + 0.1 * rng.standard_normal((len(number), centers.shape[1])), number


@pytest.mark.integration
def test_each_part_is_split_by_itself():
    rng = np.random.default_rng(0)
    own = [np.concatenate([np.eye(6) * 3 + 20 * i, np.full((1, 6), 20 * i)])[:k] for i, k in PARTS]
    x, number = blobs(rng, np.concatenate(own))
    coarse = np.repeat([i for i, _ in PARTS], [k for _, k in PARTS])[number]
    centers = np.stack([x[coarse == i].mean(0) for i in range(3)]).astype(np.float32)
    finer = levels.split(x.astype(np.float32), coarse, centers, [0, 2], 8, seed=0)
    assert finer.parent.tolist() == [0] * 4 + [1] + [2] * 5
    assert finer.agreement.min() > 0.99
    assert [(r["part"], r["k"]) for r in finer.rows if r["chosen"]] == [(0, 4), (2, 5)]
    found, first, second = levels.nearest(x.astype(np.float32), coarse, finer)
    np.testing.assert_array_equal(finer.parent[found], coarse)
    assert (first <= second).all() and np.isinf(second).any()
    for cluster in np.flatnonzero(finer.parent != 1):
        assert len(set(number[found == cluster])) == 1


def test_equal_points_are_not_split():
    x, labels = np.zeros((400, 3), np.float32), np.repeat([0, 1], 200)
    finer = levels.split(x, labels, np.zeros((2, 3), np.float32), [0, 1], 2, seed=0)
    assert finer.parent.tolist() == [0, 1] and np.isfinite(finer.centers).all()


PARTS = [(0, 4), (1, 3), (2, 5)]  # (coarse cluster, centres in it)


@pytest.mark.parametrize("refine", ["crf", "none"])
def test_a_finer_part_lies_in_its_coarse_one(refine):
    rng = np.random.default_rng(1)
    features = (rng.standard_normal((2, 8, 8, 3)).astype(np.float32),)
    image = np.clip(rng.standard_normal((2, 16, 16, 3)), -1, 1).astype(np.float32)
    k, below = 3, len(PARENT)
    arrays = {
        "centers": rng.standard_normal((k, 5)).astype(np.float32),
        "mean": np.zeros(5, np.float32),
        "scale": np.array([1, 1, 1, 0, 0], np.float32),
    }
    finer = {
        "finer/centers": rng.standard_normal((below, 5)).astype(np.float32),
        "finer/parent": PARENT.astype(np.int32),
    }
    if refine == "crf":
        arrays |= {"gap": np.ones(1, np.float32), "log_prior": np.zeros((4, 4, k), np.float32)}
        finer |= {
            "finer/gap": np.full(k, 2, np.float32),
            "finer/log_prior": np.zeros((4, 4, below), np.float32),
        }
    labelled = jax.jit(label_maps, static_argnums=3)
    coarse, sure = (np.asarray(a) for a in labelled(features, image, arrays, False))
    found, own = (np.asarray(a) for a in labelled(features, image, arrays | finer, False))
    np.testing.assert_array_equal(PARENT[found], coarse)
    assert len(np.unique(found)) > len(np.unique(coarse)) == k
    assert (own <= sure).all() and (own[coarse == 1] == sure[coarse == 1]).all()


@pytest.fixture(scope="module")
def run(tiny_weights, tmp_path_factory):
    """A run with parts in two levels, to read."""
    out = tmp_path_factory.mktemp("levels") / "run"
    sis_jax.discover(tiny_weights, out=str(out), layer="16x16", n=6, n_init=1, max_points=1536)
    return out


@pytest.mark.integration
def test_a_run_in_two_levels(run, tiny_weights):
    parts = Parts.load(run)
    parent = np.array([c["parent"] for c in parts.finer.clusters])
    np.testing.assert_array_equal(parent[parts.finer.masks], parts.masks)
    assert (
        len(parent) > len(parts.clusters) and (parts.finer.arrays["finer/parent"] == parent).all()
    )
    assert sum(c["share"] for c in parts.finer.clusters) == pytest.approx(1)
    assert parts.sweep["finer"]["criterion"] and parts.sweep["rows"]
    gen = sis_jax.load_generator(tiny_weights)
    fitted = Teacher.of(gen, parts.level(1)).fitted
    shown = gen.sample(parts.seeds, truncation=0.7, taps=fitted.taps)
    np.testing.assert_array_equal(fitted.predict(shown), parts.finer.masks)
    (alone,) = [m for _, m, _ in fitted.label_seeds(gen, [parts.seeds[3]])]
    np.testing.assert_array_equal(alone[0], parts.finer.masks[3])


@pytest.mark.integration
def test_a_dataset_and_a_student_of_either_level(run, tmp_path, monkeypatch):
    coarse, finer = (
        sis_jax.synthesize(str(run), n=4, out=str(tmp_path / str(level)), level=level)
        for level in (0, 1)
    )
    assert len(finer.classes) > len(coarse.classes)
    for one, other in zip(coarse.split("train"), finer.split("train")):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.mask == 0, other.mask == 0)
    asked = [read_run(tmp_path / str(i))["stages"]["synthesize"]["config"] for i in (0, 1)]
    assert "level" not in asked[0] and asked[1]["level"] == 1  # older records have none
    with pytest.raises(UsageError, match=r"level is 0, and the dataset in .* has level 1: give"):
        sis_jax.distill(str(tmp_path / "1"), level=0)
    for level in (0, 1):  # the dataset's own: as if none had been asked for
        config = DistillConfig(str(tmp_path / str(level)), source=Source(level=level))
        kept = distill_stage._with_level(config, tmp_path / str(level))
        assert kept.source.level is None
    jobs = []

    def stopped(folder, job):
        jobs.append(job)
        raise KeyboardInterrupt

    monkeypatch.setattr(distill_stage, "StudentTraining", stopped)
    with pytest.raises(KeyboardInterrupt):
        sis_jax.distill(
            str(run), level=1, out=str(tmp_path / "s"), student="unet-small", n=8, steps=1
        )
    assert [c["name"] for c in jobs[0].classes] == list(Parts.load(run).level(1).names.values())


@pytest.mark.integration
def test_text_is_asked_at_both_levels():
    gen, parts = naming_kit.disc_parts()
    below = dataclasses.replace(
        parts,
        arrays=parts.arrays
        | {"finer/centers": parts.arrays["centers"], "finer/parent": np.arange(2, dtype=np.int32)}
        | {f"finer/{k}": parts.arrays[k] for k in ("log_prior",)}
        | {"finer/gap": np.ones(2, np.float32)},
        clusters=tuple(c | {"parent": c["id"]} for c in parts.clusters),
    )
    both = dataclasses.replace(parts, finer=below)
    words = Ontology((("white", "disc"), ("black", "ground")))
    named = name_parts(Teacher.of(gen, both), naming_kit.two_words(), words, Naming(n=4))
    assert set(named.parts.level(0).names.values()) == {"disc", "ground"}
    assert named.parts.level(1).names == named.parts.level(0).names
    assert len(named.table()["finer"]["clusters"]) == 2
    alone = name_parts(Teacher.of(gen, both.level(0)), naming_kit.two_words(), words, Naming(n=4))
    np.testing.assert_allclose(named.cosine, alone.cosine, atol=1e-6)  # both from one pass
