# SPDX-License-Identifier: Apache-2.0
"""Let what runs at each step read its timestep of a table.

All steps' timesteps come in before the first, and what is made of them alone is a table of the run,
of which a step reads its row. Blocks that embed the timestep with weights of their own read no such
value: for them the timestep itself is a table.
"""

from __future__ import annotations

import torch
from torch import fx

from .blocks import find_instances
from .classes import Dependency, classify
from .rewrite import insert
from .trace import Trace
from .words import is_operation

__all__ = ["tabulate_timesteps"]


def tabulate_timesteps(trace: Trace) -> None:
    """Copy each timestep for those readers that are no part of the run's tables."""
    in_blocks = {node for instance in find_instances(trace) for node in instance.nodes}
    of = classify(trace).of
    first = next(node for node in trace.graph.nodes if node.op != "placeholder")
    for node, declared in trace.declared.items():
        if declared.changes != "run":
            continue
        readers = [u for u in node.users if u in in_blocks or _reads_at_a_step(u, of)]
        if readers:
            with trace.graph.inserting_before(first):
                table = insert(trace, node, torch.ops.aten.clone.default, node)
            table.meta["value_name"] = f"{trace.inputs[node]}_of_step"
            for reader in readers:
                reader.replace_input_with(node, table)


def _reads_at_a_step(reader: fx.Node, of: dict[fx.Node, Dependency]) -> bool:
    return is_operation(reader) and of[reader].every_step
