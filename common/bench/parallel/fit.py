"""Alpha and beta from measured times, with their errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fit:
    """seconds = alpha + beta * num_bytes.

    alpha_error and beta_error: one standard error, from how the times scatter about the line.
    error and worst: root mean square and greatest of the times' relative deviations from it.
    """

    alpha: float
    beta: float
    alpha_error: float
    beta_error: float
    error: float
    worst: float

    def seconds(self, num_bytes: float) -> float:
        return self.alpha + self.beta * num_bytes

    @property
    def bytes_per_s(self) -> float:
        return 1 / self.beta if self.beta else math.inf


def fit_alpha_beta(num_bytes: Sequence[float], seconds: Sequence[float]) -> Fit:
    """The line with the least relative deviations: sizes differ a thousandfold, and a microsecond
    matters in a short message and not in a long one. Neither alpha nor beta is below 0.

    Raises ValueError for fewer than three points, times that are not positive, or a single size.
    """
    x, y = np.asarray(num_bytes, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if x.shape != y.shape or len(x) < 3:
        raise ValueError(f"{len(x)} sizes and {len(y)} times: a fit needs three points")
    if (y <= 0).any() or not np.isfinite(y).all():
        raise ValueError("times must be positive")
    if len(set(x.tolist())) < 2:
        raise ValueError("all sizes are the same")
    columns = np.stack([np.ones_like(x), x], axis=1) / y[:, None]  # relative: the target is 1
    chosen = least_squares(columns)
    deviations = columns @ chosen - 1
    freedom = len(x) - np.count_nonzero(chosen)
    errors = np.zeros(2)
    used = chosen > 0
    covariance = np.linalg.inv(columns[:, used].T @ columns[:, used])
    errors[used] = np.sqrt(np.diag(covariance) * (deviations @ deviations) / max(1, freedom))
    return Fit(
        alpha=float(chosen[0]),
        beta=float(chosen[1]),
        alpha_error=float(errors[0]),
        beta_error=float(errors[1]),
        error=float(np.sqrt(np.mean(deviations**2))),
        worst=float(np.abs(deviations).max()),
    )


def least_squares(columns: np.ndarray) -> np.ndarray:
    """[2] coefficients that make the columns' sum nearest to 1 in every row, none below 0."""
    best = np.linalg.lstsq(columns, np.ones(len(columns)), rcond=None)[0]
    if (best >= 0).all():
        return best
    kept = int(best[1] > 0)  # one is below 0: leave that one out
    column = columns[:, kept]
    result = np.zeros(2)
    result[kept] = column.sum() / (column @ column)
    return result
