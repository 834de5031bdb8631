# SPDX-License-Identifier: Apache-2.0
"""DualBlock's decisions, one behaviour at a time, and what tells them from DBCache's."""

from __future__ import annotations

from typing import Any

import numpy as np

from freewheel.policies.decision_loop import DecisionLoop
from freewheel.policies.setting import CacheSetting


def decisions(signal: list[Any], policy: str = "dualblock", **parameters: Any) -> str:
    setting = CacheSetting(policy=policy, parameters=parameters)
    law = DecisionLoop.eager(setting, step_count=len(signal))
    seen = [np.broadcast_to(np.float32(value), (2, 4)).copy() for value in signal]
    return "".join("#" if law.decide(s).compute else "." for s in seen)


def test_change_counts_from_the_step_before_so_that_a_drift_is_never_computed() -> None:
    drift = [1.00, 1.04, 1.08, 1.12, 1.16, 1.20]
    assert decisions(drift, threshold=0.1) == "#....."
    assert decisions(drift, "dbcache", threshold=0.1) == "#..#.."
    assert decisions([1.0, 1.0, 1.2, 1.2, 1.0], threshold=0.1) == "#.#.#"


def test_only_every_nth_channel_is_compared() -> None:
    still, odd, even = [1.0, 1.0, 1.0, 1.0], [1.0, 9.0, 1.0, 9.0], [9.0, 1.0, 9.0, 1.0]
    assert decisions([still, odd, still, even], threshold=0.1, channel_stride=2) == "#..#"
    assert decisions([still, odd, still, even], threshold=0.1) == "####"


def test_change_is_relative_to_the_step_before_in_the_channels_that_are_compared() -> None:
    # Channels 0 and 2 go from 1 to 1.2, a fifth; with 1 and 3, at 10, it would be a hundredth.
    signal = [[1.0, 10.0, 1.0, 10.0], [1.2, 10.0, 1.2, 10.0]]
    assert decisions(signal, threshold=0.19, channel_stride=2) == "##"
    assert decisions(signal, threshold=0.21, channel_stride=2) == "#."
    assert decisions(signal, threshold=0.03) == "#."


def test_threshold_0_never_reuses_and_a_residual_of_zeros_or_not_finite_computes() -> None:
    assert decisions([1.0] * 4, threshold=0.0) == "####"
    assert decisions([0.0, 0.0, 0.0], threshold=0.5) == "###"
    assert decisions([1.0, float("nan"), 1.0, 1.0], threshold=0.5) == "###."
