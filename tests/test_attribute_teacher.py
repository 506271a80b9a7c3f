"""`scripts/faces_clip/attribute_teacher.py`: areas by hand, calibrated odds, and a teacher that
learns where a fact shows.
"""

import attribute_teacher
import numpy as np
import pytest

from sis_jax.ops.linear_models import roc_area


def pictures(n, seed=0):
    """Noise of 16 x 16 pixels; the first fact is a stripe at the top, the second the colour of the
    lower half.
    """
    rng = np.random.default_rng(seed)
    seen = rng.integers(90, 130, (n, 16, 16, 3)).astype(np.uint8)
    facts = rng.random((n, 2)) < 0.5
    seen[facts[:, 0], 1:3] = 250
    seen[facts[:, 1], 8:, :, 0] += 60
    return seen, facts


def test_areas_by_hand():
    true = np.array([True, False, True, False])
    assert roc_area(np.array([4.0, 3.0, 2.0, 1.0]), true) == 0.75
    assert roc_area(np.ones(4), true) == 0.5 and roc_area(np.arange(4.0), true | True) == 0.5


def test_the_descriptor_sees_edges_and_colours():
    flat = np.full((1, 16, 16, 3), 100, np.uint8)
    step = flat.copy()
    step[:, :, 8:] = 200
    a, b = (attribute_teacher.described(x) for x in (flat, step))
    assert a.shape == (1, 4, 4, 18) and not a[..., :12].any() and not a[..., 15:].any()
    assert b[0, :, 1, 0].min() > 0.5 and b[0, :, 1, 6].max() == pytest.approx(
        0, abs=1e-3
    )  # brighter to the right, nothing to the left
    np.testing.assert_allclose(b[0, 0, 3, 12:15], 200 / 255, atol=1e-5)


def test_the_teacher_knows_new_pictures_and_is_calibrated():
    seen, facts = pictures(100)
    teacher = attribute_teacher.fit(seen, facts)
    new, truth = pictures(100, seed=1)
    told = teacher(new)
    assert (
        told.shape == (100, 2) and min(roc_area(told[:, j], truth[:, j]) for j in range(2)) > 0.95
    )
    assert np.abs(told.mean(0) - truth.mean(0)).max() < 0.1


def test_calibration_finds_the_odds():
    rng = np.random.default_rng(0)
    score = rng.standard_normal((4000, 1))
    truth = rng.random((4000, 1)) < 1 / (1 + np.exp(-(2 * score - 1)))
    slope, bias = attribute_teacher.calibration(score, truth.astype(float))
    assert slope[0] == pytest.approx(2, abs=0.2) and bias[0] == pytest.approx(-1, abs=0.15)


def test_evidence_lies_where_the_fact_shows():
    seen, facts = pictures(120)
    where = np.zeros((2, 16, 16), np.float32)
    where[0, :8] = where[1, 8:] = 1
    found = attribute_teacher.evidence(seen, facts, where)
    assert found.shape == (2, 2) and found[0, 0] > 0.95 > 0.75 > found[0, 1] and found[1, 1] > 0.95
