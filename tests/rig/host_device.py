# SPDX-License-Identifier: Apache-2.0
"""A GPU feigned in host memory: streams, events, graphs and allocations, and a check for races.

Work is done at once, in the order in which it is enqueued. Whether that order is one that the
device would keep is decided by vector clocks: every stream and event carries what it is known to
come after, and a read or write that does not come after the last conflicting one is an error. So a
missing wait is found on every run, not on an unlucky one. What torch allocates inside is the
device's memory; other memory, as of mapped files, is the host's, whose accesses are done at once.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import torch
from stand_in import ALIGNMENT, DTYPE_NAMES, Places
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from freewheel.engines.onnxruntime import _session

Clock = dict[int, int]
Range = tuple[int, int]
PLACE = torch.device("cpu", 0)
"""Host memory that plays the device; `torch.device("cpu")` is the host."""

COPIES = ("aten.copy_", "aten._to_copy", "aten.clone")


class RaceError(AssertionError):
    """Work reads or overwrites memory that the device may not have finished with."""


class Stream:
    """A CUDA stream: its handle, and what it comes after."""

    def __init__(self, device: HostDevice, handle: int) -> None:
        self._home, self.cuda_stream, self.clock = device, handle, {}
        self.device = PLACE

    def wait_stream(self, other: Stream) -> None:
        self._home.count("waits")
        self._home.fork(other, self)
        _merge(self.clock, other.clock)

    def wait_event(self, event: Event) -> None:
        self._home.count("waits")
        event.require_recorded()
        if event.stream is not None:
            self._home.fork(event.stream, self)
        _merge(self.clock, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._home)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._home.synchronize(self)


class Event:
    """A CUDA event."""

    def __init__(self, device: HostDevice) -> None:
        self._home, self.clock, self.stream = device, {}, None
        self._is_recorded = False

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or self._home.current
        self.clock, self._is_recorded = dict(self.stream.clock), True

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._home.current).wait_event(self)

    def require_recorded(self) -> None:
        assert self._is_recorded, "waits for an event that nobody recorded"

    def synchronize(self) -> None:
        self.require_recorded()
        self._home.host_after(self.clock)


class Graph:
    """A CUDA graph: what was enqueued between the begin and the end of its capture."""

    def __init__(self, device: HostDevice) -> None:
        self._home = device
        self.works: list[tuple[Callable[[], None], Sequence[Range], Sequence[Range]]] = []
        self.streams: set[int] = set()
        self.is_broken = False

    def __del__(self) -> None:
        """Break the capture that this thread is in, as CUDA does."""
        if self._home._capture is not None:
            self._home._capture.is_broken = True

    def replay(self) -> None:
        self._home.count("replays")
        for work, reads, writes in self.works:
            self._home.touch(reads, writes)
            with _disable_current_modes():
                work()


class HostDevice(TorchDispatchMode):
    """The device; inside `with` it sees every operation of torch on this thread.

    Attributes:
        counts: ``waits``, ``copies``, ``copied bytes``, ``allocations``, ``replays``, ….
        largest: Bytes of the largest copy since `reset_counts`.
        races: Whether to check order; it takes time for large tensors.
    """

    def __init__(
        self, *, races: bool = True, make_program: Callable[[onnx.ModelProto], Any] | None = None
    ) -> None:
        super().__init__()
        self.races, self._make_program = races, make_program or OnnxProgram
        self.reset_counts()
        self._handles = itertools.count(0)
        self._streams: dict[int, Stream] = {}
        self.default = self.new_stream()
        self._local = threading.local()
        self._lock = threading.RLock()
        self._writes: dict[int, tuple[int, int]] = {}
        self._reads: dict[int, dict[int, int]] = {}
        self._host: Clock = {}  # one for all threads, which hand things on under Python's lock
        self._alive: list[Any] = []  # so that no address comes back with another meaning
        self._programs: dict[bytes, Any] = {}
        self.registered: dict[int, int] = {}
        self.recorded: list[tuple[torch.Tensor, Stream]] = []

    # What torch.cuda offers.

    def new_stream(self, device: Any = None, **_: Any) -> Stream:
        handle = next(self._handles)
        self._streams[handle] = Stream(self, handle)
        return self._streams[handle]

    @property
    def current(self) -> Stream:
        return getattr(self._local, "stream", self.default)

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        before = self.current
        self._local.stream = stream or before
        try:
            yield
        finally:
            self._local.stream = before

    @contextmanager
    def capture(
        self, graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        """Begin and end a capture by CUDA's rules."""
        stream = stream or self.new_stream()
        if stream is self.default:
            raise RuntimeError("CUDA error: operation not permitted on the legacy stream")
        self.synchronize(self.current)
        assert self._capture is None, "one capture at a time"
        self._local.capture = graph
        graph.streams = {stream.cuda_stream}
        self.count("captures")
        try:
            with self.on(stream):
                yield
        finally:
            self._local.capture = None
        if graph.is_broken:
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            )

    @property
    def _capture(self) -> Graph | None:
        return getattr(self._local, "capture", None)

    def fork(self, from_stream: Stream, to_stream: Stream) -> None:
        """Draw a stream that waits for a captured one into the capture."""
        if self._capture is not None and from_stream.cuda_stream in self._capture.streams:
            self._capture.streams.add(to_stream.cuda_stream)

    def synchronize(self, stream: Stream) -> None:
        if self._capture is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.count("synchronisations")
        self.host_after(stream.clock)

    def synchronize_all(self) -> None:
        for stream in list(self._streams.values()):
            self.synchronize(stream)

    def host_after(self, clock: Clock) -> None:
        with self._lock:
            _merge(self._host, clock)

    # What the stand-in asks of a device.

    def program(self, model: onnx.ModelProto) -> Any:
        content = model.SerializeToString()
        if content not in self._programs:
            self._programs[content] = self._make_program(model)
        return self._programs[content]

    def enqueue(
        self, stream: int, work: Callable[[], None], reads: Sequence[Range], writes: Sequence[Range]
    ) -> None:
        assert stream in self._streams, f"{stream:#x} is no stream"
        if self._capture is not None:
            assert stream in self._capture.streams, "enqueued outside the stream that is captured"
            self._capture.works.append((work, reads, writes))
            return
        with self.on(self._streams[stream]):
            self.touch(reads, writes)
        with _disable_current_modes():  # a kernel's own operations are its own affair
            work()

    def pause(self) -> None:
        """Do nothing: here the order of waits decides, not the time."""

    def spoil(self, address: int, size: int) -> None:
        ctypes.memset(address, 0xFF, size)  # NaN in every float

    def require_mapped(self, address: int, size: int) -> None:
        end = address + size
        for line in Path("/proc/self/maps").read_text(encoding="ascii").splitlines():
            first, last = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
            if first <= address < last:
                address = last  # the next mapping may go on
                if address >= end:
                    return
        raise AssertionError(f"{size} bytes to {end:#x} are not all allocated")

    def is_legacy(self, stream: int) -> bool:
        return stream == self.default.cuda_stream

    # Order.

    def count(self, what: str, by: int = 1) -> None:
        with self._lock:
            self.counts[what] += by

    def reset_counts(self) -> None:
        """Start to count anew."""
        self._lock = threading.RLock()
        self.counts: Counter[str] = Counter()
        self.largest = 0

    def touch(
        self, reads: Sequence[Range], writes: Sequence[Range], *, is_new: bool = False
    ) -> None:
        """Note an access of the current stream, and refuse one that comes too early."""
        if not self.races:
            return
        with self._lock:
            stream = self.current
            me, clock = stream.cuda_stream, stream.clock
            _merge(clock, self._host)
            clock[me] = now = clock.get(me, 0) + 1
            for spot in _spots(reads):
                if spot not in self._writes:
                    continue
                self._require(self._writes.get(spot), clock, stream, "reads what another writes")
                self._reads.setdefault(spot, {})[me] = now
            for spot in _spots(writes):
                if not is_new and spot not in self._writes:
                    continue  # the host's memory
                if not is_new:
                    self._require(self._writes.get(spot), clock, stream, "overwrites another's")
                    for last in self._reads.get(spot, {}).items():
                        self._require(last, clock, stream, "overwrites what another reads")
                self._writes[spot] = me, now
                self._reads.pop(spot, None)

    def _require(
        self, last: tuple[int, int] | None, clock: Clock, stream: Stream, what: str
    ) -> None:
        if last is not None and clock.get(last[0], 0) < last[1]:
            raise RaceError(
                f"stream {stream.cuda_stream} {what}: stream {last[0]} is not waited for"
            )

    # Torch's own operations.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        given = [t for t in given if t.device.type == "cpu"]
        before = {_storage(t) for t in given}
        written = _written(func, args, kwargs)
        made = func(*args, **kwargs)
        made = tree_map(lambda t: self._settle(t, before), made)
        results = [t for t in tree_flatten(made)[0] if isinstance(t, torch.Tensor)]
        fresh = [t for t in results if t.device.type == "cpu" and _storage(t) not in before]
        fresh = [t for t in fresh if t.numel()]
        if not written and not fresh and results:
            return made  # a view
        assert self._capture is None, f"{func} in a capture: replays would not repeat it"
        is_read = {id(t) for t in given} - {id(t) for t in written}
        if str(func).startswith("aten.copy_"):
            is_read.discard(id(args[0]))
        self.touch(
            [_range(t) for t in given if id(t) in is_read and t.numel()],
            [_range(t) for t in written if t.numel()],
        )
        for tensor in fresh:
            self._alive.append(tensor.untyped_storage())
            self.touch([], [_range(tensor)], is_new=True)
            self.count("allocations")
            self.count("allocated bytes", tensor.nbytes)
        if str(func).startswith("aten._to_copy") and not kwargs.get("non_blocking"):
            self.host_after(self.current.clock)  # torch waits for a copy between host and device
        if str(func).startswith(COPIES):
            size = (written or fresh)[0].nbytes if written or fresh else 0
            self.count("copies")
            self.largest = max(self.largest, size)
        return made

    def _settle(self, value: Any, before: set[int]) -> Any:
        """Move a new tensor to where a GPU's allocator would have put it."""
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return value
        if _storage(value) in before or not value.numel() or value.data_ptr() % ALIGNMENT == 0:
            return value
        size = value.untyped_storage().nbytes()
        memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        start = -memory.data_ptr() % ALIGNMENT
        flat = memory[start : start + size].view(value.dtype)
        settled = flat.as_strided(value.shape, value.stride(), flat.storage_offset())
        return settled.copy_(value)


