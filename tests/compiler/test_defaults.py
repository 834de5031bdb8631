# SPDX-License-Identifier: Apache-2.0
"""What a request gets that says nothing is settled at the build, in one place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from generations import generation_of

from freewheel.bundle.manifest import ConfigEntry, GenerationDefaults
from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut.declared import Cut
from freewheel.compiler.cut.document import cut_of
from freewheel.compiler.cut.models import family_of
from freewheel.compiler.defaults import (
    RUN,
    pipeline_defaults,
    policy_setting,
    resolve_configs,
    resolve_generation,
    scheduler_shift,
)
from freewheel.compiler.profiles import BuildSizes, dim_ranges
from freewheel.core.errors import CheckpointError, ConfigError, RequestError
from freewheel.policies.setting import CacheSetting

TINY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}


@pytest.fixture(scope="module")
def cut(tiny_bundle: Bundle) -> Cut:
    return cut_of(tiny_bundle)


def config(**values: float) -> ConfigEntry:
    return ConfigEntry(cache=CacheSetting(), generation=GenerationDefaults(**values))


def write_scheduler(pipeline: Path, **values: object) -> Path:
    (pipeline / "scheduler").mkdir()
    (pipeline / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    return pipeline


def test_what_a_config_leaves_open_is_the_first_ones_then_the_schedulers(
    tmp_path: Path, cut: Cut
) -> None:
    pipeline = write_scheduler(tmp_path, flow_shift=3)
    configs = {"a": config(steps=20, height=96), "b": config(steps=7, flow_shift=5.0)}
    found = resolve_configs(configs, pipeline, cut)
    assert found["a"].generation == generation_of(steps=20, height=96, flow_shift=3.0)
    assert found["b"].generation == generation_of(steps=7, height=96, flow_shift=5.0)
    assert resolve_configs({"a": config()}, None, cut)["a"].generation == RUN


def test_a_size_that_nobody_asks_for_fits_the_model(
    shared_cut: Callable[..., Cut], tmp_path: Path
) -> None:
    row = family_of("WanTransformer3DModel", "")
    patched = shared_cut(row, {**TINY, "patch_size": (2, 2, 2)})
    found = resolve_configs({"a": config(), "b": config(frames=81)}, None, patched)
    assert found["a"].generation == RUN.model_copy(update={"frames": 85})
    assert found["b"].generation == RUN, "81 is asked for"
    with pytest.raises(RequestError, match=r"--frames 81: is not 5 more than a multiple of 8"):
        dim_ranges(patched, BuildSizes(), found, None)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"scale_factor_spatial": 32}))
    fitting = resolve_configs({"a": config()}, tmp_path, patched)["a"]
    assert (fitting.generation.height, fitting.generation.width) == (512, 832)
    assert dim_ranges(patched, BuildSizes(), {"a": fitting}, tmp_path)["height"] == (16, 16, 16)


@pytest.mark.parametrize(
    ("pipeline", "transformer", "vae", "frames"),
    [
        (
            "AceStepPipeline",
            {},
            {"sampling_rate": 48_000, "downsampling_ratios": [2, 4, 4, 6, 10]},
            1_500,
        ),
        ("StableAudioPipeline", {"sample_size": 1024}, {"sampling_rate": 44_100}, 1_024),
        ("LongCatAudioDiTPipeline", {}, {}, None),
    ],
)
def test_sound_is_as_long_as_its_pipeline_makes_it(
    tmp_path: Path,
    pipeline: str,
    transformer: dict[str, Any],
    vae: dict[str, Any],
    frames: int | None,
) -> None:
    for name, content in {
        "model_index.json": {"_class_name": pipeline},
        "transformer/config.json": transformer,
        "vae/config.json": vae,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    found = pipeline_defaults(tmp_path)
    assert found.get("frames") == frames
    assert "height" not in found


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
