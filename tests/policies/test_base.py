# SPDX-License-Identifier: Apache-2.0
"""The contract's helper, and that every policy declares what it can keep."""

from __future__ import annotations

import pytest
from runs import step_at

from freewheel.policies import POLICIES, policy_class
from freewheel.policies.base import hold


def test_hold_repeats_the_newest_residual() -> None:
    assert hold(step_at(5, [4, 2], 3)).tolist() == [1, 0, 0]


@pytest.mark.parametrize("name", POLICIES)
def test_declarations_agree_with_themselves(name: str) -> None:
    spec = policy_class(name).spec
    assert spec.name == name
    assert spec.history.kept(spec.resolve({})) <= spec.history.maximum
    assert spec.distance is None or spec.distance in spec.state
    assert ("previous_signal" not in spec.kept) or spec.signals
    assert ("previous_feature" not in spec.kept) or spec.feature
    assert all(p.meaning for p in spec.parameters.values())
