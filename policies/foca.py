# SPDX-License-Identifier: Apache-2.0
"""FoCa: forecast from the trends at the last computed step and at the last step of any kind."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Mix, Mixed, Step, hold
from .interval import INTERVAL, Interval
from .spec import HistorySpec, ParameterSpec, PolicySpec, StateSpec

__all__ = ["FoCa"]

HISTORY = 8
REACH = 3.0
"""Steps ahead up to which the trend is followed in full."""


def _moved_on(
    step: Step, was_computed: Tensor, state: dict[str, Tensor], history: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the two newest steps of any kind as mixes of the residuals held now.

    A computed step makes every residual one older.
    """
    older = torch.cat([torch.zeros(1), state["newest"]])
    age = torch.arange(HISTORY + 1)
    fallen = torch.where(age >= history, older, 0.0).sum()
    older = torch.where(age < history, older, 0.0) + torch.where(age == history - 1, fallen, 0.0)
    newest = torch.where(was_computed, hold(step), state["forecast"])
    return newest, torch.where(was_computed, older[:HISTORY], state["newest"])


def _trends(
    step: Step,
    signal: Tensor,
    kept: dict[str, Tensor],
    state: dict[str, Tensor],
    parameters: dict[str, Tensor],
) -> Mixed:
    """Mix the residuals by the two trends.

    ``forecast`` is what the step before would have been if it was reused, ``newest`` and ``before``
    are the steps before that one, as mixes of the residuals held then.
    """
    last = step.computed_steps[0]
    was_computed = last == step.step_index - 1
    newest, before = _moved_on(step, was_computed, state, parameters["history"])

    ahead = (step.step_index - last).to(torch.float32)
    anchor = hold(step)
    trend = anchor - torch.roll(anchor, 1) + newest - before
    reach = 0.5 * torch.clamp(ahead, max=REACH) * torch.clamp(REACH / ahead, max=1.0)
    mix = torch.where(step.computed_steps[1] >= 0, anchor + reach * trend, anchor)
    return Mixed(mix, {"newest": newest, "before": before, "forecast": mix})


TRENDS = Mix(
    law=_trends,
    history=HistorySpec(maximum=HISTORY, parameter="history"),
    state={name: StateSpec(shape=[HISTORY]) for name in ("newest", "before", "forecast")},
    parameters={
        "history": ParameterSpec(
            default=4,
            dtype="int64",
            minimum=2,
            maximum=HISTORY,
            meaning=f"residuals that are kept, 2 to {HISTORY}",
        ),
    },
)


class FoCa(Interval):
    """Compute one step in N; in between, integrate the residual as an ODE by Heun's rule.

    With F and F′ the two newest computed residuals, P and P′ those of the two newest steps of any
    kind, and e steps since F: ``r̂ = F + e/2 · ((F − F′) + (P − P′))`` for e up to 3, beyond that the
    forecast at 3 blended towards F with weight ``3/e``. P and P′ are forecasts themselves; a
    forecast is a mix, so what is kept of them is two rows of factors.

    Reference: Zheng et al. 2025, FoCa, arXiv 2508.16211; in the form of cache-dit 1.5.3, which takes
        every step for a unit of time and bounds the reach.

    Differs: forecasts reach back without end, each computed step halving what an older one weighs. The
        newest ``history`` residuals are kept, and an older one's factor goes to the oldest of them.
    """

    mix = TRENDS
    spec = PolicySpec(
        name="foca",
        summary="computes one step in N, forecasts from the last trend and the last computed one",
        history=TRENDS.history,
        state=dict(TRENDS.state),
        parameters={"interval": INTERVAL, **TRENDS.parameters},
        reference="Zheng et al. 2025, FoCa, arXiv 2508.16211",
    )
