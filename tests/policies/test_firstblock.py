# SPDX-License-Identifier: Apache-2.0
"""First-Block Cache's decisions, one behaviour at a time."""

from __future__ import annotations

import numpy as np

from freewheel.policies.decision_loop import DecisionLoop
from freewheel.policies.setting import CacheSetting


def decisions(signal: list[float], threshold: float) -> str:
    setting = CacheSetting(policy="firstblock", parameters={"threshold": threshold})
    law = DecisionLoop.eager(setting, step_count=len(signal))
    seen = [np.full((2, 3), value, np.float32) for value in signal]
    return "".join("#" if law.decide(s).compute else "." for s in seen)


def test_threshold_0_never_reuses_even_where_nothing_changes() -> None:
    assert decisions([1.0] * 5, 0.0) == "#####"


def test_change_counts_from_the_last_computed_step_and_not_from_the_last() -> None:
    # 4 % a step: 4 and 8 % off the first step's are near, 12 % is not; then it starts over.
    assert decisions([1.00, 1.04, 1.08, 1.12, 1.16, 1.20], 0.1) == "#..#.."


def test_residual_of_zeros_or_one_not_finite_computes() -> None:
    assert decisions([0.0, 0.0, 0.0], 0.5) == "###"
    assert decisions([1.0, float("nan"), 1.0, 1.0], 0.5) == "###."
