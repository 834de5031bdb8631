# SPDX-License-Identifier: Apache-2.0
"""What of a staged folder is finished, so that the next build of it goes on where one was killed.

A journal lies beside the folder and is locked as long as its build lives. Its first line names what
is built, each other one a finished piece with the digests of its files. A killed build may leave any
line or file half-written: a piece counts when its line is whole and its files have their digests.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..configs.errors import OutputError
from .files import sha256_of

__all__ = ["finish", "is_finished", "journal_of", "locked", "take_over"]


def journal_of(folder: Path) -> Path:
    """Return where the journal of a staged folder lies."""
    folder = folder.absolute()
    return folder.with_name(f"{folder.name}.journal")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the journal of ``folder`` against every other build, dead ones excepted.

    Raises:
        OutputError: another build holds it, or it can't be written.
    """
    path = journal_of(folder)
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OutputError(
                str(path), f"can't be written: {error.strerror}", "choose another --out"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The build that held it may have removed it between our two calls.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):
                break
            os.close(handle)
        except BlockingIOError as error:
            os.close(handle)
            raise OutputError(
                str(folder), "another build of this target is running",
                "wait for it, or choose another --out",
            ) from error  # fmt: skip
    try:
        yield
    finally:
        os.close(handle)


def take_over(folder: Path, key: str) -> list[str]:
    """Make ``folder`` hold nothing but the finished pieces of a build of the same key.

    Args:
        folder: The staged folder; its journal is locked by the caller.
        key: Names everything that the pieces depend on.

    Returns:
        The pieces that were found finished.
    """
    journal = journal_of(folder)
    kept: dict[str, dict[str, str]] = {}
    lines = _lines(journal)
    if key and lines[:1] == [{"key": key}] and folder.is_dir():
        kept = {
            line["piece"]: line["files"]
            for line in lines[1:]
            if all(_is_whole(folder / name, sha256) for name, sha256 in line["files"].items())
        }
    files = {name for piece in kept.values() for name in piece}
    if files:
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):  # not empty
                    path.rmdir()
            elif path.relative_to(folder).as_posix() not in files:
                path.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)
    entries = [{"key": key}, *({"piece": p, "files": f} for p, f in kept.items())]
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    folder.mkdir(exist_ok=True)
    return list(kept)


def is_finished(folder: Path, piece: str) -> bool:
    """Tell whether ``folder`` holds a piece from before; never so where it has no journal."""
    return any(line.get("piece") == piece for line in _lines(journal_of(folder)))


def finish(folder: Path, piece: str, paths: Iterable[Path]) -> None:
    """Note that a piece is finished; nothing is noted where the folder has no journal.

    Args:
        folder: The staged folder.
        piece: Its name.
        paths: Its files, and folders of files, below ``folder``; written to no more.
    """
    journal = journal_of(folder)
    if not journal.exists():
        return
    files = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
    digests = {f.relative_to(folder).as_posix(): sha256_of(f) for f in files}
    with journal.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"piece": piece, "files": digests}) + "\n")


def _lines(journal: Path) -> list[dict[str, Any]]:
    """Read a journal's whole lines; a killed build leaves the last one cut."""
    try:
        text = journal.read_text(encoding="utf-8")
    except OSError:
        return []
    found = []
    for line in text.splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            if line.endswith("\n"):
                found.append(json.loads(line))
    return found


def _is_whole(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256
