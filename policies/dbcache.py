# SPDX-License-Identifier: Apache-2.0
"""DBCache: run the first and the last blocks at every step, and reuse those between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from .base import Decision, Policy, Step, relative_change, reuse_below
from .config import CachingConfig, Count
from .spec import HistorySpec, ParameterSpec, PolicySpec, StateSpec

__all__ = ["DBCache", "DBCacheConfig"]

WARM_UP = 8
"""cache-dit's default of steps computed at the start of a run."""

PARAMETERS = {
    "threshold": ParameterSpec(
        default=0.08,
        minimum=0.0,
        meaning="relative change of the first blocks' residual at which a step is computed,"
        " >= 0; 0 never reuses",
    ),
    "first_blocks": ParameterSpec(
        default=1, dtype="int64", minimum=1, meaning="first blocks that run at every step, >= 1"
    ),
    "last_blocks": ParameterSpec(
        default=0, dtype="int64", minimum=0, meaning="last blocks that run at every step, >= 0"
    ),
}

Limit = Annotated[int, Field(ge=-1)]


class DBCacheConfig(CachingConfig):
    """Keys of DBCache's configs, as cache-dit's `DBCacheConfig` spells them.

    Attributes:
        Fn_compute_blocks: First blocks that run at every step.
        Bn_compute_blocks: Last blocks that run at every step.
        residual_diff_threshold: Relative change at which a step is computed; 0 never reuses.
        max_warmup_steps: Steps computed at the start of a run: ``first_exact`` here.
        max_continuous_cached_steps: Reuses allowed in a row, -1 for no limit.
        max_cached_steps: Reuses allowed in a run, -1 for no limit.
        warmup_interval: 1; with other values cache-dit reuses within the warm-up.
        max_accumulated_residual_diff_threshold: None; cache-dit's limit of all changes of a run.
    """

    policy: ClassVar[str] = "dbcache"
    keys: ClassVar[Mapping[str, str]] = {
        "residual_diff_threshold": "threshold",
        "Fn_compute_blocks": "first_blocks",
        "Bn_compute_blocks": "last_blocks",
    }
    guards: ClassVar[Mapping[str, str]] = {
        "max_warmup_steps": "first_exact",
        "max_continuous_cached_steps": "max_consecutive",
        "max_cached_steps": "max_reused",
    }

    feature_caching: Literal["DBCache"] = "DBCache"
    residual_diff_threshold: Annotated[float, PARAMETERS["threshold"].check] | None = None
    Fn_compute_blocks: Annotated[int, PARAMETERS["first_blocks"].check] | None = None
    Bn_compute_blocks: Annotated[int, PARAMETERS["last_blocks"].check] | None = None
    max_warmup_steps: Count | None = None
    max_continuous_cached_steps: Limit | None = None
    max_cached_steps: Limit | None = None
    warmup_interval: int | None = None
    max_accumulated_residual_diff_threshold: float | None = None

    @field_validator("max_continuous_cached_steps", "max_cached_steps")
    @classmethod
    def _allows_some(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError(
                "-1 for no limit, or 1 and more; 'residual_diff_threshold' 0 never reuses"
            )
        return value

    @field_validator("warmup_interval")
    @classmethod
    def _computes_the_warm_up(cls, value: int | None) -> int | None:
        if value not in (None, 1):
            raise ValueError("1: every step of the warm-up is computed here; or give 'exact_steps'")
        return value

    @field_validator("max_accumulated_residual_diff_threshold")
    @classmethod
    def _has_no_limit_of_changes(cls, value: float | None) -> float | None:
        if value is not None:
            raise ValueError(
                "none: changes are not added up over a run; the nearest is 'max_reused'"
            )
        return value

    @model_validator(mode="after")
    def _limits_once(self) -> Self:
        for key, own in self.guards.items():
            if getattr(self, key) is not None and getattr(self, own) is not None:
                raise ValueError(f"one of '{key}' and '{own}', which say the same")
        return self

    def _guard(self) -> dict[str, Any]:
        given = {own: getattr(self, key) for key, own in self.guards.items()}
        limits = {own: max(value, 0) for own, value in given.items() if value is not None}
        return {"first_exact": WARM_UP, **limits}


class DBCache(Policy):
    """Reuse the middle blocks' residual while that of the first ones stays near the computed one.

    The session runs the first blocks before the decision and the last ones after it, on reused steps
    too; what is kept is the change of every stream between the two.

    Reference: DBCache, dual block cache (no paper; the cache-dit project, 1.5.3): reuse while
        ``mean|ρ − ρ_s| / mean|ρ_s|`` is below a threshold, ρ the first blocks' residual and ρ_s that
        of the last computed step; its calibrators are mixes here (``dbcache+taylorseer``).

    Differs: one first block by default, cache-dit's eight; a config says how many the model can spare.
    Differs: a threshold of 1 or more is one like any other; cache-dit then compares nothing.
    """

    config = DBCacheConfig
    spec = PolicySpec(
        name="dbcache",
        summary="runs the first and last blocks always, and reuses those between them",
        signals=["first_block_residual"],
        kept=["computed_signal"],
        history=HistorySpec(maximum=1),
        first_blocks="first_blocks",
        last_blocks="last_blocks",
        state={"distance": StateSpec()},
        parameters=PARAMETERS,
        distance="distance",
        reference="DBCache, cache-dit 1.5.3",
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
        """Decide from this step's first blocks and those of the last computed one; see `Policy.decide`."""
        distance = relative_change(signal, kept["computed_signal"])
        return reuse_below(step.must_compute, distance, parameters["threshold"])
