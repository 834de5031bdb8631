# SPDX-License-Identifier: Apache-2.0
"""Names of samplers, as requests, configs and manifests spell them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from ..core.errors import RequestError, nearest

__all__ = ["DISTILLED", "SAMPLERS", "TABULATED", "check_sampler", "list_sampler", "step_list"]

DISTILLED = "distilled"

SAMPLERS: Mapping[str, str] = MappingProxyType(
    {
        "unipc": "UniPCMultistepScheduler",
        "euler": "FlowMatchEulerDiscreteScheduler",
        "dpmpp_2m": "DPMSolverMultistepScheduler",
        DISTILLED: "FlowMatchEulerDiscreteScheduler",
        "lcm": "FlowMatchLCMScheduler",
    }
)
"""Sampler name → diffusers class; ``distilled`` is Euler over steps of its own."""

TABULATED = ("unipc", "euler", "dpmpp_2m", DISTILLED)
"""Those that draw no noise, so that bundles have their tables."""

LIST = re.compile(r"steps(?:_\d+(?:\.\d+)?)+")


def list_sampler(steps: Sequence[float]) -> str:
    """Return the sampler's name that stands for a list of timesteps: ``steps_1000_750_500_250``."""
    return "_".join(("steps", *(f"{step:.10g}" for step in steps)))


def step_list(name: str) -> tuple[float, ...] | None:
    """Return the timesteps that a sampler's name lists; None for another name."""
    if LIST.fullmatch(name) is None:
        return None
    return tuple(float(step) for step in name.split("_")[1:])


def check_sampler(name: str) -> None:
    """Refuse a name that stands for no sampler.

    Raises:
        RequestError: it stands for none.
    """
    if name not in SAMPLERS and step_list(name) is None:
        raise RequestError(f"--sampler {name}", "is not known", nearest(name, list(SAMPLERS)))
