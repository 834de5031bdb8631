# SPDX-License-Identifier: Apache-2.0
"""Cut a policy's graph at its sums over tokens, so that ranks add theirs before they decide."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Collection
from pathlib import Path

import onnx_ir as ir

from ...bundle.manifest import GraphEntry, IoEntry
from ...bundle.store import NO_STORE, Store
from ...policies.base import Policy
from ...policies.guard import Shape, decide_inputs, decide_outputs
from ..code_version import code_version
from ..graphs.decide import decide_program

__all__ = ["cut_decision", "measured_graphs", "write_measured_graphs"]

REDUCTIONS = {"ReduceMean": "mean", "ReduceSum": "sum"}
"""Operations over all elements → how what they give of ranks' parts is joined, and is called."""


def cut_decision(program: ir.Model, inputs: Collection[str]) -> tuple[ir.Model, ir.Model] | None:
    """Cut a policy's graph in two.

    Args:
        program: Of `decide_program`.
        inputs: Its inputs that have tokens.

    Returns:
        The graph of sums, one float32 each, called ``mean.1``, ``sum.2``, …, and the graph that decides
        by them. None if anything but sums and means over all elements joins tokens.
    """
    sums = _sums(program, inputs)
    if not sums:
        return None
    measured, decided = program.clone(), program.clone()
    made = {str(v.name): v for node in measured.graph for v in node.outputs}
    measured.graph.outputs.clear()
    for value, name in sums.items():
        made[value].name = name
        measured.graph.outputs.append(made[value])
    made = {str(v.name): v for node in decided.graph for v in node.outputs}
    for value, name in sums.items():
        given = ir.Input(name, shape=made[value].shape, type=made[value].type)
        made[value].replace_all_uses_with(given)
        decided.graph.inputs.append(given)
    for model in (measured, decided):
        ir.passes.common.RemoveUnusedNodesPass()(model)
        for unread in [v for v in model.graph.inputs if not v.uses()]:
            model.graph.inputs.remove(unread)
    if {str(v.name) for v in decided.graph.inputs} & set(inputs):
        return None
    return measured, decided


def _sums(program: ir.Model, inputs: Collection[str]) -> dict[str, str]:
    """Return the sums that tokens end in → their names; empty where they end otherwise."""
    of_tokens: set[ir.Value] = {v for v in program.graph.inputs if v.name in inputs}
    found: dict[str, str] = {}
    for node in program.graph:
        if of_tokens.isdisjoint(v for v in node.inputs if v is not None):
            continue
        (value, *_) = node.outputs
        is_one = value.shape is not None and all(size == 1 for size in value.shape)
        if node.op_type in REDUCTIONS and is_one:
            found[str(value.name)] = f"{REDUCTIONS[node.op_type]}.{len(found) + 1}"
        else:
            of_tokens.update(node.outputs)
    return {} if not of_tokens.isdisjoint(program.graph.outputs) else found


def measured_graphs(name: str) -> tuple[str, str]:
    """Return what a policy's two graphs are called."""
    return f"measure.{name}", f"decide.{name}.measured"


def write_measured_graphs(
    name: str, policy: Policy, bundle: Path, store: Store = NO_STORE
) -> dict[str, GraphEntry]:
    """Write a policy's two graphs; none for one that looks at no tokens, or can't be cut.

    Args:
        name: The policy's, as the bundle has it.
        policy: The law.
        bundle: The bundle's folder; has a folder ``graphs``.
        store: Where graphs are kept.

    Returns:
        Graph name → entry.
    """
    declared = decide_inputs(policy.spec)
    tokens = [n for n, (_, shape) in declared.items() if any(isinstance(d, str) for d in shape)]
    both = bool(policy.spec.signals) and policy.spec.feature is not None
    cut = None if both or not tokens else cut_decision(decide_program(policy), tokens)
    if cut is None:
        return {}
    entries = {}
    source = hashlib.sha256(Path(inspect.getfile(type(policy))).read_bytes()).hexdigest()
    for graph, model in zip(measured_graphs(name), cut, strict=True):
        file = f"graphs/{graph}.onnx"
        about = [graph, code_version(), type(policy).__qualname__, source]
        store.bring(about, bundle / file, _saver(model))
        specs = {**declared, **decide_outputs(policy.spec)}
        specs |= {
            str(v.name): ("float32", tuple(1 for _ in v.shape or ()))
            for v in (*cut[0].graph.outputs, *cut[1].graph.inputs)
            if v.name not in specs
        }
        ios = [
            {str(v.name): _entry(specs[str(v.name)]) for v in values}
            for values in (model.graph.inputs, model.graph.outputs)
        ]
        entries[graph] = GraphEntry(file=file, runs="decide", inputs=ios[0], outputs=ios[1])
    return entries


def _entry(declared: tuple[str, Shape]) -> IoEntry:
    dtype, shape = declared
    return IoEntry(dtype=dtype, shape=list(shape))


def _saver(model: ir.Model) -> Callable[[Path], None]:
    return lambda out: ir.save(model, out)
