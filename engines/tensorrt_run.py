# SPDX-License-Identifier: Apache-2.0
"""Run TensorRT plans: an execution context per binding, one scratch memory for all of them.

Written against the documented API and checked for conformance with the installed package; it
needs a GPU to run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..configs.errors import RequestError
from .base import TensorSpec
from .bindings import check_bindings
from .record import EngineRecord

__all__ = ["CapturedCalls", "Scratch", "TensorRTCall", "TensorRTEngine"]


DEFAULT_STREAM = 0


class Scratch:
    """Device memory for the activations of whichever engine runs; grows at `bind`, never at `run`.

    Engines that share it must run one after another on one stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._stream: Any = None

    @property
    def stream(self) -> Any:
        """The stream that work enqueued on the default stream is put on instead."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return self._stream

    def reserve(self, size: int) -> None:
        """Make room for ``size`` bytes."""
        if size > self.memory.numel():
            self.memory = torch.empty(size, dtype=torch.uint8, device=self.device)


class TensorRTCall:
    """An execution context with every address set."""

    def __init__(self, context: Any, tensors: Mapping[str, Tensor], size: int, engine: Any) -> None:
        self._context, self._tensors, self._size = context, tensors, size
        self._engine = engine  # outlives the context
        self.scratch: Scratch = engine.scratch
        self._memory: Tensor | None = None

    def run(self) -> None:
        """Enqueue on torch's current stream; outputs are ready when the stream gets there."""
        scratch = self.scratch
        if self._memory is not scratch.memory:  # it grew when another call was bound
            self._memory = scratch.memory
            self._context.set_device_memory(self._memory.data_ptr(), self._size)
        stream = torch.cuda.current_stream(scratch.device)
        if stream.cuda_stream != DEFAULT_STREAM:
            self._enqueue(stream.cuda_stream)
            return
        # On the default stream TensorRT waits for the device at every enqueue.
        scratch.stream.wait_stream(stream)
        self._enqueue(scratch.stream.cuda_stream)
        stream.wait_stream(scratch.stream)

    def _enqueue(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise RequestError(f"engine '{self._engine.name}'", "TensorRT could not enqueue it")

    def require_capturable(self, stream: int) -> None:
        """Raise `RequestError` where TensorRT would leave ``stream`` and so break a capture of it."""
        if not self._context.is_stream_capturable(stream):
            what = "can't be recorded into a CUDA graph"
            raise RequestError(f"engine '{self._engine.name}'", what, "leave --cuda-graphs out")


class TensorRTEngine:
    """One deserialised plan."""

    def __init__(
        self,
        trt: Any,
        engine: Any,
        record: EngineRecord,
        *,
        name: str,
        scratch: Scratch,
        runtime: Any,
        runtime_config: Any = None,
    ) -> None:
        self._trt, self._plan, self._runtime = trt, engine, runtime
        self._config = runtime_config
        self.name, self.scratch = name, scratch
        self.inputs: Mapping[str, TensorSpec] = record.inputs
        self.outputs: Mapping[str, TensorSpec] = record.outputs
        host = trt.TensorLocation.HOST
        self.host_tensors = frozenset(
            key for key in (*self.inputs, *self.outputs) if engine.get_tensor_location(key) == host
        )
        """Shape tensors: TensorRT reads these in host memory, at `bind`."""

    def bind(self, bindings: Mapping[str, Tensor]) -> TensorRTCall:
        """Bind every input and output by address; see `Engine.bind`."""
        check_bindings(
            self,
            bindings,
            name=self.name,
            device=self.scratch.device,
            on_host=self.host_tensors,
        )
        context = self._create_context()
        for key in self.inputs:
            if not context.set_input_shape(key, tuple(bindings[key].shape)):
                raise self._misfit(key, bindings[key])
        for key, tensor in bindings.items():
            context.set_tensor_address(key, tensor.data_ptr())
        missing = context.infer_shapes()
        assert not missing, f"shapes of {missing} are unknown though every input is bound"
        for key in self.outputs:
            found, given = tuple(bindings[key].shape), tuple(context.get_tensor_shape(key))
            if found != given:
                what = f"shape is {list(found)} but the graph gives {list(given)}"
                where = f"engine '{self.name}', tensor '{key}'"
                raise RequestError(where, what, "bind a tensor of that shape")
        size = context.update_device_memory_size_for_shapes()
        self.scratch.reserve(size)
        return TensorRTCall(context, dict(bindings), size, self)

    def _create_context(self) -> Any:
        if self._config is not None:
            return self._plan.create_execution_context(self._config)
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return self._plan.create_execution_context(strategy)

    def _misfit(self, key: str, tensor: Tensor) -> RequestError:
        smallest, _, largest = self._plan.get_tensor_profile_shape(key, 0)
        what = (
            f"shape {list(tensor.shape)} is outside the engine's profile "
            f"{list(smallest)} to {list(largest)}"
        )
        where = f"engine '{self.name}', tensor '{key}'"
        return RequestError(where, what, "ask for a size inside it, or rebuild with a wider range")


class CapturedCalls:
    """Calls replayed as one CUDA graph, which is recorded anew when the scratch memory moved."""

    def __init__(self, calls: Sequence[TensorRTCall]) -> None:
        self._calls = tuple(calls)  # keeps contexts and memory alive
        self._scratch = self._calls[0].scratch
        self._record()

    def run(self) -> None:
        """Replay on torch's current stream."""
        if self._memory is not self._scratch.memory:
            self._record()
        self._graph.replay()

    def _record(self) -> None:
        for call in self._calls:
            call.run()
        stream = torch.cuda.current_stream(self._scratch.device)
        stream.synchronize()
        for call in self._calls:
            call.require_capturable(stream.cuda_stream)
        self._memory = self._scratch.memory
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device: RTX compiles kernels on threads of its own.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            for call in self._calls:
                call.run()
