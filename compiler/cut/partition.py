# SPDX-License-Identifier: Apache-2.0
"""Say which segment each node of a traced graph belongs to.

Outside blocks a node goes where its dependencies send it; what every step computes is `head` before
the blocks, `condition` if it sees timestep and prompt but no latents, `bridge` between two, `finish` if
no block needs it.
Inside blocks, what depends on the prompt alone and has a matrix product behind it is `context`;
products of vectors that see the timestep and no latent are `modulation`; all else is the block's own
graph.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import fx

from .blocks import needed
from .classes import Classes
from .trace import Trace
from .words import PRODUCTS, Instance, Runs, Template, is_operation, operation, tensors_read

__all__ = ["Partition", "Region", "partition"]

MOMENTS: dict[str, tuple[str, Runs]] = {
    "shape": ("rotary", "shape"),
    "prompt": ("prompt", "prompt"),
    "run": ("timestep", "run"),
}
"""Class of a value that is known before a step → segment that makes it, and when that runs."""


@dataclass
class Region:
    """The nodes of one segment outside blocks, in order.

    Attributes:
        name: The segment's.
        runs: When.
        nodes: In the graph's order.
        behind: Position of the block behind which it runs; −1 before all.
        again: What `head` and `finish` compute again, in the graph's order: a reused step has no
            `condition`, and `head` runs before it.
    """

    name: str
    runs: Runs
    nodes: list[fx.Node]
    behind: int = -1
    again: Sequence[fx.Node] = ()


@dataclass(frozen=True)
class Partition:
    """Where every node goes.

    Attributes:
        regions: Outside blocks; in the order of `MOMENTS`, then `head`, `condition`, bridges, `finish`.
        blocks: One per template: a segment's moment → positions of its nodes among an instance's.
        live: Nodes that the results need.
    """

    regions: list[Region]
    blocks: list[dict[Runs, list[int]]]
    live: set[fx.Node]


def partition(
    trace: Trace,
    instances: Sequence[Instance],
    templates: Sequence[Template],
    classes: Classes,
) -> Partition:
    """Divide a traced graph."""
    owner = {node: k for k, i in enumerate(instances) for node in i.nodes}
    live = _live(trace, instances, owner)
    place = _places(trace, owner, live, classes)
    slots = {node for i in instances for node in i.slots}
    _join_bridges(trace, place, live)
    _bring_home(trace, place, classes, kept=slots | set(trace.results))
    again = {name: _computed_again(trace, name, place, classes) for name in ("head", "finish")}
    _leave_out(place, {n for nodes in again.values() for n in nodes}, kept=slots)
    regions: dict[Place, Region] = {}
    for node in trace.graph.nodes:
        if node in place:
            _, name, behind, runs = place[node]
            region = regions.setdefault(place[node], Region(name, runs, [], behind))
            region.nodes.append(node)
    for region in regions.values():
        region.again = again.get(region.name, ())
    return Partition(
        [region for _, region in sorted(regions.items(), key=lambda item: item[0])],
        [_block_parts(t.instances[0], classes) for t in templates],
        live,
    )


Place = tuple[int, str, int, Runs]
"""Rank, name, the block it is behind, and when it runs."""


def _live(trace: Trace, instances: Sequence[Instance], owner: dict[fx.Node, int]) -> set[fx.Node]:
    """Return what the results need; of a block that is needed, all that it reads."""
    return needed(trace, lambda node: instances[owner[node]].slots if node in owner else ())


def _places(
    trace: Trace, owner: dict[fx.Node, int], live: set[fx.Node], classes: Classes
) -> dict[fx.Node, Place]:
    """Send each node outside blocks to its segment."""
    ahead, behind = _blocks_ahead(trace, owner), _blocks_behind(trace, owner)
    ranks = {name: rank for rank, name in enumerate(MOMENTS)}
    place: dict[fx.Node, Place] = {}
    for node in trace.graph.nodes:
        if not is_operation(node) or node not in live or node in owner:
            continue
        runs = classes.runs(node)
        if runs == "constant":
            continue  # each segment that reads it computes it
        if node.target is operator.getitem and node.args[0] in place:
            place[node] = place[node.args[0]]  # a tuple never crosses a border
        elif runs != "step":
            name, moment = MOMENTS[runs]
            place[node] = (ranks[runs], name, -1, moment)
        elif behind[node] < 0:
            place[node] = (len(ranks) + 3, "finish", max(owner.values(), default=-1), "step")
        elif ahead[node] >= 0:
            block = ahead[node]
            place[node] = (len(ranks) + 2, f"bridge_{block}", block, "block")
        elif "step" not in classes.of[node].on:
            place[node] = (len(ranks) + 1, "condition", -1, "block")
        else:
            place[node] = (len(ranks), "head", -1, "step")
    return place


def _join_bridges(trace: Trace, place: dict[fx.Node, Place], live: set[fx.Node]) -> None:
    """Compute what one later bridge alone reads in that bridge: a hint's scale where it is added."""
    for node in reversed(trace.graph.nodes):
        if node not in place or not place[node][1].startswith("bridge_"):
            continue
        readers = {place.get(user) for user in node.users if user in live or user.op == "output"}
        home = next(iter(readers)) if len(readers) == 1 else None
        is_part = node.target is operator.getitem  # a tuple never crosses a border
        if home is not None and home[1].startswith("bridge_") and not is_part:
            place[node] = home


