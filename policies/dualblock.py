# SPDX-License-Identifier: Apache-2.0
"""DualBlock: run the first and the last blocks always, and compare the first ones with the step before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor

from .base import Decision, Policy, Step, relative_change, reuse_below
from .config import CachingConfig
from .spec import HistorySpec, ParameterSpec, PolicySpec, StateSpec, Value

__all__ = ["DualBlock", "DualBlockConfig"]

PARAMETERS = {
    "threshold": ParameterSpec(
        default=0.03,
        minimum=0.0,
        meaning="relative change of the first blocks' residual since the step before at which a step"
        " is computed, >= 0; 0 never reuses",
    ),
    "first_blocks": ParameterSpec(
        default=1, dtype="int64", minimum=1, meaning="first blocks that run at every step, >= 1"
    ),
    "last_blocks": ParameterSpec(
        default=0, dtype="int64", minimum=0, meaning="last blocks that run at every step, >= 0"
    ),
    "channel_stride": ParameterSpec(
        default=1,
        dtype="int64",
        minimum=1,
        meaning="every n-th channel of the residual is compared, >= 1; 1 compares all",
    ),
}

COUNTS = ("Fn_compute_blocks", "Bn_compute_blocks")
LIGHTX2V: Mapping[str, Value] = {"first_blocks": 5, "last_blocks": 5}
"""What its class has no keys for."""


class DualBlockConfig(CachingConfig):
    """Keys of DualBlock's configs: LightX2V's, and DBCache's names of the blocks that always run.

    A file that does not say which blocks means LightX2V's; the policy by its name is less.

    Attributes:
        residual_diff_threshold: Relative change at which a step is computed; 0 never reuses.
        downsample_factor: Every n-th channel is compared.
        Fn_compute_blocks: First blocks that run at every step.
        Bn_compute_blocks: Last blocks that run at every step.
    """

    policy: ClassVar[str] = "dualblock"
    keys: ClassVar[Mapping[str, str]] = {
        "residual_diff_threshold": "threshold",
        "downsample_factor": "channel_stride",
        "Fn_compute_blocks": "first_blocks",
        "Bn_compute_blocks": "last_blocks",
    }

    feature_caching: Literal["DualBlock"] = "DualBlock"
    residual_diff_threshold: Annotated[float, PARAMETERS["threshold"].check] | None = None
    downsample_factor: Annotated[int, PARAMETERS["channel_stride"].check] | None = None
    Fn_compute_blocks: Annotated[int, PARAMETERS["first_blocks"].check] | None = None
    Bn_compute_blocks: Annotated[int, PARAMETERS["last_blocks"].check] | None = None

    @classmethod
    def of_policy(cls) -> Self:
        """Return the config of the policy's own defaults; see `CachingConfig.of_policy`."""
        own = {key: PARAMETERS[cls.keys[key]].default for key in COUNTS}
        return cls.model_validate(own)

    def _parameters(self) -> dict[str, Value]:
        return {**LIGHTX2V, **super()._parameters()}


class DualBlock(Policy):
    """Reuse the middle blocks' residual while that of the first ones stays near the step before's.

    A slow drift is never computed, however far it goes: the step before may itself have been reused.
    `DBCache` compares with the last computed step instead, and `FirstBlock` does of one first block.

    Reference: LightX2V (no paper), ``WanTransformerInferDualBlock``, and with one first block and no
        last one ``WanTransformerInferFirstBlock``: reuse while ``mean|ρ − ρ_p| / mean|ρ_p|`` is below
        a threshold, ρ the first blocks' residual in every n-th channel and ρ_p that of the step before.

    Differs: one first block and no last one by default; LightX2V's five and five in files.
    Differs: a distance that is not finite computes; there it reuses.
    """

    config = DualBlockConfig
    spec = PolicySpec(
        name="dualblock",
        summary="runs the first and last blocks always, and compares the first with the step before",
        signals=["first_block_residual"],
        kept=["previous_signal"],
        history=HistorySpec(maximum=1),
        first_blocks="first_blocks",
        last_blocks="last_blocks",
        state={"distance": StateSpec()},
        parameters=PARAMETERS,
        distance="distance",
        reference="DualBlock and FirstBlock, LightX2V",
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
        """Decide from the first blocks' residuals of this step and the one before; see `Policy.decide`."""
        is_compared = torch.arange(signal.shape[1]) % parameters["channel_stride"] == 0
        new, old = (torch.where(is_compared, s, 0.0) for s in (signal, kept["previous_signal"]))
        return reuse_below(step.must_compute, relative_change(new, old), parameters["threshold"])
