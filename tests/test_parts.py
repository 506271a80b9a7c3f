"""`data/parts.py`: names, merging, files."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from sis_jax.data.parts import Parts, classes_from
from sis_jax.types import Info, SisError, UsageError


@pytest.fixture
def parts():
    rng = np.random.default_rng(0)
    clusters = [
        {
            "id": i,
            "share": s,
            "border_share": 0.25,
            "agreement": 0.9,
            "confidence": 0.5,
            "background": b,
        }
        for i, (s, b) in enumerate(
            [(0.4, False), (0.3, True), (0.05, False), (0.15, False), (0.1, True)]
        )
    ]
    classes = classes_from(clusters, True)
    owner = {cluster: c["id"] for c in classes for cluster in c["clusters"]}
    return Parts(
        method="segmentation_in_style",
        settings={"k": 5, "layer": "8x8", "normalize": "channel"},
        arrays={
            "centers": rng.standard_normal((5, 4)).astype(np.float32),
            "mean": np.zeros(4, np.float32),
        },
        classes=classes,
        clusters=tuple(c | {"class_id": owner[c["id"]]} for c in clusters),
        background={"found": True, "why": "it is"},
        generator=Info("tiny", "none needed", "made here", "abc"),
        seed=3,
        sweep={
            "criterion": "agreement",
            "rows": [{"k": 5, "layer": "8x8", "score": 1.5, "chosen": True}],
        },
        warnings=("mind the gap",),
        samples=rng.integers(0, 256, (3, 16, 16, 3)).astype(np.uint8),
        masks=rng.integers(0, 5, (3, 16, 16)).astype(np.uint8),
        seeds=(300_000, 300_001, 300_002),
        confidence=(0.5, 0.25, 0.75),
    )


def test_classes(parts):
    assert parts.names == {0: "background", 1: "part 1", 2: "part 2", 3: "part 3"}
    assert [c["clusters"] for c in parts.classes] == [
        [1, 4],
        [0],
        [3],
        [2],
    ]  # the background, then by size
    assert parts.class_of()[:5].tolist() == [1, 0, 3, 2, 0]
    assert parts.classify(np.array([[[0, 1], [2, 3]]])).tolist() == [[[1, 0], [3, 2]]]
    assert len({c["colour"] for c in parts.classes}) == 4


def test_no_class_0_without_a_background(parts):
    classes = classes_from(list(parts.clusters), False)
    assert [c["id"] for c in classes] == [1, 2, 3, 4, 5] and [c["clusters"] for c in classes] == [
        [0],
        [1],
        [3],
        [4],
        [2],
    ]


def same(a, b):
    for f in dataclasses.fields(Parts):
        mine, other = getattr(a, f.name), getattr(b, f.name)
        if f.name == "arrays":
            assert mine.keys() == other.keys() and all(
                np.array_equal(mine[k], other[k]) for k in mine
            )
        elif isinstance(mine, np.ndarray):
            assert mine.dtype == other.dtype and np.array_equal(mine, other)
        else:
            assert mine == other, f.name


def test_round_trip(parts, tmp_path):
    assert parts.save(tmp_path / "parts") == tmp_path / "parts"
    same(parts, Parts.load(tmp_path / "parts"))
    same(parts, Parts.load(str(tmp_path)))  # the run folder above it
    with Image.open(tmp_path / "parts" / "gallery.png") as gallery:
        gallery.verify()
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]
    with Image.open(tmp_path / "parts" / "samples" / "00_mask.png") as mask:
        assert mask.mode == "P" and np.array_equal(np.asarray(mask), parts.classify(parts.masks)[0])


def test_round_trip_without_samples_and_sweep(parts, tmp_path):
    bare = dataclasses.replace(
        parts,
        sweep=None,
        seeds=(),
        confidence=(),
        samples=np.zeros((0, 1, 1, 3), np.uint8),
        masks=np.zeros((0, 1, 1), np.uint8),
    )
    bare.save(tmp_path)
    same(bare, Parts.load(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["classes.json", "parts.safetensors"]


def test_round_trip_after_renaming(parts, tmp_path):
    named = parts.rename({1: "hair", 3: None})
    named.save(tmp_path)
    same(named, Parts.load(tmp_path))


def test_numpy_numbers_in_facts_can_be_saved(parts, tmp_path):
    dataclasses.replace(
        parts, clusters=tuple(c | {"share": np.float32(0.5)} for c in parts.clusters)
    ).save(tmp_path)
    assert json.loads((tmp_path / "classes.json").read_text())["clusters"][0]["share"] == 0.5


def test_rename_merges_and_sends_to_the_background(parts):
    named = parts.rename({1: "hair", 3: "hair", 2: None})
    assert named.names == {0: "background", 1: "hair"}
    assert [c["clusters"] for c in named.classes] == [[1, 3, 4], [0, 2]]
    assert named.class_of()[:5].tolist() == [1, 0, 1, 0, 0]
    assert [c["class_id"] for c in named.clusters] == [1, 0, 1, 0, 0]
    assert [c["background"] for c in named.clusters] == [False, True, False, True, True]
    assert parts.names[3] == "part 3" and parts.classes[1]["clusters"] == [
        0
    ]  # the original is as it was
    assert sum(len(c["clusters"]) for c in named.classes) == 5


def test_rename_into_a_name_that_is_there(parts):
    named = parts.rename({1: "hair"}).rename({3: "hair"})
    assert named.names == {0: "background", 1: "hair", 2: "part 2"} and named.classes[1][
        "clusters"
    ] == [0, 2]


def test_a_merged_class_keeps_its_smallest_id(parts):
    named = parts.rename({3: "part 1"})
    assert named.names == {0: "background", 1: "part 1", 2: "part 2"}


def test_rename_makes_a_background_where_there_was_none(parts):
    without = dataclasses.replace(parts, classes=classes_from(list(parts.clusters), False))
    named = without.rename({2: None, 4: None})
    assert named.names[0] == "background" and named.class_of()[[1, 4]].tolist() == [0, 0]


def test_the_background_can_be_given_another_name(parts):
    """Id 0 stays the background, whatever it is called."""
    named = parts.rename({0: "wall"})
    assert named.names[0] == "wall" and named.classes[0]["clusters"] == [1, 4]


@pytest.mark.parametrize(
    ("names", "why"),
    [({1: "background"}, "as the background is"), ({1: None, 2: None, 3: None}, "at least one")],
)
def test_rename_keeps_background_and_parts_apart(parts, names, why):
    with pytest.raises(UsageError, match=why):
        parts.rename(names)


def test_rename_refuses_what_is_not_there(parts):
    with pytest.raises(UsageError, match=r"no part 11; there are 0 \(background\), 1 \(part 1\)"):
        parts.rename({1: "hair", 11: None})


def test_show(parts):
    wide, narrow = parts.show(), parts.show(2)
    assert narrow.height == wide.height and narrow.width < wide.width
    assert (
        wide.width >= 3 * 128 and wide.height >= 3 * 128
    )  # three samples, three rows, enlarged eight times
    with pytest.raises(SisError, match="no samples to show"):
        dataclasses.replace(parts, samples=parts.samples[:0], masks=parts.masks[:0]).show()


def test_large_pictures_are_not_enlarged(parts):
    large = dataclasses.replace(
        parts, samples=np.zeros((1, 256, 256, 3), np.uint8), masks=np.zeros((1, 256, 256), np.uint8)
    )
    assert 256 <= large.show().width < 512


@pytest.mark.parametrize(
    "damage", ["absent", "no json", "list", "no arrays", "cut off", "no method"]
)
def test_folders_that_hold_no_parts(parts, tmp_path, damage):
    if damage != "absent":
        parts.save(tmp_path)
    file = tmp_path / "classes.json"
    if damage == "no json":
        file.write_text("{")
    elif damage == "list":
        file.write_text("[]")
    elif damage == "no method":
        file.write_text("{}")
    elif damage == "no arrays":
        (tmp_path / "parts.safetensors").unlink()
    elif damage == "cut off":
        (tmp_path / "parts.safetensors").write_bytes(
            (tmp_path / "parts.safetensors").read_bytes()[:40]
        )
    with pytest.raises(UsageError, match="holds no parts"):
        Parts.load(tmp_path)


@pytest.mark.parametrize("damage", ["field", "picture", "masks"])
def test_parts_of_which_something_is_missing(parts, tmp_path, damage):
    """A folder someone tidied up: one sentence, not a traceback."""
    from safetensors.numpy import load_file, save_file

    parts.save(tmp_path)
    if damage == "field":
        facts = json.loads((tmp_path / "classes.json").read_text())
        del facts["settings"]
        (tmp_path / "classes.json").write_text(json.dumps(facts))
    elif damage == "picture":
        (tmp_path / "samples" / "01_image.png").unlink()
    else:
        arrays = load_file(tmp_path / "parts.safetensors")
        del arrays["samples/clusters"]
        save_file(arrays, tmp_path / "parts.safetensors")
    with pytest.raises(SisError):
        Parts.load(tmp_path)


# Names from text


def said(name, named=True, score=0.8, margin=0.6, runner_up="other"):
    return {
        "name": name,
        "score": score,
        "margin": margin,
        "runner_up": runner_up,
        "named": named,
        "prompts": [f"a {name}"],
        "scores": {},
    }


def test_named_parts(parts):
    """Clusters 0, 3 become hair; 2 is unsure; 1 stays the background, 4 leaves it."""
    named = parts.named(
        {
            0: said("hair"),
            3: said("hair", score=0.4, margin=0.2),
            2: said("ear", named=False),
            1: said(None),
            4: said("wall"),
        }
    )
    assert named.names == {0: "background", 1: "hair", 3: "part 3", 4: "wall"}
    table = {c["name"]: c for c in named.classes}
    assert (
        table["hair"]["clusters"] == [0, 3]
        and table["hair"]["prompts"] == ["a hair"]
        and table["wall"]["clusters"] == [4]
    )
    assert (
        table["hair"]["score"] == pytest.approx((0.4 * 0.8 + 0.15 * 0.4) / 0.55)
        and not table["hair"]["unsure"]
    )
    assert (
        table["part 3"]["unsure"]
        and table["part 3"]["guess"] == "ear"
        and table["part 3"]["prompts"] == []
    )
    assert table["background"]["clusters"] == [1] and table["background"]["score"] == 0.8
    assert named.class_of()[:5].tolist() == [1, 0, 3, 1, 4] and [
        c["class_id"] for c in named.clusters
    ] == [1, 0, 3, 1, 4]
    assert len({c["colour"] for c in named.classes}) == 4


def test_named_again(parts):
    """A name from text does not outlive the next text; one by hand does."""
    first = parts.named({0: said("hair"), 3: said("hair"), 2: said("ear")}).rename({3: "left ear"})
    assert (
        first.names == {0: "background", 1: "hair", 3: "left ear"}
        and first.classes[2]["score"] is None
    )
    second = first.named({0: said("wig"), 3: said("x", named=False), 2: said("x", named=False)})
    assert set(second.names.values()) == {"background", "wig", "part 1.3", "left ear"}
    assert len(second.names) == 4 and sum(len(c["clusters"]) for c in second.classes) == 5


def test_named_parts_round_trip(parts, tmp_path):
    named = parts.named({0: said("hair"), 2: said("ear", named=False)})
    named.save(tmp_path)
    same(named, Parts.load(tmp_path))


def test_merge_and_drop(parts):
    assert parts.merge([1, 3], "hair").names == {0: "background", 1: "hair", 2: "part 2"}
    assert parts.merge([3, 2]).names == {0: "background", 1: "part 1", 2: "part 3"}
    assert parts.merge([0, 2]).class_of()[3] == 0 and parts.merge([0, 2]).names[0] == "background"
    assert (
        parts.drop([1, 2]).names == {0: "background", 3: "part 3"}
        and parts.drop(3).class_of()[2] == 0
    )
    for wrong in (lambda: parts.merge([1, 9]), lambda: parts.drop(9)):
        with pytest.raises(UsageError, match="no part 9; there are"):
            wrong()
    with pytest.raises(UsageError, match="merge needs two parts"):
        parts.merge([1])
    with pytest.raises(UsageError, match="must be a text, or None"):
        parts.rename({1: " "})
