# SPDX-License-Identifier: Apache-2.0
"""MagCache's decisions, one behaviour at a time."""

from __future__ import annotations

from freewheel.policies.decision_loop import DecisionLoop
from freewheel.policies.setting import CacheSetting


def decisions(steps: int, **parameters: object) -> str:
    given = {"steps": 10, "retention": 0.0, **parameters}
    law = DecisionLoop.eager(CacheSetting(policy="magcache", parameters=given), step_count=steps)
    return "".join("#" if law.decide().compute else "." for _ in range(steps))


def test_threshold_0_never_reuses_even_where_nothing_changes() -> None:
    assert decisions(10, ratios=[1.0], threshold=0.0) == "#" * 10


def test_reuses_in_a_row_are_limited() -> None:
    assert decisions(10, ratios=[1.0], max_skip=2) == "#..#..#..#"


def test_error_adds_up_over_the_product_of_ratios() -> None:
    # |1 - 0.9| = 0.1, then |1 - 0.81| = 0.19: 0.29 in all.
    assert decisions(6, ratios=[0.9], threshold=0.28) == "#.#.#."
    assert decisions(6, ratios=[0.9], threshold=0.30) == "#..#.."


def test_start_of_the_run_is_retained() -> None:
    assert decisions(10, ratios=[1.0], retention=0.35, max_skip=9) == "####......"[:3] + "......."


def test_table_of_another_length_is_read_at_the_nearest_step() -> None:
    jump = [1.0] * 5 + [0.1] + [1.0] * 4
    assert decisions(10, ratios=jump, max_skip=99) == "#....#...."
    assert decisions(19, ratios=jump, max_skip=99).index("#", 1) in (10, 11)
