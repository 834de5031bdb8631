# SPDX-License-Identifier: Apache-2.0
"""Custom: TeaCache decides when, TaylorSeer's first order says what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from torch import Tensor

from .base import Mix, Mixed, Step, hold
from .forecast_mixes import taylor_mix
from .spec import HistorySpec, ParameterSpec, PolicySpec, Value
from .teacache import AccumulatingConfig, TeaCache

__all__ = ["DAMPED", "PUBLISHED", "Custom", "CustomConfig"]


DAMPED: dict[str, Any] = {"trend": 0.65, "trend_decay": 0.8}
"""Parameters of the damped forecast, the policy's default."""

PUBLISHED = {"trend": 1.0, "trend_decay": 1.0}
"""Parameters of the published forecast, which a config runs that says nothing of them."""

PARAMETERS = {
    "trend": ParameterSpec(
        default=DAMPED["trend"],
        minimum=0.0,
        maximum=1.0,
        meaning="share of the last trend that a forecast follows, 0 (hold) to 1 (published)",
    ),
    "trend_decay": ParameterSpec(
        default=DAMPED["trend_decay"],
        minimum=0.0,
        maximum=1.0,
        meaning="factor on that share per step since the last computed one, 0 to 1 (published)",
    ),
}


def _form(parameters: Mapping[str, Any]) -> str:
    """Say whether the forecast is the published one, a damped one, or none."""
    trend, decay = (float(parameters[name]) for name in PUBLISHED)
    if {"trend": trend, "trend_decay": decay} == PUBLISHED:
        return "published forecast"
    if trend == 0 or decay == 0:
        return "no forecast, holds"
    return f"damped forecast, trend {trend:g}, trend_decay {decay:g}"


def _trend(
    step: Step,
    signal: Tensor,
    kept: dict[str, Tensor],
    state: dict[str, Tensor],
    parameters: dict[str, Tensor],
) -> Mixed:
    """Mix the line through two residuals into the newest one, less the farther ahead."""
    ahead = (step.step_index - step.computed_steps[0]).to(parameters["trend"].dtype)
    share = parameters["trend"] * parameters["trend_decay"] ** ahead
    held = hold(step)
    return Mixed(held + share * (taylor_mix(step, 1) - held), {})


TREND = Mix(law=_trend, history=HistorySpec(maximum=2, depth=2), parameters=PARAMETERS, form=_form)


class CustomConfig(AccumulatingConfig):
    """Keys of Custom's configs, TeaCache's among them.

    A config without ``trend`` and ``trend_decay`` is LightX2V's, and gets its law: the published
    forecast. The policy's bare name stands for the damped one.

    Attributes:
        trend: Share of the last trend that the forecast follows.
        trend_decay: Factor on that share per step since the last computed one.
    """

    policy: ClassVar[str] = "custom"
    keys: ClassVar[Mapping[str, str]] = {**AccumulatingConfig.keys, **{n: n for n in PUBLISHED}}

    feature_caching: Literal["Custom"] = "Custom"
    trend: Annotated[float, PARAMETERS["trend"].check] | None = None
    trend_decay: Annotated[float, PARAMETERS["trend_decay"].check] | None = None

    @classmethod
    def of_policy(cls) -> Self:
        """Return the damped form, the policy's default."""
        return cls.model_validate(DAMPED)

    def _parameters(self) -> dict[str, Value]:
        return PUBLISHED | super()._parameters()


class Custom(TeaCache):
    """Reuse where TeaCache would, but extrapolate the last two residuals instead of holding one.

    Reference: Liu et al. 2024, TeaCache, arXiv 2411.19108, eq. 4 to 6 (decision); Liu et al. 2025,
        TaylorSeer, arXiv 2503.06923, eq. 2 and 3 with m = 1 (mix).

    Differs: the forecast follows the last trend in part, and less the farther it reaches: undamped
        it falls below plain holding at long gaps. ``trend`` 1 and ``trend_decay`` 1 are the
        published form; the defaults damp more than the least-squares fit of the demo model, so
        that no run falls below plain holding (docs/explanation/caching.md).
    Differs: the forecast is of the whole residual, not of every module's output; by linearity the
        two differ only by the change of the gates between steps.
    Differs: as `TeaCache`.
    """

    config = CustomConfig
    mix = TREND
    spec = PolicySpec(
        name="custom",
        summary="decides as teacache, extrapolates as taylorseer of order 1",
        signals=TeaCache.spec.signals,
        kept=TeaCache.spec.kept,
        history=TREND.history,
        state=TeaCache.spec.state,
        parameters={**TeaCache.spec.parameters, **TREND.parameters},
        distance=TeaCache.spec.distance,
        reference="TeaCache, arXiv 2411.19108; TaylorSeer, arXiv 2503.06923",
    )
