# SPDX-License-Identifier: Apache-2.0
"""Every eager law takes the decisions, and reuses the residuals, of its NumPy transcription."""

from __future__ import annotations

import pytest
from runs import assert_equals_reference, fold, random_run
from settings import SETTINGS

from freewheel.policies import policy_class
from freewheel.policies.decision_loop import DecisionLoop


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("seed", range(6))
def test_law_equals_its_transcription_on_random_runs(name: str, seed: int) -> None:
    setting = SETTINGS[name]
    steps = [7, 20, 30, 50, 30, 30][seed]
    run = random_run(seed, steps, frames=1 + seed % 4, change=[0.02, 0.05, 0.1][seed % 3])
    records = fold(DecisionLoop.eager(setting, step_count=steps), run)
    parameters = policy_class(setting.policy).spec.resolve(setting.parameters)
    assert_equals_reference(records, setting, parameters, run)


@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "off"])
def test_table_of_settings_reaches_both_decisions(name: str) -> None:
    run = random_run(2, 30)
    decisions = {r.compute for r in fold(DecisionLoop.eager(SETTINGS[name], step_count=30), run)}
    assert decisions == {True, False}
