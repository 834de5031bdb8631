# SPDX-License-Identifier: Apache-2.0
"""Builds that are killed, run out of disk or meet each other: never a bundle that is wrong."""

from __future__ import annotations

import multiprocessing
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from freewheel.bundle.journal import journal_of
from freewheel.bundle.reader import Bundle
from freewheel.compiler import graphs
from freewheel.compiler.build import BuildRequest, build
from freewheel.configs.errors import BundleError, FreewheelError, OutputError
from freewheel.engines import backend
from freewheel.runtime.settings import config_entries

KILLS = 20
pytestmark = [pytest.mark.slow, pytest.mark.serial]


def request_of(checkpoint: Path, out: Path) -> BuildRequest:
    return BuildRequest(
        model=str(checkpoint), out=out, backends=[backend("onnxruntime")],
        configs=config_entries(["off"], lambda text: None),
    )  # fmt: skip


def build_there(checkpoint: Path, out: Path) -> None:
    build(request_of(checkpoint, out))


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that are forked from one which has imported the compiler and done nothing."""
    context = multiprocessing.get_context("forkserver")
    sys.path.insert(0, str(Path(__file__).parent))
    context.set_forkserver_preload(["warm"])
    return context


def staging(out: Path) -> Path:
    return out.with_name(f".{out.name}.building")


def pieces(out: Path) -> int:
    journal = journal_of(staging(out))
    return journal.read_text().count('"piece"') if journal.exists() else 0


def wait_for_pieces(out: Path, count: int, process: Any) -> None:
    while process.is_alive() and pieces(out) < count:
        time.sleep(0.02)


def test_builds_killed_at_random_moments_are_resumed(
    processes: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    rng = random.Random(0)
    out = tmp_path / "bundle"
    killed, most, attempts = 0, 0, 0
    while killed < KILLS:
        attempts += 1
        before = pieces(out)
        process = processes.Process(target=build_there, args=(tiny_checkpoint, out))
        process.start()
        wait_for_pieces(out, before + rng.randrange(4), process)
        process.join(rng.uniform(0.0, 0.5))
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
        if out.exists():
            assert Bundle(out).digests() == [], "whole, or not there"
            out.rename(tmp_path / f"whole-{attempts}")
        else:
            with pytest.raises(BundleError):
                Bundle(out)
        most = max(most, pieces(out))
    assert most > 10, "no build was killed with pieces finished"
    report = build(request_of(tiny_checkpoint, out))
    assert Bundle(out).digests() == []
    assert sorted(p.name for p in tmp_path.iterdir() if "whole" not in p.name) == ["bundle"]
    assert len(report.manifest.graphs) > 15


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_the_rerun_resumes(
    tiny_checkpoint: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = small_disk / "bundle"
    with pytest.raises(FreewheelError) as caught:
        build(request_of(tiny_checkpoint, out))
    assert "space" in str(caught.value)
    assert not out.exists()
    assert pieces(out) > 10
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    monkeypatch.setattr(graphs, "trace", lambda *arguments: pytest.fail("traced again"))
    build(request_of(tiny_checkpoint, out))
    assert Bundle(out).digests() == []
    assert [p.name for p in small_disk.iterdir()] == ["bundle"]


def test_a_target_that_cannot_be_written_is_named(tiny_checkpoint: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError, match=r"can't be written: .*Read-only"):
        build(request_of(tiny_checkpoint, small_disk / "bundle"))
    assert list(small_disk.iterdir()) == []


def test_a_second_build_at_once_is_refused(
    processes: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    first = processes.Process(target=build_there, args=(tiny_checkpoint, out))
    first.start()
    while not staging(out).is_dir():
        time.sleep(0.01)
    with pytest.raises(OutputError, match="another build of this target is running"):
        build(request_of(tiny_checkpoint, out))
    assert first.is_alive(), "it is not disturbed"
    first.kill()
    first.join()
