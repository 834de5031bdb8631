# SPDX-License-Identifier: Apache-2.0
"""Make a graph of one value inside a block, to be known before the block runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from .extract import hold
from .words import Call, Cut, arguments, results

__all__ = ["alone"]


def alone(
    cut: Cut, call: Call, module: fx.GraphModule, node: fx.Node, *, name: str
) -> tuple[fx.GraphModule, dict[str, str]]:
    """Copy what a block computes up to one value, and what `condition` computes for that.

    Args:
        cut: The cut.
        call: The block's call.
        module: Its graph.
        node: The value, of ``module``.
        name: The new graph's.

    Returns:
        The graph, whose weights are named as in the checkpoint, and argument → value of the cut, in
        the order of the graph's arguments.
    """
    copying = _Copying(cut, {value: one for one in cut.calls for value in one.outputs})
    copies = copying.copy(call, module)
    copying.graph.output((copies[node],))
    copying.graph.eliminate_dead_code(  # attention may drop values, which makes it impure
        is_impure_node=lambda n: n.op in ("placeholder", "output")
    )
    for argument in copying.graph.find_nodes(op="placeholder"):
        if not argument.users:
            copying.graph.erase_node(argument)
    made = fx.GraphModule(copying.root, copying.graph, class_name=name)
    value_of = {node: value for value, node in copying.made.items()}
    return made, {node.name: value_of[node] for node in arguments(made)}


@dataclass
class _Copying:
    cut: Cut
    maker: Mapping[str, Call]
    graph: fx.Graph = field(default_factory=fx.Graph)
    root: nn.Module = field(default_factory=nn.Module)
    made: dict[str, fx.Node] = field(default_factory=dict)

    def copy(self, call: Call, module: fx.GraphModule) -> dict[fx.Node, fx.Node]:
        """Copy a call's graph; return node → copy."""
        prefix = f"{call.block}." if call.block else ""
        copies: dict[fx.Node, fx.Node] = {}
        for node, value in zip(arguments(module), call.inputs, strict=True):
            copies[node] = self._value(value, node)
        for node in module.graph.nodes:
            if node.op == "get_attr":
                held = _attribute(module, str(node.target))
                own = prefix if isinstance(held, nn.Parameter) else f"{call.segment}_"
                hold(self.root, own + str(node.target), held)
                copies[node] = self.graph.get_attr(own + str(node.target))
                copies[node].meta = dict(node.meta)
            elif node.op == "call_function":
                copies[node] = self.graph.node_copy(node, copies.__getitem__)
        return copies

    def _value(self, value: str, like: fx.Node) -> fx.Node:
        """Return the node that is a value: of `condition` its copy, else an argument."""
        if value not in self.made:
            call = self.maker.get(value)
            if call is not None and call.segment == "condition":
                module = self.cut.segments[call.segment].module
                copies = self.copy(call, module)
                self.made.update(
                    (v, copies[n]) for v, n in zip(call.outputs, results(module), strict=True)
                )
            else:
                with self.graph.inserting_before(None):
                    self.made[value] = self.graph.placeholder(like.name)
                self.made[value].meta = dict(like.meta)
        return self.made[value]


def _attribute(module: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name)
