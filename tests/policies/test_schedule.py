# SPDX-License-Identifier: Apache-2.0
"""Schedules: noise levels that are given, and those of a flow model."""

from __future__ import annotations

import pytest

from freewheel.policies.schedule import Schedule


def test_noise_levels_are_a_flow_models_unless_given() -> None:
    assert Schedule.of([900, 100]).sigmas == (0.9, 0.1)
    assert Schedule.of([900, 100], [7, 2]) == Schedule((900.0, 100.0), (7.0, 2.0))


def test_even_schedule_falls_from_one_and_never_reaches_zero() -> None:
    assert Schedule.even(4) == Schedule((1000.0, 750.0, 500.0, 250.0), (1.0, 0.75, 0.5, 0.25))
    assert len(Schedule.even(7)) == 7


def test_one_noise_level_per_step() -> None:
    with pytest.raises(AssertionError, match="one noise level per step"):
        Schedule.of([900, 100], [1])
