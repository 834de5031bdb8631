# SPDX-License-Identifier: Apache-2.0
"""TensorRT and TensorRT-RTX: one backend over two packages with one API.

TensorRT-RTX compiles ahead of time for GPUs that aren't there; TensorRT compiles on the GPU that
will run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ..core.errors import BackendUnavailable, BuildError, BundleError, OutputError
from ..core.output import write_bytes
from .base import Availability, BoundCall, Target
from .bindings import load_graph, specs_of
from .record import REBUILD, EngineRecord, engine_folder
from .target_checks import check_options, check_precision
from .tensorrt_build import OPTIONS, Plan, build_plan, check_choices, known_capabilities
from .tensorrt_journal import fault_recorder
from .tensorrt_run import CapturedCalls, EngineStream, TensorRTEngine

__all__ = ["TensorRT", "TensorRTRTX"]

PLAN = "model.plan"
NO_GPU = "no NVIDIA GPU that this PyTorch can use"
LEVELS = range(6)  # of effort that the builder spends
DEFAULT_CAPABILITIES = ("8.6", "8.9", "12.0")  # RTX 30, RTX 40 and L40S, RTX 50
OLDEST = "10.15"
OLDER_LACK = "attention came with 10.14, rotary embedding and RMS normalization with 10.15"
COMPATIBILITY = "hardware_compatibility_level"
FLOAT8_FROM = "8.9"  # compute capability; TensorRT refuses the numbers before it
COMPATIBLE_FROM = {"ampere_plus": "8.0", "same_compute_capability": "7.5"}
"""Level of hardware compatibility → the oldest GPU that can build for it."""


@dataclass
class TensorRT:
    """Compile on and run on the NVIDIA GPU of this machine.

    Engines loaded by one instance share one stream and one scratch memory for activations. A call
    takes its place after what the caller's current stream holds; inside `on_stream` calls follow
    each other with nothing between them.

    Attributes:
        cache_folder: Where timing and kernel caches are kept between builds and runs; None keeps
            none. Caches only save time: they may be deleted, and are no part of a bundle.
        progress: Called with a phase of the build, its finished steps and their number.
        captures: Whether calls will be recorded into CUDA graphs, which must hold final kernels.
        device: The GPU; one without an index is the process's current one. Set before the first
            engine is compiled or loaded.
    """

    name: ClassVar[str] = "tensorrt"
    precisions: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    module: ClassVar[str] = "tensorrt"
    package: ClassVar[str] = "tensorrt"

    cache_folder: Path | None = None
    progress: Callable[[str, int, int], None] | None = None
    captures: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cuda"))

    def __post_init__(self) -> None:
        self._lane: EngineStream | None = None
        self._runtime_cache: Any = None
        self._runtime: Any = None
        self._faults: Any = None

    @property
    def lane(self) -> EngineStream:
        """The stream and scratch memory of every engine that this instance loads."""
        if self._lane is None:
            self._lane = EngineStream(self.device)
        return self._lane

    def on_stream(self) -> AbstractContextManager[None]:
        """Put what is enqueued inside on the engines' stream; join the caller's once at each end."""
        return self.lane.joined()

    def compiler_version(self) -> str:
        """Return the package's version; the machine is the target's."""
        return str(_import(self.module).__version__)

    @classmethod
    def probe(cls) -> Availability:
        """Say whether the package and a GPU are there."""
        missing = _missing(cls.module, cls.package)
        if missing:
            return missing
        version = _import(cls.module).__version__
        if _version(version) < _version(OLDEST):
            what = f"{cls.package} {version} is older than {OLDEST}: {OLDER_LACK}"
            return Availability(False, what, f"pip install '{cls.package}>={OLDEST}'")
        if not torch.cuda.is_available():
            return Availability(False, f"{cls.package} {version} is installed, but {NO_GPU}")
        return Availability(True, f"{cls.package} {version}, {torch.cuda.get_device_name()}")

    def complete(self, target: Target) -> Target:
        """Fill the compute capabilities in that are compiled for where none is named.

        Raises:
            BackendUnavailable: this machine can't compile.
            BuildError: a compute capability, an option or its value is unknown.
        """
        capabilities = self._check_target(self._compiler(), target, f"backend '{self.name}'")
        return replace(target, compute_capabilities=capabilities)

    def takes_float8(self, target: Target) -> bool:
        """Tell whether every GPU of a completed target has the numbers."""
        newest_alone = _compatibility(target) != "ampere_plus"
        served = target.compute_capabilities
        return newest_alone and all(_version(c) >= _version(FLOAT8_FROM) for c in served)

    def compile(self, graph: Path, target: Target, out: Path) -> None:
        """Compile ``graph`` as a strongly typed network.

        `Target.options` may hold ``builder_optimization_level`` (0-5), ``workspace_bytes``,
        ``max_aux_streams``, ``hardware_compatibility_level``, ``tiling_optimization_level`` and
        ``preview_features`` by TensorRT's names, and ``decomposable_attention``: let attention
        that has no fused kernel be split. `Target.profiles` may name inputs of other graphs; a range
        becomes two optimization profiles of regular TensorRT, itself and its usual size.

        Raises:
            BackendUnavailable: this machine can't compile.
            BuildError: TensorRT refuses the graph, or profiles, targets or options don't fit it.
            OutputError: ``out`` can't be written.
        """
        trt = self._compiler()
        check_precision(target, self.precisions, str(graph), "choose one of them with --precision")
        model = load_graph(graph)
        inputs, outputs = specs_of(model.graph, str(graph))
        capabilities = self._check_target(trt, target, str(graph))
        float8 = [name for name, spec in inputs.items() if spec.dtype == "float8_e4m3fn"]
        if float8 and not self.takes_float8(replace(target, compute_capabilities=capabilities)):
            what = f"is in float8_e4m3fn, which GPUs before compute capability {FLOAT8_FROM} lack"
            hint = "build with --float8 convert, or for newer GPUs alone"
            raise BuildError(f"{graph}, tensor '{float8[0]}'", what, hint)
        with self._builds_on():
            plan = build_plan(
                trt,
                model,
                graph,
                target,
                inputs,
                capabilities=capabilities if self.module == "tensorrt_rtx" else (),
                timing_cache=self._cache_file("timing", self._timed_on(capabilities)),
                progress=self.progress,
            )
        record = EngineRecord(
            self.name,
            trt.__version__,
            _served(capabilities, target),
            target.precision,
            inputs,
            outputs,
            details=_details(plan, target, inputs),
        )
        with engine_folder(out) as folder:
            (folder / PLAN).write_bytes(plan.content)
            record.write(folder)

    def load(self, compiled: Path) -> TensorRTEngine:
        """Load an engine that was compiled for this version and serves this GPU.

        Raises:
            BackendUnavailable: there is no GPU, or the package is missing.
            BundleError: the folder is damaged or was compiled for something else.
        """
        record = EngineRecord.read(compiled)
        found = self.probe()
        if not found.available:
            raise BackendUnavailable(f"backend '{self.name}'", found.reason, found.install)
        trt = _import(self.module)
        record.require(compiled, backend=self.name, version=trt.__version__, machine=record.machine)
        here = _capability_here(self.device)
        if not _serves(record.machine, here):
            what = f"compiled for {record.machine}, but the GPU here is {_machine((here,))}"
            raise BundleError(str(compiled), what, f"rebuild it for {_machine((here,))}")
        with torch.cuda.device(self.device):
            runtime, faults = self._open_runtime(trt)
            plan = np.memmap(compiled / PLAN, np.uint8, mode="r")
            engine = runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise BundleError(str(compiled / PLAN), faults.take(), REBUILD)
            return TensorRTEngine(
                trt,
                engine,
                record,
                name=compiled.name,
                lane=self.lane,
                runtime=runtime,
                faults=faults,
                runtime_config=self._runtime_config(trt, engine),
            )

    def _open_runtime(self, trt: Any) -> tuple[Any, Any]:
        """Return the one runtime of this backend and what keeps its complaints."""
        if self._runtime is None:
            try:
                self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
            except TypeError as fault:  # the binding's word for a null pointer
                what = f"{self.package} {trt.__version__} makes no runtime ({fault})"
                hint = (
                    "check the driver with nvidia-smi, and that the package fits its CUDA version"
                )
                raise BackendUnavailable(f"backend '{self.name}'", what, hint) from fault
            self._faults = fault_recorder(trt)
            self._runtime.error_recorder = self._faults
        return self._runtime, self._faults

    def capture(self, calls: Sequence[Any]) -> BoundCall:
        """Record ``calls`` into one CUDA graph; each runs once first, to settle its kernels.

        Args:
            calls: What `TensorRTEngine.bind` returned, of one instance of this class.

        Raises:
            RequestError: TensorRT can't run one of them inside a graph.
        """
        return CapturedCalls(calls)

    def synchronize(self) -> None:
        """Wait for everything enqueued on torch's current stream."""
        torch.cuda.current_stream(self.device).synchronize()

    def save_caches(self) -> None:
        """Keep the kernels that TensorRT-RTX compiled while running, for the next process.

        A folder that can't be written, as beside a bundle on a read-only disk, keeps none.
        """
        if self._runtime_cache is None:
            return
        path = self._cache_file("runtime", self._gpu())
        content = self._runtime_cache.serialize()
        if path is None or content is None:
            return
        if not path.is_file() or path.read_bytes() != bytes(content):
            with contextlib.suppress(OutputError):
                write_bytes(path, bytes(content), "free some space")

    def _compiler(self) -> Any:
        found = self.probe()
        if not found.can_build:
            raise BackendUnavailable(f"backend '{self.name}'", found.reason, found.install)
        return _import(self.module)

    def _check_target(self, trt: Any, target: Target, where: str) -> tuple[str, ...]:
        """Refuse unknown options, values and GPUs; return the compute capabilities to compile for."""
        check_options(target, OPTIONS, where)
        level = target.options.get("builder_optimization_level")
        if level is not None and level not in LEVELS:
            what = f"is {level}, levels go from {LEVELS[0]} to {LEVELS[-1]}"
            raise BuildError(f"{where}, option 'builder_optimization_level'", what, "3 is usual")
        check_choices(trt, target.options, where)
        return self._capabilities(trt, target, where)

    def _capabilities(self, trt: Any, target: Target, where: str) -> tuple[str, ...]:
        here = _capability_here(self.device)
        asked = target.compute_capabilities or (here,)
        if asked != (here,):
            what = f"compute capability {', '.join(asked)} asked for, but the GPU here is {here}"
            hint = "TensorRT compiles for the GPU at hand; build there or use tensorrt-rtx"
            raise BuildError(where, what, hint)
        level = _compatibility(target)
        oldest = COMPATIBLE_FROM.get(level)
        if oldest is not None and _version(here) < _version(oldest):
            what = f"'{level}' is built on GPUs from {oldest} on, and the GPU here is {here}"
            raise BuildError(f"{where}, option '{COMPATIBILITY}'", what, "build on such a GPU")
        return asked

    def _builds_on(self) -> AbstractContextManager[Any]:
        """Make the GPU that kernels are timed on the current one."""
        return torch.cuda.device(self.device)

    def _runtime_config(self, trt: Any, engine: Any) -> Any:
        return None

    def _timed_on(self, capabilities: Sequence[str]) -> str:
        """Name what kernels are timed on: another GPU's timings are refused."""
        return self._gpu()

    def _gpu(self) -> str:
        return re.sub(r"[^A-Za-z0-9.]+", "-", torch.cuda.get_device_name(self.device))

    def _cache_file(self, kind: str, about: str) -> Path | None:
        """Name a cache by all that makes TensorRT refuse it: package, version and GPU."""
        if self.cache_folder is None:
            return None
        version = _import(self.module).__version__
        return self.cache_folder / f"{self.module}-{version}-{about}.{kind}"


