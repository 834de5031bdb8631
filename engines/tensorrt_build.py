# SPDX-License-Identifier: Apache-2.0
"""From an ONNX graph to a TensorRT plan: parse, type, profile, configure, build, and remember how.

The TensorRT module is an argument throughout: `tensorrt` and `tensorrt_rtx` have one API.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo

from ..core.errors import BuildError, nearest
from ..core.output import write_bytes
from .base import Target, TensorSpec
from .target_checks import check_options, check_profile
from .tensorrt_journal import Journal

__all__ = ["OPTIONS", "Plan", "build_plan", "check_choices", "known_capabilities"]

CHOICES = {
    "hardware_compatibility_level": "HardwareCompatibilityLevel",
    "tiling_optimization_level": "TilingOptimizationLevel",
}
"""Option → the enumeration that names its values."""

OPTIONS = (
    "builder_optimization_level",
    "decomposable_attention",
    "hardware_compatibility_level",
    "max_aux_streams",
    "preview_features",
    "tiling_optimization_level",
    "workspace_bytes",
)

ProgressCallback = Callable[[str, int, int], None]
Profile = Mapping[str, Sequence[tuple[int, ...]]]
"""Input name → its smallest, usual and largest shape."""


@dataclass(frozen=True)
class Plan:
    """A built engine and what is known about it.

    Attributes:
        content: The serialised engine.
        activation_bytes: Scratch memory at the largest profile; None where it wasn't reported.
        nodes: ONNX operator → how many nodes the parser saw.
        layers: What runs on the GPU, in order: name, type, kernel and the ONNX nodes inside.
        shape_inputs: Inputs that TensorRT reads in host memory, since shapes depend on them.
    """

    content: memoryview
    activation_bytes: int | None
    nodes: Mapping[str, int]
    layers: Sequence[Mapping[str, Any]]
    shape_inputs: Sequence[str]


def known_capabilities(trt: Any) -> list[str]:
    """List the compute capabilities that TensorRT-RTX compiles for, as "8.9"."""
    names = [name[2:] for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    return [f"{name[:-1]}.{name[-1]}" for name in sorted(names, key=int)]


def build_plan(
    trt: Any,
    model: onnx.ModelProto,
    path: Path,
    target: Target,
    inputs: Mapping[str, TensorSpec],
    *,
    capabilities: Sequence[str] = (),
    timing_cache: Path | None = None,
    progress: ProgressCallback | None = None,
) -> Plan:
    """Build one graph.

    Args:
        trt: The module `tensorrt` or `tensorrt_rtx`.
        model: The graph; external weights stay where they are and are mapped.
        path: Where ``model`` was read from.
        target: Profiles and options.
        inputs: What the graph takes.
        capabilities: Targets of TensorRT-RTX; empty for TensorRT.
        timing_cache: File to read and update.
        progress: Called with phase, finished steps and number of steps.

    Raises:
        BuildError: names the file and, where TensorRT does, the node.
    """
    options = check_options(target, OPTIONS, str(path))
    profile = check_profile(target, inputs, str(path))
    try:
        return _build(
            trt,
            model,
            path,
            options,
            profile,
            capabilities=capabilities,
            timing_cache=timing_cache,
            progress=progress,
        )
    except BaseException as fault:
        # A traceback would keep the builder until the garbage collector finds it, perhaps while
        # another build calls back into Python and holds TensorRT's locks.
        traceback.clear_frames(fault.__traceback__)
        raise


def _build(
    trt: Any,
    model: onnx.ModelProto,
    path: Path,
    options: Mapping[str, Any],
    profile: Profile,
    *,
    capabilities: Sequence[str],
    timing_cache: Path | None,
    progress: ProgressCallback | None,
) -> Plan:
    journal = Journal.of(trt)
    builder = trt.Builder(journal)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, journal)
    weights = _external_weights(model, path)
    _parse(parser, model, path, weights)
    _allow_decomposition(trt, network, everywhere=bool(options.get("decomposable_attention")))
    monitor = _monitor(trt, progress) if progress else None
    config = _create_config(
        trt,
        builder,
        _profiles(profile, chooses_kernels=not capabilities),
        options,
        capabilities=capabilities,
        timing_cache=timing_cache,
        monitor=monitor,
    )
    content = builder.build_serialized_network(network, config)
    if monitor and monitor.fault:
        raise monitor.fault
    if content is None:
        raise BuildError(str(path), journal.fault(), _hint(journal.fault()))
    timings = config.get_timing_cache() if timing_cache else None
    if timing_cache and timings is not None:
        write_bytes(timing_cache, bytes(timings.serialize()), "choose another --build-cache")
    nodes = Counter(node.op_type for node in model.graph.node)
    given = [network.get_input(index) for index in range(network.num_inputs)]
    return Plan(
        content=memoryview(content),
        activation_bytes=journal.activation_bytes,
        nodes=dict(nodes),
        layers=journal.layers,
        shape_inputs=[tensor.name for tensor in given if tensor.is_shape_tensor],
    )


def _profiles(profile: Profile, *, chooses_kernels: bool) -> list[Profile]:
    """Return the range asked for and, where it is one, its usual size alone.

    A run of the usual size takes the second, whose kernels were chosen for nothing else. TensorRT-RTX
    chooses kernels on the GPU, for the shapes that it meets there; it needs the range alone.
    """
    usual = {name: (shapes[1],) * 3 for name, shapes in profile.items()}
    is_range = usual != {name: tuple(shapes) for name, shapes in profile.items()}
    if is_range and chooses_kernels:
        return [profile, usual]
    return [profile] if profile else []


def check_choices(trt: Any, options: Mapping[str, Any], where: str) -> None:
    """Refuse a value that an option of names does not have.

    Raises:
        BuildError: names the option, its value and the known ones.
    """
    given = {(n, str(options[n]), kind) for n, kind in CHOICES.items() if n in options}
    for feature in filter(None, str(options.get("preview_features", "")).split(",")):
        given.add(("preview_features", feature.strip(), "PreviewFeature"))
    for name, value, kind in sorted(given):
        known = [member.lower() for member in getattr(trt, kind).__members__]
        if value.lower() not in known:
            what = f"'{value}' is not among {trt.__name__}'s {', '.join(known)}"
            raise BuildError(f"{where}, option '{name}'", what, nearest(value.lower(), known))


def _parse(
    parser: Any, model: onnx.ModelProto, path: Path, weights: Mapping[str, np.ndarray[Any, Any]]
) -> None:
    loaded = parser.load_model_proto(model.SerializeToString(), str(path))
    for name, data in weights.items():
        loaded = loaded and parser.load_initializer(name, data.ctypes.data, data.nbytes)
    if loaded and parser.parse_model_proto():
        return
    faults = [parser.get_error(i) for i in range(parser.num_errors)]
    told = [f"node '{f.node_name()}' ({f.node_operator()}): {f.desc()}" for f in faults]
    what = f"the parser refuses {'; '.join(told) or 'it and gives no reason'}"
    raise BuildError(str(path), what, "rewrite that node with a pass in passes/")


def _external_weights(model: onnx.ModelProto, path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Map the graph's external weights; nothing is read before the builder needs it."""
    weights: dict[str, np.ndarray[Any, Any]] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            info = ExternalDataInfo(tensor)
            try:
                weights[tensor.name] = np.memmap(
                    path.parent / info.location,
                    dtype=np.uint8,
                    mode="r",
                    offset=info.offset or 0,
                    shape=info.length,
                )
            except (OSError, ValueError) as fault:
                place = f"{path}, weight '{tensor.name}'"
                what = f"'{info.location}' can't be mapped ({fault})"
                raise BuildError(place, what, "write the weights again") from fault
    return weights


