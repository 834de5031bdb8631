# SPDX-License-Identifier: Apache-2.0
"""LightX2V's files: what is taken, what is taken without effect, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from freewheel.configs.foreign import ABSENT_POLICIES, is_without_effect, refusals
from freewheel.configs.load import load_config, parse_config
from freewheel.core.errors import ConfigError
from freewheel.policies import config_kinds

RUN = {
    "infer_steps": 4,
    "target_video_length": 81,
    "target_height": 480,
    "target_width": 832,
    "text_len": 512,
    "sample_guide_scale": 6,
    "sample_shift": 8,
    "enable_cfg": True,
}
CARRIED = {
    "self_attn_1_type": "flash_attn3",
    "cross_attn_2_type": "flash_attn3",
    "audio_cross_attn_type": "sage_attn2",
    "causal_self_attn_type": "flash_attn2",
    "attn_impl": "torch_sdpa",
    "moe_backend": "flashinfer",
    "flashinfer_autotune_mode": "auto",
    "rms_norm_type": "torch",
    "cpu_offload": False,
    "offload_granularity": "block",
    "use_event_offload": True,
    "text_encoder_offload_granularity": "block",
    "t5_cpu_offload": True,
    "parallel": {"seq_p_size": 4, "seq_p_attn_type": "ulysses", "cfg_p_size": 2},
    "vae_decode_parallel": True,
    "text_encoder_tensor_parallel": False,
    "dit_quantized": True,
    "dit_quant_scheme": "fp8-sgl",
    "dit_quantized_ckpt": "dit.safetensors",
    "mxfp8_fuse_enable": False,
    "vae_use_compile": True,
    "vae_dtype": "torch.bfloat16",
    "lora_configs": [],
    "lora_dynamic_apply": False,
    "changing_resolution": False,
    "resolution_rate": [1.0, 0.75],
    "use_taylor_cache": False,
    "taylor_cache_interval": 5,
    "use_prompt_enhancer": False,
    "use_system_prompt": "None",
}
"""Keys of every other subsystem, at values that change no picture here."""


def test_keys_of_other_subsystems_are_taken_and_each_is_named_once() -> None:
    config = parse_config({"feature_caching": "NoCaching", **RUN, **CARRIED}, where="x")
    assert config.ignored == tuple(CARRIED)
    assert config.infer_steps == 4


def ratios(first: float) -> list[float]:
    return [1.0, first, 0.97, 0.95]


MAG = {
    "feature_caching": "Mag",
    "magcache_calibration": False,
    "magcache_K": 6,
    "magcache_thresh": 0.24,
    "magcache_retention_ratio": 0.25,
    "magcache_ratios": [ratios(0.99), ratios(0.98)],
}


def test_mag_file_is_taken_with_a_list_of_ratios_per_branch(tmp_path: Path) -> None:
    path = tmp_path / "wan_t2v_mag.json"
    path.write_text(json.dumps({**RUN, **MAG, "parallel": {"cfg_p_size": 2}}))
    config = load_config(path)
    assert config.ignored == ("parallel",)
    setting = config.setting()
    assert setting.parameters == {"threshold": 0.24, "max_skip": 6, "retention": 0.25}
    assert setting.branches == {
        "cond": {"steps": 4, "ratios": ratios(0.99)},
        "uncond": {"steps": 4, "ratios": ratios(0.98)},
    }
    one = parse_config({**MAG, "magcache_ratios": [ratios(0.9)]}, where="x").setting()
    assert one.parameters["ratios"] == ratios(0.9)
    assert one.branches == {}


def test_firstblock_file_means_the_law_whose_keys_it_has() -> None:
    data = {"feature_caching": "FirstBlock", **RUN}
    ours = parse_config({**data, "firstblock_thresh": 0.03}, where="x").setting()
    assert (ours.policy, ours.parameters) == ("firstblock", {"threshold": 0.03})
    keys = {"residual_diff_threshold": 0.02, "downsample_factor": 2, "last_exact": 1}
    theirs = parse_config({**data, **keys}, where="x").setting()
    law = {"threshold": 0.02, "channel_stride": 2, "first_blocks": 1, "last_blocks": 0}
    assert (theirs.policy, theirs.parameters, theirs.guard.last_exact) == ("dualblock", law, 1)


def test_dualblock_file_is_taken_with_five_blocks_at_either_end() -> None:
    keys = {"residual_diff_threshold": 0.03, "downsample_factor": 2}
    setting = parse_config({"feature_caching": "DualBlock", **RUN, **keys}, where="x").setting()
    own = {"threshold": 0.03, "channel_stride": 2}
    assert setting.parameters == {**own, "first_blocks": 5, "last_blocks": 5}
    assert load_config("dualblock").setting().parameters == {"first_blocks": 1, "last_blocks": 0}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {**MAG, "magcache_calibration": True},
            "'magcache_calibration': found true, expected false: `freewheel calibrate` records",
        ),
        (
            {**MAG, "magcache_retention": 0.1},
            "expected one of 'magcache_retention' and 'magcache_retention_ratio', which say the same",
        ),
        ({**MAG, "magcache_ratios": [[1.0]] * 3}, "one table or two, cond and uncond, not 3"),
        (
            {"feature_caching": "FirstBlock", "firstblock_thresh": 0.1, "downsample_factor": 2},
            "expected one of 'firstblock_thresh', since the last computed step, and 'downsample_factor'",
        ),
        (
            {"feature_caching": "firstblock+dmd", "residual_diff_threshold": 0.03},
            "expected 'feature_caching' of 'dualblock' in place of 'firstblock', whose key "
            "'residual_diff_threshold' is",
        ),
        (
            {"feature_caching": "Tea", "changing_resolution": True, "resolution_rate": [1.0, 0.75]},
            "'changing_resolution': a run keeps its size here",
        ),
        (
            {"feature_caching": "Tea", "lora_configs": [{"path": "a.safetensors", "strength": 1}]},
            "'lora_configs': the run would lack the LoRA; remove the key and give `freewheel run --lora",
        ),
        (
            {"feature_caching": "NoCaching", "use_taylor_cache": True, "taylor_cache_order": 2},
            "'use_taylor_cache': name the policy by 'feature_caching': 'TaylorSeer'",
        ),
        (
            {"feature_caching": "NoCaching", "sample_audio_guide_scale": 4.0, "audio_type": "para"},
            "'sample_audio_guide_scale', 'audio_type': of speech or sound",
        ),
        (
            {"feature_caching": "NoCaching", "bot_task": "auto", "use_prompt_enhancer": True},
            "'bot_task', 'use_prompt_enhancer': rewrites the prompt",
        ),
        (
            {"feature_caching": "NoCaching", "aspect_ratio": "16:9"},
            "'aspect_ratio': a size is 'target_height', 'target_width'",
        ),
    ],
)
def test_a_key_that_makes_another_picture_is_refused_by_name(
    data: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(data, where="x")
    assert message in caught.value.what
    assert "did you mean" not in str(caught.value)
    assert "faults" not in caught.value.what, "one fault alone"


@pytest.mark.parametrize("kind", ABSENT_POLICIES)
def test_a_policy_that_is_not_here_is_said_to_be_none_with_the_nearest(kind: str) -> None:
    data = {"feature_caching": kind, "residual_diff_threshold": 0.02, "downsample_factor": 2}
    with pytest.raises(ConfigError) as caught:
        parse_config({**RUN, **data}, where="x")
    what = caught.value.what
    does, near = ABSENT_POLICIES[kind]
    assert f"'{kind}', which {does}, is no policy here; the nearest is {near}" in what
    assert "did you mean" not in what
    assert "faults" not in what


def test_an_interval_of_guidance_can_not_be_asked_for() -> None:
    with pytest.raises(ConfigError, match="'guidance_interval': is not a known key"):
        parse_config({"feature_caching": "Tea", "guidance_interval": [0.2, 0.8]}, where="x")


def test_one_error_names_each_unknown_key_once_and_the_known_ones_once() -> None:
    unknown = {"sead": 1, "teacache_treshold": 0.2, "zzz": 1}
    with pytest.raises(ConfigError) as caught:
        parse_config({"feature_caching": "Tea", **unknown, "parallel": {}}, where="x")
    text = str(caught.value)
    assert caught.value.what.startswith("3 faults: ")
    assert all(text.count(f"'{key}'") == 1 for key in unknown)
    assert text.count("known: ") == text.count("max_consecutive") == 1
    assert "parallel" not in text


def test_no_key_of_ours_is_taken_for_a_foreign_one() -> None:
    kinds, _ = config_kinds()
    for model in kinds.values():
        for key in model.model_fields:
            assert not is_without_effect(key, 1), key
            assert refusals({key: 1}) == {}, key
