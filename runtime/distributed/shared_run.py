# SPDX-License-Identifier: Apache-2.0
"""A transformer's runs whose sequence several ranks share, seen from one of them."""

from __future__ import annotations

from torch import Tensor

from ...core.errors import FreewheelError, RankError
from ..session import Session
from .alike import begun, check_alike, check_no_deadline
from .counts import ExchangeCounts
from .sequence import SharedModel

__all__ = ["SharedRun"]


class SharedRun:
    """What one rank does around the calls of a transformer.

    Every rank runs the whole pipeline and answers every call; all of them have the whole output. A
    failure of one ends the job, since the others wait for tensors of it.
    """

    def __init__(self, model: SharedModel) -> None:
        self._model, self._is_new = model, False
        self._session: Session | None = None

    @property
    def counts(self) -> ExchangeCounts:
        """Bytes of the current or last run."""
        return self._model.counts

    def begin(self, session: Session) -> None:
        """Start a run of a session that has begun it.

        Raises:
            RequestError: it has a deadline.
        """
        check_no_deadline(session)
        self._session, self._is_new = session, True
        self._model.counts.begin_run()

    def call(self, latents: Tensor) -> None:
        """Announce a transformer call.

        Raises:
            RankError: the ranks are about to run different things.
        """
        if self._is_new and self._session is not None:
            self._is_new = False
            ranks = self._model.ranks
            check_alike(ranks.tell(begun(self._session, latents), "comparing runs"), ranks.members)

    def fail(self, error: Exception) -> None:
        """End the job because it failed here."""
        if not isinstance(error, FreewheelError):
            error = FreewheelError("transformer", f"failed: {type(error).__name__}: {error}")
        self._model.ranks.abandon(None if isinstance(error, RankError) else error)
