# SPDX-License-Identifier: Apache-2.0
"""EasyCache: foretell the output's change from the input's, at the rate last seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from .base import Decision, Policy, Step
from .config import CachingConfig
from .spec import HistorySpec, ParameterSpec, PolicySpec, StateSpec

__all__ = ["EasyCache", "EasyCacheConfig"]


PARAMETERS = {
    "threshold": ParameterSpec(
        default=0.05,
        minimum=0.0,
        meaning="accumulated relative change of the output at which a step is computed, "
        ">= 0; 0 never reuses",
    ),
}


class EasyCacheConfig(CachingConfig):
    """Keys of EasyCache's configs.

    Attributes:
        easycache_thresh: Accumulated relative change at which a step is computed; 0 never reuses.
    """

    policy: ClassVar[str] = "easycache"
    keys: ClassVar[Mapping[str, str]] = {"easycache_thresh": "threshold"}

    feature_caching: Literal["Easy"] = "Easy"
    easycache_thresh: Annotated[float, PARAMETERS["threshold"].check] | None = None

    def _guard(self) -> dict[str, Any]:
        return {"first_exact": 7, "last_exact": 2}


class EasyCache(Policy):
    """Reuse while the foretold relative change of the model's output adds up to less than a threshold.

    Between the last two computed steps the output changed ``rate`` times as much as the input;
    the input's change from step to step, times that rate, stands for the output's.

    Reference: Zhou et al. 2025, EasyCache, arXiv 2507.02860, section 3.3 (transformation rate and
        accumulated deviation).

    Differs: what is reused is the residual of the block stack; the paper's is that of the whole
        model, output minus input.
    Differs: threshold 0 never reuses; a rate that is not known or not finite computes.
    """

    config = EasyCacheConfig
    spec = PolicySpec(
        name="easycache",
        summary="reuses while the output's change, foretold from the input's, stays small",
        signals=["latents"],
        feature="model_output",
        kept=["previous_signal", "computed_signal", "previous_feature"],
        one_decision=True,
        history=HistorySpec(maximum=1),
        state={
            "distance": StateSpec(),
            "input_change": StateSpec(),
            "has_rate": StateSpec(dtype="bool"),
        },
        parameters=PARAMETERS,
        distance="distance",
        reference="Zhou et al. 2025, EasyCache, arXiv 2507.02860",
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
        """Decide from the accumulated change; see `Policy.decide`.

        ``input_change`` is that between the inputs of the last two computed steps, whose outputs
        are ``feature`` and ``previous_feature``; ``has_rate`` says that there are two.
        """
        rate = (feature - kept["previous_feature"]).abs().mean() / state["input_change"]
        change = (signal - kept["previous_signal"]).abs().mean() / feature.abs().mean()
        distance = state["distance"] + rate * change
        near = state["has_rate"] & (distance < parameters["threshold"])
        compute = step.must_compute | ~near
        moved = (signal - kept["computed_signal"]).abs().mean()
        had_computed = step.computed_steps[0] >= 0
        return Decision(
            compute,
            {
                "distance": torch.where(compute, 0.0, distance),
                "input_change": torch.where(compute, moved, state["input_change"]),
                "has_rate": state["has_rate"] | (compute & had_computed),
            },
        )
