# SPDX-License-Identifier: Apache-2.0
"""OpenVINO on the CPU: the fast CPU backend, and the engine that C++ shares.

The inference precision hint is always the target's precision, never OpenVINO's own choice. What
it does with it depends on the CPU (2026.4):

- Without instructions of a precision it is given as float32, and everything is computed in float32:
  low inputs are converted on every run, outputs once at the end. For bfloat16 that last conversion
  is `ov::bfloat16`'s own, which cuts off instead of rounding where the kept part is even (up to 1
  ulp towards zero), so a bfloat16 graph is slower *and* less exact there than a float32 one.
  NOTE: a float16 hint on a CPU that has bfloat16 alone computes in bfloat16 (seen: the errors of
  both are equal).
- With them (avx512_bf16 seen; `Graph::EnforceInferencePrecision` in its source) a bfloat16
  hint also lowers float32 nodes, except those between the last matrix products and a float32
  output: a block's residual stream and gating stay float32, what feeds a product does not. A
  float32 hint computes everything in float32, whatever the graph says.

`OpenVino.computed_in` decides the hint when an engine is compiled, and the engine's record keeps it
(`details.computed_in`). Loading asks for the recorded one, in Python and in C++.

An engine is the exported compiled model: it loads in a third of the time that compiling takes for
small graphs (6 against 28 ms), holds no weights that are graph inputs, and is mapped, not read.
OpenVINO refuses one of another version or instruction set.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..core.errors import BackendUnavailable, BuildError, BundleError, RequestError
from .base import Availability, Target, TensorSpec
from .bindings import check_bindings, load_graph, specs_of
from .record import REBUILD, RECORD_NAME, EngineRecord, engine_folder
from .target_checks import check_options, check_precision

__all__ = ["OpenVino"]

BLOB = "model.blob"
KEPT_DIVISION = "nonconvertable_divide_0"
"""Marks a division that OpenVINO leaves one (2026.4: `ov::NonconvertibleDivide`)."""
CPU = torch.device("cpu")
HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
WITHOUT_NUMPY = {
    torch.bfloat16: (torch.int16, "bf16"),
    torch.float8_e4m3fn: (torch.uint8, "f8e4m3"),
}
"""dtype that NumPy lacks → one of its size, and OpenVINO's name."""
CAPABILITIES = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}


class OpenVinoCall:
    """An infer request over the memory of torch tensors."""

    def __init__(self, request: Any, engine: OpenVinoEngine, bindings: Mapping[str, Tensor]):
        self._request, self._name = request, engine.name
        self._engine = engine  # the request reads constants from the engine's blob
        self._outputs = {name: bindings[name] for name in engine.outputs}
        # OpenVINO keeps no reference to shared memory: dropping one of these would crash `run`.
        self._tensors = {name: shared_tensor(tensor) for name, tensor in bindings.items()}
        self._torch_tensors = dict(bindings)
        for name, tensor in self._tensors.items():
            request.set_tensor(name, tensor)
        self._checked = False

    def run(self) -> None:
        """Run once; outputs are in place when this returns."""
        try:
            # `infer` would also copy every output into a dictionary.
            self._request.start_async()
            self._request.wait()
        except RuntimeError as fault:
            hint = "bind outputs of the shapes that the inputs imply"
            raise RequestError(f"engine '{self._name}'", _reason(fault), hint) from fault
        if not self._checked:
            self._check_outputs()

    def _check_outputs(self) -> None:
        """Make sure OpenVINO kept the bound outputs: it may resize or replace one silently."""
        for name, tensor in self._outputs.items():
            written = self._request.get_tensor(name)
            if tuple(written.shape) != tuple(tensor.shape):
                what = f"shape is {list(tensor.shape)} but the graph gives {list(written.shape)}"
                where = f"engine '{self._name}', tensor '{name}'"
                raise RequestError(where, what, "bind a tensor of that shape")
            assert written.data.ctypes.data == tensor.data_ptr(), f"'{name}' was not kept in place"
        self._checked = True


class OpenVinoEngine:
    """One compiled model; its requests share one stream and so one set of activations."""

    def __init__(self, model: Any, blob: Any, record: EngineRecord, name: str) -> None:
        self._model, self.name = model, name
        self._blob = blob  # the model's constants lie in it
        self.inputs: Mapping[str, TensorSpec] = record.inputs
        self.outputs: Mapping[str, TensorSpec] = record.outputs

    def bind(self, bindings: Mapping[str, Tensor]) -> OpenVinoCall:
        """Bind every input and output by address; see `Engine.bind`."""
        check_bindings(self, bindings, name=self.name, device=CPU)
        return OpenVinoCall(self._model.create_infer_request(), self, bindings)


