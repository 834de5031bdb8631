# SPDX-License-Identifier: Apache-2.0
"""A run's summary in text: counts, speedups, and a strip of decisions per branch."""

from __future__ import annotations

from freewheel.runtime.statistics import BranchStatistics, RunStatistics, mean_count
from freewheel.runtime.summary import counts, summary


def branch(*computed: bool | None) -> BranchStatistics:
    found = BranchStatistics(len(computed))
    for step, one in enumerate(computed):
        if one is not None:
            found.add(step, one, None, [1.0], 2.0 if one else 1.0)
    return found


def test_counts_and_strips_of_every_branch() -> None:
    run = RunStatistics("custom", folded=True, steps=4, form="damped forecast")
    run.branches = {"cond": branch(True, False, True, False), "uncond": branch(True, *[False] * 3)}
    assert counts(run) == "1.5 of 4 steps computed"
    assert summary(run).splitlines() == [
        "custom (damped forecast): 1.5 of 4 steps computed, ideal speedup 2.67, estimated 1.45",
        "cond   █░█░",
        "uncond █░░░",
    ]


def test_the_strip_shows_steps_that_were_left_out_at_their_place() -> None:
    run = RunStatistics("custom", folded=True, steps=4)
    run.branches = {
        "cond": branch(True, False, True, False),
        "uncond": branch(True, None, None, True),
    }
    assert summary(run).splitlines()[1:] == ["cond   █░█░", "uncond █··█"]


def test_a_run_that_was_not_has_nothing_to_tell() -> None:
    assert summary(RunStatistics("off", folded=True, steps=0)) == "off: no run yet"


def test_counts_are_integers_where_branches_agree() -> None:
    assert repr(mean_count([15, 15])) == "15"
    assert repr(mean_count([15, 14])) == "14.5"
    assert repr(mean_count([])) == "0"
