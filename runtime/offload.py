# SPDX-License-Identifier: Apache-2.0
"""Keep the weights of the block loop in host memory, and bring each block's in time.

Two slabs on the device hold the weights of two blocks. While block i computes from one, block i + 1
is copied into the other, in one piece and on a stream of its own: from page-locked memory, where
there is a GPU. Bindings are made once, since a block always uses the same slab. On a CPU the copies
are plain ones, which serves tests alone.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..core.errors import RequestError
from ..core.tensor_spec import TensorSpec
from ..engines.base import ALIGNMENT, BoundCall, Engine

__all__ = ["SLABS", "HostBlock", "OffloadedCall", "OffloadedWeights"]

SLABS = 2
"""Blocks of each kind whose weights are on the device."""

LOCKED_FOR_EVERY_GPU = 1  # cudaHostRegisterPortable: sessions on several GPUs share a block


class HostBlock:
    """The weights of one block, side by side in one piece of host memory.

    Attributes:
        memory: uint8 [bytes].
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, pinned: bool) -> None:
        """Copy ``tensors`` in.

        Args:
            tensors: Weights in host memory, by name.
            pinned: Lock the memory's pages, so that a GPU copies from it by itself.

        Raises:
            RequestError: the system does not let that much memory be locked.
        """
        self._places: dict[str, tuple[int, Tensor]] = {}
        self._devices: set[torch.device] = set()
        size = 0
        for name, tensor in tensors.items():
            self._places[name] = size, torch.empty_like(tensor, device="meta")
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        # PyTorch's allocator of pinned memory would round the size up to a power of two.
        self.memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        for name, view in self.views(self.memory).items():
            view.copy_(tensors[name])
        if pinned:
            self._lock(size)

    def _lock(self, size: int) -> None:
        address, cuda = self.memory.data_ptr(), torch.cuda.cudart()
        status = int(cuda.cudaHostRegister(address, size, LOCKED_FOR_EVERY_GPU))
        if status:
            raise RequestError(
                "--offload",
                f"{size} bytes of host memory can't be page-locked (CUDA error {status})",
                "raise 'ulimit -l', free memory, or leave --offload out",
            )
        unlock = weakref.finalize(
            self, _unlock, address, cuda, torch.cuda.synchronize, self._devices
        )
        unlock.atexit = False

    def copy_to(self, slab: Tensor) -> None:
        """Enqueue the copy of all weights into a slab, on the current stream of its device."""
        self._devices.add(slab.device)
        slab.copy_(self.memory, non_blocking=True)

    def views(self, slab: Tensor) -> dict[str, Tensor]:
        """Return the weights as they lie in a slab that ``memory`` was or will be copied to."""
        return {
            name: slab[start : start + like.nbytes].view(like.dtype).view(like.shape)
            for name, (start, like) in self._places.items()
        }


def _unlock(
    address: int, cuda: Any, synchronize: Callable[[torch.device], None], devices: set[torch.device]
) -> None:
    for device in devices:
        synchronize(device)  # a copy may still be under way
    cuda.cudaHostUnregister(address)


