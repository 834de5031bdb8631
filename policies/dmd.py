# SPDX-License-Identifier: Apache-2.0
"""DMD: compute one step in N, forecast the others from exponentials fitted to past residuals."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Mix, Mixed, Step
from .forecast_mixes import line_mix
from .interval import INTERVAL, Interval
from .linear import solve
from .spec import HistorySpec, ParameterSpec, PolicySpec

__all__ = ["DMD", "prony_mix"]

HISTORY = 6
LEAST = 4
"""Residuals at equal distances without which no exponentials are fitted."""

TINY = 1e-30

REACH = 2.0
"""Distances ahead that predictions span."""


def prony_mix(step: Step, gram: Tensor, ridge: Tensor, farthest: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mix of the forecast by linear prediction, and whether it is to be trusted.

    Of the newest residuals at equal distances, y_0 is fitted by those before it,
    ``y_0 ≈ κ y_1 − Σ γ_j (y_{j−1} − y_j)``, and the same combination moved on foretells the next ones,
    as a sum of exponentials goes on. In between lies the cubic through y_1, y_0 and two foretold.

    Args:
        step: Where the run stands.
        gram: float32 [history.maximum, history.maximum], as `Policy.decide` describes it.
        ridge: float32 [], share of each direction's square by which the fit is pulled to holding.
        farthest: float32 [], how many times as far as the last step the foretold one may go.

    Returns:
        float32 [history.maximum], and bool [].
    """
    size = gram.shape[0]
    steps = step.computed_steps
    distance = (steps[0] - steps[1]).to(torch.float32)
    is_even = (steps[1:] >= 0) & (steps[:-1] - steps[1:] == steps[0] - steps[1])
    even = torch.stack([is_even[: count + 1].all() for count in range(size - 1)])

    # Rows are y_1 and the differences before it, in terms of what the gram multiplies.
    unit = torch.eye(size)
    rows = torch.cat([(unit[0] - unit[1]).unsqueeze(0), unit[2:]])
    products = (rows.unsqueeze(1) * gram.unsqueeze(0)).sum(dim=2)
    normal = (products.unsqueeze(1) * rows.unsqueeze(0)).sum(dim=2)
    diagonal = torch.eye(size - 1)
    square = (normal * diagonal).sum(dim=1)
    scale = torch.where(even & (square > 0), 1 / square.clamp(min=TINY).sqrt(), 0.0)
    scaled = normal * scale.unsqueeze(0) * scale.unsqueeze(1)
    pull = torch.where(scale > 0, ridge, 1.0)
    weights = scale * solve(scaled + pull * diagonal, scale * products[:, 1])

    # `weights` are κ − 1, then −γ_j; moved on by one distance, and by two.
    kept, trends = 1 + weights[0], weights[1:]
    first = kept * unit[0] + torch.cat([torch.zeros(1), trends, torch.zeros(1)])
    gone_on = trends[0] * (first - unit[0])
    second = kept * first + gone_on + torch.cat([torch.zeros(1), trends[1:], torch.zeros(2)])

    ahead = (step.step_index - steps[0]).to(torch.float32) / distance
    nodes = [(-1.0, unit[0] - unit[1]), (0.0, unit[0]), (1.0, first), (2.0, second)]
    combined = torch.zeros(size)
    for at, value in nodes:
        share = torch.ones(())
        for other, _ in nodes:
            if other != at:
                share = share * (ahead - other) / (at - other)
        combined = combined + share * value

    moved = first - unit[0]
    foretold = (moved.unsqueeze(0) * moved.unsqueeze(1) * gram).sum()
    is_sound = even[LEAST - 2] & (ahead <= REACH) & (foretold <= farthest * farthest * gram[1, 1])
    # Differences are differences of residuals: y_{j−1} − y_j.
    older = torch.cat([combined[1:], torch.zeros(1)])
    trend = torch.cat([torch.zeros(1), combined[1:]])
    mix = torch.where(torch.arange(size) == 0, combined[0], 0.0) + older - trend
    return mix, is_sound


def _exponentials(
    step: Step,
    signal: Tensor,
    kept: dict[str, Tensor],
    state: dict[str, Tensor],
    parameters: dict[str, Tensor],
) -> Mixed:
    ridge, farthest = parameters["ridge"], parameters["farthest"]
    mix, is_sound = prony_mix(step, kept["gram"], ridge, farthest)
    return Mixed(torch.where(is_sound, mix, line_mix(step)), {})


EXPONENTIALS = Mix(
    law=_exponentials,
    history=HistorySpec(maximum=HISTORY, depth=HISTORY),
    kept=("gram",),
    parameters={
        "ridge": ParameterSpec(
            default=1e-4,
            minimum=1e-5,
            maximum=1.0,
            meaning="pull of the fit towards holding, as share of each direction's square",
        ),
        "farthest": ParameterSpec(
            default=2.0,
            minimum=0.0,
            meaning="times as far as the last step that a foretold one may go, >= 0",
        ),
    },
    tolerance=2e-3,  # the solve loses what the ridge leaves of its conditioning, 1e4 at 1e-4
)


class DMD(Interval):
    """Compute the first of every ``interval`` steps and forecast the residual in between.

    Residuals at equal distances are taken for samples of a sum of exponentials, whose next value is a
    fixed combination of the ones before. The combination is a least-squares fit, for which the inner
    products of the residuals are enough.

    Reference: Schmid 2010, dynamic mode decomposition; as a forecast of cached features in cache-dit
        1.5.3 (``dmd``), which takes powers of the eigenvalues.

    Differs: a fraction of the distance is interpolated between foretold residuals, by a cubic; cache-dit
        raises eigenvalues to that fraction.
    Differs: small directions are damped by a ridge towards holding, not cut off at a rank.
    Differs: a forecast that moves more than ``farthest`` times as far as the last residual did is left
        for the straight line, as is one of fewer than four residuals at equal distances.
    Differs: one fit for the whole batch of a branch.
    """

    mix = EXPONENTIALS
    spec = PolicySpec(
        name="dmd",
        summary="computes one step in N, forecasts by exponentials fitted to past residuals",
        kept=list(EXPONENTIALS.kept),
        history=EXPONENTIALS.history,
        parameters={"interval": INTERVAL, **EXPONENTIALS.parameters},
        reference="dynamic mode decomposition, Schmid 2010; cache-dit 1.5.3",
    )
