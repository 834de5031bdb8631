# SPDX-License-Identifier: Apache-2.0
"""Off never reuses."""

from __future__ import annotations

from freewheel.policies import policy_class
from freewheel.policies.decision_loop import DecisionLoop
from freewheel.policies.setting import CacheSetting


def test_off_computes_every_step_and_keeps_nothing() -> None:
    law = DecisionLoop.eager(CacheSetting(), step_count=9)
    records = [law.decide() for _ in range(9)]
    assert all(r.compute for r in records)
    assert policy_class("off").spec.history.kept({}) == 0
