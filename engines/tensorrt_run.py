# SPDX-License-Identifier: Apache-2.0
"""Run TensorRT plans: an execution context per binding, one stream and one scratch memory for all.

TensorRT itself has not run this. Tests drive it with the real packages' signatures and a stand-in that
computes, on any machine and on a GPU's streams and memory (docs/explanation/tensorrt.md).
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..core.errors import RequestError
from .base import ALIGNMENT, TensorSpec
from .bindings import check_bindings
from .record import EngineRecord

__all__ = ["CapturedCalls", "EngineStream", "TensorRTCall", "TensorRTEngine"]

_COLLECTOR = threading.Lock()
"""Held while one thread has switched Python's garbage collector off, which is the process's."""


class EngineStream:
    """The stream that engines of one backend run on, and the activation memory they share.

    One stream, since the memory is whichever engine's runs; never the default one, on which TensorRT
    waits for the device at every enqueue and nothing can be captured. The memory grows at `bind`,
    never at `run`.

    Attributes:
        device: CUDA device.
        memory: uint8 [bytes], on ``device``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._stream: Any = None

    @property
    def stream(self) -> Any:
        """The stream, made when first asked for."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return self._stream

    @property
    def is_current(self) -> bool:
        """Whether torch puts work of this thread on the stream now."""
        current = torch.cuda.current_stream(self.device)
        return bool(current.cuda_stream == self.stream.cuda_stream)

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Put what is enqueued inside on the stream: after the caller's work, before its next."""
        if self.is_current:
            yield
            return
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            caller.wait_stream(self.stream)

    def reserve(self, size: int, where: str) -> None:
        """Make room for ``size`` bytes.

        Raises:
            RequestError: the device has no room.
        """
        if size <= self.memory.numel():
            return
        try:
            with torch.cuda.stream(self.stream):  # whose work the old memory's next owner waits for
                self.memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as fault:
            what = f"activations take {size} bytes, which the device has not ({fault})"
            hint = "ask for a smaller size, keep the weights in host memory with --offload"
            raise RequestError(where, what, hint) from fault


class TensorRTCall:
    """An execution context with every address set."""

    def __init__(self, context: Any, tensors: Mapping[str, Tensor], size: int, engine: Any) -> None:
        self._context, self._tensors, self._size = context, tensors, size
        self._engine = engine  # outlives the context
        self.lane: EngineStream = engine.lane
        self._memory: Tensor | None = None

    def run(self) -> None:
        """Enqueue in the order of torch's current stream.

        Raises:
            RequestError: TensorRT can't enqueue it; says why.
        """
        if self.lane.is_current:
            self._enqueue()
            return
        with self.lane.joined():
            self._enqueue()

    def _enqueue(self) -> None:
        if self._memory is not self.lane.memory:  # it grew when another call was bound
            self._memory = self.lane.memory
            self._context.set_device_memory(self._memory.data_ptr(), self._size)
        if not self._context.execute_async_v3(self.lane.stream.cuda_stream):
            what = f"can't be enqueued: {self._engine.faults.take()}"
            raise RequestError(self._engine.where, what, "look at the GPU with nvidia-smi")

    def require_capturable(self) -> None:
        """Raise `RequestError` where TensorRT knows ahead that the stream can't be captured.

        TensorRT-RTX alone can be asked; a capture with regular TensorRT shows.
        """
        asked = getattr(self._context, "is_stream_capturable", None)
        if asked is not None and not asked(self.lane.stream.cuda_stream):
            what = "can't be recorded into a CUDA graph"
            raise RequestError(self._engine.where, what, "leave --cuda-graphs out")


