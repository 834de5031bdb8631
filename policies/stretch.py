# SPDX-License-Identifier: Apache-2.0
"""How far a run is from the one that its setting's tables were made for."""

from __future__ import annotations

from dataclasses import dataclass

from .schedule import Schedule
from .setting import CacheSetting

__all__ = ["LONGEST", "Stretch", "stretch_of"]

LONGEST = 2
"""How many times the steps of its tables a run may have: up to there a schedule does no worse than evenly
spread steps, with fewer steps it does (docs/measurements/calibration.md)."""


@dataclass(frozen=True)
class Stretch:
    """A run over tables of a policy that has an entry for every step of the run they were made from.

    Attributes:
        policy: Whose tables they are.
        made: Steps that they were made for.
        first: Step of these that the run begins at.
        steps: Steps of the run.
    """

    policy: str
    made: int
    first: int
    steps: int

    @property
    def is_whole(self) -> bool:
        """Whether the run has the steps that the tables were made for, from the first one on."""
        return self.first == 0 and self.steps == self.made

    def warnings(self) -> list[str]:
        """Say how far the run is from the tables; nothing where every step has an entry of its own."""
        rest = self.made - self.first
        if self.steps == rest:
            return []
        far = abs(self.steps - rest) / rest
        begins = f", of which the run begins at step {self.first}," if self.first else ""
        is_near = rest < self.steps <= LONGEST * rest
        advice = "expect somewhat less quality" if is_near else "calibrate again with --steps"
        return [
            f"the tables of '{self.policy}' were made for {self.made} steps{begins} and are stretched "
            f"from {rest} to {self.steps}, {far:.0%} away: {advice}"
        ]


def stretch_of(setting: CacheSetting, schedule: Schedule) -> Stretch | None:
    """Return how a run lies over a setting's tables; None where it has none.

    Args:
        setting: Of ``solved`` or ``magcache``, whose parameter ``steps`` tells what their tables were
            made for. ``sigmas`` tells each step's noise level, if it is there.
        schedule: The run's.
    """
    tables = (setting.parameters, *setting.branches.values())
    made = next((s for s in (t.get("steps") for t in tables) if isinstance(s, int)), None)
    if made is None:
        return None
    levels = next((s for s in (t.get("sigmas") for t in tables) if isinstance(s, list)), [0.0])
    first = min(range(len(levels)), key=lambda row: abs(levels[row] - schedule.sigmas[0]))
    return Stretch(setting.policy, made, min(first, made - 1), len(schedule))
