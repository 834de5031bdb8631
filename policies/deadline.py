# SPDX-License-Identifier: Apache-2.0
"""What a policy is told of time: seconds until the run's deadline, and seconds of a step."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["NO_DEADLINE", "Pace"]

NO_DEADLINE = 1e30
"""Seconds left of a run without a deadline; a number that every backend's float32 holds."""


class Pace(NamedTuple):
    """How a run stands against its deadline before one step; inputs of decide graphs by name.

    Attributes:
        seconds_left: Until the deadline.
        computed_seconds: Of a computed step; 0 where none was measured.
        reused_seconds: Of a reused step, likewise.
    """

    seconds_left: float = NO_DEADLINE
    computed_seconds: float = 0.0
    reused_seconds: float = 0.0
