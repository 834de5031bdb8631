# SPDX-License-Identifier: Apache-2.0
"""What a decide graph is told of time, and what it does with it."""

from __future__ import annotations

import numpy as np
import pytest
from settings import solved_tables

from freewheel.policies import policy_class, sound_policies
from freewheel.policies.deadline import NO_DEADLINE, Pace
from freewheel.policies.decision_loop import DecisionLoop
from freewheel.policies.guard import decide_inputs
from freewheel.policies.schedule import Schedule
from freewheel.policies.setting import CacheSetting

TABLES = solved_tables(
    8,
    {
        (0, 4): [[1.0]] * 6,
        (0, 2, 5): [[1.0]] * 5,
        (0, 1, 3, 6): [[1.0]] * 4,
        (0, 1, 2, 4, 6): [[1.0]] * 3,
        (0, 1, 2, 3, 4, 5, 6, 7): [],
    },
)


def law() -> DecisionLoop:
    return DecisionLoop.eager(CacheSetting(policy="solved", parameters=TABLES), step_count=8)


def test_every_decide_graph_may_take_them_by_these_names() -> None:
    for found in sound_policies().values():
        assert set(Pace._fields) <= set(decide_inputs(found.spec))
    assert np.isfinite(np.float32(NO_DEADLINE))
    assert policy_class("solved").spec.state.keys() == {"first", "schedule", "taken"}


@pytest.mark.parametrize(
    ("left", "computed"), [(100.0, 8), (8.0, 8), (7.9, 7), (4.6, 4), (3.5, 3), (2.6, 2), (0.1, 2)]
)
def test_the_most_computed_steps_that_fit_are_taken(left: float, computed: int) -> None:
    asked, found = law(), []
    for step in range(8):
        taken = sum(1.0 if c else 0.1 for c in found)
        found.append(asked.decide(pace=Pace(left - taken + 1e-4, 1.0, 0.1)).compute)
        assert step or found[0]
    assert sum(found) == computed


@pytest.mark.parametrize(("left", "computed"), [(100.0, 4), (2.3, 2), (1.4, 1)])
def test_a_run_that_begins_in_the_midst_has_time_for_the_steps_from_there_on(
    left: float, computed: int
) -> None:
    setting = CacheSetting(
        policy="solved", parameters={**TABLES, "sigmas": [1 - step / 8 for step in range(8)]}
    )
    rest = Schedule.of(500.0 - 125.0 * step for step in range(4))
    asked, found = DecisionLoop.eager(setting, step_count=4, schedule=rest), []
    for _ in range(4):
        taken = sum(1.0 if c else 0.1 for c in found)
        found.append(asked.decide(pace=Pace(left - taken + 1e-4, 1.0, 0.1)).compute)
    assert sum(found) == computed


def test_of_schedules_with_as_much_to_compute_the_likest_is_taken() -> None:
    asked = law()
    for _ in range(4):  # as the last one, which computes all
        assert asked.decide(pace=Pace(100.0, 1.0, 0.1)).compute
    # Two more fit: (0, 1, 2, 4, 6) has 4 and 6 to come; it has computed 0, 1 and 2 of 0 to 3.
    left = Pace(2.2 + 1e-4, 1.0, 0.1)
    assert [asked.decide(pace=left).compute for _ in range(1)] == [True]


def test_a_schedule_that_still_fits_is_kept_until_a_step_was_computed() -> None:
    asked = law()
    assert asked.decide(pace=Pace(2.6, 1.0, 0.1)).compute
    assert not asked.decide(pace=Pace(1.6, 1.0, 0.1)).compute
    # Time for all of them, seen while a step was reused: nothing changes before the next computed.
    assert [asked.decide(pace=Pace(50.0, 1.0, 0.1)).compute for _ in range(3)] == [
        False,
        False,
        True,
    ]
    assert all(asked.decide(pace=Pace(50.0, 1.0, 0.1)).compute for _ in range(3))
