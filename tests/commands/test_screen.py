# SPDX-License-Identifier: Apache-2.0
"""What the command line shows of a long job."""

from __future__ import annotations

import pytest
from rich.progress import Progress

from freewheel.commands.screen import RateColumn, Screen


@pytest.mark.parametrize(("seconds", "shown"), [(0.5, "2.0/s"), (4.0, "4.0 s each")])
def test_a_rate_is_of_steps_or_of_seconds(seconds: float, shown: str) -> None:
    now = 0.0
    bar = Progress(get_time=lambda: now)
    task = bar.add_task("denoise", total=10)
    column = RateColumn()
    assert column.render(bar.tasks[0]).plain == ""
    for _ in range(3):
        now += seconds
        bar.advance(task)
    assert column.render(bar.tasks[0]).plain == shown


def test_phases_are_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    with screen.progress():
        screen.phase("load")
        screen.phase("denoise", 30)
        screen.advance("step")
    assert capsys.readouterr().err.splitlines() == ["load", "denoise: 30"]


def test_a_warning_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    for text in ("stretched", "late", "stretched"):
        screen.warn(text)
    assert capsys.readouterr().err.splitlines() == ["warning: stretched", "warning: late"]
