# SPDX-License-Identifier: Apache-2.0
"""The timesteps that a model is given at each step of a run, by the names of its inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..bundle.manifest import InputEntry
from ..bundle.streams import LATENTS

__all__ = ["NEXT", "timestep_inputs"]

NEXT = "next"
"""Whose timestep the next step's is, in the words of a manifest; 0 behind the last step."""


def timestep_inputs(inputs: Mapping[str, InputEntry], timesteps: Tensor) -> dict[str, Tensor]:
    """Return what the graphs that run once per run are given.

    Args:
        inputs: A manifest's.
        timesteps: float32 [steps], those of the run's steps.

    Returns:
        ``timesteps`` itself, and each input that is a timestep, float32 [steps].
    """
    known = {
        (LATENTS,): timesteps,
        (NEXT,): torch.cat([timesteps[1:], timesteps.new_zeros(1)]),
    }
    given = {name: known[tuple(one.of)] for name, one in inputs.items() if one.runs == "run"}
    return {"timesteps": timesteps, **given}
