# SPDX-License-Identifier: Apache-2.0
"""Cut a block at its attentions over tokens that ranks share out: before, attention, after.

Between two of those parts, all tokens of some heads take the place of some tokens of all heads
(Jacobs et al. 2023, DeepSpeed Ulysses, arXiv 2309.14509). Attention whose keys no token of a rank made,
that to a prompt, is left whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...core.dtypes import Precision
from ...core.errors import ExportError
from ...core.tensor_spec import TensorSpec
from ..cut.declared import Segment
from ..cut.names import fresh_name
from ..cut.words import operation
from .evaluate import ATTENTION, Extents
from .local import HINT, LOCAL, Tokens, check_tokens_apart, order_of_parts, part_of_rank
from .pieces import copied

__all__ = ["Attended", "CutBlock", "attention_segment", "cut_block"]

OPERANDS = ("query", "key", "value")


class Attended(nn.Module):
    """Attention of which every head of every batch element is a row, as it is of its own.

    Query, key and value are [rows, 1, tokens, size], heads before batch elements; a mask is
    [batch or 1, 1, queries or 1, keys].
    """

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return [rows, 1, queries, size]."""
        if mask is not None:
            heads = query.shape[0] // mask.shape[0]
            mask = mask.unsqueeze(0).expand(heads, *mask.shape).flatten(0, 1)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=self.scale
        )


@dataclass(frozen=True)
class CutAttention:
    """One attention that a block is cut at.

    Attributes:
        scale: Of its scores; None is the usual one.
        precision: Of its graph.
        query: [heads, batch, tokens, size] of its operands, as a rank gives them.
        mask: What masks its keys, by the name among the block's inputs and its parts' results.
        mask_spec: Of that.
    """

    scale: float | None
    precision: Precision
    query: TensorSpec
    mask: str | None = None
    mask_spec: TensorSpec | None = None


@dataclass(frozen=True)
class CutBlock:
    """A block's parts.

    Attributes:
        parts: One more than attentions; the block itself where there is none.
        attentions: Between one part and the next.
        shared: Inputs of which a rank has a part → the streams' dimensions, in order.
    """

    parts: Sequence[Segment]
    attentions: Sequence[CutAttention]
    shared: Mapping[str, Sequence[str]] = field(default_factory=dict)


def cut_block(segment: Segment, streams: Mapping[str, str], tokens: Tokens) -> CutBlock:
    """Cut a block's graph.

    Args:
        segment: The block's.
        streams: Input that is a stream of tokens → its dimension.
        tokens: What is shared out.

    Raises:
        ExportError: tokens meet outside attention, or an attention is of a kind that can't be cut.
    """
    return _Cutter(segment, streams, tokens).cut()


