# SPDX-License-Identifier: Apache-2.0
"""Let each block add a timestep's part of a sum and a prompt's part itself.

`temb = time_embed(timestep) + pool_embed(pooled)` sees both, and so would be computed at every step.
Its first part is a row of the run's tables, its second is made once per prompt; the sum of two
vectors, and what is cheap to make of it, is copied into each block that reads it.
"""

from __future__ import annotations

from functools import reduce

from torch import fx

from .blocks import find_instances
from .classes import Classes, classify
from .rewrite import insert, operations, replace
from .trace import Trace
from .words import PRODUCTS, is_operation, operation, tensors_read

__all__ = ["split_sums"]


def split_sums(trace: Trace) -> None:
    """Regroup sums by what their terms depend on, and move those that see both into the blocks."""
    regroup(trace, classify(trace))
    move_into_blocks(trace, classify(trace))
    trace.graph.eliminate_dead_code()


def regroup(trace: Trace, classes: Classes) -> None:
    """`(step + one) + other` becomes `step + (one + other)`, where these see the prompt alone."""
    for node, _ in operations(trace):
        if not _is_mixed_sum(node, classes) or any(_is_mixed_sum(u, classes) for u in node.users):
            continue
        terms = _terms(node, classes)
        parts = [[t for t in terms if classes.runs(t) == runs] for runs in ("run", "prompt")]
        if sum(map(len, parts)) < len(terms) or len(terms) == 2:
            continue
        with trace.graph.inserting_before(node):
            made = [
                reduce(lambda one, two: insert(trace, node, node.target, one, two), part)
                for part in parts
            ]
            new = insert(trace, node, node.target, *made)
        replace(trace, node, new)


def _is_mixed_sum(node: fx.Node, classes: Classes) -> bool:
    """Say whether a node adds two tensors, and sees timestep and prompt but no token."""
    return (
        is_operation(node)
        and operation(node) == "add"
        and len(tensors_read(node)) == 2
        and not node.kwargs
        and node in classes.conditioning
        and classes.of[node].every_step
    )


def _terms(node: fx.Node, classes: Classes) -> list[fx.Node]:
    if not _is_mixed_sum(node, classes):
        return [node]
    return [term for read in tensors_read(node) for term in _terms(read, classes)]


def move_into_blocks(trace: Trace, classes: Classes) -> None:
    """Copy what is made of both, without a matrix product, into each block that reads it."""
    block_of = {n: i.block for i in find_instances(trace) for n in i.nodes}
    for node, name in reversed(list(operations(trace))):
        mixed = node in classes.conditioning and classes.of[node].every_step
        if not mixed or name in PRODUCTS or node in block_of:
            continue
        copies: dict[str, fx.Node] = {}
        for reader in [user for user in trace.graph.nodes if user in node.users]:
            block = block_of.get(reader)
            if block is None:
                continue
            if block not in copies:
                with trace.graph.inserting_before(reader):
                    copy = trace.graph.node_copy(node, lambda n: n)
                copy.meta["nn_module_stack"] = reader.meta["nn_module_stack"]
                copies[block], block_of[copy] = copy, block
            reader.replace_input_with(node, copies[block])
