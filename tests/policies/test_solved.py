# SPDX-License-Identifier: Apache-2.0
"""Solved: tables are followed exactly, and stretched to runs of other lengths."""

from __future__ import annotations

import pytest

from freewheel.policies.law import DecisionRecord, Law
from freewheel.policies.setting import CacheSetting, GuardSetting
from freewheel.policies.solved import HISTORY

REUSE = [0, 0, 1, 0, 1, 1]
ROWS = ([1], [1], [1.5, -0.5], [1], [1.6, -0.7, 0.1], [1.8, -0.8])
MIX = [factor for row in ROWS for factor in (*row, *[0] * (HISTORY - len(row)))]
HOLD = [1] + [0] * (HISTORY - 1)


def run(steps: int, **guard: object) -> list[DecisionRecord]:
    parameters = {"steps": 6, "reuse": REUSE, "mix": MIX}
    setting = CacheSetting(policy="solved", parameters=parameters, guard=GuardSetting(**guard))
    law = Law.eager(setting, step_count=steps)
    return [law.decide() for _ in range(steps)]


def marks(records: list[DecisionRecord]) -> str:
    return "".join("#" if r.compute else "." for r in records)


def test_tables_are_followed_exactly() -> None:
    records = run(6)
    assert marks(records) == "##.#.."
    assert records[2].mix == [1.5, -0.5, 0, 0, 0, 0]
    assert records[4].mix == pytest.approx([1.6, -0.7, 0.1, 0, 0, 0])


@pytest.mark.parametrize(("steps", "expected"), [(12, "#.#...#....."), (3, "###"), (24, 24)])
def test_another_number_of_steps_stretches_them(steps: int, expected: object) -> None:
    found = marks(run(steps))
    if isinstance(expected, str):
        assert found == expected
    else:
        assert len(found) == steps
        assert found.count("#") == 3


def test_a_mix_of_residuals_that_are_not_there_holds_the_newest() -> None:
    parameters = {"steps": 6, "reuse": [0, 1, 1, 1, 1, 1], "mix": MIX}
    law = Law.eager(CacheSetting(policy="solved", parameters=parameters), step_count=6)
    records = [law.decide() for _ in range(6)]
    assert marks(records) == "#....."
    assert records[2].mix == HOLD


def test_a_row_of_zeros_holds() -> None:
    setting = CacheSetting(policy="solved", parameters={"steps": 3, "reuse": [0, 1, 1]})
    law = Law.eager(setting, step_count=3)
    assert [law.decide().mix for _ in range(3)][1:] == [HOLD] * 2


@pytest.mark.parametrize("steps", [1, 7, 200])
def test_without_tables_every_step_is_computed(steps: int) -> None:
    law = Law.eager(CacheSetting(policy="solved"), step_count=steps)
    assert marks([law.decide() for _ in range(steps)]) == "#" * steps
