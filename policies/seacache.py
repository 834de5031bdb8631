# SPDX-License-Identifier: Apache-2.0
"""SeaCache: reuse while what the latents hold beneath their noise has changed little."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor

from .base import Decision, Policy, Step, relative_change, reuse_below
from .config import CachingConfig
from .spec import ParameterSpec, PolicySpec, StateSpec
from .taylorseer import DIFFERENCES

__all__ = ["SeaCache", "SeaCacheConfig"]

PARAMETERS = {
    "threshold": ParameterSpec(
        default=0.25,
        minimum=0.0,
        meaning="accumulated relative change of the filtered latents at which a step is computed,"
        " >= 0; 0 never reuses",
    ),
    **DIFFERENCES.parameters,
}


class SeaCacheConfig(CachingConfig):
    """Keys of SeaCache's configs: the policy's parameters by their names.

    The first and the last step are computed, and every third at least, unless a config says
    otherwise.
    """

    policy: ClassVar[str] = "seacache"
    keys: ClassVar[Mapping[str, str]] = {n: n for n in PARAMETERS}

    feature_caching: Literal["seacache"] = "seacache"
    threshold: Annotated[float, PARAMETERS["threshold"].check] | None = None
    order: Annotated[int, PARAMETERS["order"].check] | None = None
    variant: Annotated[str, PARAMETERS["variant"].check] | None = None

    def _guard(self) -> dict[str, Any]:
        return {"first_exact": 1, "last_exact": 1, "max_consecutive": 2}


class SeaCache(Policy):
    """Reuse while the change of the filtered latents adds up to less than a threshold.

    The signal is the latents of a step seen through a band filter made for its noise level, which
    keeps what a denoiser could tell from noise. It is compared with that of the step before. One
    threshold serves every model. What is reused is the line through the last two residuals.

    Reference: Chung et al. 2026, SeaCache, arXiv 2602.18993, spectral filter and caching rule; the
        latents as its input, the straight line and all defaults as in diffusers 0.42's hook.

    Differs: the noise level that the filter is made for is the timestep over 1000, as flow models
        are conditioned; a sampler that rounds timesteps differs by less than 0.001. Models that
        are no flow models (PixArt, CogView3-Plus) get a filter for another noise level than theirs.
    Differs: a batch has one distance, the mean over its samples' elements.
    Differs: ``order`` goes up to 4 and ``variant`` offers the interpolating polynomial, as
        `TaylorSeer`'s mix does; order 0 is the pair ``seacache+hold``.
    """

    config = SeaCacheConfig
    mix = DIFFERENCES
    spec = PolicySpec(
        name="seacache",
        summary="reuses until the latents' change beneath their noise adds up to a threshold",
        signals=["filtered_latents"],
        kept=["previous_signal"],
        history=DIFFERENCES.history,
        state={"distance": StateSpec()},
        parameters=PARAMETERS,
        distance="distance",
        reference="Chung et al. 2026, SeaCache, arXiv 2602.18993",
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
        distance = state["distance"] + relative_change(signal, kept["previous_signal"])
        return reuse_below(step.must_compute, distance, parameters["threshold"])
