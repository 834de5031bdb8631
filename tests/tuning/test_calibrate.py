"""One calibration of the demo model, from prompts to configs that run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from freewheel.bundle.reader import Bundle
from freewheel.configs.load import load_config, read_configs
from freewheel.core.errors import OutputError, RequestError
from freewheel.core.progress import Silent
from freewheel.policies.overrides import apply_overrides
from freewheel.policies.solved import Solved, SolvedConfig
from freewheel.runtime.pipeline.generate import Generator
from freewheel.runtime.settings import config_entry
from freewheel.tuning.calibrate import calibrate, few_steps_advice
from freewheel.tuning.calibration import Calibration, CalibrationRequest, save_calibration

PROMPTS = [
    "a red circle moving right on a gray background",
    "a white ring growing on a navy background",
]


@pytest.fixture(scope="session")
def calibration(small_demo: Bundle) -> Calibration:
    request = CalibrationRequest(PROMPTS, speedups=(2.0, 60.0), steps=16, window=6, search=1)
    told: list[str] = []
    found = calibrate(small_demo, request, Silent(), lambda text: None, told.append)
    assert re.fullmatch(r"about \d+ model runs, cached ones counted by what they compute", told[0])
    assert re.fullmatch(r"one took \d+ s: about \d+ (s|min) to go", told[1])
    return found


def test_every_policy_gets_a_config_of_the_wanted_speedup(calibration: Calibration) -> None:
    assert "solved_2x" in calibration.configs
    assert "magcache_2x" in calibration.configs
    solved = calibration.configs["solved_2x"].setting()
    for branch in solved.branches.values():
        assert len(branch["mix"]) == 8 * solved.parameters["history"]
    assert solved.parameters["computed"].count(1) == solved.parameters["computed_steps"] == 8
    assert set(solved.branches) == {"cond", "uncond"}


def test_one_config_holds_a_schedule_of_every_number_of_computed_steps(
    calibration: Calibration, generator: Generator, request_of: Any
) -> None:
    config = calibration.configs["solved"]
    assert isinstance(config, SolvedConfig)
    budgets = [len(schedule.computed) for schedule in config.schedules]
    assert budgets == [*range(5, 17)]
    alone = calibration.configs["solved_2x"]
    assert isinstance(alone, SolvedConfig)
    assert config.schedules[budgets.index(8)] == alone.schedules[0]
    assert config.solved_from is not None
    distances = config.solved_from["distance_db"]
    assert distances["16"] < distances["12"] < distances["8"] < distances["5"], "more is nearer"
    setting = config.setting()
    assert setting.parameters["computed_steps"] == 8, "twice the speed unless asked otherwise"
    for count in (5, 13):
        chosen = apply_overrides(setting, {"computed_steps": str(count)}, Solved.spec)
        result = generator.generate(request_of(chosen, steps=16))
        assert result.statistics.computed_steps == count


def test_decisions_of_each_config_are_told_and_quality_where_it_ran(
    calibration: Calibration,
) -> None:
    assert calibration.told.keys() == calibration.configs.keys()
    for name in ("solved_2x", "magcache_2x"):
        computed = calibration.told[name].computed
        assert computed is not None
        assert (len(computed), computed[0]) == (16, True)
        assert sum(computed) <= 8, name
    assert (calibration.told["solved_2x"].distance_db or 0) > 10
    assert calibration.told["magcache_2x"].distance_db is None
    assert calibration.told["sencache_2x"].computed is None, "content decides"


def test_what_can_not_be_reached_is_left_out_with_a_reason(calibration: Calibration) -> None:
    assert "solved_60x" not in calibration.configs
    assert "0 computed steps" in calibration.left_out["solved_60x"]
    assert "at most" in calibration.left_out["magcache_60x"]


def test_file_is_read_back_and_its_configs_run(
    calibration: Calibration, generator: Generator, request_of: Any, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "calibration.json"
    save_calibration(calibration, path)
    assert set(read_configs(path)) == set(calibration.configs)
    assert json.loads(path.read_text())["calibration"]["prompts"] == PROMPTS
    setting = config_entry(load_config(f"{path}#solved_2x")).cache
    result = generator.generate(request_of(setting, steps=16))
    assert result.statistics.computed_steps == 8
    assert result.statistics.folded
    mixes = [m for m in result.statistics.branches["cond"].mix if m]
    assert len({tuple(m) for m in mixes}) > 1, "each reused step has its own mix"


def test_unwritable_file_is_one_error(calibration: Calibration, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't be written"):
        save_calibration(calibration, tmp_path / "file" / "calibration.json")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"speedups": (float("inf"),)}, "--speedup inf"),
        ({"speedups": (float("nan"),)}, "--speedup nan"),
        ({"speedups": (1.0,)}, "--speedup 1: is not above 1"),
        ({"history": 0}, "--history 0"),
        ({"objective": "mane"}, "--objective 'mane': is not known; did you mean 'mean'"),
        ({"steps": 0}, "--steps 0"),
        ({"guidance": float("nan")}, "--guidance nan: is not finite"),
        ({"first_seed": 2**63 - 1}, "--seed 9223372036854775808: is outside"),
        ({"first_seed": -1}, "--seed -1"),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_loaded(
    demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr("freewheel.tuning.calibrate.Generator", None)
    with pytest.raises(RequestError, match=says):
        calibrate(
            demo_bundle, CalibrationRequest(PROMPTS[:2], **options), Silent(), lambda text: None
        )


def test_few_steps_are_advised_against(small_demo: Bundle) -> None:
    told: list[str] = []
    request = CalibrationRequest(PROMPTS[:1], speedups=(2.0,), steps=6, window=4, search=0)
    calibrate(small_demo, request, Silent(), told.append)
    assert few_steps_advice(6) in told


def test_policies_that_the_bundle_lacks_are_left_out(small_demo: Bundle, tmp_path: Path) -> None:
    shutil.copytree(small_demo.folder, tmp_path / "bundle")
    path = tmp_path / "bundle" / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("magcache", "sencache"):
        del manifest["policies"][name]
    path.write_text(json.dumps(manifest))
    request = CalibrationRequest(PROMPTS[:1], speedups=(2.0,), steps=6, window=4, search=0)
    found = calibrate(Bundle(tmp_path / "bundle"), request, Silent(), lambda text: None)
    assert "solved_2x" in found.configs
    for name in ("magcache", "sencache"):
        assert f"{name}_2x" not in found.configs
        assert f"build with --policy {name} too" in found.left_out[f"{name}_2x"]
