# SPDX-License-Identifier: Apache-2.0
"""Where a bundle is built: a folder that takes its name in the end, one build at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import OutputError
from ..core.output import check_folder, staged
from .manifest import MANIFEST

__all__ = ["alone", "check_target", "staged_folder"]

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def staged_folder(target: Path, *, replace: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that takes its name when the block succeeds.

    Args:
        target: The folder to write.
        replace: Whether a bundle (or an empty folder) of that name may be replaced; nothing else
            ever is.

    Raises:
        OutputError: ``target`` exists and can't be replaced, another build of the same target is
            under way, or the disk is full or can't be written.
    """
    target = target.absolute()
    _check_replaceable(target, replace=replace)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            str(target), f"can't be written: {error.strerror}", "choose another --out"
        ) from error
    try:
        with alone(target), staged(target) as staging:
            _check_replaceable(target, replace=replace)
            staging.mkdir()
            yield staging
            _check_replaceable(target, replace=replace)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise OutputError(
            str(target),
            f"can't be written: {error.strerror}",
            "free some space or choose another --out",
        ) from error


def check_target(target: Path, *, replace: bool) -> None:
    """Fail before a long build rather than after it; nothing is made or written.

    Raises:
        OutputError: ``target`` exists and can't be replaced, or its folder can't be written.
    """
    _check_replaceable(target, replace=replace)
    check_folder(target.absolute().parent, "--out")


@contextlib.contextmanager
def alone(target: Path) -> Iterator[None]:
    """Hold a bundle against every build of it, dead ones excepted.

    Raises:
        OutputError: another build holds it.
    """
    path = target.absolute().with_name(f".{target.name}.building.lock")
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The build that held it may have removed it between our two calls.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):
                break
            os.close(handle)
        except BlockingIOError as error:
            os.close(handle)
            raise OutputError(
                str(target),
                "another build of this target is running",
                "wait for it, or choose another --out",
            ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _check_replaceable(target: Path, *, replace: bool) -> None:
    if not target.exists():
        return
    if not replace:
        remedy = "choose another --out" + (" or pass --force" if target.is_dir() else "")
        raise OutputError(str(target), "already exists", remedy)
    is_bundle = (target / MANIFEST).is_file()
    if not is_bundle and not (target.is_dir() and not any(target.iterdir())):
        raise OutputError(
            str(target),
            f"is no bundle (it has no '{MANIFEST}') and is not replaced",
            "choose another --out, or remove it yourself",
        )
