"""Files are written whole or not at all, and a place is judged without leaving a trace."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from freewheel.core.errors import OutputError
from freewheel.core.output import check_file, check_folder, replaced_whole, write_text


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
