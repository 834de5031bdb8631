# SPDX-License-Identifier: Apache-2.0
"""Keep a vector of the timestep a vector: what is the same for all tokens is spread over none.

Some models expand their modulation to every token, and compute it for each. Arithmetic broadcasts by
itself: without the expansion it is a row of the run's table, computed once per timestep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .classes import classify
from .rewrite import operations, replace
from .trace import Trace, value_of
from .words import is_size, operation, shape_of

__all__ = ["spread_no_vectors"]

BROADCASTS = frozenset({"add", "addcmul", "div", "expand", "mul", "sub"})
"""Operations that spread an argument by themselves, or as they are told."""

TOKEN_BY_TOKEN = frozenset(
    {
        "_to_copy", "gelu", "getitem", "layer_norm", "linear", "permute", "rms_norm", "select",
        "sigmoid", "silu", "slice", "split", "split_with_sizes", "squeeze", "tanh", "to", "unsqueeze",
    }
)  # fmt: skip
"""Operations that give the same for each token where they are given the same for each."""


def spread_no_vectors(trace: Trace) -> None:
    """Take out expansions over tokens of what sees no latents, where arithmetic makes up for them."""
    of = classify(trace).of
    for node, name in operations(trace):
        if name == "expand" and "step" not in of[node].on and _is_over_tokens(node):
            found = _without(trace, node)
            for reader, value in (found or {}).items():
                reader.meta["val"] = value
            if found is not None:
                replace(trace, node, node.args[0])  # type: ignore[arg-type]  # what it expands


def _is_over_tokens(node: fx.Node) -> bool:
    """Say whether an expansion is along another axis than the batch's, which is first."""
    before, after = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]  # a node
    return len(before) == len(after) and before[1:] != after[1:]


def _without(trace: Trace, node: fx.Node) -> dict[fx.Node, Any] | None:
    """Return what readers of an expansion become without it; None if one can't do without.

    Each computes from fewer elements what it would have computed for all; where its result has its
    old shape, nothing behind it changes.
    """
    thin: dict[fx.Node, Any] = {node: value_of(node.args[0])}  # type: ignore[arg-type]  # a node
    for reader in list(trace.graph.nodes):
        if thin.keys().isdisjoint(reader.all_input_nodes):
            continue
        if reader.op == "output" or is_size(reader):
            return None
        if operation(reader) not in BROADCASTS | TOKEN_BY_TOKEN:
            return None
        value = _inferred(trace, reader, thin)
        kinds = {_compared(*pair) for pair in _pairs(value, value_of(reader))}
        if kinds == {"equal"} and operation(reader) in {"select", *BROADCASTS}:
            continue
        if not kinds <= {"equal", "thin"}:
            return None
        thin[reader] = value
    del thin[node]
    return thin


def _inferred(trace: Trace, node: fx.Node, thin: Mapping[fx.Node, Any]) -> Any:
    """Return a node's fake value of other arguments; None where it takes no such ones."""

    def value(read: fx.Node) -> Any:
        return thin.get(read, value_of(read))

    target: Any = node.target
    try:
        with trace.mode, torch.no_grad():
            return target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))
    except (RuntimeError, IndexError, TypeError):
        return None


def _pairs(one: Any, other: Any) -> list[tuple[Any, Any]]:
    if isinstance(other, Tensor):
        return [(one, other)]
    if not isinstance(one, (list, tuple)) or len(one) != len(other):
        return [(None, None)]
    return list(zip(one, other, strict=True))


def _compared(one: Any, other: Any) -> str:
    """Say whether a tensor's shape is equal to another's, or "thin": 1 where that one's is not."""
    if not isinstance(one, Tensor) or one.ndim != other.ndim:
        return "other"
    pairs = [(str(a), str(b)) for a, b in zip(one.shape, other.shape, strict=True)]
    if all(a == b for a, b in pairs):
        return "equal"
    return "thin" if all(a in (b, "1") for a, b in pairs) else "other"
