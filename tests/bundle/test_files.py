# SPDX-License-Identifier: Apache-2.0
"""Digests and links of a bundle's files, and names that may not leave its folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from pathlib import Path

import pytest

from freewheel.bundle import files
from freewheel.bundle.files import (
    describe_files,
    digests_ahead,
    disk_use,
    link_or_none,
    safe_path,
    sha256_of,
    sha256_of_each,
)
from freewheel.core.errors import BundleError

HANG_SECONDS = 300
"""Ends a test that hangs; nothing else depends on it."""


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/../../x",
        "a/..",
        "/etc/passwd",
        "",
        "..",
        "a\\b",
        "..\\x",
        "C:\\x",
        "link/x",
        "out",
    ],
)
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "out").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError) as caught:
        safe_path(folder, name)
    assert caught.value.where == f"manifest.json, path '{name}'"
    assert "leaves the bundle's folder" in caught.value.what
    assert "build it again" in caught.value.hint


@pytest.mark.parametrize("name", ["a", "a/b.onnx", "./a", "a..b", "weights/x-00001-of-00002.st"])
def test_names_inside_the_folder_are_paths(tmp_path: Path, name: str) -> None:
    assert safe_path(tmp_path, name) == tmp_path / name


def test_a_bundle_reached_through_a_link_is_readable(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert safe_path(tmp_path / "link", "a") == tmp_path / "link" / "a"


def test_digests_are_those_of_sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 3)
    content = b"several chunks of three bytes"
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "empty").write_bytes(b"")
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    assert sha256_of(tmp_path / "empty") == hashlib.sha256().hexdigest()


def test_a_file_under_two_names_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    original = sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda p: (read.append(p), original(p))[1])
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    (tmp_path / "c").write_bytes(b"y")
    digests = sha256_of_each([tmp_path / n for n in "abc"])
    assert digests[0] == digests[1] == hashlib.sha256(b"x").hexdigest()
    assert digests[2] == hashlib.sha256(b"y").hexdigest()
    assert len(read) == 2


def test_files_are_described_by_their_path_with_forward_slashes(tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "block.onnx").write_bytes(b"abc")
    found = describe_files(tmp_path)
    assert list(found) == ["graphs/block.onnx"]
    assert found["graphs/block.onnx"].bytes == 3
    assert found["graphs/block.onnx"].sha256 == hashlib.sha256(b"abc").hexdigest()


def test_disk_use_tells_shared_bytes_from_written_ones(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (tmp_path / "checkpoint").write_bytes(b"x" * 100)
    (folder / "linked").hardlink_to(tmp_path / "checkpoint")
    (folder / "own").write_bytes(b"y" * 10)
    (folder / "twin").hardlink_to(folder / "own")
    assert disk_use(folder, ["linked", "own", "twin"]) == (110, 10)


def test_a_link_is_the_same_file(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"x")
    assert link_or_none(source, target) == target
    assert target.stat().st_ino == source.stat().st_ino


def test_a_link_to_a_link_reaches_the_file(tmp_path: Path) -> None:
    """The hub's cache holds symbolic links into a store of blobs."""
    (tmp_path / "blob").write_bytes(b"x")
    (tmp_path / "snapshot").symlink_to(tmp_path / "blob")
    target = tmp_path / "b"
    assert link_or_none(tmp_path / "snapshot", target) == target
    assert not target.is_symlink()
    assert target.stat().st_ino == (tmp_path / "blob").stat().st_ino


def test_where_links_are_impossible_none_is_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_bytes(b"x")
    assert link_or_none(tmp_path / "a", tmp_path / "b") is None
    assert names_in(tmp_path) == ["a"]


def test_digests_begun_ahead_are_taken_and_the_waiting_ones_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode() * 99)
    read: list[str] = []
    begun, release = threading.Event(), threading.Event()

    def slow(path: Path) -> str:
        read.append(path.name)
        if path.name == "a":
            begun.set()
            assert release.wait(HANG_SECONDS), "'b' waits for 'a'"
        if path.name == "b":
            release.set()
        return sha256_of(path)

    expected = describe_files(tmp_path)
    monkeypatch.setattr(files, "sha256_of", slow)
    with digests_ahead([tmp_path / "a", tmp_path / "b"]) as ahead:
        assert begun.wait(HANG_SECONDS)
        assert describe_files(tmp_path, ahead) == expected
    assert sorted(read) == ["a", "b", "c"], "each file once, 'b' without waiting for 'a'"


def test_digests_begun_ahead_are_left_when_the_block_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    release = threading.Event()
    monkeypatch.setattr(files, "sha256_of", lambda path: str(release.wait(HANG_SECONDS)))
    with (
        contextlib.suppress(RuntimeError),
        digests_ahead([tmp_path / "a", tmp_path / "b"]) as ahead,
    ):
        raise RuntimeError
    release.set()
    assert list(ahead.values())[1].cancelled()
