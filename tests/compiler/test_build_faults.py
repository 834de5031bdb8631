# SPDX-License-Identifier: Apache-2.0
"""Builds that are killed, run out of disk or meet each other: never a bundle that is wrong."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from freewheel.bundle.reader import Bundle
from freewheel.bundle.store import Store
from freewheel.compiler.build import build
from freewheel.compiler.graphs import write as graphs
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.core.errors import BundleError, FreewheelError, OutputError
from freewheel.engines import backend
from freewheel.runtime.settings import config_entries

KILLS, MOST_CHANGES = 20, 120
CHANGES = ("open", "os.mkdir", "os.rename", "os.link", "os.remove")


def request_of(checkpoint: Path, out: Path, cache: Path) -> BuildRequest:
    return BuildRequest(
        model=str(checkpoint),
        out=out,
        backends=[backend("onnxruntime")],
        cache=cache,
        configs=config_entries(["off"], lambda text: None),
    )


def build_there(checkpoint: Path, out: Path, cache: Path) -> None:
    torch.set_num_threads(1)
    build(plan(request_of(checkpoint, out, cache)))


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that are forked from one which has imported the compiler and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["freewheel.compiler.build"])
    return context


def staging(out: Path) -> list[Path]:
    """List what builds of ``out`` that aren't at their end have written."""
    return list(out.parent.glob(f".{out.name}.*.partial/new/{out.name}/*"))


def pieces(cache: Path) -> int:
    """Count what is finished in a cache."""
    store = cache / "store"
    return sum(not p.name.startswith(".") for p in store.iterdir()) if store.is_dir() else 0


def build_until(moment: int, checkpoint: Path, out: Path, cache: Path) -> None:
    """Build, and die right before the ``moment``-th change under ``out``'s folder or the cache."""
    roots, left = (str(out.parent), str(cache)), moment
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open" and not arguments[2] & writes:
            return
        if event in CHANGES and any(str(a).startswith(roots) for a in arguments[:2]):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    build_there(checkpoint, out, cache)


@pytest.mark.nightly
def test_builds_killed_at_any_change_of_the_disk_are_resumed(
    processes: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Counted in changes, not in time: every machine kills at the same ones."""
    rng = random.Random(0)
    out, cache = tmp_path / "out" / "bundle", tmp_path / "cache"
    out.parent.mkdir()
    killed, attempts, grown = 0, 0, 0
    while killed < KILLS:
        attempts += 1
        before = pieces(cache)
        given = rng.randrange(1, MOST_CHANGES), tiny_checkpoint, out, cache
        process = processes.Process(target=build_until, args=given)
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        killed += process.exitcode != 0
        grown += pieces(cache) > before
        assert pieces(cache) >= before, "what is finished stays"
        if out.exists():
            assert Bundle(out).digests() == [], "whole, or not there"
            out.rename(out.with_name(f"whole-{attempts}"))
            shutil.rmtree(cache)
        else:
            with pytest.raises(BundleError):
                Bundle(out)
    assert grown > 2, "builds were killed with pieces finished"
    report = build(plan(request_of(tiny_checkpoint, out, cache)))
    assert Bundle(out).digests() == []
    assert [p.name for p in out.parent.iterdir() if "whole" not in p.name] == ["bundle"]
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
    tiny_checkpoint: Path, small_disk: Path, traced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "trace", lambda *arguments: pytest.fail("traced again"))
    out = small_disk / "bundle"
    with pytest.raises(FreewheelError) as caught:
        build(plan(request_of(tiny_checkpoint, out, traced)))
    assert "space" in str(caught.value)
    assert list(small_disk.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    build(plan(request_of(tiny_checkpoint, out, traced)))
    assert Bundle(out).digests() == []
    assert [p.name for p in small_disk.iterdir()] == ["bundle"]


def test_a_store_on_a_full_disk_is_named_and_keeps_nothing_half(
    small_disk: Path, tmp_path: Path
) -> None:
    store = Store(small_disk / "store")
    with pytest.raises(OutputError, match=r"store: can't be written: No space left.*--build-cache"):
        store.bring("k", tmp_path / "a", lambda out: out.write_bytes(bytes(1 << 20)))
    assert list(small_disk.iterdir()) == []


def test_a_target_that_cannot_be_written_is_named(tiny_checkpoint: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError, match=r"can't be written: .*Read-only"):
        build(plan(request_of(tiny_checkpoint, small_disk / "bundle", small_disk / "cache")))
    assert list(small_disk.iterdir()) == []


def test_a_second_build_at_once_is_refused(
    processes: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out, cache = tmp_path / "bundle", tmp_path / "cache"
    first = processes.Process(target=build_there, args=(tiny_checkpoint, out, cache))
    first.start()
    while not staging(out):
        assert first.is_alive()
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)  # so that it is under way, however long the second takes
    first_files = staging(out)
    with pytest.raises(OutputError, match="another build of this target is running"):
        build(plan(request_of(tiny_checkpoint, out, cache)))
    assert set(staging(out)) >= set(first_files), "it is not disturbed"
    first.kill()
    first.join()
