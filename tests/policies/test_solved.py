# SPDX-License-Identifier: Apache-2.0
"""Solved: a schedule of several is followed exactly, and stretched to runs of other lengths."""

from __future__ import annotations

import pytest
import torch
from settings import solved_tables

from freewheel.core.errors import ConfigError
from freewheel.policies.decision_loop import DecisionLoop, DecisionRecord
from freewheel.policies.overrides import apply_overrides
from freewheel.policies.schedule import Schedule
from freewheel.policies.setting import CacheSetting, GuardSetting
from freewheel.policies.solved import HISTORY, Solved, between

TABLES = solved_tables(
    6,
    {
        (0, 2): ([0.9], [1.2, -0.2], [1.3, -0.3], [1.4, -0.4]),
        (0, 1, 3): ([1.5, -0.5], [1.6, -0.7, 0.1], [1.8, -0.8]),
    },
)
HOLD = [1] + [0] * (HISTORY - 1)


def padded(*factors: float) -> object:
    return pytest.approx([*factors, *[0] * (HISTORY - len(factors))], abs=1e-6)


def run(steps: int, given: dict[str, object], **guard: object) -> list[DecisionRecord]:
    setting = CacheSetting(policy="solved", parameters=given, guard=GuardSetting(**guard))
    law = DecisionLoop.eager(setting, step_count=steps)
    return [law.decide() for _ in range(steps)]


def marks(records: list[DecisionRecord]) -> str:
    return "".join("#" if r.compute else "." for r in records)


def test_the_schedule_of_the_computed_steps_is_followed_exactly() -> None:
    records = run(6, TABLES)
    assert marks(records) == "##.#.."
    assert records[2].mix == padded(1.5, -0.5)
    assert records[4].mix == padded(1.6, -0.7, 0.1)
    assert records[5].mix == padded(1.8, -0.8)


def test_another_schedule_of_the_same_tables_is_one_override_away() -> None:
    setting = CacheSetting(policy="solved", parameters=TABLES)
    fewer = apply_overrides(setting, {"computed_steps": "2"}, Solved.spec)
    records = run(6, fewer.parameters)
    assert marks(records) == "#.#..."
    assert [r.mix for r in records if not r.compute] == [
        padded(0.9),
        padded(1.2, -0.2),
        padded(1.3, -0.3),
        padded(1.4, -0.4),
    ]


def test_computed_steps_that_no_schedule_has_are_refused_by_name() -> None:
    message = "parameter 'computed_steps': 4 is none of 'budgets'; give one of 2, 3"
    with pytest.raises(ConfigError, match=message):
        DecisionLoop.eager(
            CacheSetting(policy="solved", parameters={**TABLES, "computed_steps": 4}), step_count=6
        )


@pytest.mark.parametrize(("steps", "expected"), [(12, "#.#...#....."), (3, "###"), (24, 24)])
def test_another_number_of_steps_stretches_them(steps: int, expected: object) -> None:
    found = marks(run(steps, TABLES))
    if isinstance(expected, str):
        assert found == expected
    else:
        assert len(found) == steps
        assert found.count("#") == 3


@pytest.mark.parametrize(
    ("length", "expected"), [(6, "##.#.."), (4, "##.."), (2, "#."), (8, "#.#.....")]
)
def test_a_run_that_begins_in_their_midst_begins_there_in_the_schedules(
    length: int, expected: str
) -> None:
    """The last steps of 6, or the last 4 of these in 8."""
    begin, stretch = (6 - length, 1) if length <= 6 else (2, 2)
    levels = [1 - step / 6 for step in range(6)]
    schedule = Schedule.of(1000 * (1 - begin / 6 - i / (6 * stretch)) for i in range(length))
    setting = CacheSetting(policy="solved", parameters={**TABLES, "sigmas": levels})
    law = DecisionLoop.eager(setting, step_count=length, schedule=schedule)
    records = [law.decide() for _ in range(length)]
    assert marks(records) == expected
    assert records[-1].mix == (padded(1.8, -0.8) if length > 2 else padded(1.0))
    if length == 4:
        # Steps 3, 1 and 0 are meant; 3 and 2 are held.
        assert records[2].mix == padded(1.6, -0.7 + 0.1)


def test_without_noise_levels_every_run_begins_at_the_first_step() -> None:
    schedule = Schedule.of(500.0 - 500 * step / 6 for step in range(6))
    law = DecisionLoop.eager(
        CacheSetting(policy="solved", parameters=TABLES), step_count=6, schedule=schedule
    )
    assert marks([law.decide() for _ in range(6)]) == "##.#.."


def test_a_factor_goes_to_the_residual_of_its_step_where_the_guard_computed_more() -> None:
    # Steps 3, 1 and 0 are meant; 3, 2 and 1 are held.
    assert run(6, TABLES, exact_steps=[2])[4].mix == padded(1.6, 0.0, -0.7 + 0.1)
    # Of 12, steps 6, 2 and 0 are meant; 6, 5 and 2 are held.
    stretched = run(12, TABLES, exact_steps=[5])
    assert marks(stretched) == "#.#..##....."
    assert stretched[8].mix == padded(1.6, 0.0, -0.7 + 0.1)


def test_a_residual_that_is_not_held_is_shared_by_the_two_around_it() -> None:
    meant, held = torch.tensor([9.0, 7.0, 5.0, 2.0]), torch.tensor([8, 4, 3, -1])
    shares = [[1, 0, 0, 0], [0.75, 0.25, 0, 0], [0.25, 0.75, 0, 0], [0, 0, 1, 0]]
    assert torch.equal(between(meant, held), torch.tensor(shares))


def test_a_mix_of_more_residuals_than_were_computed_holds_the_newest() -> None:
    wrong = solved_tables(3, {(0,): ([1.0], [1.4, -0.4])})
    assert run(3, wrong)[2].mix == HOLD


@pytest.mark.parametrize("steps", [1, 7, 200])
def test_without_tables_every_step_is_computed(steps: int) -> None:
    assert marks(run(steps, {})) == "#" * steps
