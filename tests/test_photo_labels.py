"""Labels of photos by one classifier of features, begun with labels that are often wrong."""

import jax.numpy as jnp
import numpy as np
import pytest

import sis_jax as sis
from sis_jax.ops.discriminant import separated, whitened
from sis_jax.training.photo_labels import PhotoLabels, contrast, fitted


def two_classes(n=4000, seed=0):
    """(features, which are of the first class, which lie far along another direction): Gaussians
    of one covariance.
    """
    rng = np.random.default_rng(seed)
    first = rng.random(n) < 0.3
    mixing = rng.standard_normal((6, 6))
    raw = rng.standard_normal((n, 6)) + np.where(first[:, None], [4, 0, 0, 1, 0, 0], 0)
    return (raw @ mixing).astype(np.float32), first, raw[:, 1] > 0.8


def fit(features, labels, steps):
    return separated(whitened(jnp.asarray(features)), jnp.asarray(labels, jnp.float32), steps)[0]


def logits(found, features):
    return features @ np.asarray(found.weights) + float(found.offset)


def test_one_step_is_linear_discriminant_analysis():
    """The textbook's formula with the covariance within the classes, by another way."""
    features, first, _ = two_classes()
    found = logits(fit(features, first, 1), features)
    means = [features[kind].mean(0) for kind in (first, ~first)]
    within = sum((kind.mean()) * np.cov(features[kind].T, bias=True) for kind in (first, ~first))
    weights = np.linalg.solve(within, means[0] - means[1])
    odds = np.log(first.mean() / (1 - first.mean()))
    expected = (features - (means[0] + means[1]) / 2) @ weights + odds
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_steps_mend_labels_that_are_wrong_in_one_way():
    """Labels that also hold whatever lies far along another feature, as those of a place do."""
    features, first, far = two_classes()
    right = [
        ((logits(fit(features, first | far, n), features) > 0) == first).mean() for n in (1, 30)
    ]
    assert right[1] > 0.9 > right[0]


def test_labels_of_one_class_stay_finite():
    features, first, _ = two_classes()
    for given in (np.zeros(len(first)), np.ones(len(first))):
        assert np.isfinite(logits(fit(features, given, 5), features)).all()


def textures(count=24, size=64, seed=0):
    """(photos of a striped square at any place on noise, its masks)."""
    rng = np.random.default_rng(seed)
    photos = rng.integers(90, 130, (count, size, size, 1)).repeat(3, -1).astype(np.uint8)
    masks = np.zeros((count, size, size), bool)
    stripes = np.where(np.arange(32) % 8 < 4, 40, 220)[None, :, None].repeat(32, 0)
    for photo, mask, (y, x) in zip(photos, masks, rng.integers(0, 32, (count, 2))):
        photo[y : y + 32, x : x + 32] = stripes
        mask[y : y + 32, x : x + 32] = True
    return photos, masks


@pytest.mark.integration
def test_the_place_alone_is_enough_to_begin_with():
    """From "somewhere in the middle", the object is found where it is, on other photos too."""
    backbone = sis.load_backbone()
    photos, masks = textures()
    place = np.ones((1, 64, 64), np.float32)
    place[:, 20:44, 20:44] = 0.4
    rows = fitted(backbone, 16)
    assert rows.tolist() == list(range(16))
    labels = PhotoLabels(backbone, photos[:16])
    own, background = labels.fit(place, 30), labels(photos[16:])
    assert own.shape == (16, 32, 32) and background.shape == (8, 32, 32)
    np.testing.assert_allclose(labels(photos[:16]), own, atol=1e-2)
    found, truth = background < 0.5, masks[16:, 1::2, 1::2]
    assert (found & truth).sum() / (found | truth).sum() > 0.6
    again = PhotoLabels(backbone, photos[:16])
    np.testing.assert_array_equal(again.fit(place, 30), own)


def test_contrast_of_what_is_in_the_middle():
    background = np.ones((2, 40, 40), np.float32)
    background[:, 10:30, 10:30] = 0
    assert contrast(background) == pytest.approx(1)
    assert contrast(1 - background) == pytest.approx(-1)
    assert contrast(np.full((1, 40, 40), 0.5, np.float32)) == 0
