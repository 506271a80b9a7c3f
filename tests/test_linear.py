"""`ops/linear_models.py` against scikit-learn, and projections against algebra."""

import numpy as np
import pytest

from sis_jax.ops.linear_models import linear_svm, logistic_regression, project_out
from sis_jax.types import UsageError


def clouds(n=120, d=6, apart=1.0, share=0.3, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) < share * n
    return (rng.standard_normal((n, d)) + apart * y[:, None] * np.linspace(-1, 1, d)).astype(
        np.float32
    ), y


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("c", [0.1, 1.0])
def test_logistic_regression_is_scikit_learns(balanced, c):
    from sklearn.linear_model import LogisticRegression

    x, y = clouds()
    theirs = LogisticRegression(
        C=c, class_weight="balanced" if balanced else None, tol=1e-8, max_iter=5000
    ).fit(x.astype(np.float64), y)
    ours = logistic_regression(x, y, c=c, balanced=balanced)
    np.testing.assert_allclose(ours.normal * ours.size, theirs.coef_[0], atol=1e-3)
    assert ours.offset * ours.size == pytest.approx(theirs.intercept_[0], abs=1e-3)
    assert np.linalg.norm(ours.normal) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("apart", [0.5, 4.0])  # overlapping, and separable
def test_the_support_vector_machine_is_scikit_learns(apart):
    from sklearn.svm import SVC

    x, y = clouds(apart=apart)
    theirs = SVC(kernel="linear", C=1.0, tol=1e-6).fit(x.astype(np.float64), y)
    ours = linear_svm(x, y, tolerance=1e-6)
    np.testing.assert_allclose(ours.normal * ours.size, theirs.coef_[0], atol=2e-3)
    assert ours.offset * ours.size == pytest.approx(theirs.intercept_[0], abs=5e-3)
    assert ours.accuracy(x, y) == pytest.approx(theirs.score(x, y))


def test_both_sides_are_needed():
    x, _ = clouds()
    for learn in (logistic_regression, linear_svm):
        with pytest.raises(UsageError, match="on both sides, got 0 of 120"):
            learn(x, np.zeros(120, bool))


def test_points_that_are_all_one():
    with pytest.raises(UsageError, match="cannot be separated"):
        logistic_regression(np.zeros((10, 3), np.float32), np.arange(10) < 5)


def test_projection():
    rng = np.random.default_rng(1)
    n, others = (rng.standard_normal(s).astype(np.float32) for s in (8, (3, 8)))
    left = project_out(n, others)
    np.testing.assert_allclose(others @ left, 0, atol=1e-5)
    assert np.linalg.norm(left) == pytest.approx(1, abs=1e-6)
    one = others[0] / np.linalg.norm(others[0])
    by_hand = n - (n @ one) * one
    np.testing.assert_allclose(
        project_out(n, one[None]), by_hand / np.linalg.norm(by_hand), atol=1e-5
    )
    assert project_out(n, np.zeros((0, 8), np.float32)) is n
    with pytest.raises(UsageError, match="nothing is left of it"):
        project_out((others[0] + others[1]).astype(np.float32), others)
