# SPDX-License-Identifier: Apache-2.0
"""Timestep and noise level of every step of a run: what is known of all steps before the first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["TRAIN_TIMESTEPS", "Schedule"]

TRAIN_TIMESTEPS = 1000.0
"""Timestep of a flow model at noise level 1."""


@dataclass(frozen=True)
class Schedule:
    """The steps of one run, in order.

    Attributes:
        timesteps: What the model is conditioned on at each step.
        sigmas: Noise level that each step starts from; 1 is pure noise in flow models.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    @classmethod
    def of(cls, timesteps: Iterable[float], sigmas: Iterable[float] | None = None) -> Schedule:
        """Return a schedule of some timesteps.

        Args:
            timesteps: One per step.
            sigmas: One per step; None takes a flow model's, ``timestep / 1000``.
        """
        steps = tuple(float(value) for value in timesteps)
        given = (value / TRAIN_TIMESTEPS for value in steps) if sigmas is None else sigmas
        schedule = cls(steps, tuple(float(value) for value in given))
        assert len(schedule.sigmas) == len(steps), "one noise level per step"
        return schedule

    @classmethod
    def even(cls, steps: int) -> Schedule:
        """Return that of a flow model whose noise level falls evenly from 1."""
        return cls.of(TRAIN_TIMESTEPS * (1 - step / steps) for step in range(steps))

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.timesteps)
