# SPDX-License-Identifier: Apache-2.0
"""The words of a cut: a traced graph's nodes, its blocks, and the segments that they end in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import sympy
import torch
from torch import fx

from .assumptions import Assumption
from .row import Input
from .trace import value_of

__all__ = [
    "PRODUCTS",
    "Call",
    "Cut",
    "Instance",
    "Runs",
    "Segment",
    "Template",
    "arguments",
    "expression_of",
    "is_operation",
    "is_size",
    "operation",
    "results",
    "shape_of",
    "sizes_of",
    "sizes_read",
    "tensors_read",
]

PRODUCTS = frozenset(
    {
        "addmm", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "convolution", "einsum", "linear",
        "matmul", "mm", "scaled_dot_product_attention",
    }
)  # fmt: skip
"""Operations that multiply matrices: the work of a model, and what low precision is for."""

Runs = Literal["shape", "prompt", "run", "context", "modulation", "step", "block"]
"""When a segment runs: once per shape; once per prompt; once per run, all timesteps in one batch; once
per prompt and block; once per run and block, all timesteps in one batch; every step; on computed
steps, once per block, or before the first or between two."""


def operation(node: fx.Node) -> str:
    """Return an operation's name: ``linear`` of ``aten.linear.default``."""
    parts = str(node.target).split(".")
    return (
        parts[1]
        if parts[0] in ("aten", "onnx")
        else str(getattr(node.target, "__name__", node.target))
    )


def is_size(node: fx.Node) -> bool:
    """Say whether a node is a symbolic size, or computed of some."""
    return isinstance(value_of(node), (torch.SymInt, torch.SymFloat, torch.SymBool))


def is_operation(node: fx.Node) -> bool:
    """Say whether a node computes tensors."""
    return node.op == "call_function" and not is_size(node)


def expression_of(extent: Any) -> Any:
    """Return a symbolic size's expression; a number as it is."""
    return extent.node.expr if hasattr(extent, "node") else extent


def _read(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def tensors_read(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose tensors a node reads, in the order of its arguments."""
    return [n for n in _read(node) if not is_size(n)]


def sizes_read(node: fx.Node) -> list[Any]:
    """Return the expressions of the symbolic sizes among a node's arguments."""
    return [expression_of(value_of(n)) for n in _read(node) if is_size(n)]


def sizes_of(node: fx.Node) -> set[sympy.Symbol]:
    """Return the symbols in a node's shape; of a size, its own."""
    value = value_of(node)
    extents = value.shape if isinstance(value, torch.Tensor) else (value,)
    return {s for e in extents if isinstance(e, torch.SymInt) for s in e.node.expr.free_symbols}


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Return the expressions of a tensor's shape; empty of a size."""
    value = value_of(node)
    return tuple(map(expression_of, value.shape)) if isinstance(value, torch.Tensor) else ()


def arguments(module: fx.GraphModule) -> list[fx.Node]:
    """Return a graph's arguments, in order."""
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def results(module: fx.GraphModule) -> list[fx.Node]:
    """Return what a graph returns, in order."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    found: Any = output.args[0]
    return list(found)


@dataclass
class Instance:
    """One block's call.

    Attributes:
        block: Its module, ``blocks.3``.
        nodes: What it computes, in the graph's order.
        slots: Values from outside, in the order of first use.
        text: Canonical text.
    """

    block: str
    nodes: list[fx.Node]
    slots: list[fx.Node] = field(default_factory=list)
    text: str = ""

    @cached_property
    def index(self) -> dict[fx.Node, int]:
        """Node → its position among ``nodes``."""
        return {node: i for i, node in enumerate(self.nodes)}


@dataclass
class Template:
    """Blocks with equal text.

    Attributes:
        instances: In the order of their calls.
        outputs: Positions among an instance's nodes whose values are read outside, of any instance.
    """

    instances: list[Instance]
    outputs: list[int]


@dataclass(frozen=True)
class Segment:
    """One graph.

    Attributes:
        name: Graph name.
        runs: When.
        module: Takes ``inputs`` in order, returns a tuple of ``outputs``. Its parameters are on
            ``meta`` and named as in the checkpoint, below the block in a block's graph.
        inputs: Names of what it reads, as its first call calls them.
        outputs: Names of what it returns.
    """

    name: str
    runs: Runs
    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """One use of a segment.

    Attributes:
        segment: Its name.
        block: The block whose weights it takes, as in the checkpoint; empty outside blocks.
        inputs: Values it reads, in the order of the segment's inputs.
        outputs: Values it makes. A value is made once.
    """

    segment: str
    block: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Cut:
    """A transformer, cut: segments, and the order in which they are called.

    Attributes:
        model: Its class.
        segments: By name.
        calls: In an order in which each value is made before it is read; whatever runs more
            seldom comes first.
        inputs: Name → declaration of everything that `forward` is given.
        results: Values that `forward` returns.
        domain: What tracing took for granted about sizes.
        sizes: Symbolic size → the row's expression for it.
        told: Name of a row's signal → the value that carries it.
    """

    model: str
    segments: Mapping[str, Segment]
    calls: tuple[Call, ...]
    inputs: Mapping[str, Input]
    results: tuple[str, ...]
    domain: tuple[Assumption, ...]
    sizes: Mapping[sympy.Symbol, sympy.Basic]
    told: Mapping[str, str]
