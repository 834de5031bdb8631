# SPDX-License-Identifier: Apache-2.0
"""What a calibration will take, told before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PRESETS", "Preset", "duration", "model_runs"]

SCHEDULES = 8
"""Schedules of one speedup that are really run before one is improved (`search.candidates`)."""

RUNS_OF_A_BUDGET = 2
"""Runs of one number of computed steps that is not searched (`search.frontier`): 1 to 8, 1.2 (of 16
steps) to 2.4 (of 50) on average on the demo model."""

STEPS_OF_A_MOVE = 16
"""Steps that are computed to try one computed step elsewhere, at its four places: a move is judged
once two more steps were computed, and few are followed further."""


@dataclass(frozen=True)
class Preset:
    """How thorough a calibration is.

    Attributes:
        refine: Prompts whose cached runs solved schedules are fitted on.
        search: Rounds of moving the steps that solved schedules compute.
    """

    refine: int
    search: int


PRESETS = {"quick": Preset(2, 0), "normal": Preset(8, 3), "thorough": Preset(16, 6)}


def model_runs(
    prompts: int,
    speedups: Sequence[float],
    refine: int,
    search: int,
    steps: int = 50,
    *,
    paths: bool = False,
    hold_out: int = 0,
) -> int:
    """Return what a calibration computes, in uncached runs of one prompt: a little more than less.

    Args:
        prompts: Prompts that are recorded.
        speedups: Ideal speedups that configs are written for.
        refine: As in `Preset`; no more than ``prompts`` count.
        search: As in `Preset`; a search ends earlier where no move helps.
        steps: Denoise steps; every number of them to compute is run.
        paths: Whether paths are run too: of every number of computed steps one to every step.
        hold_out: Prompts that are run with every schedule.
    """
    fitted = min(refine, prompts)
    per_run = RUNS_OF_A_BUDGET * steps / 2 + sum(
        (SCHEDULES + STEPS_OF_A_MOVE * search) / speedup for speedup in speedups
    )
    per_run += steps / 2 if paths else 0
    return round(prompts + fitted * (1 + per_run) + hold_out * (1 + steps / 2))


def duration(seconds: float) -> str:
    """Return seconds in the unit that reads well: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
