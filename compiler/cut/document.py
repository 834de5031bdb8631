# SPDX-License-Identifier: Apache-2.0
"""Write a declared cut to a folder and read it back, so that a model is traced once.

``cut.json`` has every graph node by node; ``constants.safetensors`` the numbers that they hold.
Weights are named, with shape and dtype. Reading trusts nothing, for a graph becomes Python code:
names are plain words, and a node may call the functions of `FUNCTIONS` and those operators of PyTorch
and ONNX that compute tensors of tensors, no others.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.onnx.ops  # registers operators that graphs call, such as onnx.RotaryEmbedding
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import fx, nn

from ...bundle.manifest import InputEntry, LimitEntry, StageEntry, SumTerm
from ...bundle.reader import Bundle
from ...core.dtypes import Precision
from ...core.errors import BundleError
from ...core.tensor_spec import TensorSpec
from .declared import Cut, DimFactor, Runs, Segment
from .extract import hold
from .precision import on_device_of
from .sizes import FUNCTIONS as OF_SIZES

__all__ = ["CUT", "cut_of", "read_cut", "write_cut"]

CUT = "cut"
"""A bundle's folder with its cut."""

DOCUMENT, CONSTANTS = "cut.json", "constants.safetensors"
FILES = {f"{CUT}/{name}" for name in (DOCUMENT, CONSTANTS)}

CALLED: tuple[Callable[..., Any], ...] = (
    operator.getitem,
    operator.neg,
    operator.sub,
    on_device_of,
    tuple,
    *OF_SIZES.values(),
)

FUNCTIONS: Mapping[str, Callable[..., Any]] = {called.__name__: called for called in CALLED}
"""What a node may call beside operators: what computes with sizes, and takes parts."""

MOST_POWER = 8
"""A power of whole numbers grows without bounds."""

CREATORS = frozenset({"arange", "eye", "full", "linspace", "ones", "scalar_tensor", "zeros"})
"""Operators that make a tensor of numbers alone."""

KINDS: Mapping[str, type] = {
    "device": torch.device,
    "dtype": torch.dtype,
    "format": torch.memory_format,
    "layout": torch.layout,
}
"""What JSON has no value for, by the key of the object that stands for it."""

Word = Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$")]
DottedName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Node(_Model):
    name: Word
    op: Literal["placeholder", "get_attr", "call_function", "output"]
    target: DottedName
    args: list[Any]
    kwargs: dict[Word, Any]


class _Graph(_Model):
    name: Word
    nodes: list[_Node]
    weights: dict[DottedName, tuple[str, tuple[int, ...]]]
    constants: list[DottedName]


class _Segment(_Model):
    graph: int
    name: str
    runs: Runs
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    prefix: str
    precision: Precision
    dropped: tuple[str, ...]


class _Document(_Model):
    graphs: list[_Graph]
    segments: list[_Segment]
    stages: tuple[StageEntry, ...]
    inputs: dict[str, InputEntry]
    signals: dict[str, tuple[str, Literal["run", "step"]]]
    feature_block: int
    dims: dict[str, tuple[DimFactor, ...]]
    history_dtype: str
    example_dims: dict[str, int]
    latent_scale: tuple[int, int]
    limits: dict[str, LimitEntry]
    sums: dict[str, tuple[SumTerm, ...]]
    unread: list[str]
    usual: dict[str, int]
    arguments: dict[str, bool | int | float | str | None]


def write_cut(cut: Cut, folder: Path) -> None:
    """Write a cut into a new folder.

    Args:
        cut: Its segments' modules are graphs, as `declare` makes them.
        folder: Is made.
    """
    folder.mkdir()
    modules: list[Any] = list({id(s.module): s.module for s in cut.segments}.values())
    constants: dict[str, torch.Tensor] = {}
    graphs = []
    for place, module in enumerate(modules):
        held = dict(module.named_buffers())
        constants |= {f"{place}.{path}": value.clone() for path, value in held.items()}
        weights = {n: (_named(p.dtype), tuple(p.shape)) for n, p in module.named_parameters()}
        nodes = [_node(node) for node in module.graph.nodes]
        graphs.append(
            _Graph(name=module._get_name(), nodes=nodes, weights=weights, constants=[*held])
        )
    place_of = {id(module): place for place, module in enumerate(modules)}
    segments = [
        _Segment(
            graph=place_of[id(s.module)],
            name=s.name,
            runs=s.runs,
            inputs=dict(s.inputs),
            outputs=dict(s.outputs),
            prefix=s.prefix,
            precision=s.precision,
            dropped=s.dropped,
        )
        for s in cut.segments
    ]
    own = {name: getattr(cut, name) for name in _Document.model_fields if hasattr(cut, name)}
    document = _Document.model_validate(
        {**own, "graphs": graphs, "segments": segments, "unread": sorted(cut.unread)}
    )
    (folder / DOCUMENT).write_text(document.model_dump_json(), encoding="utf-8")
    save_file(constants, folder / CONSTANTS)


