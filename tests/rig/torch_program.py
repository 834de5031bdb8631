# SPDX-License-Identifier: Apache-2.0
"""Compute our ONNX graphs with torch operations, on any device, over bound addresses.

Shapes and what follows from them stay in host memory, and constants are uploaded once: so a graph
whose inputs are on a GPU waits for nothing and can be captured.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from stand_in import DTYPE_NAMES, Places
from torch import Tensor

HOST_ARGUMENTS = {
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Expand": (1,),
    "Unsqueeze": (1,),
    "Squeeze": (1,),
    "Split": (1,),
    "ReduceMean": (1,),
    "ReduceSum": (1,),
    "ReduceMin": (1,),
    "ReduceMax": (1,),
    "TopK": (1,),
}
"""Operator → its inputs that are lists of numbers rather than data."""


class _Address:
    """A piece of CUDA memory as torch takes it from others."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def tensor_at(
    address: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return a view of memory that somebody else owns."""
    size = torch.empty(shape, dtype=dtype, device="meta").nbytes
    if size == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cuda":
        flat = torch.as_tensor(_Address(address, size), device=device)
    else:
        flat = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
    return flat.view(dtype).view(tuple(shape))


class TorchProgram:
    """A graph as a list of torch calls."""

    def __init__(self, model: onnx.ModelProto, device: torch.device) -> None:
        self._device, graph = device, model.graph
        self._constants = {t.name: _torch(t) for t in graph.initializer}
        self._nodes = [n for n in graph.node if n.op_type != "Constant"]
        for node in graph.node:
            if node.op_type == "Constant":
                self._constants[node.output[0]] = _constant(node)
        self._uploaded = {n: t.to(device) for n, t in self._constants.items()}
        self._attributes = [
            {a.name: onnx.helper.get_attribute_value(a) for a in n.attribute} for n in self._nodes
        ]
        self._inputs = {
            v.name: v.type.tensor_type for v in graph.input if v.name not in self._constants
        }
        self._outputs = {v.name: v.type.tensor_type for v in graph.output}
        self._shapes: dict[Any, dict[str, tuple[int, ...]]] = {}

    def output_shapes(self, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the shape of every output, by computing it once on ones."""
        key = tuple(sorted(inputs.items()))
        if key not in self._shapes:
            ones = {
                n: torch.ones(inputs[n], dtype=_dtype(k), device=self._device)
                for n, k in self._inputs.items()
            }
            found = self.compute(ones)
            self._shapes[key] = {n: tuple(found[n].shape) for n in self._outputs}
        return self._shapes[key]

    def run(self, places: Places) -> None:
        """Read the inputs, write the outputs."""
        given = {
            n: tensor_at(*places[n], _dtype(kind), self._device) for n, kind in self._inputs.items()
        }
        found = self.compute(given)
        for name, kind in self._outputs.items():
            tensor_at(*places[name], _dtype(kind), self._device).copy_(found[name])

    def compute(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute every value of the graph."""
        values: dict[str, Tensor] = dict(inputs)
        host = dict(self._constants)  # what is known in host memory
        for node, attributes in zip(self._nodes, self._attributes, strict=True):
            lists = HOST_ARGUMENTS.get(node.op_type, ())
            is_host = node.op_type == "Shape" or all(
                n in host for i, n in enumerate(node.input) if n and i not in lists
            )
            given: list[Any] = []
            for index, name in enumerate(node.input):
                if not name:
                    given.append(None)
                elif index in lists:
                    given.append(host[name].flatten().tolist())
                elif node.op_type == "Shape" or (is_host and name in host):
                    given.append(values.get(name, host.get(name)))
                elif name in values:
                    given.append(values[name])
                elif name in self._uploaded:
                    given.append(self._uploaded[name])
                else:
                    given.append(host[name].to(self._device))
            made = OPERATORS[node.op_type](attributes, *given)
            made = made if isinstance(made, tuple | list) else [made]
            for name, value in zip(node.output, made, strict=False):
                (host if is_host else values)[name] = value
        return {n: values[n] if n in values else host[n].to(self._device) for n in self._outputs}


def _torch(tensor: onnx.TensorProto) -> Tensor:
    if tensor.data_type == onnx.TensorProto.BFLOAT16:
        raw = torch.tensor(list(onnx.numpy_helper.to_array(tensor).flatten().astype("float32")))
        return raw.to(torch.bfloat16).view(tuple(tensor.dims))
    return torch.from_numpy(numpy_helper.to_array(tensor).copy())


def _constant(node: onnx.NodeProto) -> Tensor:
    (attribute,) = node.attribute
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return _torch(value)
    kind = torch.float32 if "float" in attribute.name else torch.int64
    return torch.tensor(value, dtype=kind)


def _dtype(kind: Any) -> torch.dtype:
    found: torch.dtype = getattr(torch, DTYPE_NAMES[kind.elem_type])
    return found


def _slice(
    attributes: Any,
    x: Tensor,
    starts: list[int],
    ends: list[int],
    axes: list[int] | None = None,
    steps: list[int] | None = None,
) -> Tensor:
    for index, axis in enumerate(axes if axes is not None else range(len(starts))):
        step = steps[index] if steps else 1
        picked = list(range(x.shape[axis]))[slice(starts[index], ends[index], step)]
        if step == 1:
            x = x.narrow(axis, picked[0] if picked else 0, len(picked))
        else:
            x = torch.stack([x.select(axis, i) for i in picked], dim=axis)
    return x


def _reshape(attributes: Any, x: Tensor, shape: list[int]) -> Tensor:
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])


def _reduce(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(attributes: Any, x: Tensor, axes: list[int] | None = None) -> Tensor:
        dims = axes if axes is not None else list(range(x.ndim))
        return function(x, dim=dims, keepdim=bool(attributes.get("keepdims", 1)))

    return reduce


def _split(attributes: Any, x: Tensor, sizes: list[int] | None = None) -> Any:
    axis = attributes.get("axis", 0)
    if sizes is not None:
        return x.split(sizes, axis)
    count = attributes["num_outputs"]
    return x.split(-(-x.shape[axis] // count), axis)


def _gather(attributes: Any, x: Tensor, index: Tensor) -> Tensor:
    axis = attributes.get("axis", 0)
    index = torch.where(index < 0, index + x.shape[axis], index)
    found = x.index_select(axis, index.flatten())
    return found.reshape((*x.shape[:axis], *index.shape, *x.shape[axis % x.ndim + 1 :]))


def _attention(attributes: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    heads = attributes.get("q_num_heads") or attributes.get("num_heads")
    parts = [
        t if heads is None else t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)
    ]
    mixed = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=attributes.get("scale"))
    return mixed if heads is None else mixed.transpose(1, 2).flatten(-2)


def _rotary(attributes: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads = attributes.get("num_heads")
    shaped = x if x.ndim == 4 else x.unflatten(-1, (heads, -1)).transpose(1, 2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if attributes.get("interleaved", 0):
        first, second = shaped[..., 0::2], shaped[..., 1::2]
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(
            -2
        )
    else:
        first, second = shaped.chunk(2, -1)
        turned = torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
    return turned if x.ndim == 4 else turned.transpose(1, 2).flatten(-2)


def _norm(attributes: Any, x: Tensor, scale: Tensor, bias: Any = None) -> Tensor:
    shape = x.shape[attributes.get("axis", -1) :]
    made = F.layer_norm(x, shape, eps=attributes.get("epsilon", 1e-5)) * scale
    return made if bias is None else made + bias


def _rms_norm(attributes: Any, x: Tensor, scale: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[attributes.get("axis", -1) :], eps=attributes["epsilon"]) * scale


def _gemm(attributes: Any, a: Tensor, b: Tensor, c: Any = None) -> Tensor:
    a = a.mT if attributes.get("transA") else a
    b = b.mT if attributes.get("transB") else b
    made = attributes.get("alpha", 1.0) * (a @ b)
    return made if c is None else made + attributes.get("beta", 1.0) * c


def _conv(attributes: Any, x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    function = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    pads, spatial = attributes.get("pads", []), x.ndim - 2
    assert not any(pads), "no graph of ours pads"
    return function(x, weight, bias, stride=attributes.get("strides", [1] * spatial))


def _divide(attributes: Any, a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _top_k(attributes: Any, x: Tensor, count: list[int]) -> Any:
    return torch.topk(x, *count, attributes.get("axis", -1), bool(attributes.get("largest", 1)))


def _squeeze(attributes: Any, x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _unsqueeze(attributes: Any, x: Tensor, axes: list[int]) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda attributes, *given: function(*given)


OPERATORS: Mapping[str, Callable[..., Any]] = {
    "Abs": _plain(torch.abs), "Add": _plain(torch.add), "And": _plain(torch.logical_and),
    "Attention": _attention,
    "Cast": lambda a, x: x.to(getattr(torch, DTYPE_NAMES.get(a["to"], "float64"))),
    "Ceil": _plain(torch.ceil),
    "Clip": lambda a, x, low=None, high=None: torch.clamp(x, low, high),
    "Concat": lambda a, *x: torch.cat(x, a["axis"]), "Conv": _conv, "Cos": _plain(torch.cos),
    "Div": _divide, "Equal": _plain(torch.eq),
    "Expand": lambda a, x, shape: x * torch.ones(
        shape, dtype=x.dtype, device=x.device
    ) if x.dtype != torch.bool else x | torch.zeros(shape, dtype=x.dtype, device=x.device),
    "Floor": _plain(torch.floor), "Gather": _gather,
    "Gelu": lambda a, x: F.gelu(x, approximate=a.get("approximate", b"none").decode()),
    "Gemm": _gemm, "Greater": _plain(torch.gt), "GreaterOrEqual": _plain(torch.ge),
    "Identity": _plain(lambda x: x), "IsInf": _plain(torch.isinf), "IsNaN": _plain(torch.isnan),
    "LayerNormalization": _norm, "Less": _plain(torch.lt), "LessOrEqual": _plain(torch.le),
    "Log": _plain(torch.log),
    "MatMul": _plain(torch.matmul), "Max": _plain(torch.maximum), "Min": _plain(torch.minimum),
    "Mod": _plain(torch.remainder), "Mul": _plain(torch.mul), "MultiHeadAttention": _attention,
    "Neg": _plain(torch.neg),
    "Not": _plain(torch.logical_not), "Or": _plain(torch.logical_or), "Pow": _plain(torch.pow),
    "Range": lambda a, start, limit, delta: torch.arange(int(start), int(limit), int(delta)),
    "RMSNormalization": _rms_norm, "Reciprocal": _plain(torch.reciprocal),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean), "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum), "Reshape": _reshape, "RotaryEmbedding": _rotary,
    "Round": _plain(torch.round),
    "Shape": lambda a, x: torch.tensor(list(x.shape)[a.get("start", 0) : a.get("end")]),
    "Sigmoid": _plain(torch.sigmoid), "Sin": _plain(torch.sin), "Slice": _slice,
    "Softmax": lambda a, x: torch.softmax(x, a.get("axis", -1)), "Split": _split,
    "Sqrt": _plain(torch.sqrt), "Squeeze": _squeeze, "Sub": _plain(torch.sub),
    "TopK": _top_k, "Transpose": lambda a, x: x.permute(a["perm"]), "Unsqueeze": _unsqueeze,
    "Where": _plain(torch.where),
}  # fmt: skip
