# SPDX-License-Identifier: Apache-2.0
"""What quality a number of computed steps promises, by runs that nothing was fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ..core.errors import ConfigError

__all__ = ["COVERAGE", "EQUAL_PSNR", "FEWEST_RUNS", "Promise", "chosen_budget", "promised_psnr"]

ONE_IN = 10
"""Of so many runs one may fall short of its bound."""

COVERAGE = 1 - 1 / ONE_IN
"""Share of runs that keep their bound."""

FEWEST_RUNS = ONE_IN - 1
"""Runs that a promise takes: of fewer, not even the worst is bad enough."""

EQUAL_PSNR = 100.0
"""dB that equal frames count for."""


class Promise(BaseModel):
    """PSNR against the uncached run that runs keep, by computed steps.

    Attributes:
        coverage: Share of runs that keep it.
        runs: Runs that it was measured on; nothing was fitted on them.
        psnr: dB, one for each of the parameter ``budgets``, ascending.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    coverage: Annotated[float, Field(gt=0, lt=1)] = COVERAGE
    runs: Annotated[int, Field(ge=1)]
    psnr: Annotated[
        list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1, max_length=200)
    ]


def promised_psnr(scores: Sequence[Sequence[float]]) -> list[float]:
    """Return the PSNR that nine runs in ten keep under each number of computed steps.

    A run counts as keeping a bound from the number on from which all greater ones keep it too.
    So numbers are nested, and the least that meets a bound misses it in one run in ten at most,
    whatever the bound, where runs are exchangeable with those that were measured.

    Args:
        scores: dB of each run under each number of computed steps, [numbers, runs], ascending
            numbers, `FEWEST_RUNS` runs at least.

    Reference: split conformal prediction with nested sets: Gupta et al. 2019, arXiv 1910.10562; the
        ⌊α (n + 1)⌋-th worst of n.
    """
    runs = len(scores[0])
    assert runs >= FEWEST_RUNS, "checked where scores are taken"
    kept: list[float] = []
    nested = list(scores[-1])
    for row in reversed(scores):
        nested = [min(pair) for pair in zip(nested, row, strict=True)]
        kept.insert(0, sorted(nested)[(runs + 1) // ONE_IN - 1])
    return kept


def chosen_budget(promise: Promise | None, budgets: Sequence[int], bound: float) -> int:
    """Return the fewest computed steps that keep a bound.

    Args:
        promise: Of the setting; None where it has none.
        budgets: Computed steps of its schedules.
        bound: PSNR in dB.

    Raises:
        ConfigError: there is no promise, or none that keeps the bound.
    """
    where = f"min_psnr {bound:g}"
    if promise is None:
        raise ConfigError(
            where,
            "can't be kept: the setting tells no quality of runs that nothing was fitted on",
            "take a 'solved' config of 'freewheel calibrate --hold-out 20'",
        )
    found = [b for b, psnr in zip(budgets, promise.psnr, strict=False) if psnr >= bound]
    if not found:
        raise ConfigError(
            where,
            f"is kept by no number of computed steps: {100 * promise.coverage:.0f} of 100 "
            f"runs keep {max(promise.psnr):.1f} dB at most",
            "ask for less, or run uncached",
        )
    return found[0]
