"""What watches a run for its page: changes of every step, and a trace where one run is whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from freewheel.policies.schedule import Schedule
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.pipeline.generate import Generation, Generator
from freewheel.runtime.step_record import StepRecord
from freewheel.tuning.run_recorder import TOKENS_PER_FRAME, RunRecorder

STEPS = 10


@pytest.fixture(scope="module")
def watched(generator: Generator, request_of: Any) -> tuple[Generation, RunRecorder]:
    recorder = RunRecorder()
    setting = CacheSetting(policy="teacache", parameters={"threshold": 0.5})
    return generator.generate(request_of(setting, steps=STEPS), recorder=recorder), recorder


def test_changes_are_recorded_for_reused_steps_too(watched: Any) -> None:
    run, recorder = watched
    computed = run.statistics.branches["cond"].computed
    changes = recorder.changes["cond"]
    assert len(changes) == STEPS
    assert math.isnan(changes[0])
    held = [c for c, was in zip(changes, computed, strict=True) if not was]
    assert held
    assert max(held) < 1e-6, "TeaCache holds"


def test_trace_holds_some_tokens_of_each_frame(watched: Any) -> None:
    run, recorder = watched
    trace = recorder.trace()
    assert trace is not None
    assert trace.get("cond", "computed").tolist() == run.statistics.branches["cond"].computed
    assert trace.frame_shape()[1] <= TOKENS_PER_FRAME


def test_two_transformers_have_no_trace(watched: Any) -> None:
    _, recorder = watched
    part = recorder._parts[0]
    assert RunRecorder(_parts=[part, part]).trace() is None
    assert RunRecorder().trace() is None


def test_a_branch_with_gaps_has_no_trace() -> None:
    latents = torch.ones(1, 2, 1, 2, 2)
    recorder = RunRecorder()
    recorder.on_run({}, Schedule.even(2))
    record = StepRecord(
        "cond", 0, True, torch.ones(1, 4, 2), None, {}, latents, {"latents": latents}
    )
    recorder.on_step(record, {"tokens": 4, "tokens_per_frame": 4})
    assert recorder.trace() is None
