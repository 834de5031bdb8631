# SPDX-License-Identifier: Apache-2.0
"""What the guard forces, whatever the law says."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import fold, random_run
from settings import SETTINGS

from freewheel.policies import POLICIES, policy_class
from freewheel.policies.base import Decision, Mix, Mixed, Policy, hold
from freewheel.policies.decision_loop import DecisionLoop
from freewheel.policies.guard import Guarded, decide_inputs, decide_outputs
from freewheel.policies.setting import CacheSetting, GuardSetting
from freewheel.policies.spec import HistorySpec, PolicySpec, StateSpec


class Eager(Policy):
    """Wants to reuse everything; writes what the test asks into its mix and state."""

    spec = PolicySpec(
        name="eager",
        summary="reuses whatever it may",
        signals=["temb"],
        history=HistorySpec(maximum=2, depth=2),
        state={
            "level": StateSpec(initial=7.0),
            "count": StateSpec(dtype="int64", initial=3),
            "flag": StateSpec(dtype="bool", initial=1),
        },
    )
    level_at: ClassVar[dict[int, float]] = {}

    def decide(self, step, signal, feature, kept, state, parameters) -> Decision:
        t = int(step.step_index)
        level = torch.tensor(self.level_at.get(t, float(t)))
        state = {"level": level, "count": state["count"] + 1, "flag": torch.tensor(False)}
        return Decision(step.must_compute, state)


def holding_but(step_index: int, value: float) -> Mix:
    def law(step, signal, kept, state, parameters) -> Mixed:
        factor = value if int(step.step_index) == step_index else 1.0
        return Mixed(hold(step) * factor, {})

    return Mix(law=law, history=Eager.spec.history)


def computed(guard: GuardSetting, steps: int = 12, policy: Policy | None = None, signals=None):
    policy = policy or Eager()
    setting = CacheSetting(policy="eager", guard=guard)
    law = DecisionLoop(policy.spec, Guarded(policy), setting, step_count=steps)
    signals = np.ones((steps, 1, 4), np.float32) if signals is None else signals
    return [t for t in range(steps) if law.decide(signals[t]).compute], law


@pytest.mark.parametrize(
    ("guard", "expected"),
    [
        (GuardSetting(), [0]),
        (GuardSetting(first_exact=0), [0]),
        (GuardSetting(first_exact=4), [0, 1, 2, 3]),
        (GuardSetting(last_exact=2), [0, 10, 11]),
        (GuardSetting(max_consecutive=3), [0, 4, 8]),
        (GuardSetting(max_reused=2), [0, *range(3, 12)]),
        (GuardSetting(exact_steps=[3, 7]), [0, 3, 7]),
        (GuardSetting(max_consecutive=4, exact_steps=[3]), [0, 3, 8]),
        (GuardSetting(first_exact=99), list(range(12))),
        (GuardSetting(last_exact=99), list(range(12))),
    ],
)
def test_guard_computes_exactly_the_steps_it_must(guard: GuardSetting, expected: list[int]) -> None:
    assert computed(guard)[0] == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_signal_that_is_not_finite_computes(value: float) -> None:
    signals = np.ones((12, 3, 4), np.float32)
    signals[5, 2, 1] = value
    assert computed(GuardSetting(), signals=signals)[0] == [0, 5]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_mix_that_is_not_finite_computes_and_is_replaced(value: float) -> None:
    policy = Eager()
    policy.mix = holding_but(4, value)
    setting = CacheSetting(policy="eager")
    law = DecisionLoop(policy.spec, Guarded(policy), setting, step_count=6)
    records = [law.decide(np.ones((1, 4), np.float32)) for _ in range(6)]
    assert [r.compute for r in records] == [True, False, False, False, True, False]
    assert all(np.isfinite(r.mix).all() for r in records)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_state_that_is_not_finite_computes_and_starts_over(value: float) -> None:
    policy = Eager()
    policy.level_at = {4: value}
    guarded = Guarded(policy)
    law = DecisionLoop(policy.spec, guarded, CacheSetting(policy="eager"), step_count=6)
    decisions = []
    for t in range(5):
        decisions.append(law.decide(np.ones((1, 4), np.float32)).compute)
        state = {n: law._state[f"state.{n}"].item() for n in policy.spec.state}
        expected = (7.0, 3, True) if t == 4 else (float(t), 4 + t, False)
        assert tuple(state.values()) == expected
    assert decisions == [True, False, False, False, True]


def test_counters_follow_the_decisions() -> None:
    _, law = computed(GuardSetting(max_consecutive=3), steps=11)
    assert law._state["guard_state.consecutive"].item() == 2
    assert law._state["guard_state.reused"].item() == 8


guards = st.builds(
    GuardSetting,
    first_exact=st.integers(0, 6),
    last_exact=st.integers(0, 6),
    max_consecutive=st.integers(0, 4),
    max_reused=st.integers(0, 9),
    exact_steps=st.lists(st.integers(0, 30), max_size=3),
)


@settings(max_examples=80, deadline=None)
@given(
    guard=guards,
    name=st.sampled_from(list(SETTINGS)),
    seed=st.integers(0, 9),
    steps=st.integers(1, 24),
)
def test_every_policy_keeps_the_limits(
    guard: GuardSetting, name: str, seed: int, steps: int
) -> None:
    setting = SETTINGS[name].model_copy(update={"guard": guard})
    records = fold(DecisionLoop.eager(setting, step_count=steps), random_run(seed, steps))
    reused = [not r.compute for r in records]
    forced = [t for t in guard.exact_steps if t < steps]
    forced += range(min(guard.first_exact, steps))
    forced += range(max(steps - guard.last_exact, 0), steps)
    assert not reused[0]
    assert not any(reused[t] for t in forced)
    runs = "".join("r" if r else "c" for r in reused).split("c")
    if guard.max_consecutive:
        assert max(map(len, runs)) <= guard.max_consecutive
    if guard.max_reused:
        assert sum(reused) <= guard.max_reused


@pytest.mark.parametrize("name", POLICIES)
def test_guarded_takes_and_returns_what_is_declared(name: str) -> None:
    guarded = Guarded(policy_class(name)())
    sizes = {"rows": 2, "width": 4, "frames": 2, "tokens_per_frame": 3, "channels": 5}
    inputs = {
        n: torch.ones([sizes.get(d, d) for d in shape], dtype=getattr(torch, dtype))
        for n, (dtype, shape) in decide_inputs(guarded.spec).items()
    }
    outputs = guarded(inputs)
    declared = decide_outputs(guarded.spec)
    assert list(outputs) == list(declared)
    for output, (dtype, shape) in declared.items():
        assert outputs[output].dtype == getattr(torch, dtype), output
        assert tuple(outputs[output].shape) == shape, output
