# SPDX-License-Identifier: Apache-2.0
"""What other settings would have decided in a recorded run, replayed ahead for a page to show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import FreewheelError
from ..policies import policy as find_policy
from ..policies.decision_loop import DecisionLoop
from ..policies.guard import Guarded
from ..policies.schedule import Schedule
from ..policies.setting import GUARD_PARAMETERS, CacheSetting
from ..policies.spec import PolicySpec
from .replay import Replay, replay
from .trace import Trace

__all__ = ["WhatIf", "foretell", "reached_distances"]

SWEPT = ("threshold", "interval")
"""Parameters that say how much is reused, of which every policy has one at most."""

THRESHOLDS = 33
SPREAD = 8.0
"""Thresholds are foretold from this part of the middle one to this multiple of it."""

LONGEST_INTERVAL = 12

Distances = dict[str, list[float | None]]


@dataclass(frozen=True)
class WhatIf:
    """One policy's replays over the values of one parameter.

    Attributes:
        policy: Its name.
        parameter: ``threshold`` or ``interval``.
        values: Rising.
        current: Index of the value that the setting has.
        rows: Per value: ``computed`` (decisions per branch), ``error`` (root mean square of the
            reuse error over steps and branches), ``ideal_speedup``, and ``reached`` as
            `reached_distances` returns it.
    """

    policy: str
    parameter: str
    values: list[float]
    current: int
    rows: list[dict[str, Any]]


def foretell(trace: Trace, settings: Iterable[CacheSetting]) -> list[WhatIf]:
    """Replay each setting over the values of its parameter.

    Args:
        trace: A run recorded with the cache off.
        settings: One per policy; those without such a parameter, and those that look at what the
            trace lacks, are left out.
    """
    found = []
    for setting in settings:
        spec = find_policy(setting.policy).spec
        name = next((n for n in SWEPT if n in spec.parameters), None)
        if name is None:
            continue
        values, current = _values(setting, spec, name)
        try:
            rows = [_row(trace, _with(setting, name, value)) for value in values]
        except FreewheelError:
            continue
        found.append(WhatIf(setting.policy, name, values, current, rows))
    return found


def reached_distances(trace: Trace, setting: CacheSetting) -> tuple[Replay, Distances]:
    """Replay a setting, and tell the distance that each decision compared with the threshold.

    Statistics tell the distance after a decision, where a computed step has put it back to 0.

    Args:
        trace: A recorded run, cached or not: reuse errors are told of an uncached one alone.
        setting: Policy, parameters, guard.

    Returns:
        The replay; per branch and step the distance before any reset, None where there is none: at
        step 0, and all along where the policy reports no distance. Empty without one.

    Raises:
        RequestError: the trace lacks what the policy looks at.
    """
    laws: list[_Reaching] = []

    def law(of_branch: CacheSetting, schedule: Schedule) -> DecisionLoop:
        laws.append(_Reaching(Guarded(find_policy(of_branch.policy))))
        spec = laws[-1].spec
        return DecisionLoop(spec, laws[-1], of_branch, step_count=len(schedule), schedule=schedule)

    was_cached = any(not trace.get(b, "computed").all() for b in trace.branches)
    told = replay(_without_residuals(trace) if was_cached else trace, setting, law)
    if find_policy(setting.policy).spec.distance is None:
        return told, {}
    return told, {b: law.reached for b, law in zip(trace.branches, laws, strict=True)}


class _Reaching:
    """A decide function that is asked twice at each step: once as if nothing forced a computation."""

    def __init__(self, decide: Guarded) -> None:
        self.spec, self._decide = decide.spec, decide
        self.reached: list[float | None] = []
        self._free: dict[str, Tensor] = {"exact": torch.tensor(False)}
        self._free |= {f"guard.{n}": torch.tensor(0) for n in GUARD_PARAMETERS}  # 0 is no limit
        for name, spec in self.spec.parameters.items():
            if "threshold" in name and not spec.shape:
                self._free[f"param.{name}"] = torch.tensor(torch.finfo(torch.float32).max)
            elif name == "max_skip":
                self._free[f"param.{name}"] = torch.tensor(torch.iinfo(torch.int64).max)
            elif name == "retention":
                self._free[f"param.{name}"] = torch.tensor(0.0)

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.spec.distance is not None:
            free = self._decide({**inputs, **self._free})
            distance = float(free[f"new_state.{self.spec.distance}"])
            self.reached.append(None if free["compute"] else distance)
        decided: dict[str, Tensor] = self._decide(inputs)
        return decided


def _without_residuals(trace: Trace) -> Trace:
    left_out = ("/computed", "/residual")
    return Trace({n: a for n, a in trace.arrays.items() if not n.endswith(left_out)})


def _values(setting: CacheSetting, spec: PolicySpec, name: str) -> tuple[list[float], int]:
    """Return the values to try, and the index of the setting's own."""
    declared = spec.parameters[name]
    own = spec.resolve(setting.parameters)[name]
    assert isinstance(own, int | float), "a scalar"
    if name == "interval":
        values = sorted({*range(int(declared.minimum or 1), LONGEST_INTERVAL + 1), int(own)})
        return [float(v) for v in values], values.index(int(own))
    middle = own or declared.default
    assert isinstance(middle, int | float), "a scalar"
    spread = np.geomspace(middle / SPREAD, middle * SPREAD, THRESHOLDS)
    values_ = sorted({0.0, float(own), *(float(f"{v:.3g}") for v in spread)})
    return values_, values_.index(float(own))


def _with(setting: CacheSetting, name: str, value: float) -> CacheSetting:
    """Return the setting with one parameter replaced, in every branch."""
    given = int(value) if name == "interval" else value
    branches = {
        b: {n: v for n, v in own.items() if n != name} for b, own in setting.branches.items()
    }
    parameters = {**setting.parameters, name: given}
    return setting.model_copy(update={"parameters": parameters, "branches": branches})


def _row(trace: Trace, setting: CacheSetting) -> dict[str, Any]:
    told, reached = reached_distances(trace, setting)
    return {
        "computed": {n: b.computed for n, b in told.branches.items()},
        "error": told.error,
        "ideal_speedup": told.ideal_speedup,
        "reached": reached,
    }
