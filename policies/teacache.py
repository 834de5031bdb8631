# SPDX-License-Identifier: Apache-2.0
"""TeaCache: reuse until the rescaled change of a signal has added up to a threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from ..configs.policy_spec import HistorySpec, ParameterSpec, PolicySpec, StateSpec
from .base import Decision, Policy, Step, hold

__all__ = ["TEACACHE_PARAMETERS", "TEACACHE_SIGNALS", "TEACACHE_STATE", "TeaCache", "accumulate"]

TEACACHE_SIGNALS = ["temb", "timestep_proj", "modulated_input"]

TEACACHE_STATE = {"distance": StateSpec()}

TEACACHE_PARAMETERS = {
    # With the identity polynomial on 'temb', 0.2 computes 18 of the shipped demo model's 30 steps
    # and 0.1 all of them; fitted polynomials bring thresholds of their own in their config.
    "threshold": ParameterSpec(
        default=0.2,
        minimum=0.0,
        meaning="accumulated distance at which a step is computed, >= 0; 0 never reuses",
    ),
    "coefficients": ParameterSpec(
        default=[1.0, 0.0],
        shape=[6],
        pad="front",
        meaning="rescaling polynomial of the relative L1 change, highest power first",
    ),
}


def accumulate(
    step: Step,
    signal: Tensor,
    previous: Tensor,
    state: dict[str, Tensor],
    parameters: dict[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the rescaled change of the signal to the distance, and compare it with the threshold.

    Args:
        step: Where the run stands.
        signal: float32 [rows, width], at this step.
        previous: Same shape, at the step before this one, computed or not.
        state: ``distance``, float32 [].
        parameters: ``threshold``, float32 []; ``coefficients``, float32 [6].

    Returns:
        compute, bool [], and the new state: distance 0 where the step is computed.

    Reference: Liu et al. 2024, TeaCache, arXiv 2411.19108, eq. 4 to 6.
    """
    relative_l1 = (signal - previous).abs().mean() / previous.abs().mean()
    coefficients = parameters["coefficients"]
    rescaled = coefficients[0]
    for power in range(1, coefficients.shape[0]):
        rescaled = rescaled * relative_l1 + coefficients[power]
    distance = state["distance"] + rescaled
    threshold = parameters["threshold"]
    near = (distance < threshold) & (threshold > 0)
    # A change that is not finite makes the distance so; −inf would pass for near.
    compute = step.must_compute | ~(near & torch.isfinite(distance))
    return compute, {"distance": torch.where(compute, 0.0, distance)}


class TeaCache(Policy):
    """Reuse the newest residual while the accumulated distance stays below the threshold.

    The signal is compared with that of the previous step, not of the previous computed step.
    Wan's signals are timestep embeddings, the same for every prompt and branch; other families
    take the first block's modulated input.

    Reference: Liu et al. 2024, TeaCache, arXiv 2411.19108, section 3.3 (eq. 4 to 6).

    Differs: threshold 0 never reuses, even where the polynomial is negative.
    Differs: a change that is not finite (first step, all-zero signal) computes.
    Differs: everything is float32; implementations that cast the signal to bfloat16 first lose
        the distance between neighbouring timesteps.
    """

    spec = PolicySpec(
        name="teacache",
        summary="reuses until the signal's rescaled change adds up to a threshold",
        signals=TEACACHE_SIGNALS,
        kept=["previous_signal"],
        history=HistorySpec(maximum=1),
        state=TEACACHE_STATE,
        parameters=TEACACHE_PARAMETERS,
        distance="distance",
        reference="Liu et al. 2024, TeaCache, arXiv 2411.19108",
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
        return Decision(compute, hold(step), new_state)
