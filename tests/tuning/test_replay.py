"""Replay: what it says of a recorded run is what the transcription and the real run do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from runs import assert_equals_reference

from freewheel.bundle.reader import Bundle
from freewheel.core.errors import ConfigError, RequestError
from freewheel.policies import policy_class
from freewheel.policies.decision_loop import DecisionLoop, DecisionRecord, difference_gram
from freewheel.policies.setting import CacheSetting, GuardSetting
from freewheel.runtime.forecast.fold import forecast
from freewheel.runtime.pipeline.generate import Generator
from freewheel.runtime.resolved_setting import resolve
from freewheel.tuning.replay import replay
from freewheel.tuning.trace import Trace, TraceRecorder

SETTINGS = [
    CacheSetting(policy="teacache", signal="temb", parameters={"threshold": 0.3}),
    CacheSetting(
        policy="teacache",
        signal="timestep_proj",
        parameters={"threshold": 0.3},
        guard=GuardSetting(first_exact=5),
    ),
    CacheSetting(policy="teacache", signal="modulated_input", parameters={"threshold": 0.3}),
    CacheSetting(policy="taylorseer", parameters={"interval": 3, "order": 2}),
    CacheSetting(policy="taylorseer", parameters={"interval": 4, "order": 4, "variant": "newton"}),
    CacheSetting(policy="adacache"),
    CacheSetting(policy="adacache", parameters={"mograd": 0.0, "moreg_power": 0.0}),
    CacheSetting(policy="custom", signal="temb", parameters={"threshold": 0.4}),
    CacheSetting(policy="dmd", parameters={"interval": 2, "ridge": 0.01}),
    CacheSetting(policy="seacache", signal="filtered_latents", parameters={"threshold": 0.4}),
    CacheSetting(
        policy="dicache",
        signal="first_block_residual",
        parameters={"threshold": 0.6, "retention": 0.1},
    ),
]
names = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.policy}-{s.signal}")


PAIR = CacheSetting(policy="adacache+spectrum", parameters={"degree": 2, "history": 5})


@pytest.mark.parametrize("setting", [*SETTINGS, PAIR], ids=lambda s: f"{s.policy}-{s.signal}")
def test_replay_equals_the_numpy_transcription(trace: Trace, setting: CacheSetting) -> None:
    parameters = policy_class(setting.policy).spec.resolve(setting.parameters)
    result = replay(trace, setting)
    assert 0 < result.computed_steps < trace.steps
    for branch, found in result.branches.items():
        frames, tokens = trace.frame_shape()
        feature = trace.get(branch, "feature")
        recorded = {
            "signal": trace.get(branch, setting.signal or "temb"),
            "feature": feature.reshape(trace.steps, frames, tokens, -1),
            "residual": trace.get(branch, "residual"),
        }
        records = [
            DecisionRecord(c, m, d)
            for c, m, d in zip(found.computed, found.mix, found.distance, strict=True)
        ]
        assert_equals_reference(records, setting, parameters, recorded)


SAMPLERS_TIME = CacheSetting(policy="spectrum", parameters={"clock": "sigma", "warmup": 3})


@pytest.mark.parametrize(
    "setting", [*SETTINGS, SAMPLERS_TIME], ids=lambda s: f"{s.policy}-{s.signal}"
)
def test_a_real_run_decides_as_the_eager_law_on_what_it_saw(
    generator: Generator, request_of: Any, setting: CacheSetting
) -> None:
    """Compiled, in the loop, with reuse: the same decisions and mixes, from the run's own trace."""
    recorder = TraceRecorder(wants_signals=True)
    statistics = generator.generate(request_of(setting), recorder=recorder).statistics
    trace = recorder.trace()
    frames, tokens = trace.frame_shape()
    for name, branch in statistics.branches.items():
        law = DecisionLoop.eager(setting, step_count=trace.steps, schedule=trace.schedule)
        tolerance = policy_class(setting.policy).mix.tolerance
        residuals = trace.get(name, "residual")
        features = trace.get(name, "feature").reshape(trace.steps, frames, tokens, -1)
        signals = trace.get(name, setting.signal or "temb")
        for step in range(trace.steps):
            seen = None if law.last_computed is None else features[law.last_computed]
            gram = difference_gram(
                [residuals[s] for s in law.computed_steps], law.spec.history.maximum
            )
            expected = law.decide(signals[step].reshape(-1, signals.shape[-1]), seen, gram)
            assert branch.computed[step] == expected.compute
            if not expected.compute:
                mix = branch.mix[step]
                np.testing.assert_allclose(
                    mix, expected.mix[: len(mix)], rtol=tolerance, atol=tolerance
                )