def _computed_again(
    trace: Trace, region: str, place: dict[fx.Node, Place], classes: Classes
) -> list[fx.Node]:
    """Return what a region needs of `condition` that sees no latents."""
    found: set[fx.Node] = set()
    waiting = [node for node, (_, name, *_) in place.items() if name == region]
    while waiting:
        for node in tensors_read(waiting.pop()):
            is_condition = node in place and place[node][1] == "condition"
            if is_condition and node not in found and "step" not in classes.of[node].on:
                found.add(node)
                waiting.append(node)
    return [node for node in trace.graph.nodes if node in found]


def _leave_out(place: dict[fx.Node, Place], again: set[fx.Node], kept: set[fx.Node]) -> None:
    """Leave out of `condition` what nobody needs but those that compute it again."""
    for node in reversed(list(place)):
        readers = {place[user][1] for user in node.users if user in place}
        if node in again and node not in kept and readers <= {"head", "finish"}:
            del place[node]


def _blocks_ahead(trace: Trace, owner: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """Return the last block that each node depends on; −1 for none."""
    ahead: dict[fx.Node, int] = {}
    for node in trace.graph.nodes:
        if is_operation(node):
            ahead[node] = max(
                [owner.get(node, -1), *(ahead.get(read, -1) for read in tensors_read(node))]
            )
    return ahead


def _blocks_behind(trace: Trace, owner: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """Return the last block that needs each node; −1 for none."""
    behind: dict[fx.Node, int] = {}
    for node in reversed(trace.graph.nodes):
        if is_operation(node):
            users = [u for u in node.users if is_operation(u) and u not in owner]
            blocks = [owner[u] for u in node.users if u in owner and owner[u] != owner.get(node)]
            behind[node] = max([-1, *blocks, *(behind[u] for u in users)])
    return behind


def _bring_home(
    trace: Trace, place: dict[fx.Node, Place], classes: Classes, *, kept: set[fx.Node]
) -> None:
    """Compute what depends on sizes alone where its readers are, if those can know the sizes.

    A tensor of the batch's size belongs to the timestep's table, whose batch is all steps; one that
    the prompt alone reads, to `prompt`.
    """
    for node in reversed(trace.graph.nodes):
        if node not in place or place[node][1] != "rotary" or node in kept:
            continue
        readers = {place.get(user) for user in node.users if is_operation(user)}
        home = next(iter(readers)) if len(readers) == 1 else None
        known = home is not None and classes.of[node].sizes <= classes.batch
        if home is not None and (home[1] == "prompt" or (home[1] == "timestep" and known)):
            place[node] = home


def _block_parts(instance: Instance, classes: Classes) -> dict[Runs, list[int]]:
    """Divide a block: what it makes once per prompt, what once per run, and all else."""
    context = _context(instance, classes)
    tabulated = _modulation(instance, classes) - context
    parts: dict[Runs, list[int]] = {"context": [], "modulation": [], "block": []}
    for i, node in enumerate(instance.nodes):
        runs: Runs = "block"
        if node in context or node in tabulated:
            runs = "context" if node in context else "modulation"
        parts[runs].append(i)
    return {runs: positions for runs, positions in parts.items() if positions}


def _context(instance: Instance, classes: Classes) -> set[fx.Node]:
    """Return what a block computes of the prompt alone, behind products, and what that needs."""
    own = {n for n in instance.nodes if classes.runs(n) == "prompt"}
    behind_product: set[fx.Node] = set()
    for node in instance.nodes:
        reads = operation(node) in PRODUCTS or not behind_product.isdisjoint(tensors_read(node))
        if node in own and reads:
            behind_product.add(node)
    rest = instance.index.keys() - own
    wanted = _needed(instance, {n for n in behind_product if not rest.isdisjoint(n.users)})
    return wanted | {n for n in own if n.target is operator.getitem and n.args[0] in wanted}


def _modulation(instance: Instance, classes: Classes) -> set[fx.Node]:
    """Return products of vectors that see the timestep, and what they need of the block's own.

    What is made of the last product is cheap, and would be more tables than the product is.
    """
    own = [n for n in instance.nodes if n in classes.conditioning]
    return _needed(instance, {n for n in own if operation(n) in PRODUCTS})


def _needed(instance: Instance, wanted: Collection[fx.Node]) -> set[fx.Node]:
    """Return nodes of a block, with those of its own that they depend on."""
    found: set[fx.Node] = set()
    waiting = list(wanted)
    while waiting:
        node = waiting.pop()
        if node in instance.index and node not in found:
            found.add(node)
            waiting += tensors_read(node)
    return found
