"""What other settings would have decided: the same as replay, and as the law's own formula."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from freewheel.policies.setting import CacheSetting, GuardSetting
from freewheel.runtime.pipeline.generate import Generator
from freewheel.tuning.replay import replay
from freewheel.tuning.trace import Trace, TraceRecorder
from freewheel.tuning.what_if import foretell, reached_distances

TEACACHE = CacheSetting(policy="teacache", parameters={"threshold": 0.5})


def relative_changes(trace: Trace) -> np.ndarray:
    temb = trace.get("cond", "temb").astype(np.float64)
    return np.abs(np.diff(temb, axis=0)).mean(axis=1) / np.abs(temb[:-1]).mean(axis=1)


def test_distance_before_the_reset_is_the_sum_since_the_last_computed_step(trace: Trace) -> None:
    told, reached = reached_distances(trace, TEACACHE)
    total, expected = 0.0, []
    for change, was_computed in zip(
        relative_changes(trace), told.branches["cond"].computed[1:], strict=True
    ):
        total += change
        expected.append(total)
        total = 0.0 if was_computed else total
    assert reached["cond"][0] is None, "nothing is compared before the second step"
    np.testing.assert_allclose(reached["cond"][1:], expected, rtol=1e-4)


def test_computed_steps_are_those_that_reached_the_threshold(trace: Trace) -> None:
    told, reached = reached_distances(trace, TEACACHE)
    for computed, distance in zip(told.branches["cond"].computed, reached["cond"], strict=True):
        assert computed == (distance is None or distance >= 0.5)


def test_limits_of_the_guard_do_not_show_in_what_was_reached(trace: Trace) -> None:
    guard = GuardSetting(first_exact=4, last_exact=3, max_consecutive=2, exact_steps=[7])
    _, reached = reached_distances(trace, TEACACHE.model_copy(update={"guard": guard}))
    changes = relative_changes(trace)
    # Each of the first exact steps begins anew.
    np.testing.assert_allclose(reached["cond"][1:4], changes[:3], rtol=1e-4)
    assert None not in reached["cond"][1:]


@pytest.mark.parametrize(
    ("policy", "parameters"),
    [
        ("custom", {}),
        ("magcache", {"ratios": [0.95]}),
        ("easycache", {}),
        ("firstblock", {}),
        ("sencache", {}),
    ],
)
def test_every_policy_with_a_distance_tells_what_it_reached(
    trace: Trace, policy: str, parameters: dict[str, Any]
) -> None:
    setting = CacheSetting(policy=policy, parameters=parameters)
    told, reached = reached_distances(trace, setting)
    assert [b.computed for b in told.branches.values()] == [
        b.computed for b in replay(trace, setting).branches.values()
    ]
    known = [d for d in reached["cond"] if d is not None]
    assert len(known) >= len(reached["cond"]) // 2
    assert max(known) > 0


def test_a_policy_without_distance_tells_none(trace: Trace) -> None:
    assert reached_distances(trace, CacheSetting(policy="taylorseer"))[1] == {}


def test_a_cached_run_tells_the_distances_of_its_own_decisions(
    generator: Generator, request_of: Any
) -> None:
    recorder = TraceRecorder()
    run = generator.generate(request_of(TEACACHE), recorder=recorder)
    told, reached = reached_distances(recorder.trace(), TEACACHE)
    assert told.branches["cond"].computed == run.statistics.branches["cond"].computed
    assert any(d is not None and d >= 0.5 for d in reached["cond"])
    assert told.error == 0, "what reuse missed is not known of steps that were not computed"


def test_sweep_equals_replays_and_holds_the_setting_itself(trace: Trace) -> None:
    (found,) = foretell(trace, [TEACACHE])
    assert (found.policy, found.parameter, found.values[found.current]) == (
        "teacache",
        "threshold",
        0.5,
    )
    own = replay(trace, TEACACHE)
    row = found.rows[found.current]
    assert row["computed"]["uncond"] == own.branches["uncond"].computed
    assert (row["error"], row["ideal_speedup"]) == (own.error, own.ideal_speedup)
    assert all(a < b for a, b in pairwise(found.values))
    assert found.rows[0]["ideal_speedup"] == 1, "threshold 0 never reuses"
    assert found.rows[-1]["ideal_speedup"] > row["ideal_speedup"]


def test_intervals_count_from_the_least_and_thresholds_of_zero_have_neighbours(
    trace: Trace,
) -> None:
    never = CacheSetting(policy="teacache", parameters={"threshold": 0})
    long = CacheSetting(policy="taylorseer", parameters={"interval": 15})
    zero, taylor = foretell(trace, [never, long])
    assert zero.current == 0
    assert len(zero.values) > 20
    assert taylor.parameter == "interval"
    assert taylor.values[-1] == 15 == taylor.values[taylor.current]
    assert taylor.rows[0]["error"] == 0


def test_branches_with_a_threshold_of_their_own_move_too(trace: Trace) -> None:
    setting = TEACACHE.model_copy(update={"branches": {"uncond": {"threshold": 0.01}}})
    (found,) = foretell(trace, [setting])
    assert found.rows[-1]["computed"]["uncond"] == found.rows[-1]["computed"]["cond"]


def test_what_the_trace_lacks_and_what_has_no_parameter_is_left_out(trace: Trace) -> None:
    lacking = Trace({n: a for n, a in trace.arrays.items() if "first_block" not in n})
    settings = [CacheSetting(policy=p) for p in ("firstblock", "adacache", "off", "taylorseer")]
    assert [f.policy for f in foretell(lacking, settings)] == ["taylorseer"]
