# SPDX-License-Identifier: Apache-2.0
"""Pieces of a calibration that is not done: recorded runs, found schedules, held-out runs."""

from __future__ import annotations

import json
from typing import Any

from .calibration import CalibrationRequest

__all__ = ["Pieces"]


class Pieces:
    """The checkpoints of one calibration; keeps nothing where there are none to keep.

    What is kept is found by the facts that it was made from, so that another request, bundle or
    version finds nothing.

    Attributes:
        found: Runs that were recorded before.
    """

    def __init__(self, request: CalibrationRequest, identity: Any, runs: list[Any]) -> None:
        """Keep pieces where the request says.

        Args:
            request: What is calibrated.
            identity: What every piece depends on, as JSON.
            runs: What is asked of each recorded run, as JSON.
        """
        self._kept, self._identity, self._runs = request.checkpoints, identity, runs
        self._solved = [request.refine, request.search, request.history, request.objective]
        self.found = 0

    def run(self, index: int) -> bytes | None:
        """Return a recorded run, if it was kept."""
        if self._kept is None:
            return None
        content = self._kept.load(f"run-{index:04}", self._identity, self._runs[index])
        self.found += content is not None
        return content

    def keep_run(self, index: int, content: bytes) -> None:
        """Keep a recorded run."""
        if self._kept is not None:
            self._kept.save(content, f"run-{index:04}", self._identity, self._runs[index])

    def schedule(self, count: int) -> Any:
        """Return a found schedule, if it was kept."""
        return self.json(f"schedule-{count:04}", [self._runs, self._solved])

    def keep_schedule(self, count: int, schedule: Any) -> None:
        """Keep a found schedule."""
        self.keep_json(f"schedule-{count:04}", [self._runs, self._solved], schedule)

    def json(self, name: str, facts: list[Any]) -> Any:
        """Return what was found from some facts, if it was kept."""
        content = None if self._kept is None else self._kept.load(name, self._identity, *facts)
        return None if content is None else json.loads(content)

    def keep_json(self, name: str, facts: list[Any], found: Any) -> None:
        """Keep what was found from some facts."""
        if self._kept is not None:
            self._kept.save(json.dumps(found).encode(), name, self._identity, *facts)
