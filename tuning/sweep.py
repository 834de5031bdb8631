# SPDX-License-Identifier: Apache-2.0
"""What if: replay a trace with many values of one parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import ConfigError
from ..policies.overrides import apply_overrides
from ..policies.setting import GUARD_PARAMETERS, CacheSetting
from ..policies.spec import PolicySpec
from ..runtime.summary import strip
from .replay import replay
from .table import markdown_table
from .trace import Trace

__all__ = ["SWEEP_COLUMNS", "SweepRow", "run_sweep", "sweep_table", "sweep_values"]

SWEEP_COLUMNS = ("value", "computed", "ideal speedup", "mean reuse error", "worst", "steps")
MOST_VALUES = 1000


@dataclass(frozen=True)
class SweepRow:
    """One value's replay.

    Attributes:
        value: As written after ``key=``.
        computed_steps: Computed steps of a branch, averaged over branches.
        ideal_speedup: Steps / computed steps.
        mean_error: Mean of mean|r̂ − r| / mean|r| over reused steps; None where none is.
        worst_error: Largest of them.
        computed: Decisions of the first branch.
    """

    value: str
    computed_steps: float
    ideal_speedup: float
    mean_error: float | None
    worst_error: float | None
    computed: list[bool]

    def cells(self) -> list[Any]:
        """Return the table's cells."""
        errors = (None if e is None else round(e, 4) for e in (self.mean_error, self.worst_error))
        return [
            self.value,
            self.computed_steps,
            round(self.ideal_speedup, 2),
            *errors,
            strip(self.computed),
        ]


def run_sweep(trace: Trace, setting: CacheSetting, spec: PolicySpec, sweep: str) -> list[SweepRow]:
    """Replay a setting once per value.

    Args:
        trace: A run recorded with the cache off.
        setting: Policy, other parameters, guard.
        spec: The policy's declaration.
        sweep: ``key=first:last:count`` for evenly spaced values (integers where the parameter is
            one), or ``key=a,b,c``.

    Raises:
        ConfigError: the sweep can't be read, or a value is not one of the parameter's.
        RequestError: the trace lacks what the policy looks at.
    """
    key, values = sweep_values(sweep, spec)
    rows = []
    for value in values:
        result = replay(trace, apply_overrides(setting, {key: value}, spec))
        branches = list(result.branches.values())
        errors = [e for b in branches for e in b.reuse_error if e is not None]
        rows.append(
            SweepRow(
                value,
                result.computed_steps,
                result.ideal_speedup,
                float(np.mean(errors)) if errors else None,
                max(errors, default=None),
                branches[0].computed,
            )
        )
    return rows


def sweep_table(rows: Sequence[SweepRow]) -> str:
    """Return the table of a sweep as Markdown."""
    return markdown_table(SWEEP_COLUMNS, [row.cells() for row in rows])


def sweep_values(sweep: str, spec: PolicySpec) -> tuple[str, list[str]]:
    """Return the parameter and its values as text.

    Raises:
        ConfigError: not ``key=first:last:count`` or ``key=a,b,c``, or too many values.
    """
    where = f"--sweep '{sweep}'"
    key, separator, text = sweep.partition("=")
    if not separator or not text:
        raise ConfigError(where, "is not key=values", "write --sweep threshold=0.02:0.4:40")
    if ":" not in text:
        return key, text.split(",")
    try:
        first, last, count = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise ConfigError(
            where, "is not first:last:count", "write --sweep threshold=0.02:0.4:40"
        ) from error
    if not 2 <= count <= MOST_VALUES or count != int(count):
        raise ConfigError(where, f"asks for {count:g} values", f"use 2 to {MOST_VALUES}")
    spread = np.linspace(first, last, int(count))
    declared = spec.parameters.get(key) or GUARD_PARAMETERS.get(key)
    if declared is not None and declared.dtype == "int64":
        return key, [str(v) for v in dict.fromkeys(round(float(x)) for x in spread)]
    return key, [f"{x:.6g}" for x in spread]
