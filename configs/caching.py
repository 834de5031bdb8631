# SPDX-License-Identifier: Apache-2.0
"""What every caching config may say, whatever its policy.

Keys are spelled as LightX2V's caching configs spell them, so that such a file works unchanged.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from .policy_spec import Value
from .setting import CacheSetting, GuardSetting

__all__ = ["LARGEST_SEED", "CachingConfig", "Count", "Fraction", "NotNegative", "Positive"]

LARGEST_SEED = 2**63 - 1
"""The most that every program of this project takes: an int64."""

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class CachingConfig(BaseModel):
    """What every caching config may say; subclasses add one policy's keys.

    None means "choose for me": the model's or the policy's own default.

    Attributes:
        feature_caching: Which policy; each subclass pins it.
        infer_steps: Denoise steps.
        target_video_length: Frames of the video.
        target_height: Pixels.
        target_width: Pixels.
        text_len: Tokens that prompts are padded to.
        sample_guide_scale: Guidance scale.
        sample_shift: Flow shift of the scheduler.
        enable_cfg: False runs the conditional branch only.
        seed: Seed of the initial noise.
        first_exact: Steps computed at the start of a run.
        last_exact: Steps computed at the end of a run.
        max_consecutive: Reuses allowed in a row; 0 is no limit.
        max_reused: Reuses allowed in a run; 0 is no limit.
        exact_steps: Step indices that are always computed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    policy: ClassVar[str]
    foreign: ClassVar[frozenset[str]] = frozenset(
        {"coefficients", "use_ret_steps", "teacache_thresh"}
    )
    """LightX2V keys of other policies, which its files carry along; ignored, and named."""

    feature_caching: str
    infer_steps: Positive | None = None
    target_video_length: Positive | None = None
    target_height: Positive | None = None
    target_width: Positive | None = None
    text_len: Positive | None = None
    sample_guide_scale: float | None = None
    sample_shift: Annotated[float, Field(gt=0)] | None = None
    enable_cfg: bool | None = None
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = None
    first_exact: Count | None = None
    last_exact: Count | None = None
    max_consecutive: Count | None = None
    max_reused: Count | None = None
    exact_steps: list[Count] | None = None

    _name: str = PrivateAttr("")
    _ignored: tuple[str, ...] = PrivateAttr(())

    @property
    def name(self) -> str:
        """Return what the config goes by: its file's stem, or its policy's name."""
        return self._name

    @property
    def ignored(self) -> tuple[str, ...]:
        """Return the keys that were accepted and mean nothing here, in the file's order."""
        return self._ignored

    def setting(self) -> CacheSetting:
        """Resolve to what a runtime is told to do."""
        given = {n: getattr(self, n) for n in GuardSetting.model_fields}
        guard = self._guard() | {n: v for n, v in given.items() if v is not None}
        return CacheSetting(
            policy=self.policy,
            signal=self._signal(),
            parameters=self._parameters(),
            branches=self._branches(),
            guard=GuardSetting(**guard),
        )

    def _guard(self) -> dict[str, Any]:
        """Return the policy's own exact steps, where it has some."""
        return {}

    def _signal(self) -> str | None:
        return None

    def _parameters(self) -> dict[str, Value]:
        return {}

    def _branches(self) -> dict[str, dict[str, Value]]:
        return {}
