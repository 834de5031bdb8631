# SPDX-License-Identifier: Apache-2.0
"""First-Block Cache: run one block at every step, and let its residual tell about the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import field_validator
from torch import Tensor

from .base import Decision, Policy, Step, relative_change, reuse_below
from .config import CachingConfig
from .spec import HistorySpec, ParameterSpec, PolicySpec, StateSpec

__all__ = ["FirstBlock", "FirstBlockConfig"]


PARAMETERS = {
    "threshold": ParameterSpec(
        default=0.08,
        minimum=0.0,
        meaning="relative change of the first block's residual at which a step is computed,"
        " >= 0; 0 never reuses",
    ),
}


class FirstBlockConfig(CachingConfig):
    """Keys of First-Block Cache's configs.

    Attributes:
        firstblock_thresh: Relative change at which a step is computed; 0 never reuses.
        residual_diff_threshold: LightX2V's threshold of another law, refused: its class compares with
            the step before, computed or not, this policy with the last computed one.
        downsample_factor: LightX2V compares every n-th channel; here all count.
    """

    policy: ClassVar[str] = "firstblock"
    keys: ClassVar[Mapping[str, str]] = {"firstblock_thresh": "threshold"}

    feature_caching: Literal["FirstBlock"] = "FirstBlock"
    firstblock_thresh: Annotated[float, PARAMETERS["threshold"].check] | None = None
    residual_diff_threshold: float | None = None
    downsample_factor: int | None = None

    @field_validator("residual_diff_threshold")
    @classmethod
    def _compares_with_the_computed_step(cls, value: float | None) -> float | None:
        if value is not None:
            raise ValueError(
                "none: it is a distance to the step before, by which a slow drift is never computed;"
                " the nearest is 'firstblock_thresh', to the last computed step"
            )
        return value

    @field_validator("downsample_factor")
    @classmethod
    def _keeps_every_channel(cls, value: int | None) -> int | None:
        if value not in (None, 1):
            raise ValueError("1: every channel of the residual is compared here; remove the key")
        return value


class FirstBlock(Policy):
    """Reuse the residual of all further blocks while that of the first stays near the computed one.

    The signal asks the session for a probe: the first block runs before the decision, on computed
    steps the others follow it, and what is cached is their residual alone.

    Reference: First-Block Cache (no paper; the ParaAttention project, as also in
        diffusers and cache-dit): reuse while ``mean|ρ − ρ_s| / mean|ρ_s|`` is below a threshold, ρ
        the first block's residual and ρ_s that of the last computed step.

    Differs: each branch decides for itself, as the signal is its own.
    """

    config = FirstBlockConfig
    spec = PolicySpec(
        name="firstblock",
        summary="runs the first block always, and reuses the others while its residual stays",
        signals=["first_block_residual"],
        kept=["computed_signal"],
        history=HistorySpec(maximum=1),
        state={"distance": StateSpec()},
        parameters=PARAMETERS,
        distance="distance",
        reference="First-Block Cache, ParaAttention",
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
        """Decide from this step's probe and that of the last computed step; see `Policy.decide`."""
        distance = relative_change(signal, kept["computed_signal"])
        return reuse_below(step.must_compute, distance, parameters["threshold"])
