# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on the CPU: the exact float32 reference that `verify` compares with.

The engine is the portable graph itself, checked once by `compile` and optimised by every `load`:
optimising a block template takes 3-7 ms, while a graph optimised ahead is tied to one machine's
instructions and would store baked weights a second time.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import onnx
import torch
from onnx.external_data_helper import ExternalDataInfo
from torch import Tensor

from ..core.errors import BackendUnavailable, BuildError, BundleError, RequestError
from .base import Availability, Target, TensorSpec
from .bindings import DTYPES, check_bindings, dtype_name, load_graph, specs_of
from .record import EngineRecord, engine_folder
from .target_checks import check_options, check_precision

__all__ = ["OnnxRuntime"]

GRAPH = "graph.onnx"
CPU = torch.device("cpu")
ONNX_TYPES = {name: kind for kind, name in DTYPES.items()}


class OnnxRuntimeCall:
    """An IOBinding over the memory of torch tensors."""

    def __init__(self, session: Any, binding: Any, tensors: Mapping[str, Tensor], name: str):
        self._session, self._binding, self._name = session, binding, name
        self._tensors = tensors  # keeps the bound memory alive

    def run(self) -> None:
        """Run once; outputs are in place when this returns."""
        try:
            self._session.run_with_iobinding(self._binding)
        except RuntimeError as fault:
            hint = "bind outputs of the shapes that the inputs imply"
            raise RequestError(f"engine '{self._name}'", _first_line(fault), hint) from fault


class OnnxRuntimeEngine:
    """One graph in one inference session."""

    def __init__(self, session: Any, record: EngineRecord, name: str) -> None:
        self._session, self._name = session, name
        self.inputs: Mapping[str, TensorSpec] = record.inputs
        self.outputs: Mapping[str, TensorSpec] = record.outputs

    def bind(self, bindings: Mapping[str, Tensor]) -> OnnxRuntimeCall:
        """Bind every input and output by address; see `Engine.bind`."""
        check_bindings(self, bindings, name=self._name, device=CPU)
        binding = self._session.io_binding()
        for names, bind in (
            (self.inputs, binding.bind_input),
            (self.outputs, binding.bind_output),
        ):
            for name in names:
                tensor = bindings[name]
                kind = ONNX_TYPES[dtype_name(tensor)]
                bind(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())
        return OnnxRuntimeCall(self._session, binding, dict(bindings), self._name)


class OnnxRuntime:
    """Compile and run graphs with ONNX Runtime's CPU provider."""

    name: ClassVar[str] = "onnxruntime"
    precisions: ClassVar[tuple[str, ...]] = ("float32",)
    device = CPU

    @classmethod
    def probe(cls) -> Availability:
        """Say whether ONNX Runtime is installed."""
        if importlib.util.find_spec("onnxruntime") is None:
            return Availability(
                False, "the package 'onnxruntime' is not installed", "pip install onnxruntime"
            )
        threads = torch.get_num_threads()
        return Availability(True, f"ONNX Runtime {_version()}, CPU, float32, {threads} threads")

    def compiler_version(self) -> str:
        """Return the package's version; its engines run on any machine."""
        return _version()

    def takes_float8(self, target: Target) -> bool:
        """Tell that every engine does."""
        return True

    def compile(self, graph: Path, target: Target, out: Path) -> None:
        """Check that the CPU provider takes ``graph`` and store it with its external weights.

        Raises:
            BackendUnavailable: ONNX Runtime is not installed.
            BuildError: another precision than float32, or a node has no kernel.
            OutputError: ``out`` can't be written.
        """
        _require()
        hint = "build with --precision float32, or with --backend openvino"
        check_precision(target, self.precisions, str(graph), hint)
        check_options(target, (), str(graph))
        model = load_graph(graph)
        inputs, outputs = specs_of(model.graph, str(graph))
        try:
            _session(graph)
        except Exception as fault:  # its exceptions share no base but Exception
            hint = "rewrite that node with a pass, or use --backend openvino"
            raise BuildError(str(graph), _first_line(fault), hint) from fault
        record = EngineRecord(self.name, _version(), "", target.precision, inputs, outputs)
        with engine_folder(out) as folder:
            shutil.copyfile(graph, folder / GRAPH)
            for location in sorted(_external_files(model)):
                _link_or_copy(graph.parent / location, folder / location)
            record.write(folder)

    def load(self, compiled: Path) -> OnnxRuntimeEngine:
        """Load an engine; it runs on any machine and any version that has the operators.

        Raises:
            BackendUnavailable: ONNX Runtime is not installed.
            BundleError: the folder is damaged or this version refuses its graph.
        """
        _require()
        record = EngineRecord.read(compiled)
        record.require(compiled, backend=self.name, version=record.version)
        try:
            session = _session(compiled / GRAPH)
        except Exception as fault:  # its exceptions share no base but Exception
            what = f"ONNX Runtime {_version()} refuses it: {_first_line(fault)}"
            raise BundleError(str(compiled), what, "rebuild it with 'freewheel build'") from fault
        return OnnxRuntimeEngine(session, record, compiled.name)

    def synchronize(self) -> None:
        """Do nothing: `run` returns when it is done."""


def _session(graph: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors reach the caller as exceptions
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # A spinning pool takes the cores from the other engines of the session and from torch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _require() -> None:
    found = OnnxRuntime.probe()
    if not found.available:
        raise BackendUnavailable("backend 'onnxruntime'", found.reason, found.install)


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def _external_files(model: onnx.ModelProto) -> set[str]:
    tensors = (t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    return {ExternalDataInfo(tensor).location for tensor in tensors}


def _link_or_copy(source: Path, destination: Path) -> None:
    """Share the weight file where the file system allows; ONNX Runtime refuses symbolic links."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def _first_line(fault: BaseException) -> str:
    text = str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
    return text.split("Status Message: ")[-1].split("When calling Run()")[0].strip()
