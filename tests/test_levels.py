"""Parts in two levels: names, files, and masks of the finer level."""

import dataclasses
import json

import numpy as np
import pytest

from sis_jax.data.part_names import finer_classes
from sis_jax.data.parts import Parts, classes_from
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
    return dataclasses.replace(both, finer=below).rename({})


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
    finer = {i: verdict("face") for i in (0, 1)} | {2: verdict("hair")}
    finer |= {3: verdict("clothes"), 4: verdict(None)}
    named = parts.named(said, finer)
    assert named.names == {0: "background", 1: "face", 2: "hair"}
    below = named.level(1)
    assert below.names == {0: "background", 1: "face 1", 2: "face 2", 3: "clothes", 4: "hair"}
    assert [c["unsure"] for c in below.classes] == [False, False, False, False, True]
    again = named.named(said, {i: verdict("face", named=False) for i in range(5)}).level(1)
    assert list(again.names.values())[3:] == ["hair 1", "hair 2"]


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
