# SPDX-License-Identifier: Apache-2.0
"""What engines are told to serve follows from the sizes asked for, graph by graph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from generations import generation_of

from freewheel.bundle.manifest import ResolvedConfig
from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut.declared import Cut
from freewheel.compiler.cut.document import cut_of
from freewheel.compiler.profiles import BuildSizes, dim_ranges, parse_range, profiles_of
from freewheel.core.errors import ConfigError, RequestError
from freewheel.policies.setting import CacheSetting

SIZES = BuildSizes(height=(64, 96, 96), width=(64, 96, 128), frames=(1, 9, 17), batch=(1, 1, 2))


def config(**generation: int) -> ResolvedConfig:
    return ResolvedConfig(cache=CacheSetting(), generation=generation_of(**generation))


@pytest.fixture(scope="module")
def cut(tiny_bundle: Bundle) -> Cut:
    return cut_of(tiny_bundle)


@pytest.mark.parametrize(
    ("text", "found"), [("480", (480, 480, 480)), ("16:480:720", (16, 480, 720))]
)
def test_a_size_or_a_range_is_read(text: str, found: tuple[int, ...]) -> None:
    assert parse_range("--height", text) == found


@pytest.mark.parametrize("text", ["", "a", "1:2", "1:2:3:4", "-1", "2:1:3", "0", "1:3:2", "1.5"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--height {text}"):
        parse_range("--height", text)


def test_dimensions_range_with_the_sizes(cut: Cut) -> None:
    ranges = dim_ranges(cut, SIZES, {"a": config(text_tokens=32, steps=20)}, None)
    assert ranges["frames"] == (1, 3, 5)
    assert ranges["height"] == (8, 12, 12)
    assert ranges["tokens"] == (1 * 4 * 4, 3 * 6 * 6, 5 * 6 * 8)
    assert ranges["tokens_per_frame"] == (16, 36, 48)
    assert ranges["batch"] == (1, 1, 2)
    assert ranges["text_tokens"] == (1, 32, 32)
    assert ranges["steps"] == (1, 20, 1000 * 2)  # blocks' tables have rows by batch too


def test_without_sizes_the_carried_configs_decide(cut: Cut) -> None:
    configs = {
        "default": config(height=96, width=96, frames=9, text_tokens=32),
        "other": config(height=64, width=128, frames=17, text_tokens=48),
    }
    ranges = dim_ranges(cut, BuildSizes(), configs, None)
    assert ranges["height"] == (8, 12, 12)
    assert ranges["width"] == (12, 12, 16)
    assert ranges["frames"] == (3, 3, 5)
    assert ranges["batch"] == (1, 1, 1)
    assert ranges["text_tokens"] == (1, 32, 48)


def test_the_pipeline_scales_pixels(cut: Cut, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    scale = {"scale_factor_temporal": 1, "scale_factor_spatial": 16}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(scale))
    ranges = dim_ranges(cut, SIZES, {"a": config()}, tmp_path)
    assert ranges["frames"] == (1, 9, 17)
    assert ranges["height"] == (4, 6, 6)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (BuildSizes(frames=(1, 9, 10)), "--frames 10"),
        (BuildSizes(height=(64, 96, 100)), "--height 100"),
        (
            BuildSizes(width=(64, 96, 8 * 2 * 65)),
            "--width 1040: is beyond the model's 128 positions",
        ),
        (BuildSizes(frames=(1, 9, 4 * 64 + 1)), "--frames 257: is beyond the model's 64 positions"),
    ],
)
def test_sizes_that_the_model_cannot_serve_are_refused(
    cut: Cut, sizes: BuildSizes, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        dim_ranges(cut, sizes, {"a": config(height=96, width=96, frames=9)}, None)


def test_every_dynamic_input_of_every_graph_has_a_profile(cut: Cut, tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    ranges = dim_ranges(cut, SIZES, {"a": config(text_tokens=32)}, None)
    profiles = profiles_of(manifest.graphs, manifest.policies, cut, ranges)
    assert profiles.keys() == manifest.graphs.keys()
    for name, graph in manifest.graphs.items():
        dynamic = {n for n, e in graph.inputs.items() if any(isinstance(d, str) for d in e.shape)}
        assert profiles[name].keys() == dynamic
    assert profiles["head"]["latents"] == ((1, 4, 1, 8, 8), (1, 4, 3, 12, 12), (2, 4, 5, 12, 16))
    assert profiles["block"]["hidden"] == ((1, 16, 32), (1, 108, 32), (2, 240, 32))
    assert profiles["timestep"]["timesteps"] == ((1,), (50,), (1000 * 2,))
    deepest = max(p.spec.history.maximum for p in manifest.policies.values())
    assert [shape[0] for shape in profiles["reuse"]["history"]] == [1, 2, deepest]


def test_policies_get_the_ranges_of_their_own_dimensions(cut: Cut, tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    ranges = dim_ranges(cut, SIZES, {"a": config()}, None)
    profiles = profiles_of(manifest.graphs, manifest.policies, cut, ranges)
    signal = profiles["decide.teacache"]["signal"]
    assert signal == ((1, 32), (1, 32), (2 * 240, 6 * 32))
    feature = profiles["decide.adacache"]["feature"]
    assert feature == ((1, 16, 32), (3, 36, 32), (5, 48, 32))
    assert profiles["decide.off"] == {}
