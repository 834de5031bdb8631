"""Tuning on the demo model: replay ranks, runs confirm, one config is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from freewheel.bundle.reader import Bundle
from freewheel.configs.load import load_config
from freewheel.core.errors import ConfigError, RequestError
from freewheel.core.progress import Silent
from freewheel.tuning.tune import Goal, TuneReport, TuneRequest, calibrated, save_config, tune

PROMPTS = [
    "a red circle moving right on a gray background",
    "a white ring growing on a navy background",
]


@pytest.fixture(scope="module")
def report(small_demo: Bundle) -> TuneReport:
    request = TuneRequest(Goal(speedup=1.2), PROMPTS, traces=1, confirm=3, rounds=2, steps=12)
    return tune(small_demo, request, Silent(), lambda text: None)


def test_candidates_are_ranked_by_replay_without_doubles(report: TuneReport) -> None:
    speeds = [c.ideal_speedup for c in report.candidates]
    assert speeds == sorted(speeds)
    assert min(speeds) > 1
    assert len({c.config.policy for c in report.candidates}) >= 4
    assert len({c.name for c in report.candidates}) == len(report.candidates)


def test_only_what_is_fast_enough_is_run_and_the_best_of_it_chosen(report: TuneReport) -> None:
    assert len(report.rows) == 3
    assert all(r["ideal_speedup"] >= 1.2 for r in report.rows)
    met = {r["name"]: r["psnr_mean"] for r in report.rows if r["speedup"] >= 1.2}
    assert (report.chosen in met) if met else report.chosen is None
    if met:
        assert met[report.chosen] == max(met.values())
    assert report.held_out
    assert len(report.table()) == 3


def test_the_spread_over_rounds_is_shown(report: TuneReport) -> None:
    column = report.columns.index("spread")
    for entry in report.rows:
        least, most = entry["speedup_spread"]
        assert least <= entry["speedup"] <= most
        assert any(f"{least:.2f}–{most:.2f}" == cells[column] for cells in report.table())


def test_chosen_config_is_written_and_loads(report: TuneReport, tmp_path: Path) -> None:
    name, config = next(iter(report.configs.items()))
    save_config(config, tmp_path / "tuned.json")
    assert load_config(tmp_path / "tuned.json").setting() == config.setting(), name


def test_quality_goal_takes_the_front_of_error_over_speed(small_demo: Bundle) -> None:
    told: list[str] = []
    request = TuneRequest(Goal(psnr=5.0), PROMPTS[:1], confirm=3, rounds=1, steps=12)
    found = tune(small_demo, request, Silent(), told.append)
    assert any("too few prompts" in text for text in told)
    assert not found.held_out
    fastest = max(found.rows, key=lambda r: r["speedup"])
    assert found.chosen == fastest["name"], "5 dB is met by all"
    assert found.rank_correlation is not None


@pytest.mark.parametrize(
    ("criterion", "met", "ranks"),
    [("mean", [True, True], [40, 36]), ("worst", [True, False], [38, 20])],
)
def test_the_worst_prompt_counts_where_asked(
    criterion: str, met: list[bool], ranks: list[float]
) -> None:
    rows = [
        {"speedup": 2, "psnr_mean": 40, "psnr_worst": 38, "ssim_mean": 0.99, "ssim_worst": 0.97},
        {"speedup": 3, "psnr_mean": 36, "psnr_worst": 20, "ssim_mean": 0.98, "ssim_worst": 0.6},
    ]
    for goal in (Goal(psnr=35, criterion=criterion), Goal(ssim=0.95, criterion=criterion)):
        assert [goal.is_met(row) for row in rows] == met
    assert [Goal(speedup=2, criterion=criterion).rank(row) for row in rows] == ranks


def test_an_unknown_criterion_is_refused() -> None:
    with pytest.raises(RequestError, match=r"--criterion 'wurst': is not known.*'worst'"):
        Goal(speedup=2, criterion="wurst")


@pytest.mark.parametrize(
    ("goal", "says"),
    [
        ({}, "tune: has no goal; give one of --target-speedup, --min-psnr, --min-ssim"),
        ({"speedup": 2.0, "psnr": 30.0}, "several goals, --target-speedup and --min-psnr; give"),
        ({"speedup": float("nan")}, "--target-speedup nan: can't be reached; try --target-"),
        ({"psnr": float("inf")}, "--min-psnr inf: can't be reached; try --min-psnr 30"),
        ({"ssim": 1.5}, "--min-ssim 1.5: can't be reached; try --min-ssim 0.95"),
    ],
)
def test_exactly_one_goal_that_can_be_reached_is_taken(goal: dict[str, float], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        Goal(**goal)


@pytest.mark.parametrize("option", ["traces", "confirm", "rounds"])
def test_counts_begin_at_one(option: str) -> None:
    with pytest.raises(RequestError, match=f"--{option} 0: is below 1"):
        TuneRequest(Goal(speedup=2.0), PROMPTS, **{option: 0})


def test_a_bad_calibration_is_refused_before_anything_is_loaded(
    demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freewheel.tuning.tune.Generator", None)
    request = TuneRequest(Goal(speedup=2.0), PROMPTS, calibration=tmp_path / "no.json")
    with pytest.raises(ConfigError, match=r"no\.json: can't be read"):
        tune(demo_bundle, request, Silent(), lambda text: None)


def test_a_speedup_beyond_every_candidate_is_one_error(small_demo: Bundle) -> None:
    request = TuneRequest(Goal(speedup=50.0), PROMPTS[:1], steps=4)
    with pytest.raises(RequestError, match="beyond every candidate"):
        tune(small_demo, request, Silent(), lambda text: None)


def test_a_calibration_of_another_size_is_warned_about_once(
    demo_bundle: Bundle, tmp_path: Path
) -> None:
    size = {"target_height": 480, "target_width": 832, "target_video_length": 81}
    configs = {n: {"feature_caching": "Tea", **size} for n in ("teacache_2x", "teacache_3x")}
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"configs": configs}))
    told: list[str] = []
    request = TuneRequest(Goal(speedup=2.0), PROMPTS, calibration=path)
    assert set(calibrated(demo_bundle, request, told.append)) == set(configs)
    (text,) = told
    assert "was made for 832x480, 81 frames, and the bundle's own size is 96x96, 17 frames" in text
