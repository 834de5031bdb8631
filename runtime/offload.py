# SPDX-License-Identifier: Apache-2.0
"""Keep the weights of the block loop in host memory, and bring each block's in time.

Two sets of buffers on the device hold the weights of two blocks. While block i computes from one,
block i + 1 is copied into the other on a stream of its own: from pinned memory, where there is a
GPU. Bindings are made once, since a block always uses the same set. On a CPU the copies are plain
ones, which serves tests alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..engines.base import BoundCall, Engine

__all__ = ["OffloadedWeights"]

SETS = 2


class OffloadedWeights:
    """The weights of every block template of one model, two blocks of each kind on the device.

    Args:
        device: Where engines run.
        read: Tensor name → weight in host memory.
    """

    def __init__(self, device: torch.device, read: Callable[[str], Tensor]) -> None:
        self._device, self._read = device, read
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lanes: dict[frozenset[str], _Lane] = {}

    def bind(
        self, engine: Engine, bindings: Mapping[str, Tensor], weights: Mapping[str, str], block: int
    ) -> BoundCall:
        """Bind one block of a template.

        Args:
            engine: The template's engine.
            bindings: Everything but the weights.
            weights: Input name → tensor name with ``{block}``. Templates that share their tensors
                (a block and its tapped variant) share the copies.
            block: Whose weights.
        """
        key = frozenset(weights.values())
        lane = self._lanes.setdefault(key, _Lane(self._device, self._copies))
        if not lane.has(block):
            lane.add(block, {p: self._read(p.replace("{block}", str(block))) for p in key})
        buffers = lane.buffers(block)
        given = {name: buffers[pattern] for name, pattern in weights.items()}
        return _OffloadedCall(lane, block, engine.bind({**bindings, **given}))

    def resident_bytes(self) -> int:
        """Return the bytes of all buffers on the device."""
        return sum(lane.resident_bytes() for lane in self._lanes.values())


class _OffloadedCall:
    """A bound block whose weights arrive before it runs."""

    def __init__(self, lane: _Lane, block: int, bound: BoundCall) -> None:
        self._lane, self._block, self._bound = lane, block, bound

    def run(self) -> None:
        self._lane.take(self._block)
        self._bound.run()
        self._lane.release(self._block)


class _Set:
    """One set of buffers: whose weights it holds, when they are there, and when it is free."""

    def __init__(self, like: Mapping[str, Tensor], device: torch.device) -> None:
        self.tensors = {n: torch.empty_like(t, device=device) for n, t in like.items()}
        self.holds: int | None = None
        is_cuda = device.type == "cuda"
        self.arrived: Any = torch.cuda.Event() if is_cuda else None
        self.free: Any = torch.cuda.Event() if is_cuda else None


class _Lane:
    """Blocks of equal weights in the order they run, and the sets that they take in turn."""

    def __init__(self, device: torch.device, copies: Any) -> None:
        self._device, self._copies = device, copies
        self._stored: dict[int, Mapping[str, Tensor]] = {}
        self._sets: list[_Set] = []

    def has(self, block: int) -> bool:
        return block in self._stored

    def add(self, block: int, stored: Mapping[str, Tensor]) -> None:
        """Take the weights of the next block, in host memory."""
        self._stored[block] = stored
        if len(self._sets) < SETS:
            self._sets.append(_Set(stored, self._device))

    def buffers(self, block: int) -> Mapping[str, Tensor]:
        """Return what the block computes from, by the names its weights were added under."""
        return self._set_of(block).tensors

    def take(self, block: int) -> None:
        """Have a block's weights in place before what is enqueued next."""
        self._fetch(block)
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_event(self._set_of(block).arrived)

    def release(self, block: int) -> None:
        """Note that the block is enqueued; fetch the one after it meanwhile, the last's is the first."""
        if self._copies is not None:
            self._set_of(block).free.record(torch.cuda.current_stream(self._device))
        blocks = list(self._stored)
        self._fetch(blocks[(blocks.index(block) + 1) % len(blocks)])

    def resident_bytes(self) -> int:
        return sum(t.nbytes for s in self._sets for t in s.tensors.values())

    def _set_of(self, block: int) -> _Set:
        return self._sets[list(self._stored).index(block) % SETS]

    def _fetch(self, block: int) -> None:
        target = self._set_of(block)
        if target.holds == block:
            return
        target.holds = block
        with nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
            if self._copies is not None:
                self._copies.wait_event(target.free)
            for name, tensor in target.tensors.items():
                tensor.copy_(self._stored[block][name], non_blocking=True)
            if self._copies is not None:
                target.arrived.record(self._copies)
