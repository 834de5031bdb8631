"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from freewheel.configs.errors import OutputError
from freewheel.configs.output import write_text


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
