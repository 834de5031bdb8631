# SPDX-License-Identifier: Apache-2.0
"""Custom: TeaCache decides when, TaylorSeer's first order says what."""

from __future__ import annotations

from torch import Tensor

from ..configs.policy_spec import HistorySpec, ParameterSpec, PolicySpec
from .base import Decision, Policy, Step, hold
from .forecast import taylor_mix
from .teacache import TEACACHE_PARAMETERS, TEACACHE_SIGNALS, TEACACHE_STATE, accumulate

__all__ = ["Custom"]


class Custom(Policy):
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

    spec = PolicySpec(
        name="custom",
        summary="decides as teacache, extrapolates as taylorseer of order 1",
        signals=TEACACHE_SIGNALS,
        kept=["previous_signal"],
        history=HistorySpec(maximum=2, depth=2),
        state=TEACACHE_STATE,
        parameters={
            **TEACACHE_PARAMETERS,
            "trend": ParameterSpec(
                default=0.65,
                minimum=0.0,
                maximum=1.0,
                meaning="share of the last trend that a forecast follows, 0 (hold) to 1 (published)",
            ),
            "trend_decay": ParameterSpec(
                default=0.8,
                minimum=0.0,
                maximum=1.0,
                meaning="factor on that share per step since the last computed one, 0 to 1 (published)",
            ),
        },
        distance="distance",
        reference="TeaCache, arXiv 2411.19108; TaylorSeer, arXiv 2503.06923",
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
        """Decide from the accumulated distance; see `Policy.decide`."""
        compute, new_state = accumulate(step, signal, kept["previous_signal"], state, parameters)
        ahead = (step.step_index - step.computed_steps[0]).to(parameters["trend"].dtype)
        share = parameters["trend"] * parameters["trend_decay"] ** ahead
        held = hold(step)
        return Decision(compute, held + share * (taylor_mix(step, 1) - held), new_state)
