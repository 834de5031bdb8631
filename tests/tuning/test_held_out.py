# SPDX-License-Identifier: Apache-2.0
"""Runs that nothing was fitted on, and the bound that a request is kept by them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from freewheel.bundle.reader import Bundle
from freewheel.core.errors import ConfigError, RequestError
from freewheel.core.progress import Silent
from freewheel.policies.overrides import apply_overrides
from freewheel.policies.promise import FEWEST_RUNS
from freewheel.policies.setting import CacheSetting
from freewheel.policies.solved import Solved, SolvedConfig
from freewheel.runtime.model import Model
from freewheel.runtime.pipeline.generate import Generator
from freewheel.runtime.pipeline.request import GenerationRequest
from freewheel.runtime.session import Session
from freewheel.runtime.settings import choose_setting
from freewheel.tuning.calibrate import calibrate
from freewheel.tuning.calibration import Calibration, CalibrationRequest
from freewheel.tuning.held_out import check_count, taking
from freewheel.tuning.quality import compare_videos

PROMPTS = ["a red circle", "a white ring", *(f"a blue square number {i}" for i in range(9))]
STEPS = 8


@pytest.fixture(scope="module")
def calibration(small_demo: Bundle) -> Calibration:
    request = CalibrationRequest(
        PROMPTS, speedups=(2.0,), steps=STEPS, window=4, search=0, refine=2, hold_out=9
    )
    return calibrate(small_demo, request, Silent(), lambda text: None)


@pytest.fixture(scope="module")
def run(small_demo: Bundle, calibration: Calibration) -> GenerationRequest:
    """The last held-out run, uncached."""
    defaults = choose_setting(small_demo, None, {}, lambda text: None).generation
    made = defaults.model_copy(update={"steps": STEPS})
    return GenerationRequest(prompt=PROMPTS[-1], cache=CacheSetting(), defaults=made, seed=1010)


def test_schedules_tell_the_quality_of_runs_that_nothing_was_fitted_on(
    small_demo: Bundle, calibration: Calibration, run: GenerationRequest
) -> None:
    config = calibration.configs["solved"]
    assert isinstance(config, SolvedConfig)
    assert config.solved_from is not None
    assert config.solved_from["runs"] == 2, "what was held out is not recorded"
    assert calibration.about["held_out"] == 9
    assert {len(s.psnr or ()) for s in config.schedules} == {FEWEST_RUNS}
    assert config.schedules[-1].psnr == [100.0] * 9, "all computed: equal"
    alone = calibration.configs["solved_2x"]
    assert isinstance(alone, SolvedConfig)
    assert alone.schedules[0] in config.schedules

    few, generator = config.schedules[0], Generator(small_demo)
    cached = replace(run, cache=taking(config.setting(), len(few.computed)))
    result = generator.generate(cached)
    assert result.statistics.computed_steps == len(few.computed)
    psnr = compare_videos(result.frames, generator.generate(run).frames).psnr
    assert few.psnr is not None
    assert few.psnr[-1] == pytest.approx(psnr, abs=1e-3)


def test_a_bound_chooses_and_is_refused_for_other_runs(
    small_demo: Bundle, calibration: Calibration, run: GenerationRequest
) -> None:
    setting = calibration.configs["solved"].setting()
    assert setting.promise is not None
    budgets = setting.parameters["budgets"]
    assert isinstance(budgets, list)
    bound = setting.promise.psnr[-2]
    kept = apply_overrides(setting, {"min_psnr": str(bound)}, Solved.spec)
    assert kept.parameters["computed_steps"] == budgets[setting.promise.psnr.index(bound)]
    asked = replace(run, cache=kept)
    asked.check()
    for name, value in {"guidance_scale": 2.5, "height": 64, "steps": 7, "flow_shift": 2.0}.items():
        with pytest.raises(ConfigError, match=f"was measured at {name} "):
            replace(asked, **{name: value}).check()
    session = Session(Model(small_demo))
    with pytest.raises(ConfigError, match="measured for runs of 8 steps, and this one has 12"):
        session.begin(torch.linspace(990, 10, 12), kept)


@pytest.mark.parametrize(
    ("count", "prompts", "says"),
    [(8, 30, "not even the worst of so few"), (11, 11, "leaves none of 11 prompts to fit on")],
)
def test_numbers_that_promise_nothing_are_refused(count: int, prompts: int, says: str) -> None:
    with pytest.raises(RequestError, match=f"--hold-out {count}: .*{says}"):
        check_count(count, prompts)
    check_count(0, 1)
