# SPDX-License-Identifier: Apache-2.0
"""Say in a few lines of text what a run computed and what it reused."""

from __future__ import annotations

from collections.abc import Sequence

from .statistics import RunStatistics

__all__ = ["counts", "strip", "summary"]

COMPUTED, REUSED, SKIPPED = "█", "░", "·"


def counts(statistics: RunStatistics) -> str:
    """Return "15 of 30 steps computed"; "no run yet" before the first one."""
    if not statistics.branches:
        return "no run yet"
    return f"{statistics.computed_steps:g} of {statistics.steps} steps computed"


def strip(computed: Sequence[bool | None]) -> str:
    """Return a character per step: full where computed, a dot where the branch did not run."""
    return "".join({True: COMPUTED, False: REUSED, None: SKIPPED}[c] for c in computed)


def summary(statistics: RunStatistics) -> str:
    """Return the policy, the counts, the speedups, and a strip of decisions per branch."""
    form = f" ({statistics.form})" if statistics.form else ""
    head = [f"{statistics.policy}{form}: {counts(statistics)}"]
    if statistics.branches:
        head += [f"ideal speedup {statistics.ideal_speedup:.2f}"]
    if statistics.estimated_speedup is not None:
        head += [f"estimated {statistics.estimated_speedup:.2f}"]
    width = max((len(name) for name in statistics.branches), default=0)
    strips = [
        f"{name:{width}} {strip(branch.computed)}" for name, branch in statistics.branches.items()
    ]
    return "\n".join((", ".join(head), *strips))
