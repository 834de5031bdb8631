# SPDX-License-Identifier: Apache-2.0
"""CUDA memory and streams for the stand-in: graphs computed by torch, at times that nobody can count on.

Every piece of work, and every copy of offloaded weights, is preceded by a pause of random length on
its stream, and scratch memory is overwritten; so what lacks a wait sooner or later reads a wrong number.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence

import onnx
import torch
from torch_program import TorchProgram, tensor_at


class CudaDevice:
    """A GPU as the stand-in sees it.

    Attributes:
        longest_pause: Clock cycles of the longest pause before a piece of work or a copy; 0 makes none.
    """

    def __init__(self, device: torch.device, longest_pause: int = 0) -> None:
        self.device, self.longest_pause = device, longest_pause
        self._random = random.Random(0)
        self._streams: dict[int, torch.cuda.ExternalStream] = {}
        self._programs: dict[bytes, TorchProgram] = {}
        self._ranges: list[tuple[int, int]] = []

    def program(self, model: onnx.ModelProto) -> TorchProgram:
        """Make a graph ready, once for equal ones."""
        content = model.SerializeToString()
        if content not in self._programs:
            self._programs[content] = TorchProgram(model, self.device)
        return self._programs[content]

    def enqueue(
        self,
        stream: int,
        work: Callable[[], None],
        reads: Sequence[tuple[int, int]],
        writes: Sequence[tuple[int, int]],
    ) -> None:
        """Put work on a stream, late."""
        if stream not in self._streams:
            self._streams[stream] = torch.cuda.ExternalStream(stream, device=self.device)
        with torch.cuda.stream(self._streams[stream]), torch.no_grad():
            self.pause()
            work()

    def pause(self) -> None:
        """Keep torch's current stream busy for a while."""
        if self.longest_pause:
            torch.cuda._sleep(self._random.randrange(self.longest_pause))

    def spoil(self, address: int, size: int) -> None:
        """Overwrite scratch memory with rubbish."""
        if self.longest_pause:
            tensor_at(address, (size,), torch.uint8, self.device).fill_(0xFF)

    def require_mapped(self, address: int, size: int) -> None:
        """Raise AssertionError unless torch's allocator holds the whole range."""
        if not self._is_mapped(address, size):
            segments = torch.cuda.memory_snapshot()
            self._ranges = sorted((s["address"], s["address"] + s["total_size"]) for s in segments)
        assert self._is_mapped(address, size), f"{size} bytes at {address:#x} are not allocated"

    def _is_mapped(self, address: int, size: int) -> bool:
        at = bisect_right(self._ranges, (address, 1 << 64)) - 1
        return at >= 0 and address + size <= self._ranges[at][1]

    def is_legacy(self, stream: int) -> bool:
        """Whether this is CUDA's legacy default stream."""
        return stream == 0
