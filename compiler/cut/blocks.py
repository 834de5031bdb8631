# SPDX-License-Identifier: Apache-2.0
"""Find the blocks: the entries of a module list whose calls compute the same with other weights.

Two blocks are the same when their canonical text is: operations, own weights by the name below the
block and shape, values from outside numbered by first use, symbolic sizes as expressions. Equal
text is one template.
"""

from __future__ import annotations

import hashlib
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from .classes import classify
from .skeleton import block_lists
from .trace import Trace, value_of
from .words import (
    PRODUCTS,
    Instance,
    Template,
    expression_of,
    is_operation,
    is_size,
    operation,
    tensors_read,
)

__all__ = ["find_instances", "find_templates", "needed"]

FEWEST_PRODUCTS = 3
"""A list entry without attention and with fewer products is an embedder or a head, no block."""


def find_instances(trace: Trace) -> list[Instance]:
    """Return the calls of blocks, in order.

    A module list whose entries see the prompt alone (a text refiner) holds no blocks: it is
    ordinary code of `prompt`. One whose entries see the timestep too runs on computed steps, as
    those that see the latents do. Blocks that the results need nothing of are left out.
    """
    lists = block_lists(trace.model)
    owner: dict[fx.Node, str] = {}
    found: dict[str, list[fx.Node]] = defaultdict(list)
    for node in trace.graph.nodes:
        if not is_operation(node):
            continue
        if node.target is operator.getitem:
            block = owner.get(node.args[0])
        else:
            block = next((p for p in _paths(node) if p.rpartition(".")[0] in lists), None)
        if block is not None:
            owner[node] = block
            found[block].append(node)
    of, read = classify(trace).of, needed(trace)
    instances = [
        Instance(block, nodes)
        for block, nodes in found.items()
        if _does_work(nodes)
        and any(of[node].every_step for node in nodes)
        and not read.isdisjoint(nodes)
    ]
    order = {node: i for i, node in enumerate(trace.graph.nodes)}
    return sorted(instances, key=lambda instance: order[instance.nodes[0]])


def needed(
    trace: Trace, also: Callable[[fx.Node], Iterable[fx.Node]] = lambda node: ()
) -> set[fx.Node]:
    """Return what the results are computed of.

    Args:
        trace: Of the model.
        also: What a node needs beside the tensors that it reads.
    """
    found: set[fx.Node] = set()
    waiting = list(trace.results)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [*tensors_read(node), *also(node)]
    return found


def _paths(node: fx.Node) -> list[str]:
    """Return the modules whose forwards a node lies in, outermost first."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return [path.removeprefix("model.") for path, _ in stack]


def _does_work(nodes: list[fx.Node]) -> bool:
    names = [operation(node) for node in nodes]
    products = sum(name in PRODUCTS for name in names)
    return "scaled_dot_product_attention" in names or products >= FEWEST_PRODUCTS


def find_templates(trace: Trace, instances: list[Instance]) -> list[Template]:
    """Group instances by canonical text."""
    groups: dict[str, list[Instance]] = defaultdict(list)
    for instance in instances:
        instance.slots, instance.text = _canonical(trace, instance)
        groups[instance.text].append(instance)
    return [Template(group, _outputs(trace, group)) for group in groups.values()]


def _canonical(trace: Trace, instance: Instance) -> tuple[list[fx.Node], str]:
    """Return an instance's slots and text."""
    slots: list[fx.Node] = []

    def word(argument: Any) -> str:
        if isinstance(argument, (list, tuple)):
            return f"[{','.join(map(word, argument))}]"
        if not isinstance(argument, fx.Node):
            return repr(argument)
        if is_size(argument):
            return f"<{expression_of(value_of(argument))}>"
        if argument in instance.index:
            return f"%{instance.index[argument]}"
        weight = trace.weights.get(argument, "")
        if weight.startswith(f"{instance.block}."):
            return f"{weight[len(instance.block) :]}{tuple(value_of(argument).shape)}"
        if argument in trace.constants:
            values = trace.constants[argument].contiguous().cpu().flatten().numpy().tobytes()
            return hashlib.sha256(values).hexdigest()
        if argument not in slots:
            slots.append(argument)
        return f"slot{slots.index(argument)}"

    text = "\n".join(
        f"{node.target}({word(node.args)},{sorted((k, word(v)) for k, v in node.kwargs.items())})"
        for node in instance.nodes
    )
    return slots, text


def _outputs(trace: Trace, instances: list[Instance]) -> list[int]:
    def is_read(instance: Instance, node: fx.Node) -> bool:
        readers = [user for user in node.users if user not in instance.index and not is_size(user)]
        return node in trace.results or any(user.op != "output" for user in readers)

    used: set[int] = set()
    for instance in instances:
        used |= {i for i, node in enumerate(instance.nodes) if is_read(instance, node)}
    return sorted(used)
