"""The clustering of a run on photos: its foreground stands out there, too."""

import fakes
import numpy as np
import pytest
from PIL import Image

from sis_jax.stages import foreground
from sis_jax.training.photo_labels import PhotoLabels

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


@pytest.mark.integration
def test_settings_for_discover(tiny_weights, monkeypatch):
    """Of the layers with a coarse map, those whose foreground stands out most in the photos."""
    monkeypatch.setattr(foreground, "KS", (3, 4))
    monkeypatch.setattr(foreground, "COMPARED", 8)
    seen = []

    class Larger(PhotoLabels):
        def __init__(self):
            pass

        def standing_out(self, masks):
            seen.append(masks)
            return float(masks.mean())

    found = foreground.clustering(str(tiny_weights), 1, Larger())
    layers = foreground.layers(fakes.tiny_stylegan2(16))
    settings = [(layer, k) for layer in layers for k in (3, 4)]
    assert (found["layer"], found["k"]) == settings[np.argmax([m.mean() for m in seen])]
    assert all(m.shape[0] == 8 and m.dtype == bool for m in seen)
    assert "32x32" not in foreground.layers(fakes.tiny_stylegan2(64))


@pytest.mark.integration
def test_features_of_photos_of_any_size(tmp_path):
    """Smaller than what the backbone sees, and not square."""
    for i, size in enumerate([(30, 50), (200, 90), (64, 64)]):
        image = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    found = foreground.features(str(tmp_path), "stretch")
    assert found.shape == (3, 32, 32)
    assert -1 <= found.standing_out(np.eye(16, dtype=bool)[None]) <= 1
