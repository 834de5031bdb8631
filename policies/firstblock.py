# SPDX-License-Identifier: Apache-2.0
"""First-Block Cache: run one block at every step, and let its residual tell about the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import model_validator
from torch import Tensor

from .base import Decision, Policy, Step, relative_change, reuse_below
from .config import CachingConfig
from .dualblock import PARAMETERS as DUALBLOCK
from .dualblock import DualBlockConfig
from .setting import CacheSetting
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
    """Keys of First-Block Cache's configs, LightX2V's among them.

    A file of LightX2V's means its own law, which compares with the step before: `DualBlock` with one
    first block and no last one.

    Attributes:
        firstblock_thresh: Relative change since the last computed step at which a step is computed;
            0 never reuses.
        residual_diff_threshold: LightX2V's: relative change since the step before.
        downsample_factor: LightX2V's: every n-th channel is compared.
    """

    policy: ClassVar[str] = "firstblock"
    keys: ClassVar[Mapping[str, str]] = {"firstblock_thresh": "threshold"}

    feature_caching: Literal["FirstBlock"] = "FirstBlock"
    firstblock_thresh: Annotated[float, PARAMETERS["threshold"].check] | None = None
    residual_diff_threshold: Annotated[float, DUALBLOCK["threshold"].check] | None = None
    downsample_factor: Annotated[int, DUALBLOCK["channel_stride"].check] | None = None

    @model_validator(mode="after")
    def _names_one_law(self) -> Self:
        theirs = self._of_lightx2v()
        if theirs and self.policy != FirstBlockConfig.policy:
            raise ValueError(
                f"'feature_caching' of 'dualblock' in place of 'firstblock', whose key '{theirs[0]}' is"
            )
        if theirs and self.firstblock_thresh is not None:
            raise ValueError(
                f"one of 'firstblock_thresh', since the last computed step, and '{theirs[0]}', since the"
                " step before"
            )
        return self

    def setting(self) -> CacheSetting:
        """Resolve to the law whose keys the file has; see `CachingConfig.setting`."""
        if not self._of_lightx2v():
            return super().setting()
        given = self.model_dump(exclude={"feature_caching", "firstblock_thresh"})
        return DualBlockConfig(**given, Fn_compute_blocks=1, Bn_compute_blocks=0).setting()

    def _of_lightx2v(self) -> list[str]:
        """Return the keys of the file that only LightX2V's law has."""
        names = ("residual_diff_threshold", "downsample_factor")
        return [name for name in names if getattr(self, name) is not None]


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
