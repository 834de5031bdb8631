# SPDX-License-Identifier: Apache-2.0
"""Say in a few lines of text what a run computed and what it reused."""

from __future__ import annotations

from collections.abc import Sequence

from .statistics import RunStatistics

__all__ = ["counts", "live_strip", "strip", "summary"]

COMPUTED, REUSED, SKIPPED = "█", "░", "·"


def counts(statistics: RunStatistics) -> str:
    """Return "15 of 30 steps computed"; "no run yet" before the first one."""
    if not statistics.branches:
        return "no run yet"
    return f"{statistics.computed_steps:g} of {statistics.steps} steps computed"


def strip(computed: Sequence[bool | None]) -> str:
    """Return a character per step: full where computed, a dot where the branch did not run."""
    return "".join({True: COMPUTED, False: REUSED, None: SKIPPED}[c] for c in computed)


def live_strip(statistics: RunStatistics, most: int = 40) -> str:
    """Return the decisions of a run that still goes on: of its first branch, the ``most`` latest."""
    branch = next(iter(statistics.branches.values()), None)
    if branch is None:
        return ""
    known = [i for i, computed in enumerate(branch.computed) if computed is not None]
    return strip(branch.computed[: known[-1] + 1 if known else 0][-most:])


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
