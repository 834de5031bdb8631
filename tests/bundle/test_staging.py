# SPDX-License-Identifier: Apache-2.0
"""A folder appears whole or not at all, beside whatever else runs, fails or is killed."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from freewheel.bundle.staging import check_target, staged_folder
from freewheel.core.errors import OutputError


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


def test_a_second_build_of_the_same_target_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with staged_folder(target, replace=False) as first:
        (first / "a").write_text("x")
        with (
            pytest.raises(OutputError) as caught,
            staged_folder(target, replace=False),
        ):
            pytest.fail("must not begin")
        assert caught.value.where == str(target)
        assert "another build" in caught.value.what
        assert "wait for it" in caught.value.hint
        assert (first / "a").exists(), "the running build is not disturbed"
    assert names_in(target) == ["a"]


def test_a_parent_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(OutputError, match=r"bundle: can't be written: .*; choose another --out"),
        staged_folder(tmp_path / "file" / "bundle", replace=False),
    ):
        pytest.fail("must not begin")


def test_a_target_is_judged_ahead_and_nothing_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "bundle").mkdir()
    with pytest.raises(OutputError, match=r"file: already exists; choose another --out$"):
        check_target(tmp_path / "file", replace=False)
    with pytest.raises(OutputError, match="or pass --force"):
        check_target(tmp_path / "bundle", replace=False)
    with pytest.raises(OutputError, match=r"is a file, expected a folder|Not a directory"):
        check_target(tmp_path / "file" / "bundle", replace=False)
    check_target(tmp_path / "bundle", replace=True)
    check_target(tmp_path / "new" / "bundle", replace=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "file"]


def test_a_relative_target_survives_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with staged_folder(Path("bundle"), replace=False):
        os.chdir(tmp_path / "elsewhere")
    assert (tmp_path / "bundle").is_dir()


def die_in(target: Path) -> None:
    with staged_folder(target, replace=False) as folder:
        (folder / "half").write_text("x")
        os._exit(9)


def test_what_a_killed_build_left_is_gone(tmp_path: Path) -> None:
    killed = multiprocessing.get_context("fork").Process(target=die_in, args=(tmp_path / "bundle",))
    killed.start()
    killed.join()
    assert len(names_in(tmp_path)) == 2, "its lock and what it had written"
    with staged_folder(tmp_path / "bundle", replace=False) as folder:
        assert names_in(folder) == []
    assert names_in(tmp_path) == ["bundle"]
    assert names_in(tmp_path / "bundle") == []
