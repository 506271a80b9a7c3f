"""The background of a run on photos, where `discover` found too little."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from parts_kit import quarters, write_run

import sis_jax
from sis_jax.data.parts import Parts, classes_from
from sis_jax.stages import background
from sis_jax.training.photo_labels import PhotoLabels


def blurred(count=40, side=32):
    """Masks of class ids: grass (1) or a floor (2) around an animal's head (3) and body (4), one
    pixel in five of a wrong part.
    """
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / (side - 1) * 2 - 1
    centre = rng.normal(0, 0.15, (2, count, 1, 1))
    inside = ((x - centre[0]) / 0.8) ** 2 + ((y - 0.2 - centre[1]) / 0.75) ** 2 < 1
    around, animal = rng.integers(1, 3, (count, 1, 1)), np.where(y < 0, 3, 4)
    wrong = rng.random(inside.shape) < 0.2
    return np.where(inside ^ wrong, animal, around).astype(np.uint8)


def parts_of(found, border_share):
    """Parts 1 to 4 without a background, or with part 1 as one that holds this much of the
    frame.
    """
    shares = [0.3, 0.25, 0.23, 0.22]
    clusters = [
        {"id": i, "share": share, "border_share": border_share, "background": found and i == 0}
        | {"agreement": 0.9, "confidence": 0.4}
        for i, share in enumerate(shares)
    ]
    parts = replace(quarters(), background={"found": found, "why": "a test"}, masks=blurred(2) - 1)
    return replace(parts, clusters=tuple(clusters)).with_classes(classes_from(clusters, found))


def as_teacher(parts):
    """A generator whose images have the masks of `blurred`, in the classes of these parts."""
    return SimpleNamespace(label=lambda seeds: [(None, parts.classify(blurred() - 1), None)])


class Animals(PhotoLabels):
    """Photos in which a foreground stands out as far as it agrees with where animals are."""

    def __init__(self):
        self.place = np.isin(blurred(), (3, 4)).mean(0)

    def standing_out(self, foreground):
        return float(np.corrcoef(foreground.mean(0).ravel(), self.place.ravel())[0, 1])


@pytest.mark.parametrize("found", [False, True], ids=["none", "a part"])
def test_a_background_that_is_missing_is_completed(found, tmp_path, monkeypatch):
    run = write_run(parts_of(found, 0.3), tmp_path / "r")
    monkeypatch.setattr(background.Teacher, "from_run", lambda run: as_teacher(Parts.load(run)))
    said = []
    monkeypatch.setattr(background, "say", said.append)
    names = background.missing_background(str(run), Animals())
    first, *others = Parts.load(run).rename({int(i): name for i, name in names.items()}).classes
    assert first["id"] == 0 and first["clusters"] == [0, 1]
    assert sorted(c["clusters"][0] for c in others) == [2, 3]
    sis_jax.label(str(run), edits={"format": 1, "levels": {"0": names}})
    assert background.missing_background(str(run), Animals()) == {}
    assert len(said) == 1 and ("only a part" in said[0]) == found


def test_the_choice_that_stands_out_most_in_the_photos():
    """At least one part is background and one is not."""
    masks = blurred()
    assert background.in_photos(masks, [1, 2, 3, 4], Animals()) == [1, 2]
    assert background.in_photos(masks - 1, [0, 1, 2, 3], Animals()) == [1]
    assert background.in_photos(masks, [3], Animals()) == []
    assert background.in_photos(masks - 1, [0, 2], Animals()) == []


def test_a_background_that_holds_half_of_the_sides_stays():
    """As in portraits, where hair is at the sides, too; the upper half of a street is less."""
    portrait = np.zeros((1, 40, 40), np.uint8)
    portrait[:, 20:], portrait[:, 10:30, 10:30] = 1, 2
    assert background.at_the_sides([portrait], [0, 1, 2]) == []
    street = portrait.copy()
    street[:, 16:20][street[:, 16:20] == 0] = 1
    assert background.at_the_sides([street], [0, 1, 2]) == [1]


def test_some_part_is_left():
    """Masks without an order, or of one part alone, name no background."""
    assert background.at_the_sides([np.full((1, 32, 32), 3, np.uint8)], [3]) == []
    both = np.tile(np.array([3, 4], np.uint8), (1, 32, 16))
    assert background.at_the_sides([both], [3, 4]) == []


def test_what_lies_further_outside_than_the_background_is_background():
    """A background found behind a person, with a hedge at both sides."""
    street = np.zeros((1, 40, 40), np.uint8)
    street[:, 5:35, 14:26] = 1
    street[:, 10:20, 1:11] = street[:, 10:20, 29:39] = 2
    assert background.at_the_sides([street], [0, 1, 2]) == [2]
