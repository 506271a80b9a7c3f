"""Linear boundaries between two groups of points: logistic regression, the support vector machine,
projection onto the space that other boundaries leave free, and how well a score separates the
groups.

Used on latent codes: w + a n, with n the unit normal of a boundary, changes the property that the
boundary separates (Shen et al. 2020, "InterFaceGAN", arXiv 2005.09635, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from sis_jax.types import UsageError


@dataclass(frozen=True)
class Boundary:
    """f(x) = normal . x + offset, normal of unit length; positive on the side of the true ones.
    size: length of the normal as it was learned.
    """

    normal: Float[np.ndarray, "d"]
    offset: float
    size: float

    def distance(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n"]:
        """Signed distances."""
        return x @ self.normal + self.offset

    def accuracy(self, x: Float[np.ndarray, "n d"], y: Bool[np.ndarray, "n"]) -> float:
        """Share of points that are classified correctly."""
        return float(((self.distance(x) > 0) == y).mean())


def _boundary(weights: np.ndarray, bias: float) -> Boundary:
    size = float(np.linalg.norm(weights))
    if not size > 0:
        raise UsageError(
            "the two groups of points cannot be separated: nothing was learned; give more "
            "samples or another prompt"
        )
    return Boundary((weights / size).astype(np.float32), float(bias / size), size)


def _both(y: Bool[np.ndarray, "n"]) -> None:
    if not 0 < y.sum() < len(y):
        raise UsageError(
            f"a boundary needs points on both sides, got {int(y.sum())} of {len(y)} on the true "
            "side"
        )


def logistic_regression(
    x: Float[np.ndarray, "n d"],
    y: Bool[np.ndarray, "n"],
    *,
    c: float = 1.0,
    balanced: bool = True,
    iterations: int = 1000,
) -> Boundary:
    """Minimum of |v|^2 / 2 + c sum_i s_i log(1 + exp(-t_i (v . x_i + b))), t = +-1, by L-BFGS until
    it converged.

    balanced: s_i = n / (2 n_class), so that few true points weigh as much as many false ones;
        otherwise 1. UsageError for points of one kind only.
    """
    from scipy.optimize import minimize  # late: slow to import

    _both(y)
    x = np.asarray(x, np.float64)
    sign = np.where(y, 1.0, -1.0)
    weight = (
        np.where(y, len(y) / (2 * y.sum()), len(y) / (2 * (~y).sum()))
        if balanced
        else np.ones(len(y))
    )

    def value(v: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (x @ v[:-1] + v[-1])
        pull = -c * weight * sign / (1 + np.exp(np.minimum(margin, 500)))
        loss = 0.5 * v[:-1] @ v[:-1] + c * (weight * np.logaddexp(0, -margin)).sum()
        return float(loss), np.append(v[:-1] + x.T @ pull, pull.sum())

    found = minimize(
        value,
        np.zeros(x.shape[1] + 1),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": iterations, "maxfun": 2 * iterations, "gtol": 1e-6},
    )
    return _boundary(found.x[:-1], found.x[-1])


def linear_svm(
    x: Float[np.ndarray, "n d"],
    y: Bool[np.ndarray, "n"],
    *,
    c: float = 1.0,
    tolerance: float = 1e-4,
    iterations: int = 200_000,
) -> Boundary:
    """Minimum of |v|^2 / 2 + c sum_i max(0, 1 - t_i (v . x_i + b)): the dual, two variables at a
    time.

    The pair is the one that violates the optimality conditions most (Keerthi et al. 2001); it ends
    where none does by more than `tolerance`. The matrix of all products is held: meant for up to a
    few thousand points. UsageError for points of one kind only.
    """
    _both(y)
    x = np.asarray(x, np.float64)
    t, kernel = np.where(y, 1.0, -1.0), x @ x.T
    alpha, gradient = (
        np.zeros(len(t)),
        -np.ones(len(t)),
    )  # gradient of alpha Q alpha / 2 - sum alpha
    for _ in range(iterations):
        up, low = np.where(t > 0, alpha < c, alpha > 0), np.where(t > 0, alpha > 0, alpha < c)
        steep = -t * gradient
        i, j = (
            int(np.argmax(np.where(up, steep, -np.inf))),
            int(np.argmin(np.where(low, steep, np.inf))),
        )
        if steep[i] - steep[j] < tolerance:
            break
        curve = max(kernel[i, i] + kernel[j, j] - 2 * kernel[i, j], 1e-12)
        step = (steep[i] - steep[j]) / curve
        step = min(
            step, c - alpha[i] if t[i] > 0 else alpha[i], alpha[j] if t[j] > 0 else c - alpha[j]
        )
        alpha[i], alpha[j] = alpha[i] + t[i] * step, alpha[j] - t[j] * step
        gradient += step * t * (kernel[:, i] - kernel[:, j])
    up, low = np.where(t > 0, alpha < c, alpha > 0), np.where(t > 0, alpha > 0, alpha < c)
    steep = -t * gradient
    free = (alpha > 1e-9) & (alpha < c - 1e-9)
    bias = steep[free].mean() if free.any() else (steep[up].max() + steep[low].min()) / 2
    return _boundary(x.T @ (alpha * t), float(bias))


def project_out(
    normal: Float[np.ndarray, "d"], others: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, "d"]:
    """The unit vector nearest to `normal` along which none of the other boundaries is approached
    (conditional manipulation, section 2.3 there).

    With rows N of `others`: n - N^T (N N^T)^-1 N n, of unit length. UsageError where nothing is
    left.
    """
    if len(others) == 0:
        return normal
    rest = normal - others.T @ np.linalg.lstsq(others.T, normal, rcond=None)[0]
    size = float(np.linalg.norm(rest))
    if size < 1e-6 * float(np.linalg.norm(normal)):
        raise UsageError(
            "the direction is in the span of those it should leave alone: nothing is left of "
            "it; give fewer conditions"
        )
    return (rest / size).astype(np.float32)


def roc_area(score: Float[np.ndarray, "n"], true: Bool[np.ndarray, "n"]) -> float:
    """Area under the ROC curve, 0..1; 0.5 where all images are of one kind. Equal scores share
    their ranks.
    """
    from scipy.stats import rankdata  # late: slow to import

    hits = int(true.sum())
    if hits in (0, len(true)):
        return 0.5
    return float(
        (rankdata(score)[true].sum() - hits * (hits + 1) / 2) / (hits * (len(true) - hits))
    )
