"""TeaCache's polynomial: a known one is found again, and what tells nothing is refused."""

from __future__ import annotations

import numpy as np
import pytest

from freewheel.tuning.fit import fit_polynomial, relative_changes

COEFFICIENTS = [300.0, -80.0, 9.0, 0.4, 0.02]


def signal(steps: int = 40) -> np.ndarray:
    """Return a signal whose change per step falls and rises again."""
    pace = 0.02 + 0.2 * np.linspace(-1, 1, steps) ** 2
    return np.exp(np.cumsum(pace))[:, None] * np.ones((1, 6))


def test_a_known_polynomial_is_found_again() -> None:
    changes = np.polyval(COEFFICIENTS, relative_changes(signal()))
    fit = fit_polynomial(signal(), [changes * 0.9, changes * 1.1])
    assert fit.r2 == pytest.approx(1.0)
    assert not fit.refusal
    np.testing.assert_allclose(fit.coefficients, COEFFICIENTS, rtol=1e-3, atol=1e-6)


def test_noise_is_refused_with_its_share() -> None:
    changes = np.random.default_rng(0).uniform(0.1, 0.2, 39)
    fit = fit_polynomial(signal(), [changes])
    assert "explains" in fit.refusal
    assert fit.r2 < 0.8


@pytest.mark.parametrize(
    ("values", "reason"),
    [(signal(5), "can't settle"), (1.1 ** np.arange(40)[:, None], "the same at every step")],
)
def test_what_can_not_be_fitted_is_refused(values: np.ndarray, reason: str) -> None:
    fit = fit_polynomial(values, [np.linspace(0.1, 0.2, len(values) - 1)])
    assert reason in fit.refusal
