# SPDX-License-Identifier: Apache-2.0
"""TaylorSeer's pattern and its choice of mix."""

from __future__ import annotations

import pytest

from freewheel.policies import policy_class
from freewheel.policies.decision_loop import DecisionLoop
from freewheel.policies.setting import CacheSetting, GuardSetting


def records(steps: int, guard: GuardSetting | None = None, **parameters: object):
    setting = CacheSetting(
        policy="taylorseer", parameters=parameters, guard=guard or GuardSetting()
    )
    law = DecisionLoop.eager(setting, step_count=steps)
    return [law.decide() for _ in range(steps)]


@pytest.mark.parametrize("interval", [1, 2, 4, 7])
def test_first_of_every_interval_is_computed(interval: int) -> None:
    decided = [r.compute for r in records(20, interval=interval)]
    assert decided == [t % interval == 0 for t in range(20)]


def test_defaults_are_one_in_four_of_order_1() -> None:
    assert [t for t, r in enumerate(records(10)) if r.compute] == [0, 4, 8]
    assert records(10)[7].mix == pytest.approx([1.75, -0.75, 0, 0, 0])


def test_exact_steps_come_on_top_of_the_pattern() -> None:
    decided = records(12, GuardSetting(first_exact=2, last_exact=1))
    assert [t for t, r in enumerate(decided) if r.compute] == [0, 1, 4, 8, 11]


def test_variants_differ_on_uneven_gaps_only_above_order_1() -> None:
    guard = GuardSetting(exact_steps=[1])
    for order, equal in ((1, True), (2, False)):
        taylor = records(8, guard, order=order, variant="taylor")[6].mix
        newton = records(8, guard, order=order, variant="newton")[6].mix
        assert (taylor == pytest.approx(newton)) is equal


def test_history_depth_follows_the_order() -> None:
    history = policy_class("taylorseer").spec.history
    assert [history.kept({"order": order}) for order in (1, 2, 3, 4)] == [2, 3, 4, 5]
