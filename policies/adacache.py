# SPDX-License-Identifier: Apache-2.0
"""AdaCache: read from a feature's change how many steps the next residual may serve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ..core.errors import nearest
from .base import Decision, Policy, Step
from .config import CachingConfig
from .spec import HistorySpec, ParameterSpec, PolicySpec, StateSpec, Value

__all__ = ["CODEBOOKS", "AdaCache", "AdaCacheConfig", "motion", "skip_from_codebook"]

SLOTS = 8
"""Codebook entries a graph holds; shorter tables repeat their last entry."""


def motion(feature: Tensor) -> Tensor:
    """Return the relative change of a feature from one latent frame to the next.

    Args:
        feature: float32 [frames, tokens_per_frame, channels].

    Returns:
        float32 [], ``‖f[1:] − f[:−1]‖₁ / (‖f[1:]‖₁ + ‖f[:−1]‖₁)``; 0 for a single frame.

    Reference: Kahatapitiya et al. 2024, AdaCache, arXiv 2411.02397, section 3.3 (motion score).
    """
    later, earlier = feature[1:], feature[:-1]
    total = later.abs().sum() + earlier.abs().sum()
    return torch.where(total > 0, (later - earlier).abs().sum() / total, 0.0)


def skip_from_codebook(
    distance: Tensor, parameters: dict[str, Tensor], step_count: Tensor
) -> Tensor:
    """Return how far ahead the next computed step is: the first entry whose threshold exceeds.

    Args:
        distance: float32 [], regularised change per step.
        parameters: ``codebook_thresholds`` float32 [8], ``codebook_skips`` int64 [8],
            ``scale_codebook`` bool [].
        step_count: int64 [], steps of the run.

    Returns:
        int64 [], >= 1. The last entry where no threshold exceeds.
    """
    exceeds = parameters["codebook_thresholds"] > distance
    last = SLOTS - 1
    entry = torch.where(exceeds, torch.arange(SLOTS), last).amin(dim=0)
    skip = parameters["codebook_skips"].index_select(0, entry.reshape(1)).squeeze(0)
    scaled = torch.round((skip * step_count).to(torch.float32) / 100.0).to(torch.int64)
    return torch.where(parameters["scale_codebook"], scaled.clamp(min=1), skip)


PARAMETERS = {
    "codebook_thresholds": ParameterSpec(
        default=[0.03, 0.05, 0.07, 0.09, 0.11, 1.00],
        shape=[SLOTS],
        minimum=0.0,
        meaning="upper bounds of the feature's change per step, ascending, up to 8",
    ),
    "codebook_skips": ParameterSpec(
        default=[12, 10, 8, 6, 4, 3],
        dtype="int64",
        shape=[SLOTS],
        minimum=1,
        meaning="steps from one computed step to the next, one per threshold, >= 1",
    ),
    "scale_codebook": ParameterSpec(
        default=False,
        dtype="bool",
        meaning="multiply the skips by step_count / 100, rounded, at least 1",
    ),
    "moreg_scale": ParameterSpec(
        default=0.385,
        minimum=1e-6,
        meaning="motion at which regularisation is neutral, > 0",
    ),
    "moreg_power": ParameterSpec(
        default=8.0, minimum=0.0, meaning="exponent of the motion over moreg_scale, >= 0"
    ),
    "moreg_first": ParameterSpec(
        default=0.1,
        minimum=0.0,
        maximum=1.0,
        meaning="fraction of the run before which motion is ignored, 0 to 1",
    ),
    "moreg_last": ParameterSpec(
        default=0.9,
        minimum=0.0,
        maximum=1.0,
        meaning="fraction of the run after which motion is ignored, 0 to 1",
    ),
    "mograd": ParameterSpec(
        default=10.0, minimum=0.0, meaning="weight of the motion's growth per step, >= 0"
    ),
}


CODEBOOKS: dict[str, list[tuple[float, int]]] = {
    "steps_100": [(0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.0, 3)],
    "steps_30_fast": [(0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.4, 2), (1.0, 1)],
    "steps_30_slow": [(0.08, 3), (0.16, 2), (1.0, 1)],
}
"""AdaCache's published codebooks: upper bound of the feature's change → steps to the next
computation. Kahatapitiya et al. 2024, arXiv 2411.02397."""

CodebookRow = Annotated[
    tuple[
        Annotated[float, PARAMETERS["codebook_thresholds"].check],
        Annotated[int, PARAMETERS["codebook_skips"].check],
    ],
    Field(strict=False),
]


class AdaCacheConfig(CachingConfig):
    """Keys of AdaCache's configs.

    Attributes:
        codebook: Rows [upper bound of the change per step, steps to the next computation] in
            ascending order, up to 8; or the name of a published one (`CODEBOOKS`).
        scale_codebook: True multiplies the codebook's steps by infer_steps / 100.
        moreg_scale: Motion between latent frames at which regularisation is neutral.
        moreg_power: Exponent of the motion over ``moreg_scale``.
        moreg_first: Fraction of the run before which motion is ignored.
        moreg_last: Fraction of the run after which motion is ignored.
        mograd: Weight of the motion's growth per step.
    """

    policy: ClassVar[str] = "adacache"
    keys: ClassVar[Mapping[str, str]] = {n: n for n in PARAMETERS if not n.startswith("codebook_")}

    feature_caching: Literal["Ada"] = "Ada"
    codebook: Annotated[list[CodebookRow], PARAMETERS["codebook_skips"].length] | None = None
    scale_codebook: bool | None = None
    moreg_scale: Annotated[float, PARAMETERS["moreg_scale"].check] | None = None
    moreg_power: Annotated[float, PARAMETERS["moreg_power"].check] | None = None
    moreg_first: Annotated[float, PARAMETERS["moreg_first"].check] | None = None
    moreg_last: Annotated[float, PARAMETERS["moreg_last"].check] | None = None
    mograd: Annotated[float, PARAMETERS["mograd"].check] | None = None

    @field_validator("codebook", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in CODEBOOKS:
                hint = nearest(value, list(CODEBOOKS))
                raise ValueError(f"rows or the name of a codebook; {hint}")
            return CODEBOOKS[value]
        return value

    @field_validator("codebook")
    @classmethod
    def _is_ascending(cls, rows: list[CodebookRow] | None) -> list[CodebookRow] | None:
        bounds = [bound for bound, _ in rows or []]
        if bounds != sorted(set(bounds)):
            raise ValueError("rows in ascending order of their bounds")
        return rows

    def _parameters(self) -> dict[str, Value]:
        if self.codebook is None:
            return super()._parameters()
        bounds, skips = zip(*self.codebook, strict=True)
        table = {"codebook_thresholds": list(bounds), "codebook_skips": list(skips)}
        return super()._parameters() | table


class AdaCache(Policy):
    """Hold a residual for as many steps as a codebook grants to the feature's rate of change.

    Looks, after each computed step, at the gated self-attention output of the middle block.
    Motion between latent frames (and its growth) shortens the interval: "moreg" and "mograd".

    Reference: Kahatapitiya et al. 2024, AdaCache, arXiv 2411.02397, section 3.2 (cache schedule)
        and 3.3 (motion regularisation).

    Differs: a distance that is not finite (zero or overflowed feature) asks for the next step to
        be computed; the codebook's last entry would grant reuse of an unknown.
    Differs: with one latent frame there is no pair of frames and motion is 0; implementations
        divide 0 by 0 there.
    Differs: neighbouring frames are ``tokens_per_frame`` apart; a published port has the channel
        count in that place.
    Differs: ``scale_codebook`` stretches the codebook, made for 100 steps, to the run's length.
    """

    config = AdaCacheConfig
    spec = PolicySpec(
        name="adacache",
        summary="holds each residual for as long as a feature's rate of change allows",
        feature="attention_output",
        kept=["previous_feature"],
        history=HistorySpec(maximum=1),
        state={
            "skip": StateSpec(dtype="int64", initial=1),
            "moreg": StateSpec(initial=1),
            "has_feature": StateSpec(dtype="bool"),
        },
        parameters=PARAMETERS,
        reference="Kahatapitiya et al. 2024, AdaCache, arXiv 2411.02397",
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
        """Schedule the next computed step once per computed step; see `Policy.decide`."""
        tapped = step.step_index - 1
        is_fresh = (step.computed_steps[0] == tapped) & (tapped >= 0)
        has_pair = is_fresh & state["has_feature"]
        skip, moreg = self._schedule(step, feature, kept["previous_feature"], state, parameters)
        new_state = {
            "skip": torch.where(has_pair, skip, state["skip"]),
            "moreg": torch.where(has_pair, moreg, state["moreg"]),
            "has_feature": state["has_feature"] | is_fresh,
        }
        due = step.step_index >= step.computed_steps[0] + new_state["skip"]
        return Decision(step.must_compute | due, new_state)

    def _schedule(
        self,
        step: Step,
        feature: Tensor,
        previous: Tensor,
        state: dict[str, Tensor],
        parameters: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return skip, int64 [], and moreg, float32 [], after a computed step with two features."""
        interval = state["skip"].to(torch.float32)
        d = (previous - feature).abs().sum() / previous.abs().sum() / interval
        m = (motion(feature) / parameters["moreg_scale"]) ** parameters["moreg_power"]
        m = torch.where(self._in_moreg_window(step, parameters), m, 1.0)
        grad = parameters["mograd"] * (m - state["moreg"]) / interval
        d = d * (m + grad.abs())
        skip = skip_from_codebook(d, parameters, step.step_count)
        return torch.where(torch.isfinite(d), skip, 1), m

    def _in_moreg_window(self, step: Step, parameters: dict[str, Tensor]) -> Tensor:
        """Say whether the last step lies in the part of the run where motion counts, inclusive."""
        count = step.step_count.to(torch.float32)
        first = torch.floor(count * parameters["moreg_first"]).to(torch.int64)
        last = torch.floor(count * parameters["moreg_last"]).to(torch.int64)
        computed = step.step_index - 1
        return (computed >= first) & (computed <= last)