@dataclass
class TensorRTRTX(TensorRT):
    """Compile for RTX GPUs, present or not, and run on one; kernels are finished on the GPU."""

    name: ClassVar[str] = "tensorrt-rtx"
    module: ClassVar[str] = "tensorrt_rtx"
    package: ClassVar[str] = "tensorrt-rtx-cu12"

    @classmethod
    def probe(cls) -> Availability:
        """Say whether the package and a GPU it knows are there; it compiles without one."""
        missing = _missing(cls.module, cls.package)
        if missing:
            return missing
        trt = _import(cls.module)
        known = known_capabilities(trt)
        here = _capability_here() if torch.cuda.is_available() else ""
        lack = f"compute capability {here} is none of {', '.join(known)}" if here else NO_GPU
        if here not in known:
            reason = f"{cls.package} {trt.__version__} can build here but not run: {lack}"
            return Availability(False, reason, builds_elsewhere=True)
        name = torch.cuda.get_device_name()
        return Availability(True, f"{cls.package} {trt.__version__}, {name}")

    def _capabilities(self, trt: Any, target: Target, where: str) -> tuple[str, ...]:
        if _compatibility(target) in COMPATIBLE_FROM:  # 1.7 takes it and makes the same plan
            what = (
                "TensorRT-RTX serves the compute capabilities that it compiles for, and no others"
            )
            hint = "name each with --compute-capability"
            raise BuildError(f"{where}, option '{COMPATIBILITY}'", what, hint)
        known = known_capabilities(trt)
        asked = target.compute_capabilities or DEFAULT_CAPABILITIES
        for capability in asked:
            if capability not in known:
                what = f"compute capability '{capability}' is unknown to {self.package}"
                hint = f"known: {', '.join(known)}; other GPUs (Hopper: 9.0) need 'tensorrt'"
                raise BuildError(where, what, hint)
        return asked

    def _builds_on(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()  # builds without a GPU too

    def _timed_on(self, capabilities: Sequence[str]) -> str:
        return _machine(capabilities).replace(" ", "-")

    def _runtime_config(self, trt: Any, engine: Any) -> Any:
        """Share compiled kernels between all engines and contexts of this backend."""
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self.captures:  # by default a slower kernel stands in while the right one is compiled
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        if self._runtime_cache is None:
            self._runtime_cache = config.create_runtime_cache()
            path = self._cache_file("runtime", self._gpu())
            if path and path.is_file():
                self._runtime_cache.deserialize(path.read_bytes())  # False: of another GPU
        config.set_runtime_cache(self._runtime_cache)
        return config


def _missing(module: str, package: str) -> Availability | None:
    if importlib.util.find_spec(module) is None:
        what = f"the package '{package}' is not installed"
        return Availability(False, what, f"pip install {package}")
    try:
        _import(module)
    except (ImportError, OSError) as fault:
        what = f"the package '{package}' can't be imported ({fault})"
        return Availability(False, what, f"pip install --force-reinstall {package}")
    return None


def _import(module: str) -> Any:
    return importlib.import_module(module)


def _capability_here(device: torch.device | None = None) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def _compatibility(target: Target) -> str:
    return str(target.options.get(COMPATIBILITY, "none")).lower()


def _served(capabilities: Sequence[str], target: Target) -> str:
    """Spell the GPUs that an engine will serve, as its record has them."""
    if _compatibility(target) == "ampere_plus":
        return f"sm{COMPATIBLE_FROM['ampere_plus']}+"
    return _machine(capabilities)


def _serves(machine: str, here: str) -> bool:
    """Tell whether "sm8.9 sm12.0", or "sm8.0+" with every newer GPU, holds a compute capability."""
    for known, and_newer in re.findall(r"(?<!\S)sm(\d+\.\d+)(\+?)(?!\S)", machine):
        if known == here or (and_newer and _version(known) <= _version(here)):
            return True
    return False


def _machine(capabilities: Sequence[str]) -> str:
    return " ".join(f"sm{capability}" for capability in capabilities)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _details(plan: Plan, target: Target, inputs: Any) -> dict[str, Any]:
    return {
        "options": dict(target.options),
        "profiles": {n: p for n, p in target.profiles.items() if n in inputs},
        "activation_bytes": plan.activation_bytes,
        "nodes": plan.nodes,
        "layers": plan.layers,
        "shape_inputs": plan.shape_inputs,
    }
