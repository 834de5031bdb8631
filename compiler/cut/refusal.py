# SPDX-License-Identifier: Apache-2.0
"""Refuse a cut that a bundle has no word for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from ...core.errors import ExportError

__all__ = ["refuse"]


def refuse(model: str, what: str, names: Sequence[str] = ()) -> NoReturn:
    """Say what of a transformer can't be written into a bundle.

    Args:
        model: The transformer's class.
        what: Said of the transformer: "has no blocks".
        names: Values or graphs that it is about.

    Raises:
        ExportError: always.
    """
    raise ExportError(
        f"transformer '{model}'",
        what + (f": {', '.join(names)}" if names else ""),
        "a bundle has no word for that yet",
    )