@names
def test_folded_decisions_are_known_before_the_run(
    generator: Generator, request_of: Any, setting: CacheSetting
) -> None:
    model = generator.transformer.session.model
    request = request_of(setting)
    ahead = forecast(model, generator.timesteps(request), setting)
    if not resolve(model.manifest, setting).is_folded:
        assert ahead is None
        return
    assert ahead is not None
    statistics = generator.generate(request).statistics
    assert statistics.folded
    told = ahead.branches["cond"]
    for branch in statistics.branches.values():
        assert branch.computed == [d.compute for d in told]
        # Compiled and eager reductions add in another order; a law without a signal has no distance.
        distances = [d.distance for d in told]
        expected = [pytest.approx(d, rel=1e-5) if d else d for d in distances]
        assert branch.distance == expected


def test_reuse_error_is_that_of_the_mix(trace: Trace) -> None:
    setting = CacheSetting(policy="taylorseer", parameters={"interval": 2})
    found = replay(trace, setting).branches["cond"]
    r = trace.get("cond", "residual")
    forecast_at_3 = 1.5 * r[2] - 0.5 * r[0]
    expected = np.abs(forecast_at_3 - r[3]).mean() / np.abs(r[3]).mean()
    assert found.reuse_error[2] is None
    assert found.reuse_error[3] == pytest.approx(expected, rel=1e-5)


def test_replay_prints_what_the_design_says(trace: Trace) -> None:
    data = replay(trace, SETTINGS[0]).as_dict()
    keys = {"policy", "form", "branches", "computed_steps", "steps", "ideal_speedup", "always_run"}
    assert set(data) == keys
    assert set(data["branches"]["cond"]) == {"computed", "distance", "mix", "reuse_error"}
    assert data["ideal_speedup"] == pytest.approx(data["steps"] / data["computed_steps"])


def test_sampled_tokens_keep_the_frame_structure(
    generator: Generator, request_of: Any, trace: Trace
) -> None:
    recorder = TraceRecorder(tokens_per_frame=9)
    generator.generate(request_of(CacheSetting(), steps=6), recorder=recorder)
    sampled = recorder.trace()
    assert sampled.frame_shape() == (2, 9)
    assert sampled.get("cond", "residual").shape == (6, 18, 256)
    assert 0 < replay(sampled, CacheSetting(policy="adacache")).computed_steps < 6
    assert trace.frame_shape() == (2, 36)


def test_what_a_trace_lacks_is_said(demo_bundle: Bundle, trace: Trace) -> None:
    arrays = dict(trace.arrays)
    del arrays["cond/modulated_input"]
    with pytest.raises(RequestError, match=r"array 'cond/modulated_input'.*not recorded.*record"):
        replay(Trace(arrays), SETTINGS[2])
    arrays["cond/computed"] = np.arange(20) % 2 == 0
    with pytest.raises(RequestError, match=r"branch 'cond'.*steps reused.*--cache off"):
        replay(Trace(arrays), SETTINGS[0])
    with pytest.raises(ConfigError, match=r"signal 'latents'.*'teacache'.*known"):
        replay(trace, CacheSetting(policy="teacache", signal="latents"))
