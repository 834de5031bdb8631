# SPDX-License-Identifier: Apache-2.0
"""Finished pieces of a long job, so that the same command goes on where one was ended."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from ..core.errors import RequestError
from ..core.output import replaced_whole

__all__ = ["Checkpoints"]


class Checkpoints:
    """A folder of pieces, each under a name that tells what it was made from.

    Attributes:
        folder: Where they lie.
        found: Pieces that were there already.
    """

    def __init__(self, folder: Path) -> None:
        """Keep pieces in a folder, which is made with the first."""
        self.folder, self.found = folder, 0

    @classmethod
    def beside(cls, out: Path) -> Checkpoints:
        """Keep the pieces of a file to be written in a hidden folder beside it."""
        return cls(out.with_name(f".{out.name}.unfinished"))

    def load(self, name: str, *made_from: object) -> bytes | None:
        """Return a finished piece, or None.

        Args:
            name: What it is.
            made_from: All that its content depends on, as JSON.

        Raises:
            RequestError: it is there and can't be read.
        """
        path = self._path(name, made_from)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RequestError(
                str(path), f"can't be read: {error.strerror}", "delete it, and run it again"
            ) from error
        self.found += 1
        return content

    def save(self, content: bytes, name: str, *made_from: object) -> None:
        """Keep a piece, whole or not at all.

        Raises:
            OutputError: it can't be written.
        """
        with replaced_whole(self._path(name, made_from), "choose another --out") as partial:
            partial.write_bytes(content)

    def remove(self) -> None:
        """Delete the folder: the job is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str, made_from: tuple[object, ...]) -> Path:
        digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
        return self.folder / f"{name}-{digest[:16]}"
