# SPDX-License-Identifier: Apache-2.0
"""Watch one run for its report: how much residuals change, and what other settings would see."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..core.errors import RequestError
from ..policies.base import relative_change
from ..policies.schedule import Schedule
from ..runtime.step_record import StepRecord
from .trace import Trace, TraceRecorder

__all__ = ["RunRecorder"]

TOKENS_PER_FRAME = 16
"""Tokens of each frame in the trace: the run of a large model would not fit in memory whole."""


@dataclass
class RunRecorder:
    """Keeps the change of each step's residual, and a trace of some of its tokens.

    Attributes:
        wants_signals: Whether the trace holds hidden-sized signals, for a policy that looks at one.
        changes: Per branch and step, mean|r_t − r_s| / mean|r_s|, s the step that the branch ran
            before t; r is the body's residual or what was reused in its place. NaN at its first
            step and where it did not run.
    """

    wants_signals: bool = False
    across_experts: ClassVar[bool] = True
    changes: dict[str, list[float]] = field(default_factory=dict)
    _last: dict[str, Tensor] = field(default_factory=dict)
    _first: int = 0  # of the expert that runs
    _steps: int = 0  # of the experts so far
    _parts: list[TraceRecorder] = field(default_factory=list)

    def on_run(self, tables: Mapping[str, Tensor], schedule: Schedule) -> None:
        """Begin a run, or go on with its second expert."""
        self._first, self._steps = self._steps, self._steps + len(schedule)
        self._parts.append(TraceRecorder(self.wants_signals, TOKENS_PER_FRAME))
        self._parts[-1].on_run(tables, schedule)

    def on_step(self, record: StepRecord, dims: Mapping[str, int]) -> None:
        """Take one step of one branch."""
        self._parts[-1].on_step(record, dims)
        changes = self.changes.setdefault(record.branch, [])
        changes += [math.nan] * (self._steps - len(changes))
        before = self._last.get(record.branch)
        if before is not None:
            change = relative_change(record.residual, before)
            changes[self._first + record.step_index] = float(change)
        self._last[record.branch] = record.residual.clone()

    def trace(self) -> Trace | None:
        """Return the run's trace; None of two transformers, or where a branch left steps out."""
        if len(self._parts) != 1:
            return None
        try:
            return self._parts[0].trace()
        except RequestError:
            return None
