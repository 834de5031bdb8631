# SPDX-License-Identifier: Apache-2.0
"""From an ONNX graph to a TensorRT plan: parse, type, profile, configure, build, and remember how.

The TensorRT module is an argument throughout: `tensorrt` and `tensorrt_rtx` have one API.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo

from ..configs.errors import BuildError
from .base import Target, TensorSpec
from .record import write_whole
from .target_checks import check_options, check_profile
from .tensorrt_journal import Journal

__all__ = ["OPTIONS", "Plan", "build_plan", "known_capabilities"]

OPTIONS = (
    "builder_optimization_level",
    "decomposable_attention",
    "max_aux_streams",
    "weight_streaming",
    "workspace_bytes",
)

ProgressCallback = Callable[[str, int, int], None]


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
            trt, model, path, options, profile,
            capabilities=capabilities, timing_cache=timing_cache, progress=progress,
        )  # fmt: skip
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
    profile: Mapping[str, Sequence[tuple[int, ...]]],
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
        trt, builder, network, profile, options,
        capabilities=capabilities, timing_cache=timing_cache, monitor=monitor,
    )  # fmt: skip
    content = builder.build_serialized_network(network, config)
    if monitor and monitor.fault:
        raise monitor.fault
    if content is None:
        raise BuildError(str(path), journal.fault(), _hint(journal.fault()))
    if timing_cache:
        write_whole(timing_cache, bytes(config.get_timing_cache().serialize()))
    nodes = Counter(node.op_type for node in model.graph.node)
    given = [network.get_input(index) for index in range(network.num_inputs)]
    return Plan(
        content=memoryview(content),
        activation_bytes=journal.activation_bytes,
        nodes=dict(nodes),
        layers=journal.layers,
        shape_inputs=[tensor.name for tensor in given if tensor.is_shape_tensor],
    )


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
    network: Any,
    profile: Mapping[str, Sequence[tuple[int, ...]]],
    options: Mapping[str, Any],
    *,
    capabilities: Sequence[str],
    timing_cache: Path | None,
    monitor: Any,
) -> Any:
    import polygraphy.config as switch

    rtx = trt.__name__ == "tensorrt_rtx"
    if "polygraphy.backend.trt" in sys.modules and rtx != switch.USE_TENSORRT_RTX:
        what = f"this process has compiled with {'tensorrt' if rtx else 'tensorrt-rtx'} before"
        raise BuildError(f"backend '{trt.__name__}'", what, "compile in a process of its own")
    switch.USE_TENSORRT_RTX = rtx
    from polygraphy.backend.trt import CreateConfig, Profile
    from polygraphy.logger import G_LOGGER

    shapes = Profile()
    for name, (smallest, usual, largest) in profile.items():
        shapes.add(name, min=smallest, opt=usual, max=largest)
    workspace = options.get("workspace_bytes")
    common = {
        "profiles": [shapes] if profile else None,
        "load_timing_cache": str(timing_cache) if timing_cache and timing_cache.exists() else None,
        "memory_pool_limits": workspace and {trt.MemoryPoolType.WORKSPACE: workspace},
        "builder_optimization_level": options.get("builder_optimization_level"),
        "max_aux_streams": options.get("max_aux_streams"),
        "weight_streaming": options.get("weight_streaming"),
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "progress_monitor": monitor,
    }
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # it writes to stdout
        if not rtx:
            return CreateConfig(**common)(builder, network)
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        targets = [tuple(int(part) for part in text.split(".")) for text in capabilities]
        return CreateConfigRTX(compute_capabilities=targets, **common)(builder, network)


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
