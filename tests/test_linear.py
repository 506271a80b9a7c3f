"""`ops/linear_models.py` against scikit-learn."""

import numpy as np
import pytest

from sis_jax.ops.linear_models import logistic_regression
from sis_jax.types import UsageError


def clouds(n=120, d=6, apart=1.0, share=0.3, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) < share * n
    return (rng.standard_normal((n, d)) + apart * y[:, None] * np.linspace(-1, 1, d)).astype(
        np.float32
    ), y


@pytest.mark.parametrize("c", [0.1, 1.0])
def test_logistic_regression_is_scikit_learns(c):
    from sklearn.linear_model import LogisticRegression

    x, y = clouds()
    theirs = LogisticRegression(C=c, class_weight="balanced", tol=1e-8, max_iter=5000).fit(
        x.astype(np.float64), y
    )
    ours = logistic_regression(x, y, c=c)
    np.testing.assert_allclose(ours.normal * ours.size, theirs.coef_[0], atol=1e-3)
    assert ours.offset * ours.size == pytest.approx(theirs.intercept_[0], abs=1e-3)
    assert np.linalg.norm(ours.normal) == pytest.approx(1, abs=1e-6)


def test_both_sides_are_needed():
    x, _ = clouds()
    with pytest.raises(UsageError, match="on both sides, got 0 of 120"):
        logistic_regression(x, np.zeros(120, bool))


def test_points_that_are_all_one():
    with pytest.raises(UsageError, match="cannot be separated"):
        logistic_regression(np.zeros((10, 3), np.float32), np.arange(10) < 5)
