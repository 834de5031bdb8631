# SPDX-License-Identifier: Apache-2.0
"""MagCache: reuse while the residual's magnitude, known from a calibration, has changed little."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Tag, field_validator
from torch import Tensor

from .base import Decision, Policy, Step
from .config import ALL, BRANCHES, PER_BRANCH, CachingConfig
from .spec import HistorySpec, ParameterSpec, PolicySpec, StateSpec, Value

__all__ = ["MAXIMUM_STEPS", "MagCache", "MagCacheConfig"]

MAXIMUM_STEPS = 200
"""Steps that the table of ratios holds."""

BRANCH_ORDER = ("cond", "uncond")
"""In which LightX2V lists what differs between branches."""


PARAMETERS = {
    "threshold": ParameterSpec(
        default=0.12,
        minimum=0.0,
        meaning="accumulated error at which a step is computed, >= 0; 0 never reuses",
    ),
    "max_skip": ParameterSpec(
        default=4, dtype="int64", minimum=0, meaning="reuses allowed in a row, >= 0"
    ),
    "retention": ParameterSpec(
        default=0.2,
        minimum=0.0,
        maximum=1.0,
        meaning="fraction of the run that is computed at its start, 0 to 1",
    ),
    "steps": ParameterSpec(
        default=1,
        dtype="int64",
        minimum=1,
        maximum=MAXIMUM_STEPS,
        meaning=f"steps of the calibration run, 1 to {MAXIMUM_STEPS}",
    ),
    "ratios": ParameterSpec(
        default=[1.0],
        shape=[MAXIMUM_STEPS],
        minimum=0.0,
        meaning="residual magnitude over that of the step before, one per step",
    ),
}


Ratios = Annotated[list[Annotated[float, PARAMETERS["ratios"].check]], PARAMETERS["ratios"].length]


class MagCacheConfig(CachingConfig):
    """Keys of MagCache's configs.

    Attributes:
        magcache_thresh: Accumulated error at which a step is computed; 0 never reuses.
        magcache_K: Reuses allowed in a row.
        magcache_retention: Fraction of the run that is computed at its start.
        magcache_retention_ratio: The same, as LightX2V calls it.
        magcache_ratios: Residual magnitude over that of the step before, one number per step of
            the calibration run. One table for all branches; one per branch, by name; or LightX2V's
            list of two, of ``cond`` and ``uncond``.
        magcache_calibration: LightX2V's switch for recording ratios; only false is taken.
    """

    policy: ClassVar[str] = "magcache"
    keys: ClassVar[Mapping[str, str]] = {
        "magcache_thresh": "threshold",
        "magcache_K": "max_skip",
        "magcache_retention": "retention",
        "magcache_retention_ratio": "retention",
    }

    feature_caching: Literal["Mag"] = "Mag"
    magcache_thresh: Annotated[float, PARAMETERS["threshold"].check] | None = None
    magcache_K: Annotated[int, PARAMETERS["max_skip"].check] | None = None  # noqa: N815 (LightX2V spells it so)
    magcache_retention: Annotated[float, PARAMETERS["retention"].check] | None = None
    magcache_retention_ratio: Annotated[float, PARAMETERS["retention"].check] | None = None
    magcache_ratios: (
        Annotated[
            Annotated[Ratios, Tag(ALL)] | Annotated[dict[str, Ratios], Tag(BRANCHES)], PER_BRANCH
        ]
        | None
    ) = None
    magcache_calibration: bool | None = None

    @field_validator("magcache_ratios", mode="before")
    @classmethod
    def _by_branch(cls, value: Any) -> Any:
        is_nested = isinstance(value, list) and value and all(isinstance(v, list) for v in value)
        if not is_nested:
            return value
        if len(value) > len(BRANCH_ORDER):
            raise ValueError(f"one table or two, {' and '.join(BRANCH_ORDER)}, not {len(value)}")
        return value[0] if len(value) == 1 else dict(zip(BRANCH_ORDER, value, strict=True))

    @field_validator("magcache_calibration")
    @classmethod
    def _records_nothing(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("false: `freewheel calibrate` records a run and writes its ratios")
        return value

    def _parameters(self) -> dict[str, Value]:
        tables = self.magcache_ratios
        return super()._parameters() | (_table(tables) if isinstance(tables, list) else {})

    def _branches(self) -> dict[str, dict[str, Value]]:
        tables = self.magcache_ratios
        return {n: _table(t) for n, t in tables.items()} if isinstance(tables, dict) else {}


def _table(ratios: list[float]) -> dict[str, Value]:
    return {"steps": len(ratios), "ratios": ratios}


class MagCache(Policy):
    """Hold the newest residual while the product of calibrated magnitude ratios stays near 1.

    Looks at no tensor of the run: the ratios ‖r_t‖ / ‖r_{t−1}‖ of one calibration run stand for
    every prompt, so the whole sequence is known before step 0.

    Reference: Ma et al. 2025, MagCache, arXiv 2506.09045, section 3.3 (error model and strategy).

    Differs: threshold 0 never reuses, even where every ratio is 1.
    """

    config = MagCacheConfig
    spec = PolicySpec(
        name="magcache",
        summary="reuses while calibrated magnitude ratios say that the residual changed little",
        history=HistorySpec(maximum=1),
        state={
            "error": StateSpec(),
            "ratio": StateSpec(initial=1.0),
            "skipped": StateSpec(dtype="int64"),
        },
        parameters=PARAMETERS,
        distance="error",
        reference="Ma et al. 2025, MagCache, arXiv 2506.09045",
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
        """Decide from the accumulated error; see `Policy.decide`."""
        ratio = state["ratio"] * _ratio(step, parameters)
        skipped = state["skipped"] + 1
        error = state["error"] + (1.0 - ratio).abs()
        retained = torch.floor(step.step_count.to(torch.float32) * parameters["retention"])
        reuse = (
            (error < parameters["threshold"])
            & (skipped <= parameters["max_skip"])
            & (step.step_index >= retained.to(torch.int64))
        )
        compute = step.must_compute | ~reuse
        return Decision(
            compute,
            {
                "error": torch.where(compute, 0.0, error),
                "ratio": torch.where(compute, 1.0, ratio),
                "skipped": torch.where(compute, 0, skipped),
            },
        )


def _ratio(step: Step, parameters: dict[str, Tensor]) -> Tensor:
    """Return this step's ratio, float32 []: nearest in a table of another number of steps."""
    last, wanted = parameters["steps"] - 1, torch.clamp(step.step_count - 1, min=1)
    position = (step.step_index * last).to(torch.float32) / wanted.to(torch.float32)
    nearest = torch.round(position).to(torch.int64)
    return parameters["ratios"].index_select(0, nearest.reshape(1)).squeeze(0)
