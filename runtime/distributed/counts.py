# SPDX-License-Identifier: Apache-2.0
"""Bytes that a rank sends, counted step by step, beside what a formula gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ExchangeCounts"]


@dataclass
class ExchangeCounts:
    """Bytes that this rank sent in one run.

    Attributes:
        formula: What the bytes of a computed step are a product or a sum of.
        formula_bytes: What it gives for this run.
        formula_bytes_reused: Likewise for a reused step.
        computed: Bytes of each step in which this rank computed.
        reused: Bytes of each step in which it reused.
        note_bytes: Bytes of decisions and other notes, of the whole run.
    """

    formula: str = ""
    formula_bytes: int = 0
    formula_bytes_reused: int = 0
    computed: list[int] = field(default_factory=list)
    reused: list[int] = field(default_factory=list)
    note_bytes: int = 0
    _sent: int = 0
    _computes: bool = False

    def begin_run(self) -> None:
        """Forget the last run."""
        self.formula, self.formula_bytes, self.formula_bytes_reused = "", 0, 0
        self.computed, self.reused, self.note_bytes, self._sent = [], [], 0, 0

    def decided(self, *, computes: bool) -> None:
        """Note what the current step is."""
        self._computes = computes

    def add(self, count: int) -> None:
        """Count bytes to the current step."""
        self._sent += count

    def end_step(self, count: int) -> None:
        """Count the last bytes of the current step."""
        (self.computed if self._computes else self.reused).append(self._sent + count)
        self._sent = 0

    def as_dict(self) -> dict[str, Any]:
        """Return what ``run --json`` prints; means per step, None where there was no such step."""
        steps = len(self.computed) + len(self.reused)
        return {
            "formula": self.formula,
            "formula_bytes": self.formula_bytes,
            "formula_bytes_reused": self.formula_bytes_reused,
            "bytes_per_computed_step": _mean(self.computed),
            "bytes_per_reused_step": _mean(self.reused),
            "note_bytes_per_step": self.note_bytes / steps if steps else None,
        }


def _mean(counts: list[int]) -> float | None:
    return sum(counts) / len(counts) if counts else None
