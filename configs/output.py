# SPDX-License-Identifier: Apache-2.0
"""Write a file whole or not at all."""

from __future__ import annotations

from pathlib import Path

from .errors import OutputError

__all__ = ["write_text"]


def write_text(path: Path, text: str, hint: str) -> None:
    """Write a text file under another name first, and make its folder where there is none.

    Args:
        path: The file; replaced where it exists.
        text: Its content, written as UTF-8.
        hint: What to do where it can't be written.

    Raises:
        OutputError: it can't be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(str(path), f"can't be written: {error.strerror}", hint) from error
