# SPDX-License-Identifier: Apache-2.0
"""DiCache's decisions and mixes, one behaviour at a time."""

from __future__ import annotations

import numpy as np
import pytest

from freewheel.policies.decision_loop import DecisionLoop, DecisionRecord
from freewheel.policies.setting import CacheSetting, GuardSetting

EVERY = 1e9


def run(
    values: list[list[float]], exact: list[int] | None = None, /, **parameters: object
) -> list[DecisionRecord]:
    """Decide over probes of two elements; all steps but the exact ones may be reused by default."""
    given = {"threshold": EVERY, "retention": 0.0, **parameters}
    guard = GuardSetting(exact_steps=exact or [])
    setting = CacheSetting(policy="dicache", parameters=given, guard=guard)
    law = DecisionLoop.eager(setting, step_count=len(values))
    return [law.decide(np.array([value], np.float32)) for value in values]


def decisions(records: list[DecisionRecord]) -> str:
    return "".join("#" if r.compute else "." for r in records)


def test_changes_from_step_to_step_add_up() -> None:
    values = [[1.0, 1.0], [1.1, 1.1], [1.21, 1.21], [1.331, 1.331], [1.331, 1.331], [1.4, 1.4]]
    records = run(values, threshold=0.25)
    assert decisions(records) == "#..#.#"
    assert [r.distance for r in records] == pytest.approx([0, 0.1, 0.2, 0, 0, 0], abs=1e-6)


def test_start_and_last_step_are_computed() -> None:
    assert decisions(run([[1.0, 1.0]] * 10, retention=0.3)) == "####.....#"


def test_threshold_0_never_reuses() -> None:
    assert decisions(run([[1.0, 1.0]] * 4, threshold=0.0)) == "####"


def test_gain_is_how_far_the_probe_has_gone() -> None:
    # From the computed step 0 to the computed step 1 the probe goes by 1, then on to 1.2 and 1.4.
    records = run([[1, 1], [2, 2], [2.2, 2.2], [2.4, 2.4], [9, 9]], [1])
    assert decisions(records) == "##..#"
    np.testing.assert_allclose(records[2].mix, [1.2, -0.2], rtol=1e-5)
    np.testing.assert_allclose(records[3].mix, [1.4, -0.4], rtol=1e-5)


@pytest.mark.parametrize(("farthest", "expected"), [(1.5, 1.5), (3.0, 3.0), (1.0, 1.0), (9.0, 8.0)])
def test_gain_is_bounded(farthest: float, expected: float) -> None:
    records = run([[1, 1], [2, 2], [9, 9], [9, 9]], [1], farthest_gain=farthest)
    np.testing.assert_allclose(records[2].mix, [expected, 1 - expected], rtol=1e-5)
    # A probe that turns back holds.
    records = run([[1, 1], [2, 2], [1.5, 1.5], [9, 9]], [1], farthest_gain=farthest)
    assert records[2].mix == [1, 0]


def test_projection_counts_the_way_alone() -> None:
    sideways = [[1, 1], [2, 1], [2.2, 2.0], [9, 9]]
    far = run(sideways, [1], farthest_gain=5.0)[2].mix
    along = run(sideways, [1], farthest_gain=5.0, measure="projection")[2].mix
    np.testing.assert_allclose(far, [2.2, -1.2], rtol=1e-5)
    np.testing.assert_allclose(along, [1.2, -0.2], rtol=1e-5)


def test_holds_with_one_residual_and_where_the_probe_stood() -> None:
    assert run([[1, 1], [3, 3], [9, 9]])[1].mix == [1, 0]
    assert run([[2, 2], [2, 2], [3, 3], [9, 9]], [1])[2].mix == [1, 0]


def test_ways_are_between_the_last_two_computed_steps() -> None:
    # Computed at 0, 2, 3: the way is from 4 to 5, whatever lay before.
    records = run([[1, 1], [2, 2], [4, 4], [5, 5], [5.5, 5.5], [9, 9]], [2, 3], farthest_gain=2.0)
    assert decisions(records) == "#.##.#"
    np.testing.assert_allclose(records[4].mix, [1.5, -0.5], rtol=1e-5)