class OffloadedWeights:
    """The weights of every block template of one model, two blocks of each kind on the device.

    Args:
        device: Where engines run.
        read: Tensor names of a block → its weights in host memory.
        streamed: Whether the device is one of CUDA, whose copies run beside its kernels.
        capture: Makes a CUDA graph of a block's call; None where none is asked for.
    """

    def __init__(
        self,
        device: torch.device,
        read: Callable[[Sequence[str]], HostBlock],
        *,
        streamed: bool,
        capture: Callable[[Sequence[BoundCall]], BoundCall] | None = None,
    ) -> None:
        self._device, self._read, self._capture = device, read, capture
        self._copies = torch.cuda.Stream(device) if streamed else None
        self._lanes: dict[frozenset[tuple[str, TensorSpec]], _Lane] = {}

    def bind(
        self, engine: Engine, bindings: Mapping[str, Tensor], weights: Mapping[str, str], block: int
    ) -> BoundCall:
        """Bind one block of a template.

        Args:
            engine: The template's engine.
            bindings: Everything but the weights.
            weights: Input name → tensor name with ``{block}``. Templates that share their tensors
                (a block and its tapped variant) share the copies; those of other shapes do not.
            block: Whose weights.
        """
        key = frozenset((pattern, engine.inputs[name]) for name, pattern in weights.items())
        lane = self._lanes.setdefault(key, _Lane(self._device, self._copies))
        names = {p: p.replace("{block}", str(block)) for p in sorted(set(weights.values()))}
        if not lane.has(block):
            lane.add(block, self._read(list(names.values())))
        buffers = lane.buffers(block)
        given = {name: buffers[names[pattern]] for name, pattern in weights.items()}
        return OffloadedCall(lane, block, engine.bind({**bindings, **given}), self._capture)

    def resident_bytes(self) -> int:
        """Return the bytes of all slabs on the device."""
        return sum(lane.resident_bytes() for lane in self._lanes.values())


class OffloadedCall:
    """A bound block whose weights arrive before it runs."""

    def __init__(
        self,
        lane: _Lane,
        block: int,
        bound: BoundCall,
        capture: Callable[[Sequence[BoundCall]], BoundCall] | None,
    ) -> None:
        self._lane, self._block, self._bound, self._capture = lane, block, bound, capture

    def run(self) -> None:
        """Wait for the weights, run, and have the next block's fetched."""
        self._lane.take(self._block)
        if self._capture is not None:  # its weights are here now, and a capture runs it once
            self._bound, self._capture = self._capture([self._bound]), None
        self._bound.run()
        self._lane.release(self._block)


class _Slab:
    """Device memory of one block: whose weights it holds, when they are there, when it is free."""

    def __init__(self, size: int, device: torch.device, copies: Any) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds: int | None = None
        self.arrived: Any = None
        self.free: Any = None
        if copies is not None:
            self.arrived, self.free = torch.cuda.Event(), torch.cuda.Event()
            # The memory may be another's whose last work is still enqueued, before and after.
            self.free.record(torch.cuda.current_stream(device))
            self.memory.record_stream(copies)


class _Lane:
    """Blocks of equal weights in the order they run, and the slabs that they take in turn."""

    def __init__(self, device: torch.device, copies: Any) -> None:
        self._device, self._copies = device, copies
        self._stored: dict[int, HostBlock] = {}
        self._slabs: list[_Slab] = []

    def has(self, block: int) -> bool:
        return block in self._stored

    def add(self, block: int, stored: HostBlock) -> None:
        """Take the weights of the next block, in host memory."""
        self._stored[block] = stored
        if len(self._slabs) < SLABS:
            self._slabs.append(_Slab(stored.memory.numel(), self._device, self._copies))

    def buffers(self, block: int) -> Mapping[str, Tensor]:
        """Return what the block computes from, by the names of its weights."""
        return self._stored[block].views(self._slab_of(block).memory)

    def take(self, block: int) -> None:
        """Have a block's weights in place before what is enqueued next."""
        self._fetch(block)
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_event(self._slab_of(block).arrived)

    def release(self, block: int) -> None:
        """Note that the block is enqueued; fetch the one after it meanwhile, the last's is the first."""
        if self._copies is not None:
            self._slab_of(block).free.record(torch.cuda.current_stream(self._device))
        blocks = list(self._stored)
        self._fetch(blocks[(blocks.index(block) + 1) % len(blocks)])

    def resident_bytes(self) -> int:
        return sum(slab.memory.numel() for slab in self._slabs)

    def _slab_of(self, block: int) -> _Slab:
        return self._slabs[list(self._stored).index(block) % SLABS]

    def _fetch(self, block: int) -> None:
        target = self._slab_of(block)
        if target.holds == block:
            return
        target.holds = block
        with nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
            if self._copies is not None:
                self._copies.wait_event(target.free)
            self._stored[block].copy_to(target.memory)
            if self._copies is not None:
                target.arrived.record(self._copies)
