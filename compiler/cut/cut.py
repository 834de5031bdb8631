# SPDX-License-Identifier: Apache-2.0
"""Cut a diffusers transformer: its own forward in, segments and their calls out.

`cut_model` is the whole order. Of a run of equal blocks two were traced; `_Calls` writes the calls
of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from ...core.errors import ExportError
from .between import bring_into_blocks
from .blocks import find_instances, find_templates
from .classes import Classes, classify
from .domain import place_limits
from .extract import extract
from .joint import divide_joint
from .names import fresh_name, module_path, value_name
from .partition import Partition, Region, partition
from .parts import join_once
from .rotary import compose_rotary
from .row import Row
from .sums import split_sums
from .tidy import tidy
from .timesteps import tabulate_timesteps
from .trace import Trace, trace, value_of
from .vectors import spread_no_vectors
from .words import Call, Cut, Instance, Runs, Segment, Template, is_operation, is_size

__all__ = ["AHEAD", "cut_model"]

AHEAD: tuple[Runs, ...] = ("context", "modulation")
"""Parts of a block that are called before the first step."""


def cut_model(row: Row, model_class: Any, config: Mapping[str, Any]) -> Cut:
    """Cut a transformer.

    Args:
        row: What it takes.
        model_class: The diffusers class.
        config: Its config.

    Raises:
        ExportError: it can't be traced, or a segment lacks a size.
    """
    whole: set[str] = set()
    while True:
        traced = trace(row, model_class, config, whole)
        place_limits(traced)
        tidy(traced)
        divide_joint(traced, find_instances(traced))
        bring_into_blocks(traced, find_instances(traced))
        spread_no_vectors(traced)
        compose_rotary(traced, find_instances(traced))
        join_once(traced, find_instances(traced))
        split_sums(traced)
        tabulate_timesteps(traced)
        instances = find_instances(traced)
        templates = find_templates(traced, instances)
        unequal = _lists_to_trace_whole(traced, instances, templates)
        if not unequal:
            break
        whole |= unequal
    classes = classify(traced, templates)
    parts = partition(traced, instances, templates, classes)
    told = {name: _last_of(traced, path) for name, path in row.signals.items()}
    return _Calls(row.model, traced, instances, templates, classes, parts, told).cut()


def _last_of(traced: Trace, path: str) -> fx.Node:
    """Return what a module makes last."""
    made: list[fx.Node] = [
        n for n in traced.graph.nodes if is_operation(n) and _is_below(module_path(n), path)
    ]
    if not made:
        raise ExportError(
            f"transformer '{type(traced.model).__name__}'",
            f"has no module '{path}', which its row takes a signal from",
            "correct the row in the table of models",
        )
    return made[-1]


def _is_below(module: str, path: str) -> bool:
    return f"{module}.".startswith(f"{path}.")


def _lists_to_trace_whole(
    traced: Trace, instances: Sequence[Instance], templates: Sequence[Template]
) -> set[str]:
    """Return lists of which a traced block can't stand for those that were left out.

    It can if it is equal to the one before it, and reads from it what each block reads of the one
    before; everything else that it reads must be the same for both, and nobody else may read what
    the one before it makes.
    """
    template = {i.block: k for k, t in enumerate(templates) for i in t.instances}
    before = {b.block: a for a, b in pairwise(instances)}
    by_block = {i.block: i for i in instances}
    whole = set()
    for block in traced.runs:
        path = block.rpartition(".")[0]
        one, two = before.get(block), by_block.get(block)
        if one is None or two is None or template[one.block] != template[block]:
            whole.add(path)
            continue
        bound = zip(one.slots, two.slots, strict=True)
        steady = all(b is a or b in one.index for a, b in bound)
        made = [one.nodes[i] for i in templates[template[block]].outputs]
        readers = {u for node in made for u in node.users if is_operation(u)}
        if not steady or not all(u in one.index or u in two.index for u in readers):
            whole.add(path)
    return whole


class _Calls:
    """Makes the segments, names their values, and writes their calls in order."""

    def __init__(
        self,
        model: str,
        traced: Trace,
        instances: Sequence[Instance],
        templates: Sequence[Template],
        classes: Classes,
        parts: Partition,
        told: Mapping[str, fx.Node],
    ) -> None:
        self.traced, self.instances, self.classes, self.parts = traced, instances, classes, parts
        self.model, self.told = model, told
        self.slots = {node for i in instances for node in i.slots}
        self.owner = {node: i for i in instances for node in i.nodes}
        self.names: dict[fx.Node, str] = {**traced.inputs, **traced.weights}
        self.names.update((node, name) for name, node in told.items())
        self.segments: dict[str, Segment] = {}
        self.calls: list[Call] = []
        self.block_graphs: dict[str, _BlockGraphs] = {}
        for template, positions in zip(templates, parts.blocks, strict=True):
            graphs = self._block_graphs(template, positions, alone=len(templates) == 1)
            self.block_graphs.update((i.block, graphs) for i in template.instances)

    def cut(self) -> Cut:
        """Write every call, the seldomest first."""
        ahead = [r for r in self.parts.regions if r.runs not in ("step", "block")]
        for region in ahead:
            self._call_region(region)
        for runs in AHEAD:
            for position in range(len(self.instances)):
                self._call_block(position, runs)
        for region in self.parts.regions:
            if region not in ahead and region.behind < 0:
                self._call_region(region)
        for position in range(len(self.instances)):
            self._call_block(position, "block")
            for region in self.parts.regions:
                if region.behind == position:
                    self._call_region(region)
        return Cut(
            model=self.model,
            segments=self.segments,
            calls=tuple(self.calls),
            inputs={name: self.traced.declared[n] for n, name in self.traced.inputs.items()},
            results=tuple(self._name(node) for node in self.traced.results),
            domain=self.traced.domain,
            sizes=self.traced.symbols,
            told={name: self._name(node) for name, node in self.told.items()},
        )

    def _name(self, node: fx.Node) -> str:
        """Return a value's name; what a block makes bears the name of the last that it stands for."""
        if node not in self.names:
            instance = self.owner.get(node)
            if instance is None:
                self.names[node] = fresh_name(value_name(node), set(self.names.values()))
            else:
                output = self.block_graphs[instance.block].outputs[instance.index[node]]
                self.names[node] = f"{self._blocks(instance)[-1]}.{output}"
        return self.names[node]

    def _blocks(self, instance: Instance) -> list[str]:
        """Return the blocks that a traced one stands for."""
        path, _, index = instance.block.rpartition(".")
        count = self.traced.runs.get(instance.block, 1)
        return [f"{path}.{int(index) + i}" for i in range(count)]

    def _call_region(self, region: Region) -> None:
        """Make the segment of a region and call it."""
        inside = set(region.nodes)
        outputs = [
            n
            for n in region.nodes
            if n in self.slots
            or n in self.traced.results
            or n in self.told.values()
            or any(u in self.parts.live and u not in inside and not is_size(u) for u in n.users)
        ]
        outputs = [n for n in outputs if isinstance(value_of(n), torch.Tensor)]
        nodes = [*region.again, *region.nodes]
        module, read = extract(self.traced, self.classes, nodes, outputs, name=region.name)
        made = tuple(self._name(node) for node in outputs)
        self.segments[region.name] = Segment(
            region.name, region.runs, module, arguments_of(module), made
        )
        self.calls.append(Call(region.name, "", tuple(map(self._name, read)), made))

    def _block_graphs(
        self, template: Template, parts: Mapping[Runs, Sequence[int]], *, alone: bool
    ) -> _BlockGraphs:
        """Make a template's graphs, of its first instance."""
        first = template.instances[0]
        path = first.block.split(".")[-2]
        returned = {runs: _returned(template, positions) for runs, positions in parts.items()}
        outputs: dict[int, str] = {}
        for i in sorted(i for positions in returned.values() for i in positions):
            outputs[i] = fresh_name(value_name(first.nodes[i]), set(outputs.values()))
        graphs = _BlockGraphs(first, outputs)
        for runs, positions in parts.items():
            name = fresh_name(runs if alone else f"{path}_{runs}", self.segments)
            module, read = extract(
                self.traced,
                self.classes,
                [first.nodes[i] for i in positions],
                [first.nodes[i] for i in returned[runs]],
                name=name,
                block=first.block,
            )
            made = tuple(outputs[i] for i in returned[runs])
            self.segments[name] = Segment(name, runs, module, arguments_of(module), made)
            graphs.made[runs] = (name, read)
        return graphs

    def _call_block(self, position: int, runs: Runs) -> None:
        """Write the calls of all blocks that a traced one stands for."""
        instance = self.instances[position]
        before = self.instances[position - 1] if position else None
        graphs = self.block_graphs[instance.block]
        name, read = graphs.made.get(runs, ("", []))
        blocks = self._blocks(instance)
        for block, previous in zip(blocks, [None, *blocks], strict=False):
            if name:
                values = [self._bound(n, graphs, instance, before, block, previous) for n in read]
                made = tuple(f"{block}.{output}" for output in self.segments[name].outputs)
                self.calls.append(Call(name, block, tuple(values), made))

    def _bound(
        self,
        node: fx.Node,
        graphs: _BlockGraphs,
        instance: Instance,
        before: Instance | None,
        block: str,
        previous: str | None,
    ) -> str:
        """Return the value that a block reads where its template's first instance reads ``node``."""
        if node in graphs.first.index:
            return f"{block}.{graphs.outputs[graphs.first.index[node]]}"
        if node in graphs.first.slots:
            node = instance.slots[graphs.first.slots.index(node)]
        if previous is not None and before is not None and node in before.index:
            return f"{previous}.{graphs.outputs[before.index[node]]}"
        return self._name(node)


@dataclass
class _BlockGraphs:
    """Graphs of one template.

    Attributes:
        first: The instance that they were made of.
        outputs: Position among an instance's nodes → what the value is called.
        made: A segment's moment → its name, and what it reads of the first instance.
    """

    first: Instance
    outputs: dict[int, str]
    made: dict[Runs, tuple[str, list[fx.Node]]] = field(default_factory=dict)


def _returned(template: Template, positions: Sequence[int]) -> list[int]:
    """Return which of a part's values are read by another part of the block, or outside of it."""
    first, inside = template.instances[0], set(positions)
    read = [
        i
        for i in positions
        if i in template.outputs
        or any(first.index.get(user, i) not in inside for user in first.nodes[i].users)
    ]
    return [i for i in read if isinstance(value_of(first.nodes[i]), torch.Tensor)]


def arguments_of(module: fx.GraphModule) -> tuple[str, ...]:
    """Return the names of a graph's arguments."""
    return tuple(node.name for node in module.graph.nodes if node.op == "placeholder")
