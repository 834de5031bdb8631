# SPDX-License-Identifier: Apache-2.0
"""Write a file whole or not at all, and tell before the work whether it could be written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError

__all__ = ["check_file", "check_folder", "replaced_whole", "write_text"]


def check_file(path: Path, option: str) -> None:
    """Fail before a long run rather than after it; nothing is made or written.

    Args:
        path: The file to be written later; its folder may be missing.
        option: Flag that named it, for the message.

    Raises:
        OutputError: it is a folder or a device, or its folder can't be made or written.
    """
    try:
        _partial(path).exists()  # raises where the name is too long
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
    """Yield another name to write to, which takes the file's place when the block succeeds.

    Args:
        path: The file; replaced where it exists. Its folder is made where there is none.
        hint: What to do where it can't be written.

    Raises:
        OutputError: it can't be written; nothing half written is left, here or on any exception.
    """
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error, hint) from error


def write_text(path: Path, text: str, hint: str) -> None:
    """Write a text file as UTF-8, whole or not at all.

    Args:
        path: The file; replaced where it exists. Its folder is made where there is none.
        text: Its content.
        hint: What to do where it can't be written.

    Raises:
        OutputError: it can't be written.
    """
    with replaced_whole(path, hint) as partial:
        partial.write_text(text, encoding="utf-8")


def _partial(path: Path) -> Path:
    # The suffix stays last: writers of videos choose the format by it.
    return path.with_name(f".{path.stem}.partial{path.suffix}")


def _check_place(folder: Path) -> None:
    """Write a nameless file in the folder, or in the nearest one above it that exists."""
    place = next(p for p in (folder, *folder.parents) if p.exists())
    with tempfile.TemporaryFile(dir=place):
        pass


def _unwritable(path: Path, error: OSError, hint: str) -> OutputError:
    # imageio appends ffmpeg's whole log to its own first line.
    reason = error.strerror or (str(error).strip().splitlines() or [type(error).__name__])[0]
    return OutputError(str(path), f"can't be written: {reason}", hint)
