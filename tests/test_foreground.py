"""The clustering of a run on photos: the foreground that most others find, too."""

import fakes
import numpy as np
import pytest

from sis_jax.stages import foreground

GROUND, BODY, HEDGE = 0, 1, 2


def street(body=slice(5, 35)):
    """Clusters of one image: ground, a person, a hedge at both sides."""
    image = np.full((1, 40, 40), GROUND, np.uint8)
    image[:, body, 14:26] = BODY
    image[:, 10:20, 1:11] = image[:, 10:20, 29:39] = HEDGE
    return image


def test_background_by_both_rules():
    found = foreground.foreground(street(), [True, False, False])
    np.testing.assert_array_equal(found, street() == BODY)


def test_all_is_foreground_where_nothing_else_is_left():
    assert foreground.foreground(np.zeros((1, 8, 8), np.uint8), [False]).all()


def test_the_foreground_that_others_find():
    """Neither the torso alone nor everything, though two of each find the same."""
    whole, torso, nearly = (
        street(rows) == BODY for rows in (slice(5, 35), slice(12, 20), slice(6, 34))
    )
    everything = np.ones_like(whole)
    assert foreground.central([torso, everything, nearly, whole, torso, everything]) in (2, 3)
    assert foreground.central([np.zeros_like(whole), whole, nearly]) in (1, 2)


@pytest.mark.integration
def test_settings_for_discover(tiny_weights, monkeypatch):
    """The same ones every time, of the layers with a coarse map."""
    monkeypatch.setattr(foreground, "KS", (3, 4))
    monkeypatch.setattr(foreground, "COMPARED", 8)
    found = foreground.common(str(tiny_weights), seed=1)
    assert found == foreground.common(str(tiny_weights), seed=1)
    assert found["k"] in (3, 4)
    assert found["layer"] in foreground.layers(fakes.tiny_stylegan2(16))
    assert "32x32" not in foreground.layers(fakes.tiny_stylegan2(64))
