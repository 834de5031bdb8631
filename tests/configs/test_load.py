# SPDX-License-Identifier: Apache-2.0
"""Reading caching configs: the shipped files, LightX2V's form, and every kind of fault."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from freewheel.configs.load import load_config, parse_config, read_configs, shipped_configs
from freewheel.core.errors import ConfigError
from freewheel.policies import POLICIES, config_kinds, policy_class
from freewheel.policies.adacache import CODEBOOKS
from freewheel.runtime.settings import config_entry

# Transcribed from ALGORITHMS 1: [set with ret steps, plain set].
COEFFICIENTS = {
    "t2v_1_3b": [
        [-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2],
        [2.39676752e3, -1.31110545e3, 2.01331979e2, -8.29855975, 1.37887774e-1],
    ],
    "t2v_14b": [
        [-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1],
        [-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404],
    ],
    "i2v_480p": [
        [2.57151496e5, -3.54229917e4, 1.40286849e3, -1.35890334e1, 1.32517977e-1],
        [-3.02331670e2, 2.23948934e2, -5.25463970e1, 5.87348440, -2.01973289e-1],
    ],
    "i2v_720p": [
        [8.10705460e3, 2.13393892e3, -3.72934672e2, 1.66203073e1, -4.17769401e-2],
        [-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683],
    ],
}

T2V = {
    "infer_steps": 50,
    "text_len": 512,
    "target_height": 480,
    "target_width": 832,
    "sample_guide_scale": 6,
    "sample_shift": 8,
    "seed": 42,
}
I2V = {
    "infer_steps": 40,
    "target_height": 480,
    "target_width": 832,
    "sample_guide_scale": 5,
    "sample_shift": 3,
    "seed": 442,
}
I2V_TEA = {**I2V, "sample_shift": 5, "seed": 42}
TALL = {"target_height": 1280, "target_width": 720}
TEA = {"feature_caching": "Tea", "use_ret_steps": True, "teacache_thresh": 0.26}
CUSTOM = {"feature_caching": "Custom", "use_ret_steps": False, "teacache_thresh": 0.26}

NAMED = {
    "teacache/wan_t2v_1_3b_tea_480p": {**T2V, **TEA, "coefficients": COEFFICIENTS["t2v_1_3b"]},
    "teacache/wan_i2v_tea_480p": {**I2V_TEA, **TEA, "coefficients": COEFFICIENTS["i2v_480p"]},
    "teacache/wan_i2v_tea_720p": {
        **I2V_TEA,
        **TALL,
        **TEA,
        "coefficients": COEFFICIENTS["i2v_720p"],
    },
    "taylorseer/wan_t2v_taylorseer": {**T2V, "feature_caching": "TaylorSeer"},
    "adacache/wan_i2v_ada": {**I2V, "feature_caching": "Ada"},
    "adacache/wan_t2v_ada": {**T2V, "feature_caching": "Ada"},
    "custom/wan_t2v_custom_1_3b": {**T2V, **CUSTOM, "coefficients": COEFFICIENTS["t2v_1_3b"]},
    "custom/wan_t2v_custom_14b": {**T2V, **CUSTOM, "coefficients": COEFFICIENTS["t2v_14b"]},
    "custom/wan_i2v_custom_480p": {**I2V, **CUSTOM, "coefficients": COEFFICIENTS["i2v_480p"]},
    "custom/wan_i2v_custom_720p": {
        **I2V,
        **TALL,
        **CUSTOM,
        "coefficients": COEFFICIENTS["i2v_720p"],
    },
}


@pytest.mark.parametrize("name", NAMED)
def test_named_config_has_the_published_values(name: str) -> None:
    config = load_config(name)
    given = config.model_dump(exclude_unset=True)
    assert given == {**NAMED[name], "enable_cfg": True, "target_video_length": 81}
    assert config.ignored == ()


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_config_loads_by_stem_by_folder_and_by_path(name: str) -> None:
    path = shipped_configs()[name]
    config = load_config(name)
    assert config.name == name
    assert config == load_config(f"{path.parent.name}/{name}") == load_config(path)
    setting = config.setting()
    policy_class(setting.policy).spec.resolve(setting.parameters)
    assert setting.signal is None or setting.signal in policy_class(setting.policy).spec.signals


def test_no_two_shipped_configs_share_a_name() -> None:
    folder = shipped_configs()["shapes_wan_off"].parents[1]
    assert len(shipped_configs()) == len(list(folder.rglob("*.json"))) == 34


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "solved"])
def test_policy_name_means_its_defaults(policy: str) -> None:
    config = load_config(policy)
    assert config.name == config.setting().policy == policy
    spec = policy_class(policy).spec
    assert spec.resolve(config.setting().parameters) == spec.resolve({})


def test_policy_without_defaults_says_where_its_tables_come_from() -> None:
    with pytest.raises(ConfigError, match="freewheel calibrate"):
        load_config("solved")


def test_one_of_several_configs_of_a_file_is_named_after_a_hash(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    configs = {"slow": {"feature_caching": "NoCaching"}, "fast": {"feature_caching": "Tea"}}
    path.write_text(json.dumps({"configs": configs, "calibration": {}}))
    assert load_config(f"{path}#fast").name == "fast"
    assert {n: c.policy for n, c in read_configs(path).items()} == {
        "slow": "off",
        "fast": "teacache",
    }
    with pytest.raises(ConfigError, match="did you mean 'fast'"):
        load_config(f"{path}#fats")
    with pytest.raises(ConfigError, match="several configs; name one"):
        load_config(path)
    (tmp_path / "plain.json").write_text('{"feature_caching": "Tea"}')
    with pytest.raises(ConfigError, match="holds no 'configs'"):
        load_config(f"{tmp_path / 'plain.json'}#fast")


def solved(*schedules: object, **more: object) -> dict[str, object]:
    return {"feature_caching": "Solved", "infer_steps": 3, "schedules": [*schedules], **more}


ONE = {"computed": [0], "mix": [[1.0], [0.9]]}
TWO = {"computed": [0, 1], "mix": [[1.5, -0.5]]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (solved(), "at least 1 item"),
        (solved({"computed": [0], "mix": [[1.0]]}), "2 rows, one for each reused step, in 'sched"),
        (solved({"computed": [1], "mix": [[1.0], [1.0]]}), "ascending steps from 0 to below 3"),
        (solved({"computed": [0, 3], "mix": [[1.0]]}), "ascending steps from 0 to below 3"),
        (
            solved({"computed": [0], "mix": {"cond": [[1.0], [0.5, 0.5]]}}),
            "no more factors in a row of 'schedules[0].mix.cond' than steps were computed before",
        ),
        (solved({"computed": [0, 1], "mix": [[1, 0, 0, 0, 0, 0, 0]]}), "at most 6 values"),
        (solved({"computed": [0, 1], "mix": [[]]}), "at least 1 item"),
        (solved(TWO, ONE), "'schedules' of ever more computed steps, not of [2, 1]"),
        (solved(ONE, TWO, computed_steps=3), "'computed_steps' of one of 'schedules', not 3: 1, 2"),
        (
            solved(ONE, {"computed": [0, 1], "mix": {"cond": [[1.0]]}}),
            "the same branches in 'mix' of all 'schedules'",
        ),
        (solved(ONE, sigmas=[1.0, 0.5]), "3 numbers in 'sigmas', one for each step, not 2"),
        (solved(ONE, infer_steps=201), "'infer_steps' of 1 to 200, not 201"),
    ],
)
def test_solved_schedules_that_fit_no_run_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config(config, where="x")


def test_more_factors_than_the_tables_hold_are_refused() -> None:
    wide = [[1.0, 0, 0, 0, 0, 0]]
    schedules = [{"computed": [*range(c)], "mix": wide * (200 - c)} for c in range(6, 134)]
    with pytest.raises(ConfigError, match="at most 65536 factors in the mixes of all"):
        parse_config(solved(*schedules, infer_steps=200), where="x")


def test_solved_and_magcache_tables_become_parameters_per_branch() -> None:
    rows = {"cond": [[1.5, -0.5]], "uncond": [[1.0]]}
    config = parse_config(solved({"computed": [0, 1], "mix": rows}), where="x")
    setting = config.setting()
    assert setting.parameters["computed"][:3] == [1, 1, 0]
    assert setting.parameters["history"] == 2
    assert setting.for_branch("cond").parameters["mix"] == [1.5, -0.5]
    assert setting.for_branch("uncond").parameters["mix"] == [1.0, 0.0]
    both = parse_config(solved(ONE, TWO, computed_steps=1), where="x").setting()
    assert both.parameters["computed_steps"] == 1
    assert both.parameters["budgets"] == [1, 2]
    assert both.parameters["mix"] == [1.0, 0.0, 0.9, 0.0, 1.5, -0.5]
    mag = parse_config(
        {"feature_caching": "Mag", "magcache_ratios": [1.0, 0.9]}, where="x"
    ).setting()
    assert mag.parameters == {"steps": 2, "ratios": [1.0, 0.9]}
    assert mag.branches == {}


def test_demo_configs_have_the_demo_models_size() -> None:
    for policy in POLICIES:
        config = load_config(f"demo/shapes_wan_{policy}")
        assert config.setting().policy == policy
        assert (config.infer_steps, config.target_video_length) == (30, 17)
        assert (config.target_height, config.target_width, config.seed) == (96, 96, 42)
        assert (config.sample_guide_scale, config.sample_shift) == (3, 3)


def tea(**keys: object):
    return parse_config({"feature_caching": "Tea", **keys}, where="x.json").setting()


def test_use_ret_steps_selects_signal_coefficients_and_exact_steps() -> None:
    sets = [[1.0, 2.0], [3.0, 4.0, 5.0]]
    ret, plain = (tea(coefficients=sets, use_ret_steps=u) for u in (True, False))
    assert (ret.signal, ret.parameters["coefficients"]) == ("timestep_proj", [1.0, 2.0])
    assert (ret.guard.first_exact, ret.guard.last_exact) == (5, 0)
    assert (plain.signal, plain.parameters["coefficients"]) == ("temb", [3.0, 4.0, 5.0])
    assert (plain.guard.first_exact, plain.guard.last_exact) == (1, 1)


def test_guard_and_signal_keys_override_what_use_ret_steps_implies() -> None:
    setting = tea(use_ret_steps=True, first_exact=2, exact_steps=[7], signal="modulated_input")
    assert setting.signal == "modulated_input"
    assert setting.guard.model_dump() == {
        "first_exact": 2,
        "last_exact": 0,
        "max_consecutive": 0,
        "max_reused": 0,
        "exact_steps": [7],
    }


def test_one_flat_set_of_coefficients_is_the_form_of_other_families() -> None:
    flat = tea(coefficients=[7.3, -4.0, 6.7, -3.1, 9.6, 0.1], teacache_thresh=0.15)
    assert flat.signal == "modulated_input"
    assert flat.parameters == {
        "threshold": 0.15,
        "coefficients": [7.3, -4.0, 6.7, -3.1, 9.6, 0.1],
    }
    assert (flat.guard.first_exact, flat.guard.last_exact) == (1, 1)


def test_unused_set_of_coefficients_may_be_empty() -> None:
    assert tea(coefficients=[[], [2.0]], use_ret_steps=False).parameters == {"coefficients": [2.0]}


def test_taylorseer_and_ada_keys_become_parameters() -> None:
    taylor = {"feature_caching": "TaylorSeer", "interval": 5, "order": 2, "variant": "newton"}
    assert parse_config(taylor, where="x").setting().parameters == {
        "interval": 5,
        "order": 2,
        "variant": "newton",
    }
    ada = {"feature_caching": "Ada", "codebook": [[0.1, 4], [1, 2]], "scale_codebook": True}
    assert parse_config(ada, where="x").setting().parameters == {
        "codebook_thresholds": [0.1, 1.0],
        "codebook_skips": [4, 2],
        "scale_codebook": True,
    }


def test_default_codebook_of_the_policy_is_the_published_one() -> None:
    parameters = policy_class("adacache").spec.resolve({})
    rows = zip(parameters["codebook_thresholds"], parameters["codebook_skips"], strict=True)
    assert list(rows) == CODEBOOKS["steps_100"]
    fast = [(0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.4, 2), (1.0, 1)]
    assert CODEBOOKS["steps_30_fast"] == fast
    assert CODEBOOKS["steps_30_slow"] == [(0.08, 3), (0.16, 2), (1.0, 1)]


FOREIGN = {
    "self_attn_1_type": "flash_attn3",
    "cross_attn_2_type": "sage_attn2",
    "cpu_offload": False,
    "offload_granularity": "block",
    "t5_cpu_offload": True,
    "rms_norm_type": "torch",
    "rope_type": "torch_real_rope",
    "mm_config": {"mm_type": "Default"},
    "dit_quantized": True,
    "dit_quant_scheme": "fp8-sgl",
    "parallel": {"cfg_p_size": 2},
}


def test_config_of_lightx2v_works_and_names_what_it_ignored(tmp_path: Path) -> None:
    path = tmp_path / "wan_t2v.json"
    path.write_text(json.dumps({**NAMED["custom/wan_t2v_custom_1_3b"], **FOREIGN}))
    config = load_config(path)
    assert config.ignored == tuple(FOREIGN)
    assert config.setting() == load_config("wan_t2v_custom_1_3b").setting()


def test_keys_of_another_policy_are_ignored_only_where_lightx2v_carries_them_along() -> None:
    carried = {"feature_caching": "NoCaching", "teacache_thresh": 0.2, "use_ret_steps": True}
    assert parse_config(carried, where="x").ignored == ("teacache_thresh", "use_ret_steps")
    with pytest.raises(ConfigError, match=r"'interval': is a key of TaylorSeer and .*, not of Tea"):
        tea(interval=4)


def test_a_list_of_steps_names_its_sampler_and_count() -> None:
    listed = {"feature_caching": "NoCaching", "denoising_step_list": [1000, 750, 500, 250]}
    run = config_entry(parse_config(listed, where="x")).generation
    assert (run.sampler, run.steps) == ("steps_1000_750_500_250", 4)
    preset = config_entry(load_config("distilled/wan_t2v_distilled_8step")).generation
    assert (preset.sampler, preset.steps, preset.flow_shift) == ("distilled", 8, 5.0)
    assert preset.guidance_scale == 1


def test_two_guidance_scales_are_of_two_experts() -> None:
    pair = {"feature_caching": "NoCaching", "sample_guide_scale": [4.0, 3.0]}
    run = config_entry(parse_config(pair, where="x")).generation
    assert (run.guidance_scale, run.guidance_scale_2) == (4.0, 3.0)
    for more in ({"sample_guide_scale": [3.5, 3.5]}, {"enable_cfg": False}):
        run = config_entry(parse_config({**pair, **more}, where="x")).generation
        assert run.guidance_scale_2 is None


def test_three_faults_come_in_one_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(
        '{"feature_caching": "Tea", "infer_steps": "fifty", "teacache_thresh": -0.1, "sead": 42}'
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    error = caught.value
    assert error.where == str(path)
    assert error.what.startswith("3 faults: ")
    assert "'infer_steps': found \"fifty\", expected a valid integer" in error.what
    assert "'teacache_thresh': found -0.1, expected greater than or equal to 0" in error.what
    assert "'sead': is not a known key; did you mean 'seed'?" in error.what
    assert error.hint


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "'feature_caching': missing, expected one of NoCaching"),
        (
            {"feature_caching": "NoCaching", "denoising_step_list": [1000, 1000]},
            "expected 'denoising_step_list' to fall from step to step",
        ),
        (
            {"feature_caching": "NoCaching", "denoising_step_list": [1000, 500], "infer_steps": 4},
            "expected 'infer_steps' 2, as 'denoising_step_list' has",
        ),
        (
            {"feature_caching": "NoCaching", "denoising_step_list": [1000], "sampler": "euler"},
            "expected one of 'sampler' and 'denoising_step_list'",
        ),
        ({"feature_caching": "NoCaching", "denoising_step_list": [0]}, "'denoising_step_list[0]'"),
        ({"feature_caching": "Tee"}, "found \"Tee\", no such policy; did you mean 'Tea'"),
        ({"feature_caching": 3}, "'feature_caching': found 3"),
        ({"feature_caching": "Tea", "seed": True}, "'seed': found true, expected a valid integer"),
        ({"feature_caching": "Tea", "infer_steps": 0}, "'infer_steps': found 0, expected greater"),
        ({"feature_caching": "Tea", "infer_steps": 2.5}, "'infer_steps': found 2.5"),
        ({"feature_caching": "Tea", "teacache_thresh": float("nan")}, "'teacache_thresh': found"),
        ({"feature_caching": "Tea", "teacache_thresh": "0.2"}, "'teacache_thresh': found \"0.2\""),
        ({"feature_caching": "Tea", "coefficients": [[1], [2, "x"]]}, "'coefficients[1][1]'"),
        ({"feature_caching": "Tea", "coefficients": [[1], []]}, "set for 'use_ret_steps': false"),
        ({"feature_caching": "Tea", "coefficients": [[1], [2], [3]]}, "not 3"),
        ({"feature_caching": "Tea", "coefficients": [1] * 7}, "at most 6 values"),
        ({"feature_caching": "Tea", "signal": "latents"}, "'signal': found \"latents\""),
        ({"feature_caching": "TaylorSeer", "order": 5}, "'order': found 5, expected less"),
        ({"feature_caching": "TaylorSeer", "variant": "euler"}, "'variant': found \"euler\""),
        ({"feature_caching": "Ada", "codebook": [[0.2, 3], [0.1, 2]]}, "ascending order"),
        ({"feature_caching": "Ada", "codebook": [[0.2, 0]]}, "'codebook[0][1]': found 0"),
        (
            {"feature_caching": "Ada", "codebook": "steps_30"},
            "did you mean 'steps_100'? known: steps_100, steps_30_fast",
        ),
        ({"feature_caching": "Ada", "codebook": []}, "'codebook'"),
        ({"feature_caching": "Ada", "moreg_first": 1.5}, "'moreg_first': found 1.5"),
        ({"feature_caching": "Ada", "first_exact": -1}, "'first_exact': found -1"),
    ],
)
def test_fault_names_path_found_and_expected(data: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(data, where="x.json")
    assert message in caught.value.what
    assert str(caught.value).startswith("x.json: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "expected a JSON object, found [1]"),
        ('{"seed": 1, "seed": 2}', "key 'seed' stands twice"),
    ],
)
def test_file_that_is_no_json_object_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)


def test_unknown_name_and_missing_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nor a policy; did you mean 'wan_t2v_custom_14b'"):
        load_config("wan_t2v_costum_14b")
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        load_config(tmp_path / "missing.json")
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path)


def test_bounds_of_config_keys_are_those_of_the_parameters_they_set() -> None:
    kinds, _ = config_kinds()
    checked = set()
    for kind, model in kinds.items():
        specs = policy_class(model.policy).spec.parameters
        for key, parameter in model.keys.items():
            spec = specs[parameter]
            for bound, beyond in ((spec.minimum, -1), (spec.maximum, 1)):
                if bound is not None:
                    parse_config({"feature_caching": kind, key: _typed(bound, spec)}, where="x")
                    outside = {"feature_caching": kind, key: _typed(bound + beyond, spec)}
                    with pytest.raises(ConfigError, match=rf"'{key}(\[0\]|\.0)?': found"):
                        parse_config(outside, where="x")
                    checked.add(key)
    assert {"teacache_thresh", "trend", "order", "moreg_scale", "magcache_K"} <= checked


def _typed(value: float, spec) -> float | int | list[float | int]:
    number = int(value) if spec.dtype == "int64" else float(value)
    return [number] if spec.shape else number
