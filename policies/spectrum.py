# SPDX-License-Identifier: Apache-2.0
"""Spectrum: fit Chebyshev polynomials to the past residuals, compute at intervals that grow."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Decision, Mix, Mixed, Policy, Step
from .forecast_mixes import line_mix
from .linear import gram, solve
from .spec import HistorySpec, ParameterSpec, PolicySpec, StateSpec

__all__ = ["CLOCKS", "Spectrum", "chebyshev_mix"]

CLOCKS = ["step", "sigma", "logsnr"]
"""What polynomials are functions of."""

HISTORY = 16
DEGREE = 6
LEAST_SIGMA = 1e-3
"""Noise levels nearer to 0 or 1 count as so near: their log-SNR has no bound."""


def chebyshev_mix(step: Step, degree: Tensor, ridge: Tensor, clock: Tensor) -> Tensor:
    """Return the mix of a ridge fit of Chebyshev polynomials to the residuals, evaluated at this step.

    With Φ[k, j] = T_j(τ_k) over the computed steps and φ that row at this step,
    ``mix = Φ (ΦᵀΦ + ridge · I)⁻¹ φ``.

    Args:
        step: Where the run stands; ``computed_steps`` says which residuals exist.
        degree: int64 [], highest polynomial, at most `DEGREE`.
        ridge: float32 [], above 0.
        clock: int64 [], index in `CLOCKS`: τ is the step's place in the run, its noise level, or its
            log-SNR, each brought to [-1, 1].

    Returns:
        float32 [history.maximum].

    Reference: Han et al. 2026, Spectrum, arXiv 2603.01623, Chebyshev basis and ridge regression.
    """
    steps = torch.cat([step.step_index.reshape(1), step.computed_steps]).to(torch.float32)
    sigmas = torch.cat([step.sigma.reshape(1), step.computed_sigmas])
    times = torch.where(clock == CLOCKS.index("sigma"), 1 - 2 * sigmas, _place(step, steps))
    times = torch.where(clock == CLOCKS.index("logsnr"), _log_snr(sigmas), times)
    basis = [torch.ones_like(times), times]
    for _ in range(2, DEGREE + 1):
        basis.append(2 * times * basis[-1] - basis[-2])
    table = torch.stack(basis, dim=1)
    table = torch.where(torch.arange(DEGREE + 1) <= degree, table, 0.0)
    held = (step.computed_steps >= 0).to(torch.float32).unsqueeze(1)
    past = table[1:] * held
    coefficients = solve(gram(past) + ridge * torch.eye(DEGREE + 1), table[0])
    return (past * coefficients).sum(dim=1)


def _place(step: Step, steps: Tensor) -> Tensor:
    return 2 * steps / step.step_count.to(torch.float32) - 1


def _log_snr(sigmas: Tensor) -> Tensor:
    """Return the log-SNR of flow models' noise levels over the greatest that is told apart."""
    bounded = torch.clamp(sigmas, LEAST_SIGMA, 1 - LEAST_SIGMA)
    greatest = torch.log(torch.tensor(1 / LEAST_SIGMA - 1))
    return torch.log((1 - bounded) / bounded) / greatest


def _fitted(
    step: Step,
    signal: Tensor,
    kept: dict[str, Tensor],
    state: dict[str, Tensor],
    parameters: dict[str, Tensor],
) -> Mixed:
    age = torch.arange(HISTORY)
    held = torch.where(age < parameters["history"], step.computed_steps, -1)
    step = step._replace(computed_steps=held)
    fit = chebyshev_mix(step, parameters["degree"], parameters["ridge"], parameters["clock"])
    line = line_mix(step)
    return Mixed(line + parameters["blend"] * (fit - line), {})


CHEBYSHEV = Mix(
    law=_fitted,
    history=HistorySpec(maximum=HISTORY, parameter="history"),
    parameters={
        "degree": ParameterSpec(
            default=4,
            dtype="int64",
            minimum=0,
            maximum=DEGREE,
            meaning=f"highest Chebyshev polynomial, 0 to {DEGREE}",
        ),
        "ridge": ParameterSpec(
            default=0.1,
            minimum=0.01,
            meaning="pull of the fit towards 0, >= 0.01",
        ),
        "blend": ParameterSpec(
            default=1.0,
            minimum=0.0,
            maximum=1.0,
            meaning="share of the fit, 0 to 1; the rest is the line through two residuals",
        ),
        "clock": ParameterSpec(
            default="step",
            dtype="int64",
            choices=CLOCKS,
            meaning="what the polynomials are functions of",
        ),
        "history": ParameterSpec(
            default=8,
            dtype="int64",
            minimum=2,
            maximum=HISTORY,
            meaning=f"residuals that are kept and fitted, 2 to {HISTORY}",
        ),
    },
    tolerance=1e-5,  # the solve loses what the ridge leaves of its conditioning, 300 at 0.1
)


class Spectrum(Policy):
    """Compute at intervals that grow over the run; forecast from polynomials over all of it.

    After ``warmup`` computed steps the interval is ``⌊window⌋``, and each computed step adds
    ``growth`` to the window. The forecast is ``blend`` of the Chebyshev fit and the rest of the
    straight line through the last two residuals. Both look at no tensor, so decisions and mixes are
    known before the run.

    Reference: Han et al. 2026, Spectrum, arXiv 2603.01623, sections on the Chebyshev forecast and on
        the adaptive schedule; blending as in its authors' later code.

    Differs: fits the newest ``history`` residuals; the authors keep those of the whole run.
    Differs: time runs from -1 at step 0 to 1 after the last; the authors divide by 50 steps always.
    Differs: ``clock`` offers the sampler's noise level or its log-SNR for the step number.
    Differs: one forecast of the whole residual in float32; the authors store coefficients in bfloat16.
    """

    mix = CHEBYSHEV
    spec = PolicySpec(
        name="spectrum",
        summary="fits Chebyshev polynomials to past residuals, computes at growing intervals",
        history=CHEBYSHEV.history,
        state={"grown": StateSpec(dtype="int64")},
        parameters={
            "warmup": ParameterSpec(
                default=5, dtype="int64", minimum=1, meaning="steps computed at the start, >= 1"
            ),
            "window": ParameterSpec(
                default=2.0,
                minimum=1.0,
                meaning="steps per computed step after the warm-up, rounded down, >= 1",
            ),
            "growth": ParameterSpec(
                default=0.75,
                minimum=0.0,
                meaning="steps that each computed one adds to the window, >= 0",
            ),
            **CHEBYSHEV.parameters,
        },
        reference="Han et al. 2026, Spectrum, arXiv 2603.01623",
    )

    def decide(
        self,
        step: Step,
        signal: Tensor,
        feature: Tensor,
        kept: dict[str, Tensor],
        state: dict[str, Tensor],
        parameters: dict[str, Tensor],
    ) -> Decision:
        """Decide from the step index alone; see `Policy.decide`."""
        is_warm = step.step_index >= parameters["warmup"]
        window = parameters["window"] + parameters["growth"] * state["grown"].to(torch.float32)
        # Sums of fractions end short of whole numbers; a thousandth more is none.
        interval = torch.floor(window + 5e-4).to(torch.int64)
        due = step.step_index - step.computed_steps[0] >= interval
        compute = step.must_compute | ~is_warm | due
        grown = state["grown"] + (compute & is_warm).to(torch.int64)
        return Decision(compute, {"grown": grown})
