# SPDX-License-Identifier: Apache-2.0
"""What a request gets that says nothing is settled at the build, in one place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from generations import generation_of

from freewheel.bundle.manifest import ConfigEntry, GenerationDefaults
from freewheel.bundle.reader import Bundle
from freewheel.compiler.defaults import (
    RUN,
    policy_setting,
    resolve_configs,
    resolve_generation,
    scheduler_shift,
)
from freewheel.core.errors import CheckpointError, ConfigError
from freewheel.policies.setting import CacheSetting


def config(**values: float) -> ConfigEntry:
    return ConfigEntry(cache=CacheSetting(), generation=GenerationDefaults(**values))


def write_scheduler(pipeline: Path, **values: object) -> Path:
    (pipeline / "scheduler").mkdir()
    (pipeline / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    return pipeline


def test_what_a_config_leaves_open_is_the_first_ones_then_the_schedulers(tmp_path: Path) -> None:
    pipeline = write_scheduler(tmp_path, flow_shift=3)
    configs = {"a": config(steps=20, height=96), "b": config(steps=7, flow_shift=5.0)}
    found = resolve_configs(configs, pipeline)
    assert found["a"].generation == generation_of(steps=20, height=96, flow_shift=3.0)
    assert found["b"].generation == generation_of(steps=7, height=96, flow_shift=5.0)
    assert resolve_configs({"a": config()}, None)["a"].generation == RUN


@pytest.mark.parametrize(
    "values", [{"seed": -1}, {"seed": 2**63}, {"steps": 0}, {"width": 1 << 60}]
)
def test_a_value_that_no_run_can_take_is_named(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"'{next(iter(values))}': found ")):
        resolve_generation(GenerationDefaults(**values))


@pytest.mark.parametrize("shift", ["3", -1.0, [1]])
def test_a_flow_shift_that_is_no_number_is_named(tmp_path: Path, shift: object) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"the flow shift is {shift!r}")):
        scheduler_shift(write_scheduler(tmp_path, shift=shift))


def test_a_policy_by_name_runs_as_its_config_says(tiny_bundle: Bundle) -> None:
    policies = tiny_bundle.manifest.policies
    assert policies["teacache"].setting == policy_setting("teacache", ["temb"])
    assert policies["teacache"].setting.guard.last_exact == 1
    assert policies["easycache"].setting.guard.first_exact == 7
    assert policy_setting("teacache", ["temb"]).signal == "temb"
    assert policy_setting("teacache", ["modulated_input"]).signal is None
    assert policies["solved"].setting == CacheSetting(policy="solved")


def test_a_bundle_leaves_nothing_open(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    assert manifest.configs["off"].generation == RUN
    assert (manifest.latent_scale.frames, manifest.latent_scale.pixels) == (4, 8)
    assert manifest.vocabulary_size is None, "no text encoder is carried"
