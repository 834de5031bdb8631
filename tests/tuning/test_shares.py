# SPDX-License-Identifier: Apache-2.0
"""Prompts and candidates over two ranks give what one process gives, and a lost rank costs little."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime" / "distributed"))
from launching import torchrun

from freewheel.bundle.reader import Bundle
from freewheel.cli import app
from freewheel.tuning.shares import Shares

FAILING = Path(__file__).parents[1] / "runtime" / "distributed" / "failing_run.py"

COLOURS = ("red", "white", "green", "blue")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"a {c} ring growing on a black background\n" for c in COLOURS))
    return path


def alone(*arguments: object) -> dict[str, Any]:
    """Run a command in this process and return its JSON."""
    done = CliRunner().invoke(app, [*(str(a) for a in arguments), "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def shared(*arguments: object) -> dict[str, Any]:
    """Run a command over two ranks and return the one JSON that they print."""
    done = torchrun("-m", "freewheel", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def calibration(bundle: Bundle, prompts: Path, out: Path) -> tuple[object, ...]:
    return (
        "calibrate", bundle.folder, "--prompts", prompts, "--out", out, "--steps", 8, "--refine", 2,
        "--search", 1, "--speedup", 2, "--speedup", 3,
    )  # fmt: skip


def timeless(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    del found["calibration"]["seconds"]
    return found


def test_a_process_alone_does_every_item_in_order() -> None:
    shares = Shares(None)
    assert [shares.is_mine(item) for item in range(3)] == [True] * 3
    assert shares.gather({0: b"a", 1: b"bc"}, "x") == [b"a", b"bc"]
    assert shares.gather_json({0: [0.1, None], 1: "é"}, "x") == [[0.1, None], "é"]
    assert shares.leads


def test_two_ranks_gather_in_the_order_of_items(tmp_path: Path) -> None:
    """How long one waits for the other is test_ranks.py's, with a clock of its own."""
    job = Path(__file__).parents[1] / "runtime" / "distributed" / "sharing_job.py"
    done = torchrun(job, tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    expected = [["item", item, item / 3] for item in range(5)]
    assert [f["items"] for f in found] == [expected] * 2
    assert [f["mine"] for f in found] == [[0, 2, 4], [1, 3]]


@pytest.mark.nightly
def test_a_calibration_over_two_ranks_is_that_of_one_process(
    small_demo: Bundle, prompts: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    alone(*calibration(small_demo, prompts, one))
    shared(*calibration(small_demo, prompts, two))
    assert timeless(two) == timeless(one)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.json", "prompts.txt", "two.json"]


@pytest.mark.nightly
def test_a_calibration_goes_on_after_a_lost_rank(
    small_demo: Bundle, prompts: Path, tmp_path: Path
) -> None:
    """With other processes than before, too: here with one."""
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    alone(*calibration(small_demo, prompts, one))
    lost = torchrun(FAILING, "killed_in_its_second_run", *calibration(small_demo, prompts, two))
    assert lost.returncode != 0
    assert lost.stderr.count("error:") == 1, lost.stderr
    assert not two.exists()
    kept = sorted(p.name[:8] for p in (tmp_path / ".two.json.unfinished").iterdir())
    assert {"run-0000", "run-0001"} <= set(kept)
    assert "run-0003" not in kept
    arguments = [str(a) for a in calibration(small_demo, prompts, two)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert f"{len(kept)} of 4 runs were recorded before: going on from them" in done.stderr
    assert timeless(two) == timeless(one)
    assert not (tmp_path / ".two.json.unfinished").exists()


@pytest.mark.nightly
def test_a_bench_over_two_ranks_has_the_quality_of_one_process(
    small_demo: Bundle, prompts: Path
) -> None:
    arguments = (
        "bench", small_demo.folder, "--prompts", prompts, "--steps", 8, "--rounds", 4,
        "--cache", "shapes_wan_teacache", "--cache", "taylorseer",
    )  # fmt: skip
    one, two = alone(*arguments), shared(*arguments)
    assert (one["concurrent_ranks"], two["concurrent_ranks"]) == (1, 2)
    untimed = ("name", "computed_steps", "ideal_speedup", "psnr_mean", "psnr_worst", "ssim_mean")
    for before, after in zip(one["settings"], two["settings"], strict=True):
        assert {n: after[n] for n in untimed} == {n: before[n] for n in untimed}


@pytest.mark.nightly
def test_tuning_over_two_ranks_ranks_the_same_candidates(
    small_demo: Bundle, prompts: Path, tmp_path: Path
) -> None:
    arguments = (
        "tune", small_demo.folder, "--prompts", prompts, "--out", tmp_path / "tuned.json",
        "--min-psnr", 1, "--steps", 8, "--confirm", 2, "--rounds", 1,
    )  # fmt: skip
    one, two = alone(*arguments), shared(*arguments)
    assert two["candidates"] == one["candidates"]
    confirmed = [[(r["name"], r["psnr_mean"]) for r in found["confirmed"]] for found in (one, two)]
    assert confirmed[0] == confirmed[1]
