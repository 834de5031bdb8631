# SPDX-License-Identifier: Apache-2.0
"""Write files and folders whole or not at all, and tell before the work whether they could be.

What is being written lies in a staging folder, ``.NAME.….partial``, whose lock its writer holds. The
finished file or folder takes its name by one rename. What a killed writer left is removed by the
next one of the same name; any number of processes may write one name, and the last one stays.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError

__all__ = ["check_file", "check_folder", "replaced_whole", "staged", "write_bytes", "write_text"]

LOCK, NEW, OLD = "lock", "new", "old"
"""In a staging folder: the writer's lock, what is written, and what it replaces for a moment."""

LONGEST_NAME = 200
"""Letters of a name that its staging folder's has, in bytes below what file systems take."""


def check_file(path: Path, option: str) -> None:
    """Fail before a long run rather than after it; nothing is made or written.

    Args:
        path: The file to be written later; its folder may be missing.
        option: Flag that named it, for the message.

    Raises:
        OutputError: it is a folder or a device, or its folder can't be made or written.
    """
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # raises where the name is too long
        if path.is_dir():
            raise OutputError(
                str(path), "is a folder, expected a file", f"name a file in it with {option}"
            )
        if path.exists() and not path.is_file():
            raise OutputError(str(path), "is no regular file", f"choose another {option}")
        _check_place(path.absolute().parent)
    except OSError as error:
        raise _unwritable(path, error, f"choose another {option}") from error


def check_folder(path: Path, option: str) -> None:
    """Fail before a long run rather than after it; nothing is made or written.

    Args:
        path: The folder to be written into later; may be missing.
        option: Flag that named it, for the message.

    Raises:
        OutputError: it is a file, or can't be made or written.
    """
    try:
        if path.exists() and not path.is_dir():
            raise OutputError(str(path), "is a file, expected a folder", f"choose another {option}")
        _check_place(path.absolute())
    except OSError as error:
        raise _unwritable(path, error, f"choose another {option}") from error


@contextmanager
def replaced_whole(path: Path, hint: str) -> Iterator[Path]:
    """Do as `staged` beside ``path``, and turn a fault of the system into one of ours.

    Args:
        path: The file or folder.
        hint: What to do where it can't be written.

    Raises:
        OutputError: it can't be written; nothing half written is left, here or on any exception.
    """
    try:
        with staged(path) as partial:
            yield partial
    except OSError as error:
        raise _unwritable(path, error, hint) from error


@contextmanager
def staged(path: Path, beside: Path | None = None) -> Iterator[Path]:
    """Yield a path of the same name, whose file or folder takes ``path``'s place in the end.

    Args:
        path: The file or folder; replaced where it exists. Folders above it are made, and go again
            where nothing came into them.
        beside: Folder of the staging folder, on the same file system; None takes ``path``'s.

    Raises:
        OSError: it can't be written; what stood at ``path`` still does.
    """
    path = path.absolute()
    folder = beside.absolute() if beside is not None else path.parent
    made = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _staging_folder(path, folder) as staging:
            yield staging / NEW / path.name
            _take_place(staging, path)
    finally:
        for above in made:  # the innermost first
            with suppress(OSError):
                above.rmdir()


def write_text(path: Path, text: str, hint: str) -> None:
    """Write a text file as UTF-8, whole or not at all.

    Args:
        path: The file; replaced where it exists. Its folder is made where there is none.
        text: Its content.
        hint: What to do where it can't be written.

    Raises:
        OutputError: it can't be written.
    """
    write_bytes(path, text.encode("utf-8"), hint)


def write_bytes(path: Path, content: bytes, hint: str) -> None:
    """Write a file whole or not at all; see `write_text`.

    Raises:
        OutputError: it can't be written.
    """
    with replaced_whole(path, hint) as partial:
        partial.write_bytes(content)


@contextmanager
def _staging_folder(path: Path, folder: Path) -> Iterator[Path]:
    """Yield a locked folder with an empty folder `NEW` in it; remove dead writers' first."""
    prefix = f".{path.name[:LONGEST_NAME]}."
    for left in folder.glob(f"{glob.escape(prefix)}*.partial"):
        _remove_dead(left, path)
    while True:
        staging = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=folder))
        try:
            handle = os.open(staging / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # another writer took it for a dead one's
            continue
        fcntl.flock(handle, fcntl.LOCK_EX)
        if (staging / LOCK).exists():
            break
        os.close(handle)
    try:
        (staging / NEW).mkdir()
        yield staging
    finally:
        _discard(staging, path)
        os.close(handle)


def _remove_dead(staging: Path, path: Path) -> None:
    """Remove a staging folder unless its writer lives."""
    try:
        handle = os.open(staging / LOCK, os.O_RDWR)
    except OSError:
        with suppress(OSError):  # killed before it held the lock, or gone
            staging.rmdir()
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _discard(staging, path)
    except BlockingIOError:
        pass
    finally:
        os.close(handle)


def _discard(staging: Path, path: Path) -> None:
    """Remove a staging folder; what it moved away comes back where nothing took its place."""
    old = staging / OLD
    if old.exists() and not path.exists():
        with suppress(OSError):  # another process has put its own there
            old.rename(path)
    shutil.rmtree(staging, ignore_errors=True)


def _take_place(staging: Path, path: Path) -> None:
    """Give what is in `NEW` its name; what stood there goes once that has succeeded."""
    new, old = staging / NEW / path.name, staging / OLD
    while True:
        try:
            new.replace(path)
            shutil.rmtree(old, ignore_errors=True)
            return
        except OSError as error:
            # A folder can't be renamed onto one with content, which is moved away first.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        shutil.rmtree(old, ignore_errors=True)  # of the turn before: another process was faster
        with suppress(FileNotFoundError):
            path.rename(old)


def _check_place(folder: Path) -> None:
    """Write a nameless file in the folder, or in the nearest one above it that exists."""
    place = next(p for p in (folder, *folder.parents) if p.exists())
    with tempfile.TemporaryFile(dir=place):
        pass


def _unwritable(path: Path, error: OSError, hint: str) -> OutputError:
    # imageio appends ffmpeg's whole log to its own first line.
    reason = error.strerror or (str(error).strip().splitlines() or [type(error).__name__])[0]
    return OutputError(str(path), f"can't be written: {reason}", hint)
