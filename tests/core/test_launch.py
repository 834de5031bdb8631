# SPDX-License-Identifier: Apache-2.0
"""A process knows whether a launcher started it as one of several."""

from __future__ import annotations

import pytest

from freewheel.core.launch import VARIABLES, Launch, launch

TWO = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def place(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> Launch | None:
    for name in (*VARIABLES, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return launch()


def test_a_process_of_several_knows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(monkeypatch, {**TWO, "LOCAL_RANK": "0"}) == Launch(1, 2, 0)
    assert place(monkeypatch, TWO) == Launch(1, 2, 1), "one machine, unless the launcher says else"


@pytest.mark.parametrize("missing", VARIABLES)
def test_a_process_without_a_launcher_is_alone(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    assert place(monkeypatch, {n: v for n, v in TWO.items() if n != missing}) is None


def test_a_job_of_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(monkeypatch, {**TWO, "RANK": "0", "WORLD_SIZE": "1"}) is None
