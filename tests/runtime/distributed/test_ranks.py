# SPDX-License-Identifier: Apache-2.0
"""A job of several processes ends well or with one error, and never hangs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from launching import torchrun

from freewheel.bundle.reader import Bundle
from freewheel.cli import app
from freewheel.core.errors import RankError
from freewheel.runtime.distributed.ranks import TIMEOUT, brief, join_ranks, timeout_of_ranks

FAILING = Path(__file__).parent / "failing_run.py"

REQUEST = ("--prompt", "a red circle", "--steps", 4, "--frames", 5, "--seed", 7, "--cache", "off")

nightly = pytest.mark.nightly


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        # daily, a rank is killed inside a block: test_sequence.py
        pytest.param("killed", "rank", marks=nightly),
        pytest.param("silent", "rank 1: has not answered rank 0 for 8 s", marks=nightly),
        pytest.param("without_memory", "memory", marks=nightly),
        pytest.param("not_finite", "branch 'uncond', step 2", marks=nightly),
        pytest.param("another_version", "rank 1: the version of freewheel is '0.0.1'", marks=nightly),
        pytest.param("another_request", "rank 1: seed is '8', rank 0's is '7'", marks=nightly),
        pytest.param("another_bundle", "rank 1: the bundle's manifest is", marks=nightly),
    ],
)  # fmt: skip
def test_a_rank_that_fails_ends_the_run_with_one_error(
    demo_bundle: Bundle, tmp_path: Path, kind: str, said: str
) -> None:
    out, other = tmp_path / "video.png", tmp_path / "other"
    if kind == "another_bundle":
        shutil.copytree(demo_bundle.folder, other)
        manifest = json.loads((other / "manifest.json").read_text())
        (other / "manifest.json").write_text(json.dumps(manifest, indent=3))
    done = torchrun(
        FAILING, kind, "run", demo_bundle.folder, *REQUEST, "--out", out,
        **{TIMEOUT: "8" if kind == "silent" else "60", "OTHER_BUNDLE": str(other)},
    )  # fmt: skip
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


def test_a_brief_text_differs_where_the_text_does() -> None:
    first, second = "x" * 500, "x" * 499 + "y"
    assert brief("short") == "short"
    assert brief(first) != brief(second)
    assert len(brief(first)) < 100
