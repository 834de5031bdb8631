# SPDX-License-Identifier: Apache-2.0
"""The timesteps that a model is given at each step of a run, by the names of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ..bundle.manifest import InputEntry
from ..bundle.streams import LATENTS

__all__ = ["NEXT", "timestep_inputs"]

NEXT = "next"
"""Whose timestep the next step's is, in the words of a manifest; 0 behind the last step."""


def timestep_inputs(
    inputs: Mapping[str, InputEntry],
    timesteps: Tensor,
    beside: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Return what the graphs that run once per run are given.

    Args:
        inputs: A manifest's.
        timesteps: float32 [steps], those of the run's steps.
        beside: Latents beside the first → their timesteps, of that shape; those that are not here have the
            first's.

    Returns:
        ``timesteps`` itself, and each input that is a timestep, float32 [steps], or a vector of them,
        float32 [steps · length], step after step.
    """
    whose = {**beside, LATENTS: timesteps, NEXT: torch.cat([timesteps[1:], timesteps.new_zeros(1)])}
    return {"timesteps": timesteps} | {
        name: torch.stack([whose.get(of, timesteps) for of in one.of], dim=1).flatten()
        for name, one in inputs.items()
        if one.runs == "run"
    }
