# SPDX-License-Identifier: Apache-2.0
"""Spectrum's schedule is its authors', its fit NumPy's in each of the three times."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy_forecasts import Spectrum
from numpy_reference import Guard
from runs import assert_equals_law, fold, random_run, step_at

from freewheel.policies import policy_class
from freewheel.policies.decision_loop import DecisionLoop, DecisionRecord
from freewheel.policies.schedule import Schedule
from freewheel.policies.setting import CacheSetting
from freewheel.policies.spectrum import CLOCKS, DEGREE, chebyshev_mix


def records(steps: int, **parameters: object) -> list[DecisionRecord]:
    law = DecisionLoop.eager(
        CacheSetting(policy="spectrum", parameters=parameters), step_count=steps
    )
    return [law.decide() for _ in range(steps)]


@pytest.mark.parametrize(("growth", "passes"), [(0.75, 14), (3.0, 10)])
def test_as_many_of_50_steps_are_computed_as_the_authors_say(growth: float, passes: int) -> None:
    """Their README: 14 network passes at a window of 2 that grows by 0.75, 10 at one by 3."""
    assert sum(r.compute for r in records(50, growth=growth)) == passes


def test_window_grows_with_each_computed_step_after_the_warm_up() -> None:
    computed = [t for t, r in enumerate(records(30, warmup=2, growth=1.0)) if r.compute]
    assert computed == [0, 1, 3, 6, 10, 15, 21, 28]


def test_tenths_add_up_to_whole_numbers() -> None:
    # 2 + 10 · 0.1 is below 3 in float32, and the 11th interval is 3 steps all the same.
    computed = [t for t, r in enumerate(records(40, warmup=1, growth=0.1)) if r.compute]
    assert np.diff(computed).tolist() == [2] * 10 + [3] * (len(computed) - 11)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("seed", range(3))
def test_fit_follows_the_samplers_time_where_it_is_asked_to(clock: str, seed: int) -> None:
    run, steps = random_run(seed, 30), 30
    even = 1 - np.arange(steps) / steps
    sigmas = 3 * even / (1 + 2 * even)  # shifted towards noise, as samplers are; 1 at step 0
    setting = CacheSetting(policy="spectrum", parameters={"clock": clock, "warmup": 3})
    schedule = Schedule.of(1000 * sigmas, sigmas)
    found = fold(DecisionLoop.eager(setting, step_count=steps, schedule=schedule), run)
    spec = policy_class("spectrum").spec
    resolved = spec.resolve(setting.parameters)
    law = Spectrum(**resolved, step_count=steps, sigmas=sigmas)
    assert_equals_law(found, spec, law, Guard(), run)
    others = {
        c: Spectrum(**{**resolved, "clock": c}, step_count=steps, sigmas=sigmas) for c in CLOCKS
    }
    for other in set(CLOCKS) - {clock}:
        with pytest.raises(AssertionError):
            assert_equals_law(found, spec, others[other], Guard(), run)


def test_polynomials_of_the_degree_are_met_where_the_pull_is_small() -> None:
    at = step_at(58, [50, 40, 30, 20, 10, 0], 8)
    mix = chebyshev_mix(at, torch.tensor(2), torch.tensor(1e-4), torch.tensor(0)).numpy()
    for power in range(3):
        past = np.array([*((np.array([50, 40, 30, 20, 10, 0]) / 100) ** power), 0, 0])
        assert mix @ past == pytest.approx(0.58**power, abs=2e-3)


def test_degrees_above_the_asked_one_take_no_part() -> None:
    at, clock = step_at(58, [50, 40, 30], 8), torch.tensor(0)
    constant = chebyshev_mix(at, torch.tensor(0), torch.tensor(0.5), clock).tolist()
    assert constant == pytest.approx([1 / 3.5] * 3 + [0] * 5)
    highest = chebyshev_mix(at, torch.tensor(DEGREE), torch.tensor(0.5), clock).tolist()
    assert highest[:3] != pytest.approx(constant[:3])
