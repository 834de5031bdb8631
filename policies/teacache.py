# SPDX-License-Identifier: Apache-2.0
"""TeaCache: reuse until the rescaled change of a signal has added up to a threshold."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from torch import Tensor

from .base import Decision, Policy, Step, relative_change
from .config import CachingConfig
from .spec import HistorySpec, ParameterSpec, PolicySpec, StateSpec, Value, one_of

__all__ = [
    "TEACACHE_PARAMETERS",
    "TEACACHE_SIGNALS",
    "TEACACHE_STATE",
    "AccumulatingConfig",
    "TeaCache",
    "TeaCacheConfig",
    "accumulate",
]

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

# An unused set may be empty; the parameter's front padding takes fewer numbers than it holds.
Polynomial = Annotated[list[float], Field(max_length=TEACACHE_PARAMETERS["coefficients"].shape[0])]


class AccumulatingConfig(CachingConfig):
    """Keys of the policies that add up a signal's rescaled change.

    Attributes:
        teacache_thresh: Accumulated distance at which a step is computed; 0 never reuses.
        use_ret_steps: True takes the signal ``timestep_proj`` and computes the first 5 steps; False
            takes ``temb`` and computes the first and the last.
        coefficients: Rescaling polynomials, highest power first, as [[set for use_ret_steps true],
            [set for false]], or one set for both, alone or in a list.
        signal: Overrides the signal. One set of coefficients and no ``use_ret_steps``, the form of
            families other than Wan, takes ``modulated_input``.
    """

    foreign: ClassVar[frozenset[str]] = frozenset()

    keys: ClassVar[Mapping[str, str]] = {"teacache_thresh": "threshold"}

    teacache_thresh: Annotated[float, TEACACHE_PARAMETERS["threshold"].check] | None = None
    use_ret_steps: bool = False
    coefficients: list[Polynomial] | None = None
    signal: Annotated[str, AfterValidator(partial(one_of, TEACACHE_SIGNALS))] | None = None

    @field_validator("coefficients", mode="before")
    @classmethod
    def _in_sets(cls, value: Any) -> Any:
        is_flat = isinstance(value, list) and value and not isinstance(value[0], list)
        return [value] if is_flat else value

    @field_validator("coefficients")
    @classmethod
    def _has_polynomial(
        cls, sets: list[list[float]] | None, info: ValidationInfo
    ) -> list[list[float]] | None:
        if sets is None:
            return None
        if len(sets) not in (1, 2):
            raise ValueError(f"[[set for ret steps], [plain set]] or one set, not {len(sets)}")
        if "use_ret_steps" in info.data and not _chosen(sets, info.data["use_ret_steps"]):
            wanted = str(info.data["use_ret_steps"]).lower()
            raise ValueError(f"coefficients in the set for 'use_ret_steps': {wanted}")
        return sets

    def _guard(self) -> dict[str, Any]:
        ends = (5, 0) if self.use_ret_steps else (1, 1)
        return dict(zip(("first_exact", "last_exact"), ends, strict=True))

    def _signal(self) -> str:
        if self.signal is not None:
            return self.signal
        is_one_set = self.coefficients is not None and len(self.coefficients) == 1
        if is_one_set and "use_ret_steps" not in self.model_fields_set:
            return "modulated_input"
        return "timestep_proj" if self.use_ret_steps else "temb"

    def _parameters(self) -> dict[str, Value]:
        sets = self.coefficients
        given = super()._parameters()
        if sets is not None:
            given["coefficients"] = _chosen(sets, self.use_ret_steps)
        return given


def _chosen(sets: list[list[float]], use_ret_steps: bool) -> list[float]:
    return sets[0] if use_ret_steps or len(sets) == 1 else sets[1]


class TeaCacheConfig(AccumulatingConfig):
    """Keys of TeaCache's configs."""

    policy: ClassVar[str] = "teacache"

    feature_caching: Literal["Tea"] = "Tea"


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
    relative_l1 = relative_change(signal, previous)
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

    config: ClassVar[type[CachingConfig] | None] = TeaCacheConfig
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
        return Decision(compute, new_state)
