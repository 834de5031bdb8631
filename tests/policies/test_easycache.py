# SPDX-License-Identifier: Apache-2.0
"""EasyCache's decisions, one behaviour at a time."""

from __future__ import annotations

import numpy as np
import pytest

from freewheel.policies.decision_loop import DecisionLoop, DecisionRecord
from freewheel.policies.setting import CacheSetting, GuardSetting


def fold(
    inputs: list[float], outputs: list[float], threshold: float, first_exact: int = 1
) -> list[DecisionRecord]:
    setting = CacheSetting(
        policy="easycache",
        parameters={"threshold": threshold},
        guard=GuardSetting(first_exact=first_exact),
    )
    law = DecisionLoop.eager(setting, step_count=len(inputs))
    records = []
    for value in inputs:
        last = law.last_computed
        feature = None if last is None else np.full((1, 2, 2), outputs[last], np.float32)
        records.append(law.decide(np.full((2, 3), value, np.float32), feature))
    return records


def decisions(records: list[DecisionRecord]) -> str:
    return "".join("#" if r.compute else "." for r in records)


def test_two_computed_steps_are_needed_for_a_rate() -> None:
    assert decisions(fold([1.0] * 4, [1.0] * 4, 9.0)) == "####"  # 0 / 0 is no rate
    assert decisions(fold([1.0, 1.1, 1.2, 1.3], [1.0, 1.1, 1.2, 1.3], 9.0)) == "##.."


def test_threshold_0_never_reuses() -> None:
    assert decisions(fold([1.0, 2.0, 3.0, 4.0], [1.0] * 4, 0.0)) == "####"


def test_distance_is_the_rate_times_the_inputs_change_over_the_outputs_size() -> None:
    # The output moved by 0.5 where the input moved by 0.1: rate 5; a further 0.1 foretells 0.5 / 2.5.
    records = fold([1.0, 1.1, 1.2, 1.3], [2.0, 2.5, 0.0, 0.0], 0.35)
    assert decisions(records) == "##.#"
    assert records[2].distance == pytest.approx(0.2, rel=1e-5)
    assert records[3].distance == 0.0


def test_rate_is_taken_between_computed_steps_whatever_lies_between() -> None:
    # Steps 1 and 3 are computed: the input moved by 0.2, the output by 0.1, so the rate is 0.5.
    records = fold([1.0, 1.1, 1.2, 1.3, 1.4], [2.0, 2.5, 9.0, 2.6, 0.0], 0.35)
    assert decisions(records) == "##.#."
    assert records[4].distance == pytest.approx(0.5 * 0.1 / 2.6, rel=1e-4)
