# SPDX-License-Identifier: Apache-2.0
"""What a run did: decisions, distances and seconds, and what is odd about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["FEW_STEPS", "BranchStatistics", "RunStatistics", "ideal_speedup", "mean_count"]

FEW_STEPS = 8
"""Steps up to which a checkpoint is taken for a distilled one, whose steps are too far apart."""


def mean_count(counts: Sequence[int]) -> int | float:
    """Return the mean of counts, an integer where it is whole; 0 of none."""
    whole, rest = divmod(sum(counts), len(counts) or 1)
    return sum(counts) / len(counts) if rest else whole


def ideal_speedup(steps: float, computed: float, always_run: float = 0.0) -> float:
    """Return by how much a run would be faster if it took nothing but its blocks; 1 of no step.

    Args:
        steps: That ran.
        computed: Of these, computed in full.
        always_run: Part of the blocks that the others run too.
    """
    paid = computed + (steps - computed) * always_run
    return steps / paid if computed else 1.0


class BranchStatistics:
    """One branch, step by step; each list holds an entry for every step of the run.

    A step that the branch did not run, as in a guidance interval, is None (of ``mix``: empty).

    Attributes:
        computed: Whether each step ran the body.
        distance: Accumulated distance after each decision; None where the policy has none.
        mix: Factors of the past residuals at each reused step, newest first; empty if computed.
        seconds: Seconds of each whole step.
    """

    def __init__(self, steps: int) -> None:
        """Make the record of a branch that has run none of its ``steps`` yet."""
        self.computed: list[bool | None] = [None] * steps
        self.distance: list[float | None] = [None] * steps
        self.mix: list[list[float]] = [[] for _ in range(steps)]
        self.seconds: list[float | None] = [None] * steps

    def add(
        self,
        step_index: int,
        computed: bool,
        distance: float | None,
        mix: Sequence[float],
        seconds: float,
    ) -> None:
        """Note what a step did."""
        self.computed[step_index] = computed
        self.distance[step_index] = distance
        self.mix[step_index] = [] if computed else list(mix)
        self.seconds[step_index] = seconds

    @property
    def computed_steps(self) -> int:
        """Number of steps that ran the body."""
        return self.computed.count(True)

    @property
    def skipped_steps(self) -> int:
        """Number of steps that the branch did not run."""
        return self.computed.count(None)

    @property
    def done_steps(self) -> int:
        """Number of steps that the branch ran, computed or reused."""
        return len(self.computed) - self.skipped_steps

    def step_seconds(self, *, computed: bool) -> list[float]:
        """Return the seconds of the computed or of the reused steps."""
        pairs = zip(self.computed, self.seconds, strict=True)
        return [s for c, s in pairs if c is computed and s is not None]

    def percentiles(self) -> dict[str, float] | None:
        """Return the distances' minimum, quartiles and maximum over reused steps."""
        pairs = zip(self.distance, self.computed, strict=True)
        values = [d for d, c in pairs if d is not None and c is False]
        if not values:
            return None
        names = {"min": 0, "p25": 25, "p50": 50, "p75": 75, "max": 100}
        return {n: float(np.percentile(values, q)) for n, q in names.items()}


