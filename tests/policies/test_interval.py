# SPDX-License-Identifier: Apache-2.0
"""One step in so many: which are computed, and that all forecasts of the steps between share it."""

from __future__ import annotations

import pytest

from freewheel.policies import policies, policy_class
from freewheel.policies.decision_loop import DecisionLoop
from freewheel.policies.interval import INTERVAL, Interval
from freewheel.policies.setting import CacheSetting, GuardSetting

NAMES = [n for n, p in policies().items() if issubclass(p, Interval)]


def test_there_are_several() -> None:
    assert {"taylorseer", "hermite", "foca", "dmd"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_first_of_every_interval_is_computed(name: str) -> None:
    setting = CacheSetting(
        policy=name, parameters={"interval": 3}, guard=GuardSetting(exact_steps=[4])
    )
    law = DecisionLoop.eager(setting, step_count=10)
    gram = [[0.0] * law.spec.history.maximum] * law.spec.history.maximum
    computed = [t for t in range(10) if law.decide(gram=gram).compute]
    assert computed == [0, 3, 4, 6, 9], "counted from step 0, whatever else is computed"
    assert policy_class(name).spec.parameters["interval"] is INTERVAL
