# SPDX-License-Identifier: Apache-2.0
"""Hermite: compute one step in N, forecast the others by Hermite polynomials of past differences."""

from __future__ import annotations

from torch import Tensor

from .base import Mix, Mixed, Step
from .forecast_mixes import hermite_mix
from .interval import INTERVAL, Interval
from .spec import HistorySpec, ParameterSpec, PolicySpec

__all__ = ["Hermite"]


def _polynomials(
    step: Step,
    signal: Tensor,
    kept: dict[str, Tensor],
    state: dict[str, Tensor],
    parameters: dict[str, Tensor],
) -> Mixed:
    return Mixed(hermite_mix(step, parameters["order"], parameters["scale"]), {})


POLYNOMIALS = Mix(
    law=_polynomials,
    history=HistorySpec(maximum=5, parameter="order", offset=1),
    parameters={
        "order": ParameterSpec(
            default=2,
            dtype="int64",
            minimum=1,
            maximum=4,
            meaning="highest finite difference used, 1 to 4",
        ),
        "scale": ParameterSpec(
            default=0.5,
            minimum=0.0,
            maximum=1.0,
            meaning="contraction of the polynomials, 0 (hold) to 1; 0.5 in the paper",
        ),
    },
)


class Hermite(Interval):
    """Compute the first of every ``interval`` steps and forecast the residual in between.

    As `TaylorSeer`, with the monomial ``k^i`` of its forecast k steps ahead replaced by
    ``scale^i · H_i(scale · k)``, which grows less and turns back where differences are noise.

    Reference: Feng et al. 2025, HiCache, arXiv 2508.16984, Hermite forecast with dual scaling.

    Differs: the forecast is of the whole residual, not of every module's output; by linearity the
        two differ only by the change of the gates between steps.
    Differs: ``scale`` is a number for the whole run; an adaptive one of later code is left out.
    """

    mix = POLYNOMIALS
    spec = PolicySpec(
        name="hermite",
        summary="computes one step in N, forecasts the others by Hermite polynomials",
        history=POLYNOMIALS.history,
        parameters={"interval": INTERVAL, **POLYNOMIALS.parameters},
        reference="Feng et al. 2025, HiCache, arXiv 2508.16984",
    )