def _allow_decomposition(trt: Any, network: Any, *, everywhere: bool) -> None:
    """Let float32 attention be split: only half precisions have fused kernels.

    Attention in half precision stays whole, so an engine that builds has it fused.
    """
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name == "ATTENTION_OUTPUT":
            layer.__class__ = trt.IAttentionOutputLayer  # the binding's way to downcast
            if everywhere or layer.get_output(0).dtype == trt.float32:
                layer.attention.decomposable = True


def _create_config(
    trt: Any,
    builder: Any,
    profiles: Sequence[Profile],
    options: Mapping[str, Any],
    *,
    capabilities: Sequence[str],
    timing_cache: Path | None,
    monitor: Any,
) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # Else a context takes the scratch memory of the largest size, whatever size is run.
    config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
    if capabilities:
        # Else the runtime may allocate inside a step, and no step can be captured.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            name = f"SM{capability.replace('.', '')}"
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in profile.items():
            shapes.set_shape(name, smallest, usual, largest)
        config.add_optimization_profile(shapes)
    if "workspace_bytes" in options:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options["workspace_bytes"])
    for name in ("builder_optimization_level", "max_aux_streams"):
        if name in options:
            setattr(config, name, options[name])
    for name, kind in CHOICES.items():
        if name in options:
            setattr(config, name, getattr(trt, kind).__members__[str(options[name]).upper()])
    for feature in filter(None, str(options.get("preview_features", "")).split(",")):
        config.set_preview_feature(trt.PreviewFeature.__members__[feature.strip().upper()], True)
    if monitor is not None:
        config.progress_monitor = monitor
    if timing_cache:
        _set_timing_cache(config, timing_cache)
    return config


def _set_timing_cache(config: Any, path: Path) -> None:
    """Start from the timings of builds before; from none where TensorRT refuses those."""
    content = b""
    with contextlib.suppress(OSError):
        content = path.read_bytes()
    for serialized in (content, b""):
        cache = config.create_timing_cache(serialized)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def _monitor(trt: Any, progress: ProgressCallback) -> Any:
    """Make an IProgressMonitor that reports the outer phases, and stops the build on a fault."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # trt is untyped
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}
            self.fault: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None or parent == next(iter(self.totals), None):
                self.totals[phase] = steps
                self.report(phase, 0)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.totals:
                self.report(phase, step + 1)
            return self.fault is None

        def phase_finish(self, phase: str) -> None:
            if phase in self.totals:
                self.report(phase, self.totals[phase])

        def report(self, phase: str, done: int) -> None:
            try:
                progress(phase, done, self.totals[phase])
            except BaseException as fault:  # TensorRT can't carry it; build_plan raises it
                self.fault = fault

    return Monitor()


def _hint(fault: str) -> str:
    if "Attention operation was not supported" in fault:
        return (
            "use bfloat16 or float16 and a head size with a fused kernel, or build with the option "
            "decomposable_attention=true"
        )
    if "violate shape constraints" in fault:
        return "give profiles that fit each other: the graph derives some dimensions from others"
    return "see the message; 'freewheel inspect' lists the nodes of the graph"
