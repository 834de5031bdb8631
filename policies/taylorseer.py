# SPDX-License-Identifier: Apache-2.0
"""TaylorSeer: compute one step in N, forecast the others from differences of past residuals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from .base import Mix, Mixed, Step
from .config import CachingConfig
from .forecast_mixes import newton_mix, taylor_mix
from .interval import INTERVAL, Interval
from .spec import HistorySpec, ParameterSpec, PolicySpec

__all__ = ["DIFFERENCES", "TaylorSeer", "TaylorSeerConfig"]

VARIANTS = ["taylor", "newton"]


PARAMETERS = {
    "order": ParameterSpec(
        default=1,
        dtype="int64",
        minimum=1,
        maximum=4,
        meaning="highest finite difference used, 1 to 4",
    ),
    "variant": ParameterSpec(
        default="taylor",
        dtype="int64",
        choices=VARIANTS,
        meaning="'taylor' as in the paper, 'newton' for the interpolating polynomial",
    ),
}


def _differences(
    step: Step,
    signal: Tensor,
    kept: dict[str, Tensor],
    state: dict[str, Tensor],
    parameters: dict[str, Tensor],
) -> Mixed:
    order = parameters["order"]
    is_newton = parameters["variant"] == VARIANTS.index("newton")
    return Mixed(torch.where(is_newton, newton_mix(step, order), taylor_mix(step, order)), {})


DIFFERENCES = Mix(
    law=_differences,
    history=HistorySpec(maximum=5, parameter="order", offset=1),
    parameters=PARAMETERS,
)


class TaylorSeerConfig(CachingConfig):
    """Keys of TaylorSeer's configs: the policy's parameters by their names."""

    policy: ClassVar[str] = "taylorseer"
    keys: ClassVar[Mapping[str, str]] = {n: n for n in ("interval", *PARAMETERS)}

    feature_caching: Literal["TaylorSeer"] = "TaylorSeer"
    interval: Annotated[int, INTERVAL.check] | None = None
    order: Annotated[int, PARAMETERS["order"].check] | None = None
    variant: Annotated[str, PARAMETERS["variant"].check] | None = None


class TaylorSeer(Interval):
    """Compute the first of every ``interval`` steps and extrapolate the residual in between.

    The decision looks at no tensor, so the whole sequence is known before the run.

    Reference: Liu et al. 2025, TaylorSeer, arXiv 2503.06923, eq. 2 and 3.

    Differs: the forecast is of the whole residual, not of every module's output; by linearity the
        two differ only by the change of the gates between steps, for a fraction of the memory.
    Differs: ``variant: newton`` offers the interpolating polynomial, exact on uneven gaps; the
        paper's form divides every order by the gap of the two newest steps.
    """

    config = TaylorSeerConfig
    mix = DIFFERENCES
    spec = PolicySpec(
        name="taylorseer",
        summary="computes one step in N, forecasts the others by finite differences",
        history=DIFFERENCES.history,
        parameters={"interval": INTERVAL, **DIFFERENCES.parameters},
        reference="Liu et al. 2025, TaylorSeer, arXiv 2503.06923",
    )