@dataclass
class RunStatistics:
    """One run of a session.

    Attributes:
        policy: Policy name.
        folded: Whether all decisions were known before step 0.
        steps: Steps of the run.
        branches: By branch name.
        seconds: Seconds by segment: head, decide, body, delta, reuse, finish, check, prepare.
        form: Which form of the policy's law ran, where it has several: published or damped.
        deadline: Seconds that the steps were to take, or None.
        loop_seconds: Seconds from the run's begin to the end of its last step so far.
        always_run: Part of the blocks that reused steps run too, 0 to below 1.
        foreseen: Warnings that were known when the run began.
    """

    policy: str
    folded: bool
    steps: int
    branches: dict[str, BranchStatistics] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    form: str = ""
    deadline: float | None = None
    loop_seconds: float = 0.0
    always_run: float = 0.0
    foreseen: list[str] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: Sequence[RunStatistics]) -> RunStatistics:
        """Return one run's statistics from those of its experts, in the order in which they ran."""
        first = parts[0]
        whole = cls(first.policy, all(p.folded for p in parts), sum(p.steps for p in parts))
        whole.form, whole.deadline = first.form, first.deadline
        whole.always_run = first.always_run
        whole.foreseen = list(dict.fromkeys(text for part in parts for text in part.foreseen))
        names = dict.fromkeys(name for part in parts for name in part.branches)
        whole.branches = {name: BranchStatistics(0) for name in names}
        for part in parts:
            whole.loop_seconds += part.loop_seconds
            for name, seconds in part.seconds.items():
                whole.seconds[name] = whole.seconds.get(name, 0.0) + seconds
            for name, known in whole.branches.items():
                branch = part.branches.get(name) or BranchStatistics(part.steps)
                known.computed += branch.computed
                known.distance += branch.distance
                known.mix += branch.mix
                known.seconds += branch.seconds
        return whole

    @property
    def computed_steps(self) -> int | float:
        """Computed steps of a branch; where branches differ, their mean."""
        return mean_count([b.computed_steps for b in self.branches.values()])

    @property
    def ideal_speedup(self) -> float:
        """Steps that ran / those that its blocks would be enough for, as if all else were free."""
        computed = sum(b.computed_steps for b in self.branches.values())
        done = sum(b.done_steps for b in self.branches.values())
        return ideal_speedup(done, computed, self.always_run)

    def step_seconds(self) -> dict[str, float | None]:
        """Return the median seconds of computed and of reused steps."""
        computed, reused = (
            [s for b in self.branches.values() for s in b.step_seconds(computed=is_computed)]
            for is_computed in (True, False)
        )
        return {
            "computed": float(np.median(computed)) if computed else None,
            "reused": float(np.median(reused)) if reused else None,
        }

    @property
    def estimated_speedup(self) -> float | None:
        """Median seconds of a computed step, for every step that ran / seconds of these steps.

        An estimate: no uncached run was timed. None where nothing could be reused or was computed.
        """
        computed = self.step_seconds()["computed"]
        taken = sum(s for b in self.branches.values() for s in b.seconds if s is not None)
        if self.policy == "off" or computed is None or not taken:
            return None
        return computed * sum(b.done_steps for b in self.branches.values()) / taken

    def warnings(self, parameters: Mapping[str, Any]) -> list[str]:
        """Return warnings, one per cause: foreseen, too few steps, nothing reused, threshold never reached."""
        if self.policy == "off":
            return []
        late = [] if self.deadline is None else self._lateness(self.deadline)
        return self.foreseen + late + self._idleness(parameters)

    def _lateness(self, deadline: float) -> list[str]:
        if self.loop_seconds <= deadline:
            return []
        return [
            f"the steps took {self.loop_seconds:.3g} s, and their deadline was {deadline:.3g} s: the "
            f"fewest steps that policy '{self.policy}' may compute take longer, or the last ones "
            "took longer than those before; ask for fewer steps, or more seconds"
        ]

    def _idleness(self, parameters: Mapping[str, Any]) -> list[str]:
        idle = [n for n, b in self.branches.items() if 0 < b.done_steps == b.computed_steps]
        where = f"branch {' and '.join(map(repr, idle))}"
        if 1 < self.steps <= FEW_STEPS:
            outcome = f"; policy '{self.policy}' reused nothing in {where}" if idle else ""
            return [
                f"{self.steps} steps is few-step sampling: there is little to reuse and much to "
                f"lose{outcome}; compare with --cache off"
            ]
        found = []
        if idle:
            found.append(
                f"policy '{self.policy}' reused nothing in {where}: every step was computed; raise "
                "its threshold or interval, or look at 'guard' limits"
            )
        free = [d for b in self.branches.values() for d in b.distance if d is not None]
        threshold = parameters.get("threshold")
        if (
            free
            and not idle
            and isinstance(threshold, int | float)
            and max(free) < 0.01 * threshold  # never so of threshold 0
        ):
            found.append(
                f"threshold {threshold} can't matter: the largest distance was {max(free):.3g}"
            )
        return found

    def as_dict(self, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return what ``run --json`` prints."""
        return {
            "policy": self.policy,
            "form": self.form,
            "folded": self.folded,
            "steps": self.steps,
            "computed_steps": self.computed_steps,
            "always_run": self.always_run,
            "ideal_speedup": self.ideal_speedup,
            "estimated_speedup": self.estimated_speedup,
            "deadline": self.deadline,
            "loop_seconds": round(self.loop_seconds, 6),
            "branches": {
                n: {
                    "computed": b.computed,
                    "distance": b.distance,
                    "mix": b.mix,
                    "percentiles": b.percentiles(),
                }
                for n, b in self.branches.items()
            },
            "seconds": {n: round(s, 6) for n, s in self.seconds.items()},
            "step_seconds": self.step_seconds(),
            "warnings": self.warnings(parameters or {}),
        }
