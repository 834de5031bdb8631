# SPDX-License-Identifier: Apache-2.0
"""Read what a graph takes and gives, and check tensors against it before anything is bound."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from ..core.errors import BuildError, RequestError, nearest
from .base import Engine, TensorSpec

__all__ = ["DTYPES", "check_bindings", "dtype_name", "load_graph", "specs_of"]

HOST = torch.device("cpu")
DTYPES: Mapping[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.FLOAT8E4M3FN: "float8_e4m3fn",
    TensorProto.INT64: "int64",
    TensorProto.INT32: "int32",
    TensorProto.BOOL: "bool",
}
"""ONNX element type → our spelling, for what engines pass."""


def load_graph(path: Path) -> onnx.ModelProto:
    """Load an ONNX file without its external weights.

    Raises:
        BuildError: the file is missing or not ONNX.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as fault:  # protobuf's DecodeError derives from Exception alone
        raise BuildError(str(path), f"not a readable ONNX file ({fault})", "export it again") from (
            fault
        )


def specs_of(
    graph: onnx.GraphProto, where: str
) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Describe the inputs (weights kept inside the graph excepted) and outputs of a graph.

    Raises:
        BuildError: an input or output has no shape or a dtype that engines don't pass.
    """
    inside = {tensor.name for tensor in graph.initializer}
    inputs = {v.name: _spec(v, where) for v in graph.input if v.name not in inside}
    return inputs, {v.name: _spec(v, where) for v in graph.output}


def dtype_name(tensor: Tensor) -> str:
    """Spell a tensor's dtype as in a `TensorSpec`."""
    return str(tensor.dtype).removeprefix("torch.")


def check_bindings(
    engine: Engine,
    bindings: Mapping[str, Tensor],
    *,
    name: str,
    device: torch.device,
    on_host: Collection[str] = (),
) -> None:
    """Check that ``bindings`` are all of an engine's tensors and fit its specs.

    Args:
        engine: The engine to be bound.
        bindings: Input or output name → tensor.
        name: What the engine is called in messages.
        device: Where every tensor must live,
        on_host: except these, which live on the CPU.

    Raises:
        RequestError: names the tensor, what it is and what it should be.
    """
    specs = {**engine.inputs, **engine.outputs}
    for unknown in bindings.keys() - specs.keys():
        hint = nearest(unknown, list(specs))
        raise RequestError(f"engine '{name}', tensor '{unknown}'", "no such input or output", hint)
    sizes: dict[str, tuple[int, str]] = {}
    for key, spec in specs.items():
        where = f"engine '{name}', tensor '{key}'"
        if key not in bindings:
            raise RequestError(where, "not bound", f"bind a {spec.dtype} tensor {_text(spec)}")
        _check_tensor(bindings[key], spec, where, HOST if key in on_host else device)
        for size, dim in zip(bindings[key].shape, spec.shape, strict=True):
            if isinstance(dim, str):
                known, by = sizes.setdefault(dim, (size, key))
                if known != size:
                    what = f"'{dim}' is {size}, but {known} in tensor '{by}'"
                    raise RequestError(where, what, f"bind tensors of one size for '{dim}'")


def _check_tensor(tensor: Tensor, spec: TensorSpec, where: str, device: torch.device) -> None:
    if dtype_name(tensor) != spec.dtype:
        what = f"dtype is {dtype_name(tensor)} but the graph declares {spec.dtype}"
        raise RequestError(where, what, f"convert it with .to(torch.{spec.dtype})")
    if tensor.device.type != device.type:
        what = f"it is on '{tensor.device}' but the engine runs on '{device}'"
        raise RequestError(where, what, f"move it with .to('{device}')")
    fits = tensor.ndim == len(spec.shape) and all(
        isinstance(dim, str) or dim == size
        for size, dim in zip(tensor.shape, spec.shape, strict=True)
    )
    if not fits:
        what = f"shape is {list(tensor.shape)} but the graph declares {_text(spec)}"
        raise RequestError(where, what, "bind a tensor of that shape")
    if not tensor.is_contiguous():
        raise RequestError(where, f"strides {tensor.stride()} are not contiguous", "copy it first")


def _text(spec: TensorSpec) -> str:
    return "[" + ", ".join(str(dim) for dim in spec.shape) + "]"


def _spec(value: onnx.ValueInfoProto, where: str) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = DTYPES.get(tensor.elem_type)
    if dtype is None or not tensor.HasField("shape"):
        kind = TensorProto.DataType.Name(tensor.elem_type) if dtype is None else "without a shape"
        known = ", ".join(DTYPES.values())
        what = f"is {kind}; engines pass tensors with a shape of {known}"
        raise BuildError(f"{where}, tensor '{value.name}'", what, "cast it inside the graph")
    dims = enumerate(tensor.shape.dim)
    shape = [d.dim_param or d.dim_value or f"{value.name}.{axis}" for axis, d in dims]
    return TensorSpec(dtype, tuple(shape))
