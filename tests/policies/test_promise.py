# SPDX-License-Identifier: Apache-2.0
"""Bounds on quality: which number of computed steps keeps one, and how many runs it holds for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from freewheel.core.errors import ConfigError
from freewheel.policies import policy_class
from freewheel.policies.overrides import apply_overrides
from freewheel.policies.promise import COVERAGE, FEWEST_RUNS, Promise, chosen_budget, promised_psnr
from freewheel.policies.setting import CacheSetting
from freewheel.policies.solved import Solved, SolvedConfig

BUDGETS = [5, 8, 12]


def test_of_nine_runs_the_worst_is_promised_and_of_nineteen_the_second_worst() -> None:
    for runs, place in ((9, 0), (18, 0), (19, 1), (40, 3)):
        scores = np.random.default_rng(0).permutation(np.arange(30.0, 30.0 + runs))
        assert promised_psnr([list(scores)]) == [30.0 + place]
    assert FEWEST_RUNS == 9


def test_a_run_keeps_a_bound_from_where_all_greater_numbers_keep_it() -> None:
    rising, falling = [30.0] * 9, [29.0] * 9
    assert promised_psnr([rising, falling, [50.0] * 9]) == [29.0, 29.0, 50.0]


def test_runs_like_those_measured_keep_their_bound_as_often_as_stated() -> None:
    random = np.random.default_rng(1)

    def runs(count: int) -> np.ndarray:
        return (
            30
            + random.normal(0, 4, count)
            + np.arange(12)[:, None]
            + random.normal(0, 1, (12, count))
        )

    kept, asked = 0, 0
    for _ in range(400):
        promise = promised_psnr(runs(20).tolist())
        chosen = next((i for i, psnr in enumerate(promise) if psnr >= 33.0), 11)
        new = runs(50)[chosen]
        kept, asked = kept + int((new >= 33.0).sum()), asked + 50
    assert COVERAGE - 0.02 <= kept / asked <= COVERAGE + 0.06


def test_the_fewest_computed_steps_that_keep_the_bound_are_taken() -> None:
    promise = Promise(runs=20, psnr=[31.0, 40.0, 55.0])
    assert [chosen_budget(promise, BUDGETS, b) for b in (30, 31, 31.1, 55)] == [5, 5, 8, 12]
    with pytest.raises(
        ConfigError, match=r"min_psnr 56: is kept by no number.*90 of 100.*55\.0 dB"
    ):
        chosen_budget(promise, BUDGETS, 56)
    with pytest.raises(ConfigError, match="--hold-out 20"):
        chosen_budget(None, BUDGETS, 40)


def config(psnr: Any) -> SolvedConfig:
    return SolvedConfig.model_validate(
        {
            "infer_steps": 4,
            "schedules": [
                {"computed": list(range(c)), "mix": [[1.0]] * (4 - c), "psnr": p}
                for c, p in zip((2, 3, 4), psnr, strict=True)
            ],
        }
    )


SETTING = config([[30.0] * 9, [40.0] * 9, [100.0] * 9]).setting()


def test_a_setting_chooses_by_its_bound() -> None:
    assert SETTING.promise == Promise(runs=9, psnr=[30.0, 40.0, 100.0])
    kept = apply_overrides(SETTING, {"min_psnr": "35"}, Solved.spec)
    assert (kept.parameters["computed_steps"], kept.min_psnr) == (3, 35.0)
    assert kept.keeping_bound() == kept
    other = apply_overrides(kept, {"computed_steps": "2"}, Solved.spec)
    assert (other.parameters["computed_steps"], other.min_psnr) == (2, None)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"min_psnr": "forty"}, "expected dB above 0, found 'forty'; give 30 to 50"),
        ({"min_psnr": "-1"}, "expected dB above 0"),
        ({"min_psnr": "101"}, "keep 100.0 dB at most; ask for less"),
        ({"min_psnr": "30", "computed_steps": "2"}, "chooses 'computed_steps', which is given too"),
        ({"min_psnr": "30", "deadline": "9s"}, "can't be kept beside a deadline"),
    ],
)
def test_bounds_that_can_not_be_kept_are_refused(overrides: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        apply_overrides(SETTING, overrides, Solved.spec)


def test_other_policies_refuse_a_bound() -> None:
    spec = policy_class("teacache").spec
    with pytest.raises(ConfigError, match="tells no quality of runs"):
        apply_overrides(CacheSetting(policy="teacache"), {"min_psnr": "40"}, spec)


@pytest.mark.parametrize("psnr", [[[30.0] * 8] * 3, [[30.0] * 9, [30.0] * 9, None]])
def test_too_few_or_missing_runs_are_a_fault_of_the_config(psnr: Any) -> None:
    with pytest.raises(ValueError, match="of the same 9 runs or more in all 'schedules'"):
        config(psnr)
