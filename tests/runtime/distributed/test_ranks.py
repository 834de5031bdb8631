# SPDX-License-Identifier: Apache-2.0
"""A job of several processes ends well or with one error, and never hangs."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from launching import torchrun

from freewheel.bundle.reader import Bundle
from freewheel.cli import app
from freewheel.core.errors import RankError
from freewheel.runtime.distributed import ranks as ranks_module
from freewheel.runtime.distributed.ranks import (
    TIMEOUT,
    Ranks,
    brief,
    join_ranks,
    timeout_of_ranks,
)

FAILING = Path(__file__).parent / "failing_run.py"

REQUEST = ("--prompt", "a red circle", "--steps", 4, "--frames", 5, "--seed", 7, "--cache", "off")

nightly = pytest.mark.nightly


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        # daily, a rank is killed inside a block: test_sequence.py
        pytest.param("killed", "rank", marks=nightly),
        pytest.param("silent", "rank 1: has not answered rank 0 for 30 s", marks=nightly),
        pytest.param("without_memory", "memory", marks=nightly),
        pytest.param("not_finite", "branch 'uncond', step 2", marks=nightly),
        pytest.param(
            "another_version", "rank 1: the version of freewheel is '0.0.1'", marks=nightly
        ),
        pytest.param("another_request", "rank 1: seed is '8', rank 0's is '7'", marks=nightly),
        pytest.param("another_bundle", "rank 1: the bundle's manifest is", marks=nightly),
    ],
)
def test_a_rank_that_fails_ends_the_run_with_one_error(
    demo_bundle: Bundle, tmp_path: Path, kind: str, said: str
) -> None:
    out, other = tmp_path / "video.png", tmp_path / "other"
    if kind == "another_bundle":
        shutil.copytree(demo_bundle.folder, other)
        manifest = json.loads((other / "manifest.json").read_text())
        (other / "manifest.json").write_text(json.dumps(manifest, indent=3))
    done = torchrun(
        FAILING,
        kind,
        "run",
        demo_bundle.folder,
        *REQUEST,
        "--out",
        out,
        **({TIMEOUT: "30"} if kind == "silent" else {}),
        OTHER_BUNDLE=str(other),
    )
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert said in errors[0]
    assert "Traceback" not in done.stderr.split("ChildFailedError")[0].split("elastic")[0]
    assert list(tmp_path.glob("*.png")) == []
    assert done.stdout == ""


def test_a_run_over_two_ranks_prints_and_writes_once(demo_bundle: Bundle, tmp_path: Path) -> None:
    arguments = ("run", demo_bundle.folder, *REQUEST, "--json")
    alone, shared = tmp_path / "alone.png", tmp_path / "shared.png"
    assert CliRunner().invoke(app, [str(a) for a in (*arguments, "--out", alone)]).exit_code == 0
    done = torchrun("-m", "freewheel", *arguments, "--out", shared)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["exchange"]["ranks"] == 2
    assert shared.read_bytes() == alone.read_bytes()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process look like one of two, without a launcher's store."""
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--guidance", 1), "--guidance 1: is no guidance"),
        (("--record", "trace.npz"), "--record trace.npz: is for one process"),
        (("--report", "page.html"), "--report page.html: is for one process"),
        (("--device", 0), "--device 0: is for one process"),
    ],
)
def test_run_refuses_what_ranks_cannot_share(
    demo_bundle: Bundle, tmp_path: Path, arguments: tuple[object, ...], said: str
) -> None:
    out = ("--out", tmp_path / "video.png")
    words = ("run", demo_bundle.folder, *REQUEST, *out, *arguments)
    done = CliRunner().invoke(app, [str(a) for a in words])
    assert done.exit_code == 3
    assert said in done.stderr


@pytest.mark.usefixtures("launched")
def test_other_commands_are_the_work_of_one_process(demo_bundle: Bundle) -> None:
    done = CliRunner().invoke(app, ["inspect", str(demo_bundle.folder)])
    assert done.exit_code == 1
    assert "inspect, 2 ranks: is the work of one process; start it alone" in done.stderr


def test_a_script_started_alone_has_nothing_to_join() -> None:
    with pytest.raises(RankError, match="one process alone; start the script with torchrun"):
        join_ranks()


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "1e9"])
def test_a_timeout_is_seconds_above_0(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(TIMEOUT, text)
    with pytest.raises(RankError, match=f"is '{text}', expected seconds above 0"):
        timeout_of_ranks()


class Clock:
    """A clock that a process moves by waiting, and what the other rank does meanwhile."""

    def __init__(self, other: Callable[[float], None]) -> None:
        self.now, self._other = 0.0, other

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._other(self.now)


class Store:
    """Counters by name, as the job's store keeps them."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def add(self, key: str, amount: int) -> int:
        self.counts[key] = self.counts.get(key, 0) + amount
        return self.counts[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.counts for key in keys)


@pytest.fixture
def first_of_two(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    return Ranks(None, timedelta(seconds=3), Store())


def test_signs_of_life_are_waited_for_beyond_the_timeout(
    first_of_two: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beat_for_20_seconds(now: float) -> None:
        first_of_two._store.add("beats/1" if now < 20 else "waits/1", 1)

    clock = Clock(beat_for_20_seconds)
    monkeypatch.setattr(ranks_module, "time", clock)
    first_of_two.wait_for_all("waiting")
    assert 20 <= clock.now < 21


def test_a_rank_that_falls_silent_is_waited_for_as_long_as_the_timeout(
    first_of_two: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beat_for_9_seconds(now: float) -> None:
        if now < 9:
            first_of_two._store.add("beats/1", 1)

    clock = Clock(beat_for_9_seconds)
    monkeypatch.setattr(ranks_module, "time", clock)
    with pytest.raises(RankError, match="rank 1: has not answered rank 0 for 3 s while waiting"):
        first_of_two.wait_for_all("waiting")
    assert 12 <= clock.now < 13


def test_a_brief_text_differs_where_the_text_does() -> None:
    first, second = "x" * 500, "x" * 499 + "y"
    assert brief("short") == "short"
    assert brief(first) != brief(second)
    assert len(brief(first)) < 100
