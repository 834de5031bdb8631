"""Files and folders are written whole or not at all; a place is judged without leaving a trace."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from freewheel.core.errors import OutputError
from freewheel.core.output import (
    check_file,
    check_folder,
    replaced_whole,
    staged,
    write_bytes,
    write_text,
)


def test_folder_is_made_and_a_file_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "one", "hint")
    write_text(path, "zwei, größer", "hint")
    assert path.read_text(encoding="utf-8") == "zwei, größer"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["file/x.txt", "folder"])
def test_what_can_not_be_written_is_one_error_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="choose another --out"):
        write_text(tmp_path / name, "text", "choose another --out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("fault", [OSError(28, "No space left"), KeyboardInterrupt(), ValueError()])
def test_a_writer_that_fails_or_is_interrupted_leaves_the_old_file(
    tmp_path: Path, fault: BaseException
) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    expected = OutputError if isinstance(fault, OSError) else type(fault)

    def write_half() -> None:
        with replaced_whole(path, "hint") as partial:
            partial.write_text("half")
            raise fault

    with pytest.raises(expected):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def in_processes(count: int, target: Callable[..., None], *arguments: object) -> list[int | None]:
    """Run a function in so many processes at once; return their exit codes."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=target, args=(*arguments, i)) for i in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [worker.exitcode for worker in workers]


def put(path: Path, text: str) -> None:
    """Write a folder of two files, or one file, by the name's suffix."""
    if path.suffix:
        path.write_text(text * 1000)
        return
    path.mkdir()
    (path / "a").write_text(text * 1000)
    (path / "b").write_text(text * 1000)


def content(path: Path) -> set[str]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {p.read_text() for p in files}


@pytest.fixture(params=["file.txt", "folder"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


def die_writing(path: Path, index: int) -> None:
    with staged(path) as partial:
        put(partial, "half")
        os._exit(9)


def test_what_a_killed_writer_left_goes_with_the_next_write(path: Path) -> None:
    put(path, "old")
    assert in_processes(2, die_writing, path) == [9, 9]
    assert content(path) == {"old" * 1000}
    assert 1 <= len(list(path.parent.glob(".*"))) <= 2
    with staged(path) as partial:
        put(partial, "new")
    assert content(path) == {"new" * 1000}
    assert list(path.parent.iterdir()) == [path]


def die_between_renames(path: Path, index: int) -> None:
    replace, calls = Path.replace, []

    def second_is_the_last(source: Path, target: Path) -> Path:
        calls.append(source)
        if len(calls) == 2:
            os._exit(9)
        return replace(source, target)

    Path.replace = second_is_the_last  # type: ignore[method-assign]  # in a process of its own
    with staged(path) as partial:
        put(partial, "new")


def test_a_replacement_killed_between_its_renames_is_undone(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    put(folder, "old")
    assert in_processes(1, die_between_renames, folder) == [9]
    assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), staged(folder):
        raise KeyboardInterrupt
    assert content(folder) == {"old" * 1000}
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    folder, replace, calls = tmp_path / "folder", Path.replace, []
    put(folder, "old")

    def refuse_the_second(source: Path, target: Path) -> Path:
        calls.append(source)
        if len(calls) == 2:
            raise fault
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", refuse_the_second)
    with pytest.raises(type(fault)), staged(folder) as partial:
        put(partial, "new")
    assert content(folder) == {"old" * 1000}
    assert list(tmp_path.iterdir()) == [folder]


def write_often(path: Path, index: int) -> None:
    for turn in range(40):
        with staged(path) as partial:
            put(partial, f"{index}:{turn};")


def test_writers_at_once_leave_one_whole_and_nothing_else(path: Path) -> None:
    assert in_processes(4, write_often, path) == [0] * 4
    assert len(content(path)) == 1
    assert content(path) <= {f"{i}:39;" * 1000 for i in range(4)}
    assert list(path.parent.iterdir()) == [path]


def test_it_can_be_staged_elsewhere_and_folders_made_for_nothing_go(tmp_path: Path) -> None:
    (tmp_path / "aside").mkdir()
    path = tmp_path / "new" / "er" / "file.txt"
    with pytest.raises(KeyboardInterrupt), staged(path, tmp_path / "aside") as partial:  # noqa: PT012
        assert list(path.parent.iterdir()) == []
        assert partial.is_relative_to(tmp_path / "aside")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.rglob("*")] == ["aside"]


def test_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a" / "cache", b"\r\n\x00", "hint")
    assert (tmp_path / "a" / "cache").read_bytes() == b"\r\n\x00"


def test_a_message_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught, replaced_whole(tmp_path / "v.mp4", "hint"):
        raise OSError("Broken pipe\n\nFFMPEG COMMAND:\n/usr/bin/ffmpeg")
    assert caught.value.what == "can't be written: Broken pipe"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("folder", r"folder: is a folder, expected a file; name a file in it with --out"),
        ("file/x/y.txt", r"can't be written: Not a directory; choose another --out"),
        ("x" * 300, r"can't be written: File name too long"),
        ("fifo", r"is no regular file"),
    ],
)
def test_a_file_that_could_not_be_written_is_told_ahead(
    tmp_path: Path, name: str, says: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OutputError, match=says) as caught:
        check_file(tmp_path / name, "--out")
    assert caught.value.exit_code == 3


def test_a_folder_that_is_a_file_is_told_ahead(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="--out"):
            check_folder(path, "--out")


def test_judging_a_place_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("old")
    check_file(tmp_path / "new" / "er" / "file.txt", "--out")
    check_file(tmp_path / "old.txt", "--out")
    check_folder(tmp_path / "new" / "er", "--out")
    check_folder(tmp_path, "--out")
    assert [p.name for p in tmp_path.iterdir()] == ["old.txt"]
