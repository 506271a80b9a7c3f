"""Logistic regression between two groups of points, and how well a score separates them.

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
    """f(x) = normal . x + offset, positive for true ones; size: length of the learned normal."""

    normal: Float[np.ndarray, "d"]
    offset: float
    size: float


def logistic_regression(
    x: Float[np.ndarray, "n d"], y: Bool[np.ndarray, "n"], *, c: float = 1.0
) -> Boundary:
    """Minimum of |v|^2 / 2 + c sum_i s_i log(1 + exp(-t_i (v . x_i + b))), t = +-1, by L-BFGS until
    it converged; s_i = n / (2 n_class), so that few true points weigh as much as many false ones.

    UsageError for points of one kind only, or that cannot be separated.
    """
    from scipy.optimize import minimize  # late: slow to import

    if not 0 < y.sum() < len(y):
        raise UsageError(
            f"a boundary needs points on both sides, got {int(y.sum())} of {len(y)} on the true "
            "side"
        )
    x = np.asarray(x, np.float64)
    sign = np.where(y, 1.0, -1.0)
    weight = np.where(y, len(y) / (2 * y.sum()), len(y) / (2 * (~y).sum()))

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
        options={"maxiter": 1000, "maxfun": 2000, "gtol": 1e-6},
    )
    size = float(np.linalg.norm(found.x[:-1]))
    if not size > 0:
        raise UsageError(
            "the two groups of points cannot be separated: nothing was learned; give more "
            "samples or another prompt"
        )
    return Boundary((found.x[:-1] / size).astype(np.float32), float(found.x[-1] / size), size)


def roc_area(score: Float[np.ndarray, "n"], true: Bool[np.ndarray, "n"]) -> float:
    """Area under the ROC curve, 0..1, ties shared; 0.5 where all images are of one kind."""
    from scipy.stats import rankdata  # late: slow to import

    hits = int(true.sum())
    if hits in (0, len(true)):
        return 0.5
    return float(
        (rankdata(score)[true].sum() - hits * (hits + 1) / 2) / (hits * (len(true) - hits))
    )
