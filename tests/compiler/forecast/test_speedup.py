# SPDX-License-Identifier: Apache-2.0
"""Predictions made without engines are the decisions that a run would take."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from generations import generation_of

from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut.document import cut_of
from freewheel.compiler.forecast.flops import step_flops
from freewheel.compiler.forecast.speedup import predict, timestep_tables, timesteps_of
from freewheel.compiler.sizes import dims_of, size_of
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.forecast.fold import forecast
from freewheel.runtime.model import Model

STEPS = 12


@pytest.fixture(scope="module")
def known(tiny_bundle: Bundle):
    cut = cut_of(tiny_bundle)
    dims = dims_of(cut, size_of(generation_of(height=64, width=96, frames=5)), None)
    timesteps = timesteps_of(tiny_bundle, generation_of(flow_shift=3.0), STEPS)
    return cut, dims, timesteps, timestep_tables(tiny_bundle, cut, timesteps)


def test_timesteps_are_the_schedulers_with_the_configs_shift(tiny_bundle: Bundle) -> None:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=7.0
    )
    scheduler.set_timesteps(9)
    found = timesteps_of(tiny_bundle, generation_of(flow_shift=7.0), 9)
    assert found.dtype == torch.float32
    assert found.tolist() == [float(t) for t in scheduler.timesteps]


@pytest.mark.parametrize(
    "setting",
    [
        CacheSetting(policy="off"),
        CacheSetting(policy="teacache", parameters={"threshold": 0.3}),
        CacheSetting(policy="teacache", signal="timestep_proj", parameters={"threshold": 0.5}),
        CacheSetting(policy="taylorseer", parameters={"interval": 3}),
        CacheSetting(policy="custom", parameters={"threshold": 0.6}),
    ],
)
def test_folded_settings_are_predicted_as_the_engines_decide(
    tiny_bundle: Bundle, known, setting: CacheSetting
) -> None:
    cut, dims, timesteps, tables = known
    found = predict(cut, dims, setting, tables)
    run = forecast(Model(tiny_bundle, "onnxruntime"), timesteps, setting)
    assert run is not None
    assert found.computed_steps == run.computed_steps
    assert found.ideal_speedup == pytest.approx(STEPS / found.computed_steps)
    assert 1 <= found.flops_speedup <= found.ideal_speedup
    assert found.reason == ""


def test_the_speedup_by_operations_counts_what_reused_steps_cost(known) -> None:
    cut, dims, _, tables = known
    setting = CacheSetting(policy="taylorseer", parameters={"interval": 4, "order": 2})
    flops = step_flops(cut, dims, slots=3)
    cached = 3 * flops.computed + 9 * flops.reused
    found = predict(cut, dims, setting, tables)
    assert found.computed_steps == 3
    assert found.flops_speedup == pytest.approx(STEPS * flops.computed / cached)


@pytest.mark.parametrize(
    ("setting", "seen"),
    [
        (CacheSetting(policy="adacache"), "attention_output"),
        (CacheSetting(policy="teacache", signal="modulated_input"), "modulated_input"),
    ],
)
def test_what_depends_on_content_is_said_to(known, setting: CacheSetting, seen: str) -> None:
    cut, dims, _, tables = known
    found = predict(cut, dims, setting, tables)
    assert found.reason == f"depends on content: looks at '{seen}'"
    assert found.computed_steps is found.ideal_speedup is found.flops_speedup is None


def test_tables_are_those_of_the_engine(tiny_bundle: Bundle, known) -> None:
    _, _, timesteps, tables = known
    model = Model(tiny_bundle, "onnxruntime")
    names = tiny_bundle.manifest.graphs["timestep"].outputs
    outputs = {n: torch.zeros(tables[n].shape) for n in names}
    model.bind("timestep", {"timesteps": timesteps, **outputs}).run()
    for name, table in outputs.items():
        np.testing.assert_allclose(tables[name], table.numpy(), rtol=1e-3, atol=1e-5)
