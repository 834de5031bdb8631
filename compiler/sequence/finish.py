# SPDX-License-Identifier: Apache-2.0
"""Cut `finish` where its tokens' rows become the model's output: a rank computes its rows alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from ...bundle.dims import all_dims, divisor
from ...bundle.streams import HIDDEN, MODEL_OUTPUT
from ...core.errors import ExportError
from ..cut.declared import Cut, Segment
from .evaluate import PRIMES, Extents, measure
from .local import HINT, Tokens, check_tokens_apart, part_of_rank
from .pieces import copied

__all__ = ["ROWS", "cut_finish"]

ROWS = "rows"
"""Result of the graph of a rank's rows, and input of the graph that joins them."""

BODY = f"{HIDDEN}_out"


def cut_finish(cut: Cut, tokens: Tokens) -> tuple[list[Segment], dict[str, list[str]]]:
    """Cut ``finish`` in two.

    Args:
        cut: The model, cut.
        tokens: What is shared out.

    Returns:
        ``finish.rows``, and ``finish.joined`` unless rows are the output; inputs of the first of
        which a rank has a part.

    Raises:
        ExportError: tokens meet before they are rows.
    """
    finish = next(s for s in cut.segments if s.name == "finish")
    module: Any = finish.module
    nodes: list[fx.Node] = list(module.graph.nodes)
    names = dict(zip((n for n in nodes if n.op == "placeholder"), finish.inputs, strict=True))
    (output,) = (n for n in nodes if n.op == "output")
    results: Any = output.args[0]
    extents = measure(module, finish.inputs, _sizes(cut))
    last = _last_rows(nodes, names, extents, str(finish.inputs[BODY].shape[1]))
    spec = extents.spec(last)
    behind_body = _needed(nodes, [last])
    given = {name: n for n, name in names.items() if n in behind_body}
    own = [n for n in nodes if n in behind_body and n.op == "call_function"]
    rows = copied(module, own, given, {ROWS: last}, "finish_rows")
    inputs = {n: finish.inputs[n] for n in given}
    taken, _ = part_of_rank("finish.rows", rows, inputs, [BODY], tokens, lambda found: True)
    made = {ROWS: tokens.local(spec)}
    order = list(tokens.plain)
    check_tokens_apart("finish.rows", rows, taken, made, tokens, order)
    first = replace(
        finish, name="finish.rows", runs="part", module=rows, inputs=taken, outputs=made
    )
    shared = {n: [str(s.shape[1])] for n, s in inputs.items() if taken[n] != s}
    if last is results[0]:
        return [first], shared
    inside = _needed(nodes, results) - behind_body
    inside |= _needed(nodes, [n for n in behind_body & extents.numbers if inside & set(n.users)])
    readers = [n for n in inside if n.op == "call_function"]
    read = {r for n in readers for r in n.all_input_nodes}
    body = next(n for n, name in names.items() if name == BODY)
    of_body = [n for n in readers if body in n.all_input_nodes]
    if not all(n in extents.numbers and n.args[1] in (0, 1) for n in of_body):
        raise ExportError("graph 'finish'", "needs the body's result behind its rows", HINT)
    given = {ROWS: last, **{name: n for n, name in names.items() if n in read and n is not body}}
    own = [n for n in nodes if n in readers and n is not last]
    joined = copied(
        module, own, given, {MODEL_OUTPUT: results[0]}, "finish_joined", measured={body: ROWS}
    )
    second = replace(
        finish,
        name="finish.joined",
        runs="part",
        module=joined,
        inputs={ROWS: spec, **{n: finish.inputs[n] for n in given if n != ROWS}},
    )
    return [first, second], shared


def _last_rows(
    nodes: Sequence[fx.Node], names: dict[fx.Node, str], extents: Extents, tokens: str
) -> fx.Node:
    """Return the last value of the body's that has an axis of tokens."""
    seen = {n for n, name in names.items() if name == BODY}
    found = None
    for node in nodes:
        if node in seen or seen.isdisjoint(node.all_input_nodes) or node in extents.numbers:
            continue
        seen.add(node)
        pairs = zip(*extents.shapes.get(node, ((), ())), strict=True)
        found = node if extents.sizes[tokens] in list(pairs) else found
    if found is None:
        raise ExportError("graph 'finish'", "has no rows of tokens", HINT)
    return found


def _sizes(cut: Cut) -> dict[str, tuple[int, int]]:
    """Return two sizes of every dimension that agree with each other."""
    finish = next(s for s in cut.segments if s.name == "finish")
    dims = [d for s in finish.inputs.values() for d in s.shape if isinstance(d, str)]
    dims += [d for factors in cut.dims.values() for d, _ in factors]
    plain = [d for d in dict.fromkeys(["batch", *dims]) if d not in cut.dims and d not in cut.sums]
    one, other = (
        all_dims(
            cut.dims, cut.sums, {d: primes[i] * divisor(cut.dims, d) for i, d in enumerate(plain)}
        )
        for primes in PRIMES
    )
    return {d: (one[d], other[d]) for d in one}


def _needed(nodes: Sequence[fx.Node], wanted: Collection[fx.Node]) -> set[fx.Node]:
    """Return nodes with all that they are computed of."""
    found = set(wanted)
    for node in reversed(nodes):
        if node in found:
            found.update(node.all_input_nodes)
    return found
