# SPDX-License-Identifier: Apache-2.0
"""Keep finished graphs and engines by what they are made from, so that each is made once.

A piece is a file or a folder. It lies in a folder named after the digest of everything it depends
on, with the SHA-256 of each of its files. That folder appears by one rename, so a process that is
killed or runs beside others leaves whole pieces or none, and a piece whose bytes have changed is
made again. Nothing depends on a store: it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core.errors import OutputError
from ..core.output import staged
from .files import link_or_none, sha256_of

__all__ = ["NO_STORE", "Store"]

PIECE, DIGESTS = "piece", "sha256.json"
LINKED_BYTES = 1 << 20
"""Files from this size on are hard links where the file system can; whoever edits a smaller one in
a bundle edits that bundle alone."""

KEPT_SECONDS = 30 * 24 * 3600


class Store:
    """Pieces of builds in one folder, for any number of processes."""

    def __init__(self, folder: Path | None) -> None:
        """Keep pieces in ``folder``, which is made when needed; None keeps nothing."""
        self.folder = folder

    def bring(self, about: Any, out: Path, make: Callable[[Path], None]) -> None:
        """Put a piece at ``out``: the kept one, or what ``make(out)`` writes, which is kept.

        Args:
            about: Everything the piece depends on, as JSON values and dataclasses.
            out: The file or folder to write.
            make: Writes the piece.

        Raises:
            OutputError: the store can't be written.
        """
        if self.folder is None:
            make(out)
            return
        text = json.dumps(about, sort_keys=True, default=asdict)
        place = self.folder / hashlib.sha256(text.encode()).hexdigest()
        if _take(place, out):
            return
        make(out)
        try:
            self._keep(out, place)
        except OSError as error:
            raise OutputError(
                str(self.folder),
                f"can't be written: {error.strerror}",
                "free some space or choose another --build-cache",
            ) from error

    def trim(self) -> None:
        """Remove pieces that no build has taken for 30 days, and what killed processes left."""
        if self.folder is None or not self.folder.is_dir():
            return
        oldest = time.time() - KEPT_SECONDS
        for place in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process removes it
                if place.stat().st_mtime < oldest:
                    shutil.rmtree(place)

    def _keep(self, piece: Path, place: Path) -> None:
        with staged(place) as made:
            made.mkdir()
            _copy(piece, made / PIECE)
            (made / DIGESTS).write_text(json.dumps(_digests(made / PIECE)), encoding="utf-8")


NO_STORE = Store(None)


def _take(place: Path, out: Path) -> bool:
    """Copy a kept piece to ``out`` if it is there and whole; tell whether it was."""
    if out.exists():
        return False
    try:
        os.utime(place)
        whole = json.loads((place / DIGESTS).read_text(encoding="utf-8"))
        if _digests(place / PIECE) != whole:
            return False
        _copy(place / PIECE, out)
    except (OSError, ValueError):  # there is none, or another process replaces it
        shutil.rmtree(out, ignore_errors=True)
        return False
    return True


def _digests(piece: Path) -> dict[str, str]:
    files = sorted(p for p in piece.rglob("*") if p.is_file()) if piece.is_dir() else [piece]
    return {p.relative_to(piece).as_posix(): sha256_of(p) for p in files}


def _copy(source: Path, target: Path) -> None:
    def copy(file: str, place: str) -> None:
        small = Path(file).stat().st_size < LINKED_BYTES
        if small or link_or_none(Path(file), Path(place)) is None:
            shutil.copyfile(file, place)

    if source.is_dir():
        shutil.copytree(source, target, copy_function=copy)
    else:
        copy(str(source), str(target))
