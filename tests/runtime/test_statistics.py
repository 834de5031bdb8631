"""Accounting of a run that never ran: sums, medians and warnings on made-up steps."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from freewheel.runtime.statistics import BranchStatistics, RunStatistics


def run_of(
    computed: Sequence[bool | None],
    distances: list[float | None] | None = None,
    policy: str = "teacache",
) -> RunStatistics:
    branch = BranchStatistics(len(computed))
    for step, is_computed in enumerate(computed):
        distance = None if distances is None else distances[step]
        if is_computed is not None:
            branch.add(step, is_computed, distance, [1.0, 0.5], 2.0 if is_computed else 0.5)
    return RunStatistics(policy, False, len(computed), {"cond": branch})


def test_speedups_of_four_computed_steps_in_ten() -> None:
    run = run_of([True, False, True, False, False] * 2)
    assert run.computed_steps == 4
    assert run.ideal_speedup == 2.5
    assert run.estimated_speedup == pytest.approx(10 * 2.0 / (4 * 2.0 + 6 * 0.5))
    assert run.step_seconds() == {"computed": 2.0, "reused": 0.5}


def test_branches_are_averaged() -> None:
    run = run_of([True, True, False, False])
    run.branches["uncond"] = run_of([True, False, False, False]).branches["cond"]
    assert run.computed_steps == 1.5
    assert run.ideal_speedup == pytest.approx(8 / 3)


def test_a_run_without_steps_claims_nothing() -> None:
    run = RunStatistics("teacache", False, 0)
    assert (run.computed_steps, run.ideal_speedup, run.estimated_speedup) == (0.0, 1.0, None)
    assert run.step_seconds() == {"computed": None, "reused": None}


def test_mixes_are_kept_of_reused_steps_alone() -> None:
    assert run_of([True, False]).branches["cond"].mix == [[], [1.0, 0.5]]


def test_percentiles_are_those_of_reused_steps() -> None:
    branch = run_of([True, False, False, False, True], [9.0, 0.1, 0.2, 0.3, 9.0]).branches["cond"]
    found = branch.percentiles()
    assert found is not None
    assert found == pytest.approx({"min": 0.1, "p25": 0.15, "p50": 0.2, "p75": 0.25, "max": 0.3})
    assert run_of([True, False]).branches["cond"].percentiles() is None


def test_a_step_that_a_branch_left_out_counts_for_nothing() -> None:
    run = run_of([True, None, None, False], [0.0, 9.0, 9.0, 0.2])
    branch = run.branches["cond"]
    assert (branch.computed_steps, branch.skipped_steps, branch.done_steps) == (1, 2, 2)
    assert run.ideal_speedup == 2.0
    assert run.estimated_speedup == pytest.approx(2 * 2.0 / 2.5)
    assert run.step_seconds() == {"computed": 2.0, "reused": 0.5}
    data = run.as_dict()["branches"]["cond"]
    assert data["computed"] == [True, None, None, False]
    assert data["distance"] == [0.0, None, None, 0.2]
    assert data["mix"] == [[], [], [], [1.0, 0.5]]
    assert data["percentiles"]["min"] == data["percentiles"]["max"] == 0.2
    (idle,) = run_of([True, None] * 10).warnings({})
    assert "reused nothing" in idle


def test_experts_join_with_every_step_at_its_place() -> None:
    high, low = run_of([True, False]), run_of([True, False, False])
    low.branches["uncond"] = run_of([None, True, False]).branches["cond"]
    whole = RunStatistics.joined([high, low])
    assert whole.steps == 5
    assert whole.branches["cond"].computed == [True, False, True, False, False]
    assert whole.branches["uncond"].computed == [None, None, None, True, False]
    high.foreseen = low.foreseen = ["stretched"]
    assert RunStatistics.joined([high, low]).warnings({})[0] == "stretched"
    lengths = {len(v) for b in whole.branches.values() for v in vars(b).values()}
    assert lengths == {5}


@pytest.mark.parametrize(
    ("run", "parameters", "expected"),
    [
        (run_of([True] * 20), {}, ["reused nothing in branch 'cond'"]),
        (run_of([True] * 20, policy="off"), {}, []),
        (run_of([True, False] * 10, [0.001] * 20), {"threshold": 0.3}, ["can't matter"]),
        (run_of([True, False] * 10, [0.1] * 20), {"threshold": 0.3}, []),
        (run_of([True, False] * 4), {}, ["few-step sampling"]),
        (run_of([True] * 4), {}, ["4 steps is few-step sampling"]),
        (run_of([True] * 20, [0.001] * 20), {"threshold": 0.3}, ["reused nothing"]),
        (run_of([True] * 4, policy="off"), {}, []),
    ],
)
def test_warnings(run: RunStatistics, parameters: dict[str, float], expected: list[str]) -> None:
    found = run.warnings(parameters)
    assert len(found) == len(expected)
    assert all(part in text for part, text in zip(expected, found, strict=True))


def test_one_cause_is_one_warning_for_all_branches() -> None:
    run = run_of([True] * 20)
    run.branches["uncond"] = run.branches["cond"]
    (text,) = run.warnings({"threshold": 0.3})
    assert "reused nothing in branch 'cond' and 'uncond': every step was computed" in text
    run.steps = 4
    (text,) = run.warnings({"threshold": 0.3})
    assert "few-step sampling" in text
    assert "reused nothing in branch 'cond' and 'uncond'" in text


def test_an_uncached_run_has_no_speedup() -> None:
    assert run_of([True] * 20, policy="off").as_dict()["estimated_speedup"] is None
    assert "measured_speedup" not in run_of([True, False]).as_dict(), "nothing was timed beside it"


def test_json_holds_every_branch() -> None:
    data = run_of([True, False], [0.0, 0.1]).as_dict()
    assert data["branches"]["cond"]["computed"] == [True, False]
    assert data["branches"]["cond"]["distance"] == [0.0, 0.1]
    assert data["ideal_speedup"] == 2.0
