"""What a calibration will take: near what it takes, and never a small part of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from freewheel.bundle.reader import Bundle
from freewheel.core.progress import Silent
from freewheel.runtime.body import Body
from freewheel.tuning.calibrate import calibrate
from freewheel.tuning.calibration import SPEEDUPS, CalibrationRequest
from freewheel.tuning.effort import PRESETS, duration, model_runs


@pytest.mark.parametrize("search", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_forecast_is_near_what_a_calibration_computes(
    small_demo: Bundle, monkeypatch: pytest.MonkeyPatch, search: int
) -> None:
    ran, run = [], Body.run

    def counted(self: Body, *given: object, **named: object) -> None:
        ran.append(1)
        run(self, *given, **named)

    monkeypatch.setattr(Body, "run", counted)
    steps, speedups = 16, (2.0,)
    request = CalibrationRequest(
        ["a red circle", "a white ring"],
        speedups=speedups,
        steps=steps,
        window=6,
        search=search,
        refine=2,
    )
    calibrate(small_demo, request, Silent(), lambda text: None)
    took = len(ran) / steps / 2  # of two branches
    foretold = model_runs(2, speedups, 2, search, steps)
    assert took / 1.3 < foretold < 4 * took


def test_more_prompts_than_there_are_cost_nothing() -> None:
    assert model_runs(2, (2.0,), 8, 0) == model_runs(2, (2.0,), 2, 0)
    assert model_runs(3, (2.0,), 0, 3) == 3, "nothing is run cached"


def test_presets_rise() -> None:
    counts = [model_runs(16, (2.0, 3.0), p.refine, p.search) for p in PRESETS.values()]
    assert list(PRESETS) == ["quick", "normal", "thorough"]
    assert counts == sorted(counts)
    assert counts[2] > 2 * counts[1] > 4 * counts[0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(40, "40 s"), (600, "10 min"), (5399, "90 min"), (12600, "3.5 h")]
)
def test_durations_are_in_a_unit_that_reads_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_counts_of_the_page_are_these(repository: Path) -> None:
    page = (repository / "docs" / "how-to" / "choose-a-setting.md").read_text(encoding="utf-8")
    counts = (model_runs(8, SPEEDUPS, p.refine, p.search) for p in PRESETS.values())
    quick, normal, thorough = (f"{count:,}" for count in counts)
    told = (
        f"about {quick} with `--preset quick`, {normal} with `normal`, {thorough} with `thorough`"
    )
    assert told in page


def test_paths_are_counted_by_the_steps_that_they_compute() -> None:
    """Of 20 steps, runs of 1 to 20 computed ones arrive at each step behind their number: 210 at most."""
    without = model_runs(2, (2.0,), 2, 0, 20)
    assert model_runs(2, (2.0,), 2, 0, 20, paths=True) - without == 2 * 20 / 2
