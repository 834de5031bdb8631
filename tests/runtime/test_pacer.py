# SPDX-License-Identifier: Apache-2.0
"""Deadlines by a feigned clock: the budget follows the seconds that steps take, and is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from freewheel.bundle.reader import Bundle
from freewheel.core.errors import ConfigError
from freewheel.policies.deadline import NO_DEADLINE, Pace
from freewheel.policies.decision_loop import DecisionLoop
from freewheel.policies.setting import CacheSetting
from freewheel.policies.solved import SolvedConfig
from freewheel.runtime.model import Model
from freewheel.runtime.pacer import Pacer
from freewheel.runtime.session import Session

STEPS = 20


def spread(count: int, steps: int = STEPS) -> list[int]:
    """Return so many computed steps, dense at first and then ever wider apart."""
    found = sorted({round((steps - 1) * (i / max(count - 1, 1)) ** 1.5) for i in range(count)})
    free = (s for s in range(steps) if s not in found)
    return sorted([*found, *(next(free) for _ in range(count - len(found)))])


def frontier(steps: int = STEPS, fewest: int = 4) -> CacheSetting:
    """Return schedules of every number of computed steps, which hold."""
    counts = range(fewest, steps + 1)
    schedules = [{"computed": spread(c, steps), "mix": [[1.0]] * (steps - c)} for c in counts]
    return SolvedConfig.model_validate({"infer_steps": steps, "schedules": schedules}).setting()


FRONTIER = frontier()


def drive(
    deadline: float | None, cost: Callable[[int, bool], float], pacer: Pacer | None = None
) -> tuple[list[bool], list[float]]:
    """Run a law by a feigned clock; return what it computed, and the seconds of each step."""
    pacer = pacer or Pacer()
    now = 100.0
    pacer.begin(deadline, now)
    law, computed, seconds = DecisionLoop.eager(FRONTIER, step_count=STEPS), [], []
    for step in range(STEPS):
        record = law.decide(pace=pacer.begin_step(now))
        pacer.note(record.compute)
        computed.append(record.compute)
        seconds.append(cost(step, record.compute))
        now += seconds[-1]
    return computed, seconds


def steady(step: int, computed: bool) -> float:
    return 1.0 if computed else 0.1


def test_without_a_deadline_nothing_is_hurried() -> None:
    pacer = Pacer()
    pacer.begin(None, 0.0)
    assert pacer.begin_step(0.0) == Pace(NO_DEADLINE, 0.0, 0.0)
    computed, _ = drive(None, steady)
    assert sum(computed) == STEPS


@pytest.mark.parametrize(("deadline", "most"), [(25.0, 20), (15.0, 14), (9.0, 7), (5.7, 4)])
def test_steady_steps_fill_their_deadline(deadline: float, most: int) -> None:
    computed, seconds = drive(deadline, steady)
    assert sum(seconds) <= deadline
    assert most - 1 <= sum(computed) <= most, "what an oracle of the seconds would compute"


def test_a_second_run_knows_the_seconds_from_its_first_step() -> None:
    pacer = Pacer()
    drive(9.0, steady, pacer)
    computed, seconds = drive(9.0, steady, pacer)
    assert [s for s, c in enumerate(computed) if c] == spread(7)
    assert sum(seconds) <= 9.0


def test_steps_that_turn_slower_are_fewer_and_faster_ones_more() -> None:
    usual, _ = drive(12.0, steady)
    slow, seconds = drive(12.0, lambda t, c: steady(t, c) * (2.0 if t >= 5 else 1.0))
    fast, _ = drive(12.0, lambda t, c: steady(t, c) * (0.5 if t >= 5 else 1.0))
    assert sum(slow) < sum(usual) < sum(fast)
    assert sum(seconds) <= 12.0 + 2.0


def test_a_deadline_that_nothing_keeps_computes_least() -> None:
    computed, seconds = drive(0.5, steady)
    assert sum(seconds) > 0.5
    assert sum(computed) <= 5


def test_a_late_machine_whose_reused_steps_took_longer_computes_least() -> None:
    def busy(step: int, computed: bool) -> float:
        return 0.1 if computed else 1.0

    pacer = Pacer()
    drive(25.0, busy, pacer)
    computed, _ = drive(0.5, busy, pacer)
    assert sum(computed) == 4


def test_seconds_are_kept_per_branch() -> None:
    pacer = Pacer()
    pacer.begin(100.0, 0.0)
    pacer.begin_step(0.0)
    pacer.note(True)
    assert pacer.begin_step(1.0).computed_seconds == 1.0
    pacer.begin(100.0, 1.0)
    pacer.begin_step(1.0)
    pacer.note(True)
    pacer.note(True)
    assert pacer.begin_step(3.0).computed_seconds == 2.0, "two branches, as the run before had one"


@given(
    noise=st.lists(st.floats(0.8, 1.25), min_size=STEPS, max_size=STEPS),
    pace=st.floats(0.7, 1.4),
    turn=st.integers(1, STEPS),
    deadline=st.floats(8.0, 25.0),
)
def test_a_deadline_is_missed_by_one_step_at_most(
    noise: list[float], pace: float, turn: int, deadline: float
) -> None:
    def cost(step: int, computed: bool) -> float:
        return steady(step, computed) * noise[step] * (pace if step >= turn else 1.0)

    _, seconds = drive(deadline, cost)
    assert sum(seconds) <= deadline + max(seconds)


def run(session: Session, deadline: float | None, clock: list[float], slow_from: int) -> list[bool]:
    """Run both branches of every step, each of which a feigned clock takes a second for."""
    setting = FRONTIER.model_copy(update={"deadline": deadline})
    session.begin(torch.linspace(990, 10, STEPS), setting)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 3, 4, 6, generator=generator)
    for branch in ("cond", "uncond"):
        session.set_prompt(branch, {"text_states": torch.randn(1, 5, 24, generator=generator)})
    for step in range(STEPS):
        for branch in ("cond", "uncond"):
            session.step(branch, step, {"latents": latents})
            computed = session.statistics.branches[branch].computed[step]
            clock[0] += (1.0 if computed else 0.1) * (2.0 if step >= slow_from else 1.0)
    branches = session.statistics.branches
    assert branches["cond"].computed == branches["uncond"].computed, "one clock reading a step"
    return [bool(c) for c in branches["cond"].computed]


def test_a_session_keeps_its_deadline_by_its_clock(tiny_bundle: Bundle) -> None:
    clock = [7.0]
    session = Session(Model(tiny_bundle, "onnxruntime"), clock=lambda: clock[0])
    free = run(session, None, clock, STEPS)
    assert sum(free) == STEPS
    assert session.statistics.folded
    began = clock[0]
    kept = run(session, 20.0, clock, STEPS)
    assert clock[0] - began <= 20.0
    assert 7 <= sum(kept) < STEPS
    assert not session.statistics.folded
    assert session.statistics.deadline == 20.0
    assert session.statistics.warnings({}) == []
    began = clock[0]
    slow = run(session, 20.0, clock, 4)
    assert sum(slow) < sum(kept)
    assert clock[0] - began <= 20.0 + 4.0
    run(session, 1.0, clock, STEPS)
    assert "deadline was 1 s" in session.statistics.warnings({})[0]


def test_policies_that_can_not_keep_a_deadline_refuse_it(tiny_bundle: Bundle) -> None:
    session = Session(Model(tiny_bundle, "onnxruntime"))
    with pytest.raises(ConfigError, match=r"deadline of policy 'teacache': can't be kept.*solved"):
        session.begin(torch.tensor([900.0]), CacheSetting(policy="teacache", deadline=20.0))
