# SPDX-License-Identifier: Apache-2.0
"""A stand-in for TensorRT that computes: real signatures, NVIDIA's protocol, somebody else's kernels.

Every attribute must exist on the real class, every call must fit a real signature. Every order that
NVIDIA's documentation prescribes is insisted on, and every freedom that it leaves is used: scratch
memory holds rubbish at every enqueue, a context needs as much of it as its shapes ask for, and what
was not set is an error. `execute_async_v3` hands the graph to a device that computes it: ONNX
Runtime over host memory, or torch over CUDA memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import ModuleType
from typing import Any, Protocol

import onnx
from onnx import TensorProto
from signatures import check_call

ALIGNMENT = 256
MAGIC = b"stand-in plan\n"
ITEM_BYTES = {
    TensorProto.FLOAT: 4,
    TensorProto.FLOAT16: 2,
    TensorProto.BFLOAT16: 2,
    TensorProto.INT64: 8,
    TensorProto.INT32: 4,
    TensorProto.BOOL: 1,
}
DTYPE_NAMES = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.INT64: "int64",
    TensorProto.INT32: "int32",
    TensorProto.BOOL: "bool",
}
Places = Mapping[str, tuple[int, tuple[int, ...]]]
"""Tensor name → address and shape."""


class Program(Protocol):
    """A graph made ready for a device."""

    def output_shapes(self, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the shape of every output for these shapes of inputs."""

    def run(self, places: Places) -> None:
        """Read the inputs, write the outputs."""


class Device(Protocol):
    """What computes, and the rules of its streams."""

    def program(self, model: onnx.ModelProto) -> Program:
        """Make a graph ready."""

    def enqueue(
        self,
        stream: int,
        work: Callable[[], None],
        reads: Sequence[tuple[int, int]],
        writes: Sequence[tuple[int, int]],
    ) -> None:
        """Do ``work`` in the order of a stream; ranges are address and bytes."""

    def pause(self) -> None:
        """Keep the current stream busy for a while of random length, if time is what shows a race."""

    def spoil(self, address: int, size: int) -> None:
        """Overwrite memory with rubbish, as part of a work."""

    def require_mapped(self, address: int, size: int) -> None:
        """Raise AssertionError unless the range is allocated."""

    def is_legacy(self, stream: int) -> bool:
        """Whether this is CUDA's legacy default stream."""


class Standing:
    """Answers in the place of an object of a real class, only to what that class offers."""

    _real: type

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):
            return object.__getattribute__(self, name)
        member = getattr(self._real, name)  # AttributeError: the package has no such thing
        answer = object.__getattribute__(self, name)
        if isinstance(member, property) or not callable(answer):
            return answer

        def call(*given: Any, **named: Any) -> Any:
            check_call(member, given, named)
            return answer(*given, **named)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            member = getattr(self._real, name)
            assert isinstance(member, property), f"'{name}' can't be set"
            assert member.fset is not None, f"'{name}' is read only"
        object.__setattr__(self, name, value)


class StandInModule(ModuleType):
    """The package: its real enumerations and base classes, and stand-ins for what works.

    Attributes:
        stand_in: The `Installation`, for tests.
    """

    def __init__(self, name: str, real: ModuleType, device: Device) -> None:
        super().__init__(name)
        self.__version__ = real.__version__
        self.__spec__ = real.__spec__  # `find_spec` asks for it
        self.__dict__.update(_real_module=real, stand_in=Installation(real, device))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        real = getattr(self._real_module, name)  # AttributeError: the package has no such thing
        return self.stand_in.classes.get(name, real)


