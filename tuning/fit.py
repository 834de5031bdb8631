# SPDX-License-Identifier: Apache-2.0
"""Fit what published policies ask of a calibration: TeaCache's polynomial, MagCache's ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST_R2", "PolynomialFit", "fit_polynomial", "relative_changes"]

DEGREE = 4
LEAST_R2 = 0.8
"""Share of the variance a polynomial must explain to be written into a config."""


@dataclass(frozen=True)
class PolynomialFit:
    """A rescaling polynomial of TeaCache.

    Attributes:
        coefficients: Highest power first.
        r2: Share of the variance of the residual's change that it explains, at most 1.
        refusal: Why it is not to be used, or empty.
    """

    coefficients: tuple[float, ...]
    r2: float
    refusal: str = ""


def relative_changes(signal: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return mean|s_t − s_{t−1}| / mean|s_{t−1}| for t = 1 …, [steps − 1].

    Args:
        signal: [steps, …].

    Reference: Liu et al. 2024, TeaCache, arXiv 2411.19108, eq. 4.
    """
    rows = np.asarray(signal, dtype=np.float64).reshape(len(signal), -1)
    return np.asarray(np.abs(np.diff(rows, axis=0)).mean(1) / np.abs(rows[:-1]).mean(1))


def fit_polynomial(
    signal: NDArray[np.floating], changes: Sequence[Sequence[float]]
) -> PolynomialFit:
    """Fit the residual's relative change to the signal's.

    Args:
        signal: [steps, …], a table that depends on timesteps alone.
        changes: [runs][steps − 1], mean|r_t − r_{t−1}| / mean|r_{t−1}| of every run and branch.

    Returns:
        The fit of the runs' mean; refused where it explains too little, or has no point enough.

    Reference: Liu et al. 2024, TeaCache, arXiv 2411.19108, section 3.3 (polynomial fitting).

    Differs: fitted to the change of the body residual, which is what is reused, not of the
        model's output.
    """
    x, y = relative_changes(signal), np.mean(changes, axis=0)
    if len(x) <= DEGREE + 1:
        refusal = f"{len(x)} changes can't settle a polynomial of degree {DEGREE}"
        return PolynomialFit((), 0.0, refusal)
    spread = float(np.ptp(x))
    if spread < 1e-9:
        return PolynomialFit((), 0.0, "the signal's change is the same at every step")
    coefficients = np.polyfit(x, y, DEGREE)
    left = float(np.square(y - np.polyval(coefficients, x)).sum())
    r2 = 1.0 - left / float(np.square(y - y.mean()).sum())
    fit = tuple(float(c) for c in coefficients)
    if r2 < LEAST_R2:
        refusal = (
            f"explains {r2:.0%} of the residual's change, less than {LEAST_R2:.0%}: the signal does "
            "not tell when to compute"
        )
        return PolynomialFit(fit, r2, refusal)
    return PolynomialFit(fit, r2)
