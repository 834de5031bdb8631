# SPDX-License-Identifier: Apache-2.0
"""Items of work over the ranks of a job: item i is rank i modulo size's, and all get all results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..runtime.distributed.ranks import Ranks

__all__ = ["Shares"]


class Shares:
    """This rank's share of every list of items; the whole of it in a process alone."""

    def __init__(self, ranks: Ranks | None) -> None:
        """Share among ``ranks``; None is one process alone."""
        self._ranks = ranks
        self.size = 1 if ranks is None else ranks.size

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and prints."""
        return self._ranks is None or self._ranks.leads

    def is_mine(self, item: int) -> bool:
        """Tell whether this rank does an item."""
        return self._ranks is None or item % self.size == self._ranks.rank

    def beat(self) -> None:
        """Show the ranks that wait that this one works; call it at every step of a run."""
        if self._ranks is not None:
            self._ranks.beat()

    def gather(self, own: Mapping[int, bytes], doing: str) -> list[bytes]:
        """Give every rank the results of all, in the order of the items.

        Args:
            own: This rank's results by item.
            doing: What for, for the message where another rank is lost.

        Raises:
            RankError: a rank is gone or gives no sign of life.
        """
        if self._ranks is None:
            return [own[item] for item in sorted(own)]
        self._ranks.wait_for_all(doing)
        head = json.dumps({item: len(content) for item, content in own.items()}).encode()
        shared = b"".join((len(head).to_bytes(8, "little"), head, *own.values()))
        found: dict[int, bytes] = {}
        for content in self._ranks.share(shared, doing):
            size = int.from_bytes(content[:8], "little")
            place = 8 + size
            for item, count in json.loads(content[8:place]).items():
                found[int(item)] = content[place : place + count]
                place += count
        return [found[item] for item in sorted(found)]

    def gather_json(self, own: Mapping[int, Any], doing: str) -> list[Any]:
        """Do as `gather` does with what JSON holds; its floats come back bit for bit."""
        packed = {item: json.dumps(value).encode() for item, value in own.items()}
        return [json.loads(content) for content in self.gather(packed, doing)]