class Installation:
    """One package on one device, and everything that was asked of it.

    Attributes:
        counts: What was done how often: ``contexts``, ``enqueues``, ``addresses``, ….
        contexts: Every context ever made.
        configs: Every builder configuration ever made.
        refuses: What is to fail next: ``context``, ``enqueue``, ``capture``.
        bytes_of: Scratch bytes of a context, by the bytes of its inputs.
    """

    def __init__(self, real: ModuleType, device: Device) -> None:
        self.real, self.device = real, device
        self.counts: Counter[str] = Counter()
        self.contexts: list[Any] = []
        self.configs: list[Any] = []
        self.refuses: set[str] = set()
        self.bytes_of: Callable[[int], int] = lambda size: ALIGNMENT * (1 + size // 3 // ALIGNMENT)
        self.classes = _classes(self)


def _classes(home: Installation) -> dict[str, Any]:
    """Make the stand-ins of one package."""
    trt, device = home.real, home.device

    class Runtime(Standing):
        _real = trt.Runtime
        error_recorder: Any = None

        def __init__(self, logger: Any) -> None:
            check_call(trt.Runtime.__init__, (logger,), {})
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
            content = bytes(serialized_engine)
            if not content.startswith(MAGIC):
                self._fault("Serialization assertion magic == expected failed.")
                return None
            return Engine(self, content)

        def _fault(self, text: str) -> None:
            if self.error_recorder is not None:
                self.error_recorder.report_error(trt.ErrorCodeTRT.INVALID_ARGUMENT, text)
            else:
                self._logger.log(trt.ILogger.ERROR, text)

    class Cache(Standing):
        _real = getattr(trt, "IRuntimeCache", object)

        def __init__(self) -> None:
            self._content = b"kernels of " + trt.__version__.encode()
            self._taken: list[bytes] = []

        def serialize(self) -> bytes:
            return self._content

        def deserialize(self, blob: bytes) -> bool:
            self._taken.append(bytes(blob))
            return bytes(blob) == self._content

    class RuntimeConfig(Standing):
        _real = trt.IRuntimeConfig

        def __init__(self) -> None:
            self._strategy = trt.ExecutionContextAllocationStrategy.STATIC
            self._cache: Any = None
            if hasattr(trt, "CudaGraphStrategy"):
                self.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
                kinds = trt.DynamicShapesKernelSpecializationStrategy
                self.dynamic_shapes_kernel_specialization_strategy = kinds.LAZY

        def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
            self._strategy = strategy

        def create_runtime_cache(self) -> Any:
            return Cache()

        def set_runtime_cache(self, cache: Any) -> bool:
            self._cache = cache
            return True

    class Engine(Standing):
        _real = trt.ICudaEngine

        def __init__(self, runtime: Any, content: bytes) -> None:
            head, _, graph = content.removeprefix(MAGIC).partition(b"\n")
            self._about = json.loads(head)
            self._runtime = runtime
            self._model = onnx.load_model_from_string(graph)
            self._program = device.program(self._model)
            inside = {t.name for t in self._model.graph.initializer}
            self._inputs = {v.name: v for v in self._model.graph.input if v.name not in inside}
            self._outputs = {v.name: v for v in self._model.graph.output}

        def _value(self, name: str) -> Any:
            return (self._inputs | self._outputs)[name].type.tensor_type

        @property
        def num_optimization_profiles(self) -> int:
            return len(self._about["profiles"]) or 1

        def get_tensor_location(self, name: str) -> Any:
            location = trt.TensorLocation
            return location.HOST if name in self._about["host"] else location.DEVICE

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
            fixed = [d.dim_value for d in self._value(name).shape.dim]
            profiles = self._about["profiles"]
            shapes = profiles[profile_index].get(name, [fixed] * 3) if profiles else [fixed] * 3
            return [trt.Dims(shape) for shape in shapes]

        def create_runtime_config(self) -> Any:
            return RuntimeConfig()

        def create_execution_context(self, how: Any = None) -> Any:
            if "context" in home.refuses:
                self._runtime._fault("Error Code 2: OutOfMemory (Requested size was 99 bytes.)")
                return None
            strategy = how._strategy if isinstance(how, RuntimeConfig) else how
            assert strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED, (
                "the context would take memory of its own for the largest shapes"
            )
            return Context(self, how if isinstance(how, RuntimeConfig) else None)

    class Context(Standing):
        _real = trt.IExecutionContext

        def __init__(self, engine: Any, config: Any) -> None:
            self._engine, self._config = engine, config
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._memory: tuple[int, int] | None = None
            self._size: int | None = None
            self._profile = 0
            self._checked = False
            home.contexts.append(self)
            home.counts["contexts"] += 1

        def _fault(self, text: str) -> bool:
            self._engine._runtime._fault(text)
            return False

        @property
        def active_optimization_profile(self) -> int:
            return int(self._profile)

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            if not 0 <= profile_index < self._engine.num_optimization_profiles:
                return self._fault(f"no optimization profile {profile_index}")
            if profile_index != self._profile:
                self._profile, self._size = profile_index, None
                self._shapes.clear()
            return True

        def set_input_shape(self, name: str, shape: Any) -> bool:
            if name not in self._engine._inputs:
                return self._fault(f"'{name}' is no input")
            sizes = tuple(shape)
            low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
            if len(sizes) != len(low) or not all(
                a <= s <= b for a, s, b in zip(low, sizes, high, strict=True)
            ):
                return self._fault(f"'{name}' {sizes} is outside [{tuple(low)}, {tuple(high)}]")
            if self._shapes.get(name) != sizes:
                self._size, self._checked = None, False
            self._shapes[name] = sizes
            return True

        def set_tensor_address(self, name: str, memory: int) -> bool:
            home.counts["addresses"] += 1
            if name not in self._engine._inputs | self._engine._outputs:
                return self._fault(f"'{name}' is no tensor")
            if memory % ALIGNMENT:
                return self._fault(f"'{name}' is at {memory:#x}, not aligned to {ALIGNMENT} bytes")
            self._addresses[name] = memory
            self._checked = False
            return True

        def get_tensor_address(self, name: str) -> int:
            return int(self._addresses.get(name, 0))

        def infer_shapes(self) -> list[str]:
            return [n for n in self._engine._inputs if n not in self._shapes]

        def get_tensor_shape(self, name: str) -> Any:
            if name in self._shapes:
                return trt.Dims(self._shapes[name])
            assert not self.infer_shapes(), "asked for an output before every input's shape is set"
            return trt.Dims(self._engine._program.output_shapes(self._shapes)[name])

        def update_device_memory_size_for_shapes(self) -> int:
            assert not self.infer_shapes(), "asked before every input's shape is set"
            self._size = home.bytes_of(sum(self._bytes(n) for n in self._shapes))
            return int(self._size)

        def set_device_memory(self, memory: int, size: int) -> None:
            assert self._size is not None, "memory given before its size was asked for"
            assert memory % ALIGNMENT == 0, "scratch memory is not aligned"
            assert size >= self._size, f"{size} bytes of scratch memory given, {self._size} needed"
            device.require_mapped(memory, self._size)
            self._memory = memory, size

        if hasattr(trt.IExecutionContext, "is_stream_capturable"):

            def is_stream_capturable(self, stream: int) -> bool:
                home.counts["capturability asked"] += 1
                needed = "REQUIRE_USER_ALLOCATION" in self._engine._about["flags"]
                return needed and not device.is_legacy(stream) and "capture" not in home.refuses

        def _bytes(self, name: str) -> int:
            shape = self._shapes.get(name) or tuple(self.get_tensor_shape(name))
            return int(prod(shape) * ITEM_BYTES[self._engine._value(name).elem_type])

        def _places(self) -> dict[str, tuple[int, tuple[int, ...]]]:
            names = (*self._engine._inputs, *self._engine._outputs)
            return {n: (self._addresses[n], tuple(self.get_tensor_shape(n))) for n in names}

        def _check(self) -> None:
            for name in (*self._engine._inputs, *self._engine._outputs):
                assert name in self._addresses, f"enqueued before '{name}' has an address"
                device.require_mapped(self._addresses[name], self._bytes(name))
            assert self._size is not None, "enqueued before the scratch memory's size was asked for"
            assert self._memory is not None, "enqueued before scratch memory was given"
            self._checked = True

        def execute_async_v3(self, stream_handle: int) -> bool:
            home.counts["enqueues"] += 1
            if device.is_legacy(stream_handle):
                home.counts["enqueues on the default stream"] += 1
            if "enqueue" in home.refuses:
                return self._fault("Error Code 1: Cuda Runtime (an illegal address was met)")
            if not self._checked:
                self._check()
            assert self._memory is not None, "checked"
            places, memory = self._places(), (self._memory[0], self._size)
            ranges = {n: (a, self._bytes(n)) for n, (a, _) in places.items()}
            program = self._engine._program

            def work() -> None:
                device.spoil(*memory)
                program.run(places)

            outputs = self._engine._outputs
            device.enqueue(
                stream_handle,
                work,
                [r for n, r in ranges.items() if n not in outputs],
                [*(r for n, r in ranges.items() if n in outputs), memory],
            )
            return True

    class Profile(Standing):
        _real = trt.IOptimizationProfile

        def __init__(self) -> None:
            self._shapes: dict[str, list[list[int]]] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self._shapes[input] = [list(min), list(opt), list(max)]

    class TimingCache(Standing):
        _real = trt.ITimingCache

        def __init__(self, content: bytes) -> None:
            self._content = content

        def serialize(self) -> bytes:
            return b"timings of this GPU"

    class Config(Standing):
        _real = trt.IBuilderConfig
        builder_optimization_level = 3
        max_aux_streams = -1
        progress_monitor: Any = None
        profiling_verbosity: Any = None
        hardware_compatibility_level: Any = trt.HardwareCompatibilityLevel.NONE
        tiling_optimization_level: Any = trt.TilingOptimizationLevel.NONE
        num_compute_capabilities = 0

        def __init__(self) -> None:
            self._profiles: list[Any] = []
            self._flags: set[str] = set()
            self._previews: dict[str, bool] = {}
            self._pools: dict[str, int] = {}
            self._capabilities: dict[int, Any] = {}
            self._cache: Any = None
            home.configs.append(self)

        def set_flag(self, flag: Any) -> None:
            self._flags.add(flag.name)

        def set_preview_feature(self, feature: Any, enable: bool) -> None:
            self._previews[feature.name] = enable

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self._pools[pool.name] = pool_size

        def add_optimization_profile(self, profile: Any) -> int:
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
            assert index < self.num_compute_capabilities, "more capabilities than were announced"
            self._capabilities[index] = compute_capability.name
            return True

        def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
            return TimingCache(bytes(serialized_timing_cache))

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            is_ours = cache._content in (b"", b"timings of this GPU")
            self._cache = cache if is_ours or ignore_mismatch else None
            return self._cache is not None

        def get_timing_cache(self) -> Any:
            return self._cache

    class Input(Standing):
        _real = trt.ITensor
        is_shape_tensor = False

        def __init__(self, name: str) -> None:
            self._name = name

        @property
        def name(self) -> str:
            return str(self._name)

    class Network(Standing):
        _real = trt.INetworkDefinition
        num_layers = 0

        def __init__(self, flags: int) -> None:
            assert flags == 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            self._model = onnx.ModelProto()

        @property
        def num_inputs(self) -> int:
            return len(self._model.graph.input)

        def get_input(self, index: int) -> Any:
            return Input(self._model.graph.input[index].name)

    class Parser(Standing):
        _real = trt.OnnxParser
        num_errors = 0

        def __init__(self, network: Any, logger: Any) -> None:
            check_call(trt.OnnxParser.__init__, (network, logger), {})
            self._network = network

        def load_model_proto(self, model: bytes, path: str | None = None) -> bool:
            self._network._model = onnx.load_model_from_string(model)
            return True

        def parse_model_proto(self) -> bool:
            return True

    class Builder(Standing):
        _real = trt.Builder

        def __init__(self, logger: Any) -> None:
            check_call(trt.Builder.__init__, (logger,), {})

        def create_network(self, flags: int = 0) -> Any:
            return Network(flags)

        def create_builder_config(self) -> Any:
            return Config()

        def create_optimization_profile(self) -> Any:
            return Profile()

        def build_serialized_network(self, network: Any, config: Any) -> bytes:
            return plan_of(
                network._model, [p._shapes for p in config._profiles], sorted(config._flags)
            )

    return {
        "Runtime": Runtime,
        "Builder": Builder,
        "OnnxParser": Parser,
    }


def plan_of(
    model: onnx.ModelProto,
    profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]],
    flags: Sequence[str] = (),
    host: Sequence[str] = (),
) -> bytes:
    """Serialise a graph as the stand-in's runtime reads it."""
    about = {"profiles": list(profiles), "flags": list(flags), "host": list(host)}
    return MAGIC + json.dumps(about).encode() + b"\n" + model.SerializeToString()
