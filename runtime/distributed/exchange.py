# SPDX-License-Identifier: Apache-2.0
"""What ranks that share a sequence send each other: bound once, run any number of times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...engines.base import BoundCall
from .ranks import Ranks

__all__ = ["Exchange", "InOrder", "Place", "Then"]

Place = tuple[int, int]
"""First and end of a rank's part along an axis."""


@dataclass(frozen=True)
class InOrder:
    """Calls that run one after another."""

    calls: Sequence[BoundCall]

    def run(self) -> None:
        """Run them."""
        for call in self.calls:
            call.run()


@dataclass(frozen=True)
class Then:
    """A function as a call."""

    function: Callable[[], None]

    def run(self) -> None:
        """Call it."""
        self.function()


@dataclass
class Exchange:
    """Copies, tensors that go to and come from other ranks, and copies again.

    A tensor goes, and comes, in one piece: what does not lie in one is copied to a buffer before, or
    out of one after.

    Attributes:
        ranks: Between whom.
        doing: Said of them where one is lost.
        count: Told the bytes that this rank sent, each time.
    """

    ranks: Ranks
    doing: str
    count: Callable[[int], None]
    _before: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _sent: list[tuple[int, Tensor]] = field(default_factory=list)
    _wanted: list[tuple[int, Tensor]] = field(default_factory=list)
    _after: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def turn(
        self,
        given: Tensor,
        taken: Tensor,
        by: tuple[int, Sequence[Place]],
        into: tuple[int, Sequence[Place]],
    ) -> None:
        """Add that each rank gives each its part along one axis, and joins theirs along another.

        Args:
            given: What this rank has.
            taken: What it gets.
            by: Axis of ``given``, and each rank's part along it.
            into: Axis of ``taken``, and where each rank's part comes from along it.
        """
        (axis, parts), (other, places) = by, into
        for rank, (part, place) in enumerate(zip(parts, places, strict=True)):
            source = given.narrow(axis, part[0], part[1] - part[0])
            target = taken.narrow(other, place[0], place[1] - place[0])
            self._add(rank, source, target)

    def gather(self, given: Tensor, taken: Tensor, axis: int, places: Sequence[Place]) -> None:
        """Add that every rank gets all ranks' tensors, side by side along an axis."""
        for rank, (first, end) in enumerate(places):
            self._add(rank, given, taken.narrow(axis, first, end - first))

    def run(self) -> None:
        """Do all of it; everything is in its place when this returns."""
        for source, target in self._before:
            target.copy_(source)
        if self._sent:
            self.count(self.ranks.swap(self._sent, self._wanted, self.doing))
        for source, target in self._after:
            target.copy_(source)

    @property
    def copied_bytes(self) -> int:
        """Bytes that are copied on this rank each time."""
        return sum(t.nbytes for _, t in (*self._before, *self._after))

    def _add(self, rank: int, source: Tensor, target: Tensor) -> None:
        if rank == self.ranks.rank:
            self._after.append((source, target))
            return
        sent, wanted = _in_one_piece(source), _in_one_piece(target)
        self._sent.append((rank, sent))
        self._wanted.append((rank, wanted))
        if sent is not source:
            self._before.append((source, sent))
        if wanted is not target:
            self._after.append((wanted, target))


def _in_one_piece(tensor: Tensor) -> Tensor:
    """Return a tensor, or where it does not lie in one piece a buffer of its shape."""
    if tensor.is_contiguous():
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
