# SPDX-License-Identifier: Apache-2.0
"""A bundle appears whole or not at all, and no name leaves its folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
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
    staged_folder,
)
from freewheel.configs.errors import BundleError, OutputError


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def bundle_in(folder: Path) -> Path:
    target = folder / "bundle"
    target.mkdir()
    (target / "manifest.json").write_text("{}")
    (target / "old").write_text("x")
    return target


def test_the_folder_takes_its_name_when_the_block_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "bundle"
    with staged_folder(target, replace=False) as folder:
        (folder / "a").write_text("x")
        assert not target.exists()
    assert names_in(target.parent) == ["bundle"]
    assert (target / "a").read_text() == "x"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged_folder(tmp_path / "bundle", replace=False) as folder:  # noqa: PT012
        (folder / "half").write_text("x")
        raise error
    assert names_in(tmp_path) == []


def test_a_failure_leaves_the_bundle_that_was_to_be_replaced(tmp_path: Path) -> None:
    target = bundle_in(tmp_path)
    with pytest.raises(RuntimeError), staged_folder(target, replace=True) as folder:  # noqa: PT012
        (folder / "new").write_text("y")
        raise RuntimeError
    assert names_in(tmp_path) == ["bundle"]
    assert names_in(target) == ["manifest.json", "old"]


def test_an_existing_target_is_refused_and_kept(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    with (
        pytest.raises(OutputError, match=r"bundle: already exists; .*--out or pass --force"),
        staged_folder(target, replace=False),
    ):
        pytest.fail("must not begin")
    assert names_in(tmp_path) == ["bundle"]


def test_replacing_leaves_only_the_new_content(tmp_path: Path) -> None:
    target = bundle_in(tmp_path)
    with staged_folder(target, replace=True) as folder:
        (folder / "new").write_text("y")
        assert names_in(target) == ["manifest.json", "old"], "the old one stays until the end"
    assert names_in(tmp_path) == ["bundle"]
    assert names_in(target) == ["new"]


def test_nothing_but_a_bundle_is_ever_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "wedding.jpg").write_text("x")
    (tmp_path / "file").write_text("a file")
    for name in ("photos", "file"):
        with (
            pytest.raises(OutputError) as caught,
            staged_folder(tmp_path / name, replace=True),
        ):
            pytest.fail("must not begin")
        assert caught.value.where == str(tmp_path / name)
        assert "is no bundle" in caught.value.what
        assert "another --out" in caught.value.hint
    assert names_in(tmp_path) == ["file", "photos"]
    assert names_in(tmp_path / "photos") == ["wedding.jpg"]


def test_an_empty_folder_is_replaced_when_asked(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with staged_folder(tmp_path / "bundle", replace=True) as folder:
        (folder / "new").write_text("y")
    assert names_in(tmp_path / "bundle") == ["new"]


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with (
        pytest.raises(OutputError, match="already exists"),
        staged_folder(target, replace=False),
    ):
        target.mkdir()
    assert names_in(tmp_path) == ["bundle"]


def test_the_old_bundle_comes_back_where_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = bundle_in(tmp_path)
    rename = Path.rename

    def refuse_staging(path: Path, to: Path) -> Path:
        if path.name.endswith(".building"):
            raise OSError(5, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse_staging)
    with pytest.raises(OSError, match="Input/output"), staged_folder(target, replace=True):
        pass
    assert names_in(tmp_path) == ["bundle"]
    assert names_in(target) == ["manifest.json", "old"]


def test_a_second_build_of_the_same_target_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with staged_folder(target, replace=False) as first:
        (first / "a").write_text("x")
        with (
            pytest.raises(OutputError) as caught,
            staged_folder(target, replace=False),
        ):
            pytest.fail("must not begin")
        assert ".bundle.building" in caught.value.where
        assert "another build" in caught.value.what
        assert "remove" in caught.value.hint
        assert (first / "a").exists(), "the running build is not disturbed"
    assert names_in(target) == ["a"]


def test_a_parent_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(OutputError, match=r"bundle: can't be written: .*; choose another --out"),
        staged_folder(tmp_path / "file" / "bundle", replace=False),
    ):
        pytest.fail("must not begin")


def test_a_relative_target_survives_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with staged_folder(Path("bundle"), replace=False):
        os.chdir(tmp_path / "elsewhere")
    assert (tmp_path / "bundle").is_dir()


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
    release = threading.Event()

    def slow(path: Path) -> str:
        read.append(path.name)
        if path.name == "a":
            release.wait(10)
        return sha256_of(path)

    expected = describe_files(tmp_path)
    monkeypatch.setattr(files, "sha256_of", slow)
    with digests_ahead([tmp_path / "a", tmp_path / "b"]) as ahead:
        while "a" not in read:
            time.sleep(0.001)
        threading.Timer(0.05, release.set).start()
        assert describe_files(tmp_path, ahead) == expected
    assert sorted(read) == ["a", "b", "c"], "each file once, 'b' without waiting for 'a'"


def test_digests_begun_ahead_are_left_when_the_block_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    release = threading.Event()
    monkeypatch.setattr(files, "sha256_of", lambda path: str(release.wait(10)))
    with (
        contextlib.suppress(RuntimeError),
        digests_ahead([tmp_path / "a", tmp_path / "b"]) as ahead,
    ):
        raise RuntimeError
    release.set()
    assert list(ahead.values())[1].cancelled()