class _Cutter:
    def __init__(self, segment: Segment, streams: Mapping[str, str], tokens: Tokens) -> None:
        self.segment, self.streams, self.tokens = segment, streams, tokens
        module: Any = segment.module
        self.module: fx.GraphModule = module
        self.nodes = list(self.module.graph.nodes)
        arguments = (n for n in self.nodes if n.op == "placeholder")
        self.argument = dict(zip(arguments, segment.inputs, strict=True))
        (output,) = (n for n in self.nodes if n.op == "output")
        results: Any = output.args[0]
        self.results: dict[str, fx.Node] = dict(zip(segment.outputs, results, strict=True))
        seen = self._see_streams()
        self.attentions = [
            n for n in self.nodes if is_attention(n) and not seen.isdisjoint(operands_of(n)[1:])
        ]

    def cut(self) -> CutBlock:
        """Cut the block."""
        taken, self.extents = part_of_rank(
            self.segment.name,
            self.module,
            self.segment.inputs,
            self.streams,
            self.tokens,
            self._fits,
        )
        self.place = self._places()
        self.names: dict[fx.Node, str] = dict(self.argument)
        self.specs: dict[str, TensorSpec] = dict(taken)
        self.turned: list[str] = []
        self.returned: list[dict[str, fx.Node]] = [{} for _ in range(len(self.attentions) + 1)]
        attentions = [self._attention(i, node) for i, node in enumerate(self.attentions)]
        self._name_results()
        self._name_carried()
        parts, order = self._parts()
        shared = {n: s for n, s in taken.items() if s != self.segment.inputs[n]}
        return CutBlock(
            parts, attentions, {n: self._streams_in(s, order) for n, s in shared.items()}
        )

    def _see_streams(self) -> set[fx.Node]:
        """Return the nodes that are computed of a stream."""
        seen = {n for n, name in self.argument.items() if name in self.streams}
        for node in self.nodes:
            if not seen.isdisjoint(node.all_input_nodes) and operation_name(node) != "sym_size":
                seen.add(node)
        return seen

    def _fits(self, found: Extents) -> bool:
        """Say whether streams come out as they went in, and masks are of the tokens that keys have."""
        for name, node in self.results.items():
            stream = name.removesuffix("_out")
            if stream in self.streams and name.endswith("_out"):
                wanted = self.tokens.local(self.segment.inputs[stream])
                if found.spec(node).shape != wanted.shape:
                    return False
        return all(self._fits_mask(node, found) for node in self.attentions)

    def _fits_mask(self, attention: fx.Node, found: Extents) -> bool:
        """Say whether a mask is a rank's, or a whole one of a sequence that lies as the model's does."""
        mask = mask_of(attention)
        if mask is None:
            return True
        keys = str(found.spec(operands_of(attention)[1]).shape[-2])
        masked = str(found.spec(mask).shape[-1])
        is_whole = f"{LOCAL}{masked}" == keys and masked in self.tokens.plain
        return masked == keys or (is_whole and mask in self.argument)

    def _streams_in(self, spec: TensorSpec, order: Sequence[str]) -> list[str]:
        axis = next(i for i, d in enumerate(spec.shape) if str(d).startswith(LOCAL))
        dim = str(spec.shape[axis]).removeprefix(LOCAL)
        return (
            [d for d in order if d in self.tokens.sums[dim]] if dim in self.tokens.sums else [dim]
        )

    def _name_results(self) -> None:
        last = len(self.attentions)
        for name, node in self.results.items():
            self.returned[self.place.get(node, last)][name] = node
            self.specs[name] = self.extents.spec(node)

    def _name_carried(self) -> None:
        """Let each part return what a later one reads."""
        for node, own in self.place.items():
            if node in self.attentions or all(self.place.get(u, own) == own for u in node.users):
                continue
            made = {n: name for name, n in self.returned[own].items() if name not in self.turned}
            name = made.get(node) or fresh_name(node.name, {*self.names.values(), *self.specs})
            self.names[node] = name
            self.returned[own][name], self.specs[name] = node, self.extents.spec(node)

    def _parts(self) -> tuple[list[Segment], list[str]]:
        """Make the parts' graphs; return them, and the order of streams in a sequence of several."""
        parts, order, is_ordered = [], list(self.tokens.plain), False
        for i, returned in enumerate(self.returned):
            nodes = self._nodes_of(i)
            read = {r for n in nodes for r in n.all_input_nodes} | set(returned.values())
            given = {
                self.names[n]: n
                for n in self.nodes
                if n in read and n in self.names and self.place.get(n) != i
            }
            name = f"{self.segment.name}.part_{i + 1}" if self.attentions else self.segment.name
            module = copied(
                self.module, nodes, given, returned, name.replace(".", "_"), turned=self.turned
            )
            inputs, outputs = ({n: self.specs[n] for n in part} for part in (given, returned))
            joint = [
                (j, s)
                for j, s in enumerate(outputs.values())
                if not self.tokens.local_sums.keys().isdisjoint(map(str, s.shape))
            ]
            if joint and not is_ordered:
                found = order_of_parts(name, module, inputs, joint[0], self.tokens)
                order, is_ordered = [*found, *(d for d in order if d not in found)], True
            check_tokens_apart(name, module, inputs, outputs, self.tokens, order)
            dropped = tuple(n for n in self.segment.dropped if n in outputs)
            parts.append(
                replace(
                    self.segment,
                    name=name,
                    runs="part",
                    module=module,
                    inputs=inputs,
                    outputs=outputs,
                    dropped=dropped,
                )
            )
        return parts, order

    def _attention(self, i: int, node: fx.Node) -> CutAttention:
        """Have an attention's operands returned, name its result, and describe it."""
        for operand, read in zip(OPERANDS, operands_of(node), strict=True):
            name = f"{operand}_{i + 1}"
            self.returned[i][name] = read
            self.specs[name] = _heads_first(self.extents.spec(read))
            self.turned.append(name)
        self.names[node] = attended = f"attended_{i + 1}"
        self.specs[attended] = _heads_first(self.extents.spec(node))
        self.turned.append(attended)
        query, key = (self.specs[f"{n}_{i + 1}"] for n in ("query", "key"))
        mask, others = mask_of(node), dict[str, Any](node.kwargs)
        others |= {str(place): given for place, given in enumerate(node.args[4:], 4)}
        scale = others.pop("scale", None)
        odd = [f"{n} = {v}" for n, v in others.items() if v]
        if query.shape[0] != key.shape[0] or not isinstance(query.shape[0], int):
            odd.append(f"{query.shape[0]} heads of queries and {key.shape[0]} of keys")
        spec = None if mask is None else self.extents.spec(mask)
        if spec is not None and not self._can_share(spec, query, in_argument=mask in self.argument):
            odd.append(f"a mask {list(spec.shape)}")
        if odd:
            where = f"graph '{self.segment.name}', attention {i + 1}"
            raise ExportError(where, f"can't be shared out by heads: {', '.join(odd)}", HINT)
        low: Any = query.dtype
        if mask is None:
            return CutAttention(scale, low, query)
        name = self.argument.get(mask, f"mask_{i + 1}")
        if mask not in self.argument:
            self.returned[i][name], self.specs[name] = mask, self.extents.spec(mask)
        return CutAttention(scale, low, query, name, spec)

    def _can_share(self, mask: TensorSpec, query: TensorSpec, *, in_argument: bool) -> bool:
        """Say whether a mask is of keys alone, or a given one of all queries and keys of a stream."""
        if len(mask.shape) != 4 or mask.shape[1] != 1:
            return False
        rows = mask.shape[2]
        return rows == 1 or (in_argument and query.shape[2] == f"{LOCAL}{rows}")

    def _places(self) -> dict[fx.Node, int]:
        """Return the part that computes each value: the last before all that reads it."""
        place: dict[fx.Node, int] = {}
        for node in reversed(self.nodes):
            if node in self.attentions:
                place[node] = self.attentions.index(node)
            elif node.op == "call_function" and node not in self.extents.numbers:
                readers = [place[user] for user in node.users if user in place]
                place[node] = min(readers, default=len(self.attentions))
        for node in self.nodes:  # a tuple never crosses a border
            if operation_name(node) == "getitem" and node in place:
                place[node] = place[node.all_input_nodes[0]]
        return {node: place[node] for node in self.nodes if node in place}

    def _nodes_of(self, i: int) -> list[fx.Node]:
        """Return the nodes of a part, in order, with the sizes that they read."""
        found = {n for n, own in self.place.items() if own == i and n not in self.attentions}
        waiting = list(found)
        while waiting:
            for read in waiting.pop().all_input_nodes:
                if read in self.extents.numbers and read not in found:
                    found.add(read)
                    waiting.append(read)
        return [n for n in self.nodes if n in found]


