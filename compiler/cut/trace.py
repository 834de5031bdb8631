# SPDX-License-Identifier: Apache-2.0
"""Trace a diffusers transformer's own `forward`, once, into one graph with symbolic sizes.

No weight is loaded or allocated, and of a run of equal blocks the first two alone are traced. The
graph is functional (no operation writes into its inputs), and composite operations (`linear`,
`layer_norm`, `scaled_dot_product_attention`) stay whole in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize

from ...core.errors import ExportError
from .arguments import example, filled, leaves_of, results_of, tensors_of
from .assumptions import Assumption, collected_assumptions, over_sizes
from .patch import patched
from .row import Input, Row, size_expression
from .skeleton import skeleton
from .symbolic import symbolic_python

__all__ = ["Trace", "hint", "trace", "value_of"]


@dataclass
class Trace:
    """A transformer's forward as one graph.

    Attributes:
        model: The shortened transformer; its parameters have no storage.
        graph: Every node's ``meta["val"]`` is a fake tensor or a symbolic size.
        inputs: Placeholder → name of the input (argument, and place in it where that is nested).
        declared: Placeholder → its row's declaration.
        examples: Placeholder → the value that it was traced with.
        weights: Placeholder → name in the checkpoint.
        constants: Placeholder → value, of buffers and tensors that no checkpoint holds.
        results: What `forward` returns.
        mode: Makes fake tensors of the graph's sizes.
        symbols: Symbolic size → the row's expression for it.
        domain: What tracing took for granted about sizes.
        runs: Block → number of blocks that it stands for, itself included.
    """

    model: nn.Module
    graph: fx.Graph
    inputs: dict[fx.Node, str]
    declared: dict[fx.Node, Input]
    examples: dict[fx.Node, Any]
    weights: dict[fx.Node, str]
    constants: dict[fx.Node, Tensor]
    results: tuple[fx.Node, ...]
    mode: FakeTensorMode
    symbols: dict[sympy.Symbol, sympy.Basic]
    domain: tuple[Assumption, ...]
    runs: dict[str, int]


class Watched(nn.Module):
    """A transformer that also returns what each of its blocks returns.

    A last block's text stream, which nobody reads, would be removed as dead code there and nowhere
    else, and the last block would not be equal to the others.

    What it writes in place is traced as operations that write nowhere, in the same pass:
    `run_decompositions` would trace the whole graph twice more.
    """

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.arguments = arguments

    def forward(self, leaves: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the transformer's results and every block's."""
        mode = FunctionalTensorMode(pre_dispatch=True, export=True)
        returned: tuple[list[Tensor], list[Tensor]] = dispatch_functionalize(self.run, mode)(leaves)
        return returned

    def run(self, leaves: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Run the transformer, watched."""
        kept: list[Tensor] = []
        entries = [
            entry
            for module in self.model.modules()
            if isinstance(module, nn.ModuleList)
            for entry in module
        ]
        hooks = [
            entry.register_forward_hook(lambda _module, _inputs, out: kept.extend(tensors_of(out)))
            for entry in entries
        ]
        try:
            results = self.model(**filled(self.arguments, leaves))
        finally:
            for hook in hooks:
                hook.remove()
        return results_of(results), kept


def trace(
    row: Row, model_class: Any, config: Mapping[str, Any], whole: Collection[str] | None = ()
) -> Trace:
    """Trace a transformer's own forward.

    Args:
        row: What it takes.
        model_class: The diffusers class.
        config: Its config.
        whole: Lists of blocks to trace all of; None traces all of every list.

    Raises:
        ExportError: torch can't trace it.
    """
    with patched(model_class, row.patches):
        model, runs = skeleton(model_class, config, None if row.whole else whole)
    config = {**getattr(model, "config", {}), **config}
    arguments, named = leaves_of(row, config)
    generator = torch.Generator().manual_seed(0)
    sizes = row.sizes(config)
    leaves = [example(declared, config, sizes, generator) for declared in named.values()]
    automatic = torch.export.Dim.AUTO
    dynamic = [
        (automatic if declared.dynamic() else None)
        if declared.changes == "shape"
        else dict.fromkeys(declared.dynamic(), automatic)
        for declared in named.values()
    ]
    try:
        with (
            collected_assumptions() as domain,
            symbolic_python(),  # first: a patched method takes its module's names along
            patched(model_class, row.patches),
            torch.no_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            program = torch.export.export(
                Watched(model, arguments),
                (leaves,),
                dynamic_shapes=(dynamic,),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            if not _is_plain(program.graph):
                program = program.run_decompositions({})
            program.graph.eliminate_dead_code()  # views that were made again after a write
    except Exception as error:
        raise ExportError(
            f"transformer '{row.model}'",
            f"torch can't trace its forward: {error}",
            "report this with the model's config",
        ) from error
    return _read(program, model, config, dict(zip(named, leaves, strict=True)), named, runs, domain)


def _is_plain(graph: fx.Graph) -> bool:
    """Say whether no operation writes into a weight or a constant, or holds a graph as autocast does."""
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    schemas = (getattr(target, "_schema", None) for target in targets)
    return not any(
        isinstance(target, torch._ops.HigherOrderOperator) for target in targets
    ) and not any(schema is not None and schema.is_mutable for schema in schemas)


def _read(
    program: torch.export.ExportedProgram,
    model: nn.Module,
    config: Mapping[str, Any],
    examples: Mapping[str, Any],
    named: Mapping[str, Input],
    runs: dict[str, int],
    domain: Iterable[Assumption],
) -> Trace:
    """Sort an exported program's placeholders and results."""
    signature = program.graph_signature
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    inputs, declared, weights, constants = {}, {}, {}, {}
    user_inputs = iter(named.items())
    for spec in signature.input_specs:
        node = placeholders[spec.arg.name]
        kind, target = spec.kind.name, str(spec.target).removeprefix("model.")
        if kind == "USER_INPUT":
            inputs[node], declared[node] = next(user_inputs)
        elif kind == "PARAMETER" or (kind == "BUFFER" and spec.persistent):
            weights[node] = target
        elif kind == "BUFFER":
            constants[node] = model.get_buffer(target)
        else:
            constants[node] = program.constants[str(spec.target)]
    output = next(n for n in program.graph.nodes if n.op == "output")
    structure = program.call_spec.out_spec
    assert structure is not None, "an exported program knows what it returns"
    changed = len(signature.output_specs) - structure.num_leaves
    count = structure.children()[0].num_leaves
    mode = next(v.fake_mode for v in map(value_of, inputs) if hasattr(v, "fake_mode"))
    symbols = _symbols(declared, config)
    return Trace(
        model=model,
        graph=program.graph,
        inputs=inputs,
        declared=declared,
        examples={node: examples[name] for node, name in inputs.items()},
        weights=weights,
        constants=constants,
        results=tuple(output.args[0][changed : changed + count]),
        mode=mode,
        symbols=symbols,
        domain=over_sizes(domain, symbols, mode.shape_env),
        runs=runs,
    )


def value_of(node: fx.Node) -> Any:
    """Return a node's fake tensor or symbolic size."""
    return node.meta.get("val")


def hint(extent: Any) -> Any:
    """Return a size's value at the traced sizes; a number as it is."""
    return extent.node.hint if hasattr(extent, "node") else extent


def _symbols(
    declared: Mapping[fx.Node, Input], config: Mapping[str, Any]
) -> dict[sympy.Symbol, sympy.Basic]:
    """Name each symbolic size by the expression that a row gives for it."""
    names: dict[sympy.Symbol, sympy.Basic] = {}
    for node, one in declared.items():
        value = value_of(node)
        for word, extent in zip(one.shape.split(), getattr(value, "shape", (value,)), strict=True):
            if isinstance(extent, torch.SymInt) and extent.node.expr.is_Symbol:
                names.setdefault(extent.node.expr, size_expression(word, config))
    return names
