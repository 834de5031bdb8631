"""What-if tables: one replay per value of a parameter."""

from __future__ import annotations

import pytest

from freewheel.core.errors import ConfigError
from freewheel.policies import policy
from freewheel.policies.setting import CacheSetting
from freewheel.tuning.replay import replay
from freewheel.tuning.sweep import run_sweep, sweep_table, sweep_values
from freewheel.tuning.trace import Trace

TEA, TAYLOR = policy("teacache").spec, policy("taylorseer").spec


@pytest.mark.parametrize(
    ("sweep", "values"),
    [
        ("threshold=0.1:0.3:3", ["0.1", "0.2", "0.3"]),
        ("threshold=0.5,0.25", ["0.5", "0.25"]),
        ("max_consecutive=1:3:5", ["1", "2", "3"]),
    ],
)
def test_values_are_spread_or_listed(sweep: str, values: list[str]) -> None:
    assert sweep_values(sweep, TEA) == (sweep.split("=")[0], values)


@pytest.mark.parametrize(
    "sweep", ["threshold", "threshold=", "threshold=1:2", "threshold=a:b:c", "threshold=0:1:1e9"]
)
def test_what_can_not_be_read_is_refused(sweep: str) -> None:
    with pytest.raises(ConfigError, match="--sweep"):
        sweep_values(sweep, TEA)


def test_each_row_is_the_replay_of_its_value(trace: Trace) -> None:
    setting = CacheSetting(policy="taylorseer", parameters={"order": 1})
    rows = run_sweep(trace, setting, TAYLOR, "interval=1:5:5")
    assert [r.value for r in rows] == ["1", "2", "3", "4", "5"]
    assert rows[0].mean_error is None, "interval 1 reuses nothing"
    alone = replay(trace, CacheSetting(policy="taylorseer", parameters={"order": 1, "interval": 4}))
    assert rows[3].computed_steps == alone.computed_steps
    errors = [e for b in alone.branches.values() for e in b.reuse_error if e is not None]
    assert rows[3].worst_error == max(errors)


def test_the_table_has_a_row_per_value(trace: Trace) -> None:
    rows = run_sweep(trace, CacheSetting(policy="taylorseer"), TAYLOR, "interval=2,4")
    head, _, two, four = sweep_table(rows).splitlines()
    assert head.startswith("| value | computed | ideal speedup |")
    assert two.startswith("| 2 | ")
    assert four.startswith("| 4 | ")


def test_a_value_outside_the_parameters_range_is_one_error(trace: Trace) -> None:
    with pytest.raises(ConfigError, match="order"):
        run_sweep(trace, CacheSetting(policy="taylorseer"), TAYLOR, "order=1:9:9")
