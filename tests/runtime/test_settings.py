"""What a name means: the bundle's configs first, then shipped ones, policies and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import copy
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel

from freewheel.bundle.reader import Bundle
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.configs.load import parse_config
from freewheel.core.errors import ConfigError
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.settings import choose_setting, config_entries, config_entry


def unwarned(text: str) -> None:
    pytest.fail(f"warned: {text}")


def test_config_keys_become_generation_values() -> None:
    data = {
        "feature_caching": "TaylorSeer",
        "infer_steps": 20,
        "target_height": 96,
        "seed": 7,
        "sample_guide_scale": 4.0,
        "sample_shift": 3.0,
        "target_video_length": 9,
    }
    found = config_entry(parse_config(data, where="test")).generation
    assert (found.steps, found.height, found.width, found.frames) == (20, 96, None, 9)
    assert (found.guidance_scale, found.flow_shift, found.seed) == (4.0, 3.0, 7)
    without = config_entry(parse_config({**data, "enable_cfg": False}, where="test"))
    assert without.generation.guidance_scale == 1.0


def test_keys_without_effect_are_named_in_one_warning(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps({"feature_caching": "NoCaching", "cpu_offload": True, "parallel": {}})
    )
    warned: list[str] = []
    assert list(config_entries([str(path)], warned.append)) == ["mine"]
    assert warned == [f"no effect here of 'cpu_offload', 'parallel' in '{path}'"]


def test_nothing_named_is_the_bundles_default(demo_bundle: Bundle) -> None:
    found = choose_setting(demo_bundle, None, {}, unwarned)
    assert found == demo_bundle.manifest.configs["shapes_wan_teacache"]


def test_a_policy_by_name_keeps_the_bundles_generation_values(demo_bundle: Bundle) -> None:
    found = choose_setting(demo_bundle, "taylorseer", {"interval": "4"}, unwarned)
    assert found.cache.policy == "taylorseer"
    assert found.cache.parameters["interval"] == 4
    assert found.generation == demo_bundle.manifest.configs["shapes_wan_teacache"].generation


def test_a_setting_is_taken_as_it_is(demo_bundle: Bundle) -> None:
    setting = CacheSetting(policy="custom", parameters={"threshold": 0.5})
    assert choose_setting(demo_bundle, setting, {}, unwarned).cache == setting


def test_what_nothing_goes_by_gets_the_nearest(demo_bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match=r"neither a file.*teacache"):
        choose_setting(demo_bundle, "teacahe", {}, unwarned)
    with pytest.raises(ConfigError, match="threshold"):
        choose_setting(demo_bundle, "teacache", {"treshold": "0.2"}, unwarned)


def test_a_model_of_one_block_carries_no_policy_that_looks_at_the_first(
    tmp_path: Path, tiny_checkpoint: Path, tiny_bundle: Bundle, build_cache: Path
) -> None:
    config = WanTransformer3DModel.load_config(tiny_checkpoint)
    WanTransformer3DModel.from_config(config, num_layers=1).save_pretrained(tmp_path / "one")
    off = config_entries(["off"], unwarned)
    request = BuildRequest(str(tmp_path / "one"), tmp_path / "out", [], off, cache=build_cache)
    carried = plan(request).policies
    probing = {"firstblock", "dicache", "dbcache", "dualblock"}
    assert set(tiny_bundle.manifest.policies) - set(carried) == probing
    bundle = copy(tiny_bundle)
    kept = {n: p for n, p in bundle.manifest.policies.items() if n in carried}
    bundle.manifest = bundle.manifest.model_copy(update={"policies": kept})
    for cache in ("firstblock", CacheSetting(policy="firstblock")):
        for overrides in ({}, {"threshold": "0.2"}):
            with pytest.raises(ConfigError, match="'firstblock': is not in the bundle"):
                choose_setting(bundle, cache, overrides, unwarned)


def test_a_pair_is_in_bundles_that_were_built_for_it(
    tiny_checkpoint: Path, build_bundle: Callable[..., Bundle], tiny_bundle: Bundle
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"'teacache\+spectrum': is not in the bundle; .*build with --policy teacache\+spectrum",
    ):
        choose_setting(tiny_bundle, "teacache+spectrum", {"degree": "2"}, unwarned)
    entries = config_entries(["off", "teacache+spectrum"], unwarned)
    bundle = build_bundle(tiny_checkpoint, ("onnxruntime",), configs=entries)
    assert bundle.manifest.graphs["decide.teacache+spectrum"].file in bundle.manifest.files
    chosen = choose_setting(bundle, "teacache+spectrum", {"degree": "2"}, unwarned).cache
    assert (chosen.policy, chosen.parameters["degree"]) == ("teacache+spectrum", 2)
