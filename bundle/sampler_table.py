# SPDX-License-Identifier: Apache-2.0
"""A sampler at one step count, as factors of the samples and model outputs that a run has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Matrix", "SamplerTable"]

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class SamplerTable:
    """The recurrence ``x[t+1] = Σ a[t][k]·x[t−k] + Σ b[t][k]·v[t−k]``, k from 0 to below the window.

    Attributes:
        timesteps: [steps], what the model is conditioned on.
        sigmas: [steps], noise level at the start of each step.
        a: [steps, window], factors of the samples, newest first.
        b: [steps, window], factors of the model outputs, newest first.
    """

    timesteps: Matrix
    sigmas: Matrix
    a: Matrix
    b: Matrix

    @classmethod
    def of(cls, packed: Matrix) -> SamplerTable:
        """Read what `packed` gives, as bundles store it."""
        window = (packed.shape[1] - 2) // 2
        return cls(packed[:, 0], packed[:, 1], packed[:, 2 : 2 + window], packed[:, 2 + window :])

    def packed(self) -> Matrix:
        """Return [steps, 2 + 2 · window]: timestep, sigma, a, b."""
        return np.column_stack([self.timesteps, self.sigmas, self.a, self.b])

    @property
    def window(self) -> int:
        """Samples, and model outputs, that a step looks at."""
        return int(self.a.shape[1])

    def advance(self, step: int, samples: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
        """Return the next sample, float32; summed in float64, in the order that every runtime uses.

        Args:
            step: 0-based.
            samples: All samples so far, oldest first.
            outputs: All model outputs so far, oldest first.
        """
        total = torch.zeros_like(samples[step], dtype=torch.float64)
        for age in range(min(self.window, step + 1)):
            total += float(self.a[step, age]) * samples[step - age].double()
            total += float(self.b[step, age]) * outputs[step - age].double()
        return total.float()
