# SPDX-License-Identifier: Apache-2.0
"""What a run did: decisions, distances and seconds, and what is odd about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["FEW_STEPS", "BranchStatistics", "RunStatistics", "mean_count"]

FEW_STEPS = 8
"""Steps up to which a checkpoint is taken for a distilled one, whose steps are too far apart."""


def mean_count(counts: Sequence[int]) -> int | float:
    """Return the mean of counts, an integer where it is whole; 0 of none."""
    whole, rest = divmod(sum(counts), len(counts) or 1)
    return sum(counts) / len(counts) if rest else whole


@dataclass
class BranchStatistics:
    """One branch, step by step.

    Attributes:
        computed: Whether each step ran the body.
        distance: Accumulated distance after each decision; None where the policy has none.
        mix: Factors of the past residuals at each reused step, newest first; empty if computed.
        seconds: Seconds of each whole step.
    """

    computed: list[bool] = field(default_factory=list)
    distance: list[float | None] = field(default_factory=list)
    mix: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(
        self, computed: bool, distance: float | None, mix: Sequence[float], seconds: float
    ) -> None:
        """Append one step."""
        self.computed.append(computed)
        self.distance.append(distance)
        self.mix.append([] if computed else list(mix))
        self.seconds.append(seconds)

    def percentiles(self) -> dict[str, float] | None:
        """Return the distances' minimum, quartiles and maximum over reused steps."""
        values = [
            d for d, c in zip(self.distance, self.computed, strict=True) if d is not None and not c
        ]
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
    """

    policy: str
    folded: bool
    steps: int
    branches: dict[str, BranchStatistics] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    form: str = ""

    @classmethod
    def joined(cls, parts: Sequence[RunStatistics]) -> RunStatistics:
        """Return one run's statistics from those of its experts, in the order in which they ran."""
        first = parts[0]
        whole = cls(first.policy, all(p.folded for p in parts), sum(p.steps for p in parts))
        whole.form = first.form
        for part in parts:
            for name, seconds in part.seconds.items():
                whole.seconds[name] = whole.seconds.get(name, 0.0) + seconds
            for name, branch in part.branches.items():
                known = whole.branches.setdefault(name, BranchStatistics())
                known.computed += branch.computed
                known.distance += branch.distance
                known.mix += branch.mix
                known.seconds += branch.seconds
        return whole

    @property
    def computed_steps(self) -> int | float:
        """Computed steps of a branch; where branches differ, their mean."""
        return mean_count([sum(b.computed) for b in self.branches.values()])

    @property
    def ideal_speedup(self) -> float:
        """Steps / computed steps, as if all but the body were free."""
        computed = sum(sum(b.computed) for b in self.branches.values())
        done = sum(len(b.computed) for b in self.branches.values())
        return done / computed if computed else 1.0

    def step_seconds(self) -> dict[str, float | None]:
        """Return the median seconds of computed and of reused steps."""
        pairs = [p for b in self.branches.values() for p in zip(b.computed, b.seconds, strict=True)]
        computed = [s for c, s in pairs if c]
        reused = [s for c, s in pairs if not c]
        return {
            "computed": float(np.median(computed)) if computed else None,
            "reused": float(np.median(reused)) if reused else None,
        }

    @property
    def estimated_speedup(self) -> float | None:
        """Median seconds of a computed step, for every step / seconds of the steps taken.

        An estimate: no uncached run was timed. None where nothing could be reused or was computed.
        """
        computed = self.step_seconds()["computed"]
        taken = sum(sum(b.seconds) for b in self.branches.values())
        if self.policy == "off" or computed is None or not taken:
            return None
        return computed * sum(len(b.seconds) for b in self.branches.values()) / taken

    def warnings(self, parameters: Mapping[str, Any]) -> list[str]:
        """Return warnings, one per cause: too few steps, nothing reused, threshold never reached."""
        if self.policy == "off":
            return []
        idle = [n for n, b in self.branches.items() if b.computed and all(b.computed)]
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
            "ideal_speedup": self.ideal_speedup,
            "estimated_speedup": self.estimated_speedup,
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