class TensorRTEngine:
    """One deserialised plan."""

    def __init__(
        self,
        trt: Any,
        engine: Any,
        record: EngineRecord,
        *,
        name: str,
        lane: EngineStream,
        runtime: Any,
        faults: Any,
        runtime_config: Any = None,
    ) -> None:
        self._trt, self._plan, self._runtime = trt, engine, runtime
        self._config = runtime_config
        self.name, self.lane, self.faults = name, lane, faults
        self.inputs: Mapping[str, TensorSpec] = record.inputs
        self.outputs: Mapping[str, TensorSpec] = record.outputs
        host = trt.TensorLocation.HOST
        self.host_tensors = frozenset(
            key for key in (*self.inputs, *self.outputs) if engine.get_tensor_location(key) == host
        )
        """Shape tensors: TensorRT reads these in host memory, at `bind`."""

    @property
    def where(self) -> str:
        """What errors call it."""
        return f"engine '{self.name}'"

    def bind(self, bindings: Mapping[str, Tensor]) -> TensorRTCall:
        """Bind every input and output by address; see `Engine.bind`."""
        check_bindings(
            self,
            bindings,
            name=self.name,
            device=self.lane.device,
            on_host=self.host_tensors,
        )
        with torch.cuda.device(self.lane.device):
            context = self._create_context()
            self._set_shapes(context, bindings)
            for key, tensor in bindings.items():
                self._set_address(context, key, tensor)
            missing = context.infer_shapes()
            assert not missing, f"shapes of {missing} are unknown though every input is bound"
            for key in self.outputs:
                found, given = tuple(bindings[key].shape), tuple(context.get_tensor_shape(key))
                if found != given:
                    what = f"shape is {list(found)} but the graph gives {list(given)}"
                    raise RequestError(
                        f"{self.where}, tensor '{key}'", what, "bind a tensor of that shape"
                    )
            size = context.update_device_memory_size_for_shapes()
            self.lane.reserve(size, self.where)
        return TensorRTCall(context, dict(bindings), size, self)

    def _create_context(self) -> Any:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        how = strategy if self._config is None else self._config
        context = self._plan.create_execution_context(how)
        if context is None:
            what = f"TensorRT makes no execution context: {self.faults.take()}"
            raise RequestError(
                self.where, what, "free memory of the GPU, or ask for a smaller size"
            )
        return context

    def _set_shapes(self, context: Any, bindings: Mapping[str, Tensor]) -> None:
        """Choose the last optimization profile that fits, the narrowest, and set every shape."""
        shapes = {key: tuple(bindings[key].shape) for key in self.inputs}
        count = self._plan.num_optimization_profiles
        fitting = [i for i in range(count) if not self._misfits(shapes, i)]
        if not fitting:
            key = self._misfits(shapes, 0)[0]
            smallest, _, largest = self._plan.get_tensor_profile_shape(key, 0)
            what = (
                f"shape {list(shapes[key])} is outside the engine's profile "
                f"{list(smallest)} to {list(largest)}"
            )
            hint = "ask for a size inside it, or rebuild with a wider range"
            raise RequestError(f"{self.where}, tensor '{key}'", what, hint)
        if fitting[-1] and not context.set_optimization_profile_async(
            fitting[-1], self.lane.stream.cuda_stream
        ):
            what = f"profile {fitting[-1]} can't be set: {self.faults.take()}"
            raise RequestError(self.where, what, "build the bundle again")
        for key, shape in shapes.items():
            if not context.set_input_shape(key, shape):
                what = f"shape {list(shape)} is refused: {self.faults.take()}"
                raise RequestError(f"{self.where}, tensor '{key}'", what, "build the bundle again")

    def _misfits(self, shapes: Mapping[str, tuple[int, ...]], profile: int) -> list[str]:
        """Name the inputs whose shapes an optimization profile does not hold."""
        found = []
        for key, shape in shapes.items():
            if key in self.host_tensors:
                continue  # their profile is of values
            smallest, _, largest = self._plan.get_tensor_profile_shape(key, profile)
            sizes = zip(smallest, shape, largest, strict=True)
            if not all(least <= size <= most for least, size, most in sizes):
                found.append(key)
        return found

    def _set_address(self, context: Any, key: str, tensor: Tensor) -> None:
        address = tensor.data_ptr()
        if key not in self.host_tensors:
            assert address % ALIGNMENT == 0, f"{self.where}, '{key}': not at {ALIGNMENT} bytes"
        if not context.set_tensor_address(key, address):
            what = f"its address is refused: {self.faults.take()}"
            raise RequestError(f"{self.where}, tensor '{key}'", what, "build the bundle again")


class CapturedCalls:
    """Calls replayed as one CUDA graph, which is recorded anew when the scratch memory moved.

    Raises:
        RequestError: one of them can't be recorded; says which, or what TensorRT and CUDA say.
    """

    def __init__(self, calls: Sequence[TensorRTCall]) -> None:
        self._calls = tuple(calls)  # keeps contexts and memory alive
        self._lane = self._calls[0].lane
        self._record()

    def run(self) -> None:
        """Replay in the order of torch's current stream."""
        with self._lane.joined():
            if self._memory is not self._lane.memory:
                self._record()
            self._graph.replay()

    def _record(self) -> None:
        for call in self._calls:
            call.run()
        self._lane.stream.synchronize()
        for call in self._calls:
            call.require_capturable()
        self._memory = self._lane.memory
        self._graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on using the device: RTX compiles kernels on threads of its own.
            with (
                _no_garbage_collected(),
                torch.cuda.graph(
                    self._graph, stream=self._lane.stream, capture_error_mode="thread_local"
                ),
            ):
                for call in self._calls:
                    call.run()
        except (RequestError, RuntimeError) as fault:  # TensorRT's, or CUDA's at the capture's end
            cause = fault.__context__ if isinstance(fault.__context__, RequestError) else fault
            what = f"the step can't be recorded into a CUDA graph ({cause})"
            raise RequestError("--cuda-graphs", what, "leave --cuda-graphs out") from fault


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """Keep Python from freeing forgotten CUDA graphs meanwhile: that breaks a capture."""
    with _COLLECTOR:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()