def read_cut(folder: Path) -> Cut:
    """Read a cut; its modules' weights are on ``meta``.

    Raises:
        BundleError: a file is missing, or is not what `write_cut` writes.
    """
    try:
        document = _Document.model_validate_json((folder / DOCUMENT).read_bytes())
        constants = load_file(folder / CONSTANTS)
        modules = [_module(g, place, constants) for place, g in enumerate(document.graphs)]
        segments = tuple(
            Segment(module=modules[s.graph], **{n: v for n, v in s if n != "graph"})
            for s in document.segments
        )
    except (
        OSError,
        ValidationError,
        SafetensorError,
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        SyntaxError,
    ) as error:
        raise BundleError(
            str(folder), f"holds no cut: {error}", "build the bundle again"
        ) from error
    own = {name: value for name, value in document if name not in ("graphs", "segments")}
    return Cut(segments=segments, **{**own, "unread": frozenset(document.unread)})


def cut_of(bundle: Bundle) -> Cut:
    """Read the cut that a bundle was built of; its modules are on ``meta``.

    Raises:
        BundleError: it has none, or one that its manifest does not list.
    """
    folder = bundle.folder / CUT
    if not bundle.manifest.files.keys() >= FILES:  # opening a bundle checks those that it lists
        raise BundleError(str(folder), "the manifest lists no cut here", "build the bundle again")
    return read_cut(folder)


def _node(node: fx.Node) -> _Node:
    op: Any = node.op
    target = node.target if isinstance(node.target, str) else _function_name(node.target)
    results: Any = node.args[0] if op == "output" else node.args
    return _Node(
        name=node.name,
        op=op,
        target=target,
        args=[_encoded(one) for one in results],
        kwargs={key: _encoded(one) for key, one in node.kwargs.items()},
    )


def _function_name(function: Any) -> str:
    if isinstance(function, torch._ops.OpOverload):
        return str(function)
    return next(name for name, known in FUNCTIONS.items() if known is function)


def _encoded(value: Any) -> Any:
    """Return an argument as JSON."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encoded(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    for kind, python in KINDS.items():
        if isinstance(value, python):
            return {kind: _named(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a graph has an argument of {type(value)}")


def _named(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _module(document: _Graph, place: int, constants: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    """Make a graph of its document."""
    root, graph = nn.Module(), fx.Graph()
    for path, (dtype, shape) in document.weights.items():
        weight = torch.empty(shape, dtype=_of_torch(dtype, torch.dtype), device="meta")
        hold(root, path, nn.Parameter(weight, requires_grad=False))
    for path in document.constants:
        hold(root, path, constants[f"{place}.{path}"])
    held = {*document.weights, *document.constants}
    nodes: dict[str, fx.Node] = {}
    for one in document.nodes:
        args = [_decoded(arg, nodes) for arg in one.args]
        kwargs = {key: _decoded(arg, nodes) for key, arg in one.kwargs.items()}
        if one.op == "output":
            graph.output(tuple(args))
        elif one.op == "call_function":
            if one.target == "pow" and not (len(args) == 2 and 0 <= args[1] <= MOST_POWER):
                raise ValueError(f"a graph takes the power {args[1:]}")
            nodes[one.name] = graph.create_node(
                "call_function", _function(one.target), tuple(args), kwargs, name=one.name
            )
        elif one.target in held or (one.op == "placeholder" and one.target.isidentifier()):
            nodes[one.name] = graph.create_node(one.op, one.target, name=one.name)
        else:
            raise ValueError(f"a graph reads '{one.target}', which it does not hold")
    made = fx.GraphModule(root, graph, class_name=document.name)
    # What no checkpoint holds is no part of a state dict; a graph module forgets that.
    made._non_persistent_buffers_set.update(name for name, _ in made.named_buffers())
    return made


def _function(name: str) -> Any:
    """Return what a node calls: an operator without side effects, or one of `FUNCTIONS`."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    namespace, packet, overload = name.split(".")
    if namespace not in ("aten", "onnx"):
        raise ValueError(f"a graph calls '{name}'")
    found = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    schema = found._schema
    of_tensors = any("Tensor" in str(argument.type) for argument in schema.arguments)
    if schema.is_mutable or not (of_tensors or packet in CREATORS):
        raise ValueError(f"a graph calls '{name}'")
    return found


def _decoded(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """Return an argument of its JSON."""
    if isinstance(value, list):
        return [_decoded(one, nodes) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, name),) = value.items()
    if kind == "node":
        return nodes[name]
    if kind == "float":
        return float(name)
    return torch.device(name) if kind == "device" else _of_torch(name, KINDS[kind])


def _of_torch(name: str, kind: type) -> Any:
    found = getattr(torch, name)
    if not isinstance(found, kind):
        raise TypeError(f"'{name}' is no {kind.__name__}")
    return found