def is_attention(node: fx.Node) -> bool:
    """Say whether a node is an attention."""
    return operation_name(node) == ATTENTION


def operands_of(attention: fx.Node) -> list[fx.Node]:
    """Return query, key and value."""
    operands: Any = attention.args[:3]
    return list(operands)


def mask_of(attention: fx.Node) -> fx.Node | None:
    """Return what masks an attention's keys."""
    mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
    return mask if isinstance(mask, fx.Node) else None


def operation_name(node: fx.Node) -> str:
    """Return an operation's name; empty for arguments, weights and results."""
    return operation(node) if node.op == "call_function" else ""


def _heads_first(spec: TensorSpec) -> TensorSpec:
    batch, heads, *rest = spec.shape
    return replace(spec, shape=(heads, batch, *rest))


def attention_segment(name: str, attention: CutAttention) -> Segment:
    """Return the graph of an attention with some heads of all tokens."""
    size, dtype = attention.query.shape[-1], attention.query.dtype
    inputs = {
        operand: TensorSpec(dtype, ("attention_rows", 1, tokens, size))
        for operand, tokens in zip(
            OPERANDS, ("attention_queries", "attention_keys", "attention_keys"), strict=True
        )
    }
    if attention.mask_spec is not None:
        batch, _, rows, _ = attention.mask_spec.shape
        shape = (batch, 1, 1 if rows == 1 else "attention_queries", "attention_keys")
        inputs["mask"] = TensorSpec(attention.mask_spec.dtype, shape)
    outputs = {"attended": replace(inputs["query"])}
    return Segment(
        name, "attention", Attended(attention.scale), inputs, outputs, precision=attention.precision
    )
