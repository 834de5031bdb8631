# SPDX-License-Identifier: Apache-2.0
"""Memory and disk of this machine, and of machines made of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from freewheel.engines import host


def test_memory_is_what_the_system_says_is_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable: 64 kB\n")
    monkeypatch.setattr(host, "MEMINFO", meminfo)
    monkeypatch.setattr(host, "GROUP", tmp_path / "absent")
    assert host.memory_available_bytes() == 64 << 10


def test_a_containers_limit_counts_with_its_evictable_pages_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text("50000\n")
    (tmp_path / "memory.current").write_text("45000\n")
    (tmp_path / "memory.stat").write_text("anon 5000\nfile 40000\n")
    monkeypatch.setattr(host, "GROUP", tmp_path)
    assert host.memory_available_bytes() == 45_000
    (tmp_path / "memory.max").write_text("max\n")
    assert host.memory_available_bytes() != 45_000


def test_a_system_that_tells_nothing_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "MEMINFO", tmp_path / "absent")
    monkeypatch.setattr(host, "GROUP", tmp_path / "absent")
    assert host.memory_available_bytes() is None


def test_disk_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    place = tmp_path / "not" / "there"
    assert host.existing_parent(place) == tmp_path
    assert host.disk_free_bytes(place) > 0


def test_the_peak_stays_where_memory_is_given_back() -> None:
    before = host.peak_memory_bytes()
    assert before is not None
    held = bytearray(os.urandom(1 << 20) * 64)
    during = host.peak_memory_bytes()
    assert during is not None
    assert during >= before
    del held
    assert host.peak_memory_bytes() == during
