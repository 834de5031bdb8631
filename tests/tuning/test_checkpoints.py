# SPDX-License-Identifier: Apache-2.0
"""Pieces of a long job are found again by what they were made from, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from freewheel.core.errors import OutputError, RequestError
from freewheel.tuning.checkpoints import Checkpoints


def test_a_piece_is_found_by_what_it_was_made_from(tmp_path: Path) -> None:
    kept = Checkpoints.beside(tmp_path / "out.json")
    assert kept.load("run", "a prompt", 7) is None
    kept.save(b"content", "run", "a prompt", 7)
    again = Checkpoints.beside(tmp_path / "out.json")
    assert again.load("run", "a prompt", 7) == b"content"
    assert again.load("run", "a prompt", 8) is None
    assert again.load("other", "a prompt", 7) is None
    assert again.found == 1


def test_nothing_is_left_once_the_job_is_done(tmp_path: Path) -> None:
    kept = Checkpoints.beside(tmp_path / "out.json")
    kept.remove()
    kept.save(b"content", "run")
    kept.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_piece_that_can_not_be_read_is_one_error(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(b"content", "run")
    (path,) = tmp_path.iterdir()
    path.unlink()
    path.mkdir()
    with pytest.raises(RequestError, match=r"can't be read: .*; delete it, and run it again"):
        kept.load("run")


def test_a_piece_that_can_not_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose another --out"):
        Checkpoints(tmp_path / "file").save(b"content", "run")