class OpenVino:
    """Compile and run graphs with OpenVINO's CPU plugin."""

    name: ClassVar[str] = "openvino"
    precisions: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    device = CPU

    @classmethod
    def probe(cls) -> Availability:
        """Say whether OpenVINO is installed and which precisions this CPU computes in."""
        if importlib.util.find_spec("openvino") is None:
            return Availability(
                False, "the package 'openvino' is not installed", "pip install openvino"
            )
        native = [p for p in cls.precisions if CAPABILITIES[p] in _capabilities()]
        others = [p for p in cls.precisions if p not in native]
        slow = f" ({' and '.join(others)} graphs run in float32, slower)" if others else ""
        threads = torch.get_num_threads()
        return Availability(
            True,
            f"OpenVINO {_version()}, CPU, {', '.join(native)}{slow}, {threads} threads",
            # benchmarks/step.py: a computed step takes 1.2 to 1.7 times as long with AVX2 alone.
            yields_to="" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "onnxruntime",
        )

    @classmethod
    def computed_in(cls, precision: str) -> str:
        """Name the precision in which this CPU computes graphs of ``precision``."""
        has_it = cls.probe().available and CAPABILITIES[precision] in _capabilities()
        return precision if has_it else "float32"

    def compiler_version(self) -> str:
        """Name the version, this CPU, the threads, and what each precision is computed in."""
        computed_in = [self.computed_in(precision) for precision in self.precisions]
        threads = torch.get_num_threads()
        return f"{_version()} {_machine()} {' '.join(computed_in)} {threads} threads"

    def takes_float8(self, target: Target) -> bool:
        """Tell that every engine does."""
        return True

    def compile(self, graph: Path, target: Target, out: Path) -> None:
        """Compile ``graph`` for this CPU.

        Raises:
            BackendUnavailable: OpenVINO is not installed.
            BuildError: the precision is unknown or OpenVINO refuses the graph.
            OutputError: ``out`` can't be written.
        """
        _require()
        check_precision(target, self.precisions, str(graph), "choose one of them with --precision")
        check_options(target, (), str(graph))
        inputs, outputs = specs_of(load_graph(graph).graph, str(graph))
        computed_in = self.computed_in(target.precision)
        try:
            model = _core().compile_model(_read(graph), "CPU", _properties(computed_in))
        except RuntimeError as fault:
            hint = "rewrite that node with a pass, or use --backend onnxruntime"
            raise BuildError(str(graph), _reason(fault), hint) from fault
        details = {"computed_in": computed_in}
        record = EngineRecord(
            self.name, _version(), _machine(), target.precision, inputs, outputs, details=details
        )
        with engine_folder(out) as folder:
            (folder / BLOB).write_bytes(model.export_model().getbuffer())
            record.write(folder)

    def load(self, compiled: Path) -> OpenVinoEngine:
        """Load an engine compiled by this version on a CPU of these instructions.

        Raises:
            BackendUnavailable: OpenVINO is not installed.
            BundleError: the folder is damaged, or was compiled elsewhere.
        """
        _require()
        record = EngineRecord.read(compiled)
        record.require(compiled, backend=self.name, version=_version(), machine=_machine())
        computed_in = record.details.get("computed_in")
        if computed_in not in HINTS:
            what = f"is {computed_in!r}, not one of {', '.join(HINTS)}"
            raise BundleError(f"{compiled / RECORD_NAME}, 'details.computed_in'", what, REBUILD)
        import openvino

        # Copy on write: ov.Tensor wants writable memory, and nothing is written to it.
        blob = np.memmap(compiled / BLOB, dtype=np.uint8, mode="c")
        try:
            model = _core().import_model(
                openvino.Tensor(blob, shared_memory=True), "CPU", _properties(computed_in)
            )
        except RuntimeError as fault:
            what = f"OpenVINO refuses it: {_reason(fault)}"
            raise BundleError(str(compiled / BLOB), what, REBUILD) from fault
        return OpenVinoEngine(model, blob, record, compiled.name)

    def synchronize(self) -> None:
        """Do nothing: `run` returns when it is done."""


def shared_tensor(tensor: Tensor) -> Any:
    """Wrap a torch CPU tensor as an OpenVINO tensor over the same memory."""
    import openvino

    if tensor.dtype in WITHOUT_NUMPY:
        same_size, kind = WITHOUT_NUMPY[tensor.dtype]
        bits = tensor.detach().view(same_size).numpy()
        shape = openvino.Shape(list(tensor.shape))
        return openvino.Tensor(bits, shape, getattr(openvino.Type, kind))
    return openvino.Tensor(tensor.detach().numpy(), shared_memory=True)


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _properties(computed_in: str) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": HINTS[computed_in],
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,  # the requests of a session run one after another
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # never int8 behind the caller's back
    }


def _require() -> None:
    found = OpenVino.probe()
    if not found.available:
        raise BackendUnavailable("backend 'openvino'", found.reason, found.install)


def _version() -> str:
    import openvino

    return str(openvino.__version__).split("-")[0]


def _capabilities() -> list[str]:
    return sorted(_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def _machine() -> str:
    """Name the precisions that decide how a model is compiled; OpenVINO checks the rest."""
    return f"{platform.machine()} {' '.join(_capabilities())}"


def _reason(fault: BaseException) -> str:
    """Tell OpenVINO's exception in one line, without the places in its source."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return " ".join(told or lines or [type(fault).__name__])


def _read(graph: Path) -> Any:
    """Read a graph whose divisions by constants stay divisions.

    OpenVINO multiplies by the reciprocal, which differs in the last digit: of the angles that LTX-2
    takes sines of, 1e-3.
    """
    model = _core().read_model(str(graph))
    for node in model.get_ops():
        if node.get_type_name() != "Divide":
            continue
        if node.input_value(1).get_node().get_type_name() == "Constant":
            node.get_rt_info()[KEPT_DIVISION] = True
    return model
