"""A piece is made once, and given to equal builds alone, whole, in any number of processes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from freewheel.bundle import store as storing
from freewheel.bundle.store import NO_STORE, Store
from freewheel.core.errors import OutputError
from freewheel.core.tensor_spec import TensorSpec

Make = Callable[[Path], None]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def made() -> list[Path]:
    return []


@pytest.fixture
def make(made: list[Path]) -> Make:
    """Return what writes a folder of a small and a deep file, and notes where."""

    def write(out: Path) -> None:
        made.append(out)
        (out / "deep").mkdir(parents=True)
        (out / "small").write_text("a")
        (out / "deep" / "file").write_text("b")

    return write


def files_of(folder: Path) -> dict[str, str]:
    found = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_text() for p in found}


def test_a_piece_is_made_once(store: Store, make: Make, made: list[Path], tmp_path: Path) -> None:
    for name in "abc":
        store.bring(["k", TensorSpec("float32", ("n", 3))], tmp_path / name, make)
    assert made == [tmp_path / "a"]
    assert files_of(tmp_path / "a") == files_of(tmp_path / "c") == {"small": "a", "deep/file": "b"}


def test_a_piece_that_goes_while_it_is_taken_is_made_whole(
    store: Store, make: Make, made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.bring(["k"], tmp_path / "a", make)
    copyfile, copied = shutil.copyfile, []

    def cut(source: str, target: str) -> object:
        copied.append(target)
        if len(copied) == 2:
            raise FileNotFoundError(source)
        return copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", cut)
    store.bring(["k"], tmp_path / "b", make)
    assert made == [tmp_path / "a", tmp_path / "b"]
    assert files_of(tmp_path / "b") == {"small": "a", "deep/file": "b"}


def test_what_depends_on_something_else_is_another_piece(
    store: Store, make: Make, made: list[Path], tmp_path: Path
) -> None:
    about = [
        ["k"],
        ["k", 1],
        ["k", TensorSpec("float32", (1,))],
        ["k", TensorSpec("float32", (2,))],
    ]
    for index, one in enumerate(about):
        store.bring(one, tmp_path / str(index), make)
    assert len(made) == len(about)


def test_what_cannot_be_told_apart_is_refused(store: Store, make: Make, tmp_path: Path) -> None:
    """An object's own name holds its address: it would be another piece in each process."""
    with pytest.raises(TypeError):
        store.bring(["k", object()], tmp_path / "a", make)


def test_a_file_is_a_piece_too(store: Store, tmp_path: Path) -> None:
    store.bring("k", tmp_path / "a", lambda out: out.write_text("x"))
    store.bring("k", tmp_path / "b", lambda out: pytest.fail("made again"))
    assert (tmp_path / "b").read_text() == "x"


def test_without_a_folder_nothing_is_kept(make: Make, made: list[Path], tmp_path: Path) -> None:
    for name in "ab":
        NO_STORE.bring("k", tmp_path / name, make)
    NO_STORE.trim()
    assert len(made) == 2


@pytest.mark.parametrize("damage", ["bytes", "gone", "more", "no digests", "digests cut"])
def test_a_damaged_piece_is_made_again_and_mended(
    store: Store, make: Make, made: list[Path], tmp_path: Path, damage: str
) -> None:
    store.bring("k", tmp_path / "a", make)
    (place,) = (tmp_path / "store").iterdir()
    if damage == "bytes":
        (place / "piece" / "small").write_text("z")
    elif damage == "gone":
        (place / "piece" / "small").unlink()
    elif damage == "more":
        (place / "piece" / "other").write_text("z")
    elif damage == "no digests":
        (place / "sha256.json").unlink()
    else:
        (place / "sha256.json").write_text((place / "sha256.json").read_text()[:-5])
    for name in "bc":
        store.bring("k", tmp_path / name, make)
        assert files_of(tmp_path / name) == files_of(tmp_path / "a")
    assert made == [tmp_path / "a", tmp_path / "b"]


def test_a_piece_whose_making_fails_is_not_kept(store: Store, tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        out.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.bring("k", tmp_path / "a", fail)
    store.bring("k", tmp_path / "b", lambda out: out.write_text("whole"))
    assert (tmp_path / "b").read_text() == "whole"


def test_a_process_killed_while_it_keeps_leaves_nothing_that_is_given(
    store: Store, make: Make, made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(path: Path, to: Path) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(SystemExit):
            store.bring("k", tmp_path / "a", make)
    store.bring("k", tmp_path / "b", make)
    assert len(made) == 2


def bring_often(folder: Path, worker: int) -> None:
    store = Store(folder / "store")
    for index in range(40):
        out = folder / f"{worker}-{index}"
        store.bring(["k", index % 4], out, lambda place: place.write_text("whole" * 1000))
        assert out.read_text() == "whole" * 1000


def test_processes_share_a_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=bring_often, args=(tmp_path, i)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0] * 4
    assert len(list((tmp_path / "store").iterdir())) == 4, "no half piece is left"


def test_large_files_are_one_on_the_disk_and_small_ones_are_not(
    store: Store, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever edits a small file of one bundle leaves the others as they are."""
    for name in "ab":
        store.bring("k", tmp_path / name, make)
    assert not (tmp_path / "a" / "small").samefile(tmp_path / "b" / "small")
    monkeypatch.setattr(storing, "LINKED_BYTES", 1)
    for name in "cd":
        store.bring("large", tmp_path / name, make)
    assert (tmp_path / "c" / "small").samefile(tmp_path / "d" / "small")


def test_where_links_are_impossible_files_are_copied(
    store: Store, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(storing, "LINKED_BYTES", 1)
    monkeypatch.setattr(os, "link", refuse)
    for name in "ab":
        store.bring("k", tmp_path / name, make)
    assert files_of(tmp_path / "b") == files_of(tmp_path / "a")
    assert not (tmp_path / "a" / "small").samefile(tmp_path / "b" / "small")


def test_a_store_that_cannot_be_written_is_named(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError) as caught:
        Store(tmp_path / "file" / "store").bring("k", tmp_path / "a", make)
    assert caught.value.where == str(tmp_path / "file" / "store")
    assert "can't be written" in caught.value.what
    assert "--build-cache" in caught.value.hint


def test_what_no_build_has_taken_for_a_month_goes(
    store: Store, make: Make, made: list[Path], tmp_path: Path
) -> None:
    store.bring("taken", tmp_path / "a", make)
    store.bring("left", tmp_path / "b", make)
    month_ago = time.time() - 31 * 24 * 3600
    for place in (tmp_path / "store").iterdir():
        os.utime(place, (month_ago, month_ago))
    (tmp_path / "store" / ".half").mkdir()  # of a process at work
    store.bring("taken", tmp_path / "c", make)
    store.trim()
    assert len(list((tmp_path / "store").iterdir())) == 2
    store.bring("taken", tmp_path / "d", make)
    store.bring("left", tmp_path / "e", make)
    assert made == [tmp_path / n for n in "abe"]
