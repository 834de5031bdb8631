# SPDX-License-Identifier: Apache-2.0
"""A folder that appears whole or not at all, and whose finished pieces outlive a killed build."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..configs.errors import OutputError
from .journal import journal_of, locked, take_over
from .manifest import MANIFEST

__all__ = ["staged_folder"]

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def staged_folder(target: Path, *, replace: bool, key: str = "") -> Iterator[Path]:
    """Yield a folder beside ``target`` that takes its name when the block succeeds.

    Args:
        target: The folder to write.
        replace: Whether a bundle (or an empty folder) of that name may be replaced; nothing else
            ever is.
        key: Names what is built. Pieces that an earlier block of this key finished (`journal`),
            before it was killed or failed, are in the folder again; nothing else is.

    Raises:
        OutputError: ``target`` exists and can't be replaced, another build of the same target is
            under way, or the disk is full or can't be written.
    """
    target = target.absolute()
    staging = target.with_name(f".{target.name}.building")
    _check_replaceable(target, replace=replace)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            str(target), f"can't be written: {error.strerror}", "choose another --out"
        ) from error
    try:
        with locked(staging):
            try:
                _put_back(target)
                _check_replaceable(target, replace=replace)
                take_over(staging, key)
                yield staging
                _check_replaceable(target, replace=replace)
                _move_into_place(staging, target)
            finally:
                # What is half done goes; it would only fill the disk.
                if not staging.is_dir() or not take_over(staging, key):
                    shutil.rmtree(staging, ignore_errors=True)
                    journal_of(staging).unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise OutputError(
            str(target), f"can't be written: {error.strerror}",
            "free some space or choose another --out",
        ) from error  # fmt: skip


def _put_back(target: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    old = target.with_name(f".{target.name}.replaced")
    if old.is_dir() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(target: Path, *, replace: bool) -> None:
    if not target.exists():
        return
    if not replace:
        raise OutputError(str(target), "already exists", "choose another --out or pass --force")
    is_bundle = (target / MANIFEST).is_file()
    if not is_bundle and not (target.is_dir() and not any(target.iterdir())):
        raise OutputError(
            str(target), f"is no bundle (it has no '{MANIFEST}') and is not replaced",
            "choose another --out, or remove it yourself",
        )  # fmt: skip


def _move_into_place(staging: Path, target: Path) -> None:
    """Give ``staging`` the name ``target``; what stood there goes once that has succeeded."""
    if not target.exists():
        staging.rename(target)
        return
    old = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
