# SPDX-License-Identifier: Apache-2.0
"""SenCache's decisions, one behaviour at a time."""

from __future__ import annotations

import numpy as np
import pytest

from freewheel.policies.decision_loop import DecisionLoop, DecisionRecord
from freewheel.policies.schedule import Schedule
from freewheel.policies.setting import CacheSetting


def fold(
    latents: list[float], schedule: list[float], /, **parameters: object
) -> list[DecisionRecord]:
    given = {"early": 0.0, "latent_sensitivity": [1.0], "timestep_sensitivity": [0.0], **parameters}
    setting = CacheSetting(policy="sencache", parameters=given)
    law = DecisionLoop.eager(setting, step_count=len(latents), schedule=Schedule.of(schedule))
    return [law.decide(np.full((2, 3), value, np.float32)) for value in latents]


def decisions(records: list[DecisionRecord]) -> str:
    return "".join("#" if r.compute else "." for r in records)


def test_latents_are_compared_with_those_of_the_last_computed_step() -> None:
    found = fold([1.0, 1.1, 1.2, 1.3], [900, 800, 700, 600], threshold=0.25)
    assert decisions(found) == "#..#"
    assert [r.distance for r in found] == pytest.approx([0, 0.1, 0.2, 0])


def test_timesteps_count_by_their_distance_and_not_by_their_number() -> None:
    parameters = {"timestep_sensitivity": [0.001], "threshold": 0.25}
    assert decisions(fold([1.0] * 4, [900, 800, 700, 600], **parameters)) == "#..#"
    assert decisions(fold([1.0] * 4, [900, 600, 550, 500], **parameters)) == "##.."


def test_tables_are_read_where_the_last_computed_step_was() -> None:
    tables = {"timesteps": [900.0, 500.0], "latent_sensitivity": [1.0, 3.0], "threshold": 0.25}
    # From 880 on a tenth counts once, from 550 on three times.
    assert decisions(fold([1.0, 1.1, 1.2], [880, 500, 450], **tables)) == "#.."
    assert decisions(fold([1.0, 1.1, 1.2], [550, 500, 450], **tables)) == "###"


def test_start_of_the_run_is_stricter_and_never_laxer() -> None:
    latents, timesteps = [1.0 + 0.1 * t for t in range(6)], [900.0 - 100 * t for t in range(6)]
    strict = {"early": 0.5, "early_threshold": 0.05, "threshold": 0.25}
    assert decisions(fold(latents, timesteps, **strict)) == "###..#"
    lax = {"early": 0.5, "early_threshold": 9.0, "threshold": 0.25}
    assert decisions(fold(latents, timesteps, **lax)) == "#..#.."


def test_reuses_in_a_row_are_limited() -> None:
    found = fold([1.0] * 7, [900.0 - t for t in range(7)], max_skip=2)
    assert decisions(found) == "#..#..#"


def test_threshold_0_never_reuses() -> None:
    assert decisions(fold([1.0] * 3, [900, 800, 700], threshold=0.0, early=1.0)) == "###"
