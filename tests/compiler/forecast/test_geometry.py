# SPDX-License-Identifier: Apache-2.0
"""A config made for another size than the bundle's is warned about with a forecast, or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from typer.testing import CliRunner

from freewheel.bundle.manifest import ConfigEntry
from freewheel.bundle.reader import Bundle
from freewheel.cli import app
from freewheel.compiler.cut.document import cut_of
from freewheel.compiler.forecast.geometry import FAR_BEYOND, check_geometry
from freewheel.compiler.forecast.run import describe_flops
from freewheel.compiler.forecast.tables import operations
from freewheel.compiler.inspect import inspect_bundle
from freewheel.compiler.sizes import bundle_pipeline, dims_of, size_of
from freewheel.configs.load import parse_config
from freewheel.core.errors import RequestError
from freewheel.runtime.pipeline.transformer import FreewheelTransformer
from freewheel.runtime.settings import choose_setting, config_entry

FAR = "wan_t2v_custom_1_3b"


def check(
    bundle: Bundle,
    entry: ConfigEntry,
    *,
    force: bool = False,
    where: Mapping[str, Any] = MappingProxyType({}),
    **flags: Any,
) -> str | None:
    size = size_of(entry.generation, **flags)
    return check_geometry(bundle, "mine", entry, size, force=force, **where)


def config(**keys: object) -> ConfigEntry:
    return config_entry(parse_config({"feature_caching": "Tea", **keys}, where="mine.json"))


def chosen(bundle: Bundle, name: str, entry: ConfigEntry | None = None) -> ConfigEntry:
    found = choose_setting(bundle, name, {}, lambda _: None)
    if entry is None:
        return found
    given = entry.generation.model_dump(exclude_none=True)
    return found.model_copy(update={"generation": found.generation.model_copy(update=given)})


def test_a_config_of_the_bundles_size_or_of_none_is_not_mentioned(demo_bundle: Bundle) -> None:
    for name in ("teacache", "shapes_wan_custom", "demo/shapes_wan_solved"):
        assert check(demo_bundle, chosen(demo_bundle, name)) is None


def test_one_of_a_far_greater_size_is_refused_with_inspects_forecast(demo_bundle: Bundle) -> None:
    entry = chosen(demo_bundle, FAR)
    with pytest.raises(RequestError) as caught:
        check(demo_bundle, entry)
    own = inspect_bundle(demo_bundle)["flops"]["uncached_run"]
    cut, size = cut_of(demo_bundle), size_of(entry.generation)
    dims = dims_of(cut, size, bundle_pipeline(demo_bundle))
    run = describe_flops(cut, dims, size)["uncached_run"]
    assert (size.width, size.height, size.frames, size.steps) == (832, 480, 81, 50)
    assert run / own > FAR_BEYOND
    assert caught.value.where == "config 'mine'"
    assert caught.value.what.startswith(
        "was made for 832x480, 81 frames, and the bundle's own size is 96x96, 17 frames: "
        f"{run / own:,.0f} times the operations ({operations(run)} FLOPs uncached"
    )
    assert "of memory" in caught.value.what
    assert "--height 96 --width 96 --frames 17" in caught.value.hint
    assert "--force" in caught.value.hint
    assert check(demo_bundle, entry, force=True) == f"config 'mine' {caught.value.what}"


def test_at_the_bundles_size_only_its_thresholds_are_in_question(demo_bundle: Bundle) -> None:
    found = check(demo_bundle, chosen(demo_bundle, FAR), height=96, width=96, frames=17)
    assert found is not None
    assert "832x480, 81 frames" in found
    assert found.endswith("its thresholds and tables are untried at this size")


def test_somewhat_more_is_a_warning(demo_bundle: Bundle) -> None:
    entry = chosen(demo_bundle, "teacache", config(target_video_length=33))
    found = check(demo_bundle, entry)
    assert found is not None
    assert "96x96, 33 frames, and the bundle's own size is 96x96, 17 frames" in found
    assert "times the operations" in found


def test_memory_is_that_of_the_backend_and_of_what_is_offloaded(demo_bundle: Bundle) -> None:
    entry = chosen(demo_bundle, "teacache", config(target_video_length=33))
    told = [
        check(demo_bundle, entry, where={"backend": "tensorrt", "offload": offload})
        for offload in (False, True)
    ]
    told.append(check(demo_bundle, entry))
    found = [re.search(r"and ([\d.]+) MB of memory", str(text)) for text in told]
    whole, offloaded, host = (float(number[1]) for number in found if number)
    assert offloaded < whole < host, "the host holds the program too"


@pytest.mark.parametrize(
    "command",
    [["run", "--prompt", "a red circle", "--out", "v.mp4"], ["bench", "--prompt", "a red circle"]],
    ids=lambda command: command[0],
)
def test_commands_ask_for_force(
    demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    verb, *rest = command
    arguments = [verb, str(demo_bundle.folder), *rest, "--cache", FAR, "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 3, result.output
    error = json.loads(result.stdout)["error"]
    assert error["where"] == f"config '{FAR}'"
    assert "was made for 832x480, 81 frames" in error["message"]
    assert "--force" in error["hint"]
    assert list(tmp_path.iterdir()) == []


def test_attached_it_warns_for_the_pipeline_chooses_the_size(generator: Any) -> None:
    transformer = generator.transformer
    assert isinstance(transformer, FreewheelTransformer)
    before = transformer.setting
    try:
        with pytest.warns(UserWarning, match=r"'wan_t2v_custom_1_3b' was made for 832x480, 81"):
            transformer.use(FAR)
    finally:
        transformer.use(before)
