# SPDX-License-Identifier: Apache-2.0
"""Configs of solved schedules: one with the schedules of every budget, and one per wanted speedup."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ..bundle.sampler_table import SamplerTable
from ..core.progress import Progress
from ..policies.config import CachingConfig
from ..policies.solved import (
    MAXIMUM_FACTORS,
    MAXIMUM_SCHEDULES,
    MAXIMUM_STEPS,
    SolvedConfig,
    SolvedSchedule,
)
from ..runtime.model import Model
from .calibration import CalibrationRequest
from .gram import GramRecorder
from .lockstep import Lockstep
from .paths import best_paths, nearer_of
from .pieces import Pieces
from .search import Computed, Recipe, Searched, candidates, frontier, search_count
from .shares import Shares
from .solve import Solution, early_weights, solve

__all__ = ["solved_configs"]

SEARCHED_HISTORY = 3
"""Residuals that schedules are searched with: a fourth would reach behind the window at long gaps."""

FEWEST_COMPUTED = 5
"""Computed steps of the first schedule of a frontier."""


def solved_configs(
    model: Model,
    recorder: GramRecorder,
    request: CalibrationRequest,
    table: SamplerTable | None,
    guidance: float,
    common: dict[str, Any],
    progress: Progress,
    shares: Shares,
    pieces: Pieces,
) -> tuple[dict[str, CachingConfig], dict[str, str], Lockstep | None]:
    """Find schedules: one of every number of computed steps, and those of the wanted speedups.

    Args:
        model: Engines.
        recorder: Recorded uncached runs.
        request: Speedups, prompts to refine on, objective.
        table: The runs' sampler; None takes schedules and mixes from the uncached runs.
        guidance: Guidance scale of the runs.
        common: Keys that all configs share.
        progress: Shown each schedule.
        shares: Which schedules this process finds.
        pieces: Schedules that were found before.

    Returns:
        Configs by name (`solved` with all schedules, ``solved_2x`` and the like), why one is
        missing, by name, and the cached runs that they were chosen by.
    """
    grams = recorder.grams()
    factors = dict.fromkeys(grams.branches, 1.0)
    if len(grams.branches) == 2:
        factors = dict(zip(grams.branches, (guidance, 1.0 - guidance), strict=True))
    sigmas = np.append(recorder.tables["sigmas"], 0.0)
    wanted = {int(grams.steps // speedup) for speedup in request.speedups}
    starts = recorder.starts[: request.refine]
    lockstep = None
    if table is not None and starts:
        lockstep = Lockstep(
            model, starts, table, factors, history=request.history, on_step=shares.beat
        )
    fewest = min([FEWEST_COMPUTED, *wanted])
    if lockstep is None:
        solutions = solve(
            grams, factors, early_weights(sigmas), history=min(request.history, SEARCHED_HISTORY)
        )
    else:
        schedules = candidates(grams, factors, sigmas, history=request.history)
        progress.phase("solve", sum(c in wanted or c >= fewest for c in schedules))
        solutions = frontier(
            lockstep,
            schedules,
            wanted,
            rounds=request.search,
            objective=request.objective,
            fewest=fewest,
            done=progress.advance,
            known=_searched(lockstep, schedules, wanted, request, shares, pieces),
        )
        if request.paths:
            progress.phase("paths", 1)
            found = best_paths(lockstep, solutions, objective=request.objective)
            solutions = nearer_of(solutions, found, objective=request.objective)
            progress.advance(f"{len(found)} numbers of computed steps")
    about = {
        "runs": grams.runs,
        "guidance_scale": guidance,
        "refined_on": len(starts) if lockstep else 0,
        "objective": request.objective,
        "paths": request.paths,
    }
    # Of what: the weighted model output, or, once refined, the final sample in dB.
    measure = "distance_db" if lockstep else "error"

    def config(counts: Sequence[int], computed: int) -> SolvedConfig:
        errors = {str(c): round(solutions[c].error, 6) for c in counts}
        return SolvedConfig(
            **common,
            computed_steps=computed,
            sigmas=[round(float(level), 6) for level in recorder.tables["sigmas"]],
            schedules=[schedule_of(solutions[c]) for c in counts],
            solved_from={**about, measure: errors},
        )

    configs: dict[str, CachingConfig] = {}
    left_out: dict[str, str] = {}
    counts = _storable([c for c in sorted(solutions) if c >= fewest], wanted, grams.steps, request)
    if counts:
        middle = min(counts, key=lambda count: abs(count - grams.steps / 2))
        configs["solved"] = config(counts, middle)
    for speedup in request.speedups:
        count = int(grams.steps // speedup)
        if count not in solutions or grams.steps > MAXIMUM_STEPS:
            left_out[f"solved_{speedup:g}x"] = f"no schedule of {count} computed steps was found"
            continue
        configs[f"solved_{speedup:g}x"] = config([count], count)
    return configs, left_out, lockstep


def _searched(
    lockstep: Lockstep,
    schedules: Mapping[int, Mapping[Recipe, Computed]],
    wanted: set[int],
    request: CalibrationRequest,
    shares: Shares,
    pieces: Pieces,
) -> dict[int, Searched]:
    """Search the wanted numbers of computed steps: each rank its own, and all get all."""
    counts = sorted(wanted & set(schedules))
    own: dict[int, Any] = {}
    for index, count in enumerate(counts):
        if shares.is_mine(index):
            own[index] = pieces.schedule(count)
            if own[index] is None:
                recipe, found = search_count(
                    lockstep, schedules[count], rounds=request.search, objective=request.objective
                )
                own[index] = [list(recipe), *vars(found).values()]
                pieces.keep_schedule(count, own[index])
    gathered = shares.gather_json(own, "gathering schedules")
    return {
        count: (tuple(recipe), Solution(tuple(computed), mix, error, tuple(distances)))
        for count, (recipe, computed, mix, error, distances) in zip(counts, gathered, strict=True)
    }


def schedule_of(solution: Solution) -> SolvedSchedule:
    mix = {n: [list(row) for row in rows if row] for n, rows in solution.mix.items()}
    return SolvedSchedule(computed=list(solution.computed), mix=mix)


def _storable(
    counts: Sequence[int], wanted: Collection[int], steps: int, request: CalibrationRequest
) -> list[int]:
    """Return numbers of computed steps whose schedules one config holds: all, or each so many."""
    if steps > MAXIMUM_STEPS:
        return []
    for stride in range(1, len(counts) + 1):
        kept = [c for i, c in enumerate(counts) if i % stride == 0 or c in wanted]
        factors = sum(steps - c for c in kept) * request.history
        if len(kept) <= MAXIMUM_SCHEDULES and factors <= MAXIMUM_FACTORS:
            return kept
    return []