class OnnxProgram:
    """A graph in ONNX Runtime, over addresses, exactly as the backend `onnxruntime` runs it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._session = _session(model.SerializeToString())  # type: ignore[arg-type]
        graph = model.graph
        inside = {t.name for t in graph.initializer}
        self._inputs = {v.name: v.type.tensor_type for v in graph.input if v.name not in inside}
        self._outputs = {v.name: v.type.tensor_type for v in graph.output}
        self._shapes: dict[Any, dict[str, tuple[int, ...]]] = {}

    def output_shapes(self, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        key = tuple(sorted(inputs.items()))
        if key not in self._shapes:
            # Ones: a parameter that something is divided by must not be zero.
            ones = {n: np.ones(inputs[n], _numpy(t)) for n, t in self._inputs.items()}
            made = self._session.run(None, ones)
            self._shapes[key] = {n: v.shape for n, v in zip(self._outputs, made, strict=True)}
        return self._shapes[key]

    def run(self, places: Places) -> None:
        binding = self._session.io_binding()
        for name, kind in self._inputs.items():
            address, shape = places[name]
            binding.bind_input(name, "cpu", 0, kind.elem_type, shape, address)
        for name, kind in self._outputs.items():
            address, shape = places[name]
            binding.bind_output(name, "cpu", 0, kind.elem_type, shape, address)
        self._session.run_with_iobinding(binding)


def _numpy(kind: Any) -> Any:
    return np.dtype(DTYPE_NAMES[kind.elem_type])


def _merge(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        if clock.get(stream, 0) < time:
            clock[stream] = time


def _spots(ranges: Sequence[Range]) -> Iterator[int]:
    for address, size in ranges:
        yield from range(address // ALIGNMENT, (address + size - 1) // ALIGNMENT + 1)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _range(tensor: torch.Tensor) -> Range:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Return the arguments that an operation overwrites."""
    found: list[torch.Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_flatten(value)[0] if isinstance(t, torch.Tensor)]
    return found


def feign_cuda(monkeypatch: Any, device: HostDevice, capability: tuple[int, int] = (8, 9)) -> None:
    """Let torch.cuda speak of ``device``."""
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: "Feigned GPU",
        "current_stream": lambda place=None: device.current,
        "default_stream": lambda place=None: device.default,
        "synchronize": lambda place=None: device.synchronize_all(),
        "Stream": device.new_stream,
        "Event": lambda **_: Event(device),
        "stream": device.on,
        "device": lambda place: nullcontext(),
        "CUDAGraph": lambda **_: Graph(device),
        "graph": device.capture,
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=lambda address, size, flags: (
                device.registered.update({address: size}) or 0
            ),
            cudaHostUnregister=lambda address: device.registered.pop(address) and 0,
        ),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda tensor, stream: device.recorded.append((tensor, stream)),
    )
