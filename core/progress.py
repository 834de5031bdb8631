# SPDX-License-Identifier: Apache-2.0
"""How a long job tells its caller where it stands."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """Receives phases and steps; the command line draws bars from them."""

    def phase(self, name: str, total: int | None = None) -> None:
        """Begin a phase of ``total`` steps; None of a phase that is one wait."""

    def advance(self, what: str, steps: int = 1) -> None:
        """Report that ``what`` is done."""


class Silent:
    """Progress that nobody watches."""

    def phase(self, name: str, total: int | None = None) -> None:
        """Ignore."""

    def advance(self, what: str, steps: int = 1) -> None:
        """Ignore."""
