# SPDX-License-Identifier: Apache-2.0
"""Measure a run's steps, and tell its policy how it stands against its deadline."""

from __future__ import annotations

from collections import deque
from statistics import fmean

from ..policies.deadline import NO_DEADLINE, Pace

__all__ = ["Pacer"]

REMEMBERED = 32
"""Steps of a kind whose mean foretells the next ones: long enough to hold a busy machine's spells and its rests."""

NEWEST = 8
"""The last of them, whose slowest tells how late a step may be."""


class Pacer:
    """Seconds of the last computed and reused steps, of this run and those before it.

    They are kept per branch, since the run before may have had one and this one two. Times are given,
    so that any clock will do.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._seconds: dict[bool, deque[float]] = {
            computed: deque(maxlen=REMEMBERED) for computed in (True, False)
        }
        self._branches = 1
        self.begin(None, 0.0)

    def begin(self, deadline: float | None, now: float) -> None:
        """Start a run.

        Args:
            deadline: Seconds that it may take, or None.
            now: Seconds on any clock.
        """
        self._began, self._deadline = now, deadline
        self._step_began = now
        self._was_computed: bool | None = None
        self._noted = 0

    def forget(self) -> None:
        """Forget how long steps take: they become others."""
        for seconds in self._seconds.values():
            seconds.clear()

    def begin_step(self, now: float, prepared: float = 0.0) -> Pace:
        """End the step before, and tell how the run stands before the next.

        A step may be slower than their mean. What the slowest of the newest computed ones
        took longer than that is held in reserve, so that the last one computed does not end late.
        A computed step takes a reused one's seconds at least: on a busy machine the means of a few
        may say otherwise.

        Args:
            now: Seconds on the clock of `begin`.
            prepared: Seconds of this run that no later step takes again, such as allocations.
        """
        if self._was_computed is not None:
            self._branches = self._noted
            taken = now - prepared - self._step_began
            self._seconds[self._was_computed].append(taken / self._branches)
        self._step_began, self._was_computed, self._noted = now - prepared, None, 0
        if self._deadline is None:
            return Pace()
        computed, reused = (
            self._branches * fmean(self._seconds[kind]) if self._seconds[kind] else 0.0
            for kind in (True, False)
        )
        slowest = max(list(self._seconds[True])[-NEWEST:], default=0.0)
        reserve = max(self._branches * slowest - computed, 0.0)
        left = self._deadline - (now - self._began) - reserve
        return Pace(min(left, NO_DEADLINE / 2), max(computed, reused), reused)

    def note(self, computed: bool) -> None:
        """Say what a branch does in the step that began last; the first one's is the step's."""
        self._noted += 1
        if self._was_computed is None:
            self._was_computed = computed

    def taken(self, now: float) -> float:
        """Return the seconds since the run began."""
        return now - self._began
