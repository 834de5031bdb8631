# SPDX-License-Identifier: Apache-2.0
"""A model whose sequence several ranks share: the interface of `Model`, with a rank's buffers.

A session, its bodies and its caches run over it as over any model; they hold this rank's tokens. What
differs is how some graphs are bound: a block as its parts with exchanges between, `finish` as rows
that are gathered, a decision by sums that are added over ranks (docs/adr/0005).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...bundle.dims import derive_dims, shape_of
from ...bundle.manifest import IoEntry, PartEntry
from ...bundle.reader import Bundle
from ...bundle.streams import MODEL_OUTPUT
from ...core.errors import ConfigError, RankError, RequestError
from ...engines.base import BoundCall
from ...policies.decision_loop import DecisionRecord
from ..model import DeviceOptions, Model
from ..resolved_setting import ResolvedSetting
from .counts import ExchangeCounts
from .exchange import Exchange, InOrder, Place, Then
from .formula import FORMULA, sent_bytes
from .ranks import FRAME_BYTES, Ranks
from .shares import FEATURE, LOCAL, Share, local_manifest, side_by_side, whole_dims

__all__ = ["SharedModel"]

FLOAT_BYTES = 8

Made = TypeVar("Made")


class SharedModel(Model):
    """One rank's part of a model.

    Attributes:
        manifest: As this rank sees it.
        whole: As the bundle has it.
        counts: Bytes that this rank sent in the current or last run.
    """

    runs_alone = False

    def __init__(
        self,
        bundle: Bundle,
        backend: str | None = None,
        options: DeviceOptions | None = None,
        expert: int = 0,
        *,
        ranks: Ranks,
    ) -> None:
        """Choose the backend, and this rank's part.

        Args:
            bundle: An open bundle.
            backend: As of `Model`.
            options: As of `Model`.
            expert: As of `Model`.
            ranks: Those that share the sequence.

        Raises:
            BackendUnavailable: as of `Model`.
            RequestError: the bundle was not built for this, it has fewer heads than there are ranks,
                or an option is for one process.
        """
        super().__init__(bundle, backend, options, expert)
        self.whole, self.ranks = bundle.manifest, ranks
        if self.whole.sequence is None:
            raise RequestError(
                f"bundle '{bundle.folder}'",
                "has no graphs for ranks that share a sequence",
                "build it again with --sequence-parallel",
            )
        for option in ("offload", "cuda_graphs"):
            if getattr(self.options, option):
                raise RequestError(
                    f"--{option.replace('_', '-')}",
                    "is for one process, and ranks share a sequence",
                    "leave it out",
                )
        self.entry = self.whole.sequence
        self.share = Share(ranks.rank, ranks.size, self.entry)
        fewest = min(self._heads(), default=ranks.size)
        if fewest < ranks.size:
            raise RequestError(
                f"{ranks.size} ranks",
                f"are more than the {fewest} heads of an attention",
                f"let {fewest} or fewer share a sequence",
            )
        self.manifest = local_manifest(self.whole, self.share)
        self.counts = ExchangeCounts()
        self._kept: dict[tuple[Any, ...], Any] = {}
        self._dims: dict[str, int] = {}

    def dims_of(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return all sizes that follow from some, those of this rank's parts among them.

        Raises:
            RequestError: they don't fit the model, or a rank would have no token.
        """
        dims = derive_dims(self.whole, sizes)
        return dims | self.share.local_dims(dims)

    def decide_graph(self, resolved: ResolvedSetting) -> str:
        """Return the graph that decides: by sums that are added over ranks, where it looks at tokens.

        Raises:
            ConfigError: the policy looks at tokens otherwise than by sums.
        """
        if not self._looks_at_tokens(resolved):
            return resolved.policy.graph
        policy = resolved.policy.spec.name
        if policy not in self.entry.policies:
            raise ConfigError(
                f"policy '{policy}'",
                "looks at tokens otherwise than by sums over all of them, which "
                f"{self.ranks.size} ranks share",
                "choose another policy or signal",
            )
        return self.entry.policies[policy][1]

    def agree(self, branch: str, step_index: int, decision: DecisionRecord) -> None:
        """Hold this rank's decision against the others'.

        Raises:
            RankError: they differ, or the ranks run different steps.
        """
        mix = [float(f"{factor:.5g}") for factor in decision.mix]
        own = {"branch": branch, "step": step_index, "computes": decision.compute, "mix": mix}
        notes = self.ranks.tell(own, f"comparing decisions of step {step_index}")
        self.counts.decided(computes=decision.compute)
        self.counts.note_bytes += FRAME_BYTES * (self.ranks.size - 1)
        for member, note in zip(self.ranks.members, notes, strict=True):
            odd = [f"{n} is {note[n]}, not {notes[0][n]}" for n in own if note[n] != notes[0][n]]
            if odd:
                raise RankError(
                    f"rank {member}, branch '{note['branch']}', step {note['step']}",
                    f"decided otherwise than rank {self.ranks.members[0]}: {'; '.join(odd)}",
                    "make the same calls on every rank; if you do, report this with the policy",
                )
        if not self.counts.formula:
            self.counts.formula = FORMULA
            sent = sent_bytes(self.whole, self.share, self._dims)
            self.counts.formula_bytes, self.counts.formula_bytes_reused = sent

    def bind(self, graph: str, values: Mapping[str, Tensor], block: int = 0) -> BoundCall:
        """Bind a graph to this rank's buffers; see `Model.bind`."""
        if graph in self.entry.blocks:
            return self._bind_block(graph, values, block)
        if graph == "finish":
            return self._bind_finish(values)
        if graph == "gram":
            return self._bind_gram(values)
        measured = {decide: measure for measure, decide in self.entry.policies.values()}
        if graph in measured:
            return self._bind_decision(measured[graph], graph, values)
        entry = self.manifest.graphs[graph]
        if entry.runs in ("shape", "prompt", "step") and entry.outputs.keys() & self.entry.shared:
            return self._bind_whole(graph, values)
        return super().bind(graph, values, block)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of buffers between parts, and of what other ranks' tokens are gathered in."""
        return sum(t.nbytes for t in self._kept.values() if isinstance(t, Tensor))

    def _bind_whole(self, graph: str, values: Mapping[str, Tensor]) -> BoundCall:
        """Bind a graph that makes all tokens' values, of which this rank takes its part."""
        dims, made, pairs = whole_dims(self.whole, values), dict[str, Tensor](), []
        for name, io in self.whole.graphs[graph].outputs.items():
            local = self.manifest.graphs[graph].outputs[name]
            if local != io:
                made[name] = self._buffer((graph, name), io, dims)
                axis = next(i for i, dim in enumerate(local.shape) if dim != io.shape[i])
                parts = self.share.parts(self.entry.shared[name], dims)
                pairs += _narrowed(made[name], values[name], axis, parts)

        def take() -> None:
            for whole, own in pairs:
                own.copy_(whole)

        return InOrder([super().bind(graph, {**values, **made}), Then(take)])

    def _bind_block(self, graph: str, values: Mapping[str, Tensor], block: int) -> BoundCall:
        """Bind a block's parts, and the exchanges around its attentions."""
        self._dims = dims = self._all_dims(values)
        calls: list[BoundCall] = []
        held, made = dict(values), dict[str, IoEntry]()
        for place, part in enumerate(self.entry.blocks[graph]):
            entry = self.whole.graphs[part.graph]
            if entry.runs == "attention":
                calls += self._attention(place // 2 + 1, part, made, held)
                continue
            made |= entry.outputs
            for name, io in entry.outputs.items():
                if name not in values or (name == FEATURE and self.ranks.size > 1):
                    held[name] = self._buffer((part.graph, name), io, dims)
            calls.append(super().bind(part.graph, held, block))
            if FEATURE in entry.outputs and held[FEATURE] is not values[FEATURE]:
                places = self._places(entry.outputs[FEATURE].shape[1])
                calls.append(self._by_channels(held[FEATURE], values[FEATURE], places))
        return InOrder(calls)

    def _attention(
        self, number: int, part: PartEntry, made: Mapping[str, IoEntry], held: dict[str, Tensor]
    ) -> Sequence[BoundCall]:
        """Bind an attention with this rank's heads; ``held`` has its operands, and gets its result.

        All blocks of one template have the same buffers, and so the same calls.
        """
        own = {n: held[f"{n}_{number}"] for n in ("query", "key", "value")}
        tokens = {n: self._places(made[f"{n}_{number}"].shape[2]) for n in own}
        mask = None if part.mask is None else held[part.mask]
        key = [t.data_ptr() for t in (*own.values(), *(() if mask is None else (mask,)))]
        calls, held[f"attended_{number}"] = self._once(
            (part.graph, *key, *map(str, tokens.values())),
            lambda: self._bound_attention(part.graph, own, tokens, mask),
        )
        return calls

    def _bound_attention(
        self,
        graph: str,
        own: Mapping[str, Tensor],
        tokens: Mapping[str, Sequence[Place]],
        mask: Tensor | None,
    ) -> tuple[list[BoundCall], Tensor]:
        attended = torch.empty_like(own["query"])
        masks = {} if mask is None else {"mask": mask}
        if self.ranks.size == 1:
            return [super().bind(graph, _in_rows({**own, "attended": attended}) | masks)], attended
        heads = self.share.places(own["query"].shape[0])
        first, end = heads[self.ranks.rank]
        into = Exchange(self.ranks, "sharing an attention's heads out", self.counts.add)
        back = Exchange(self.ranks, "bringing an attention's heads together", self.counts.add)
        whole: dict[str, Tensor] = {}
        for name, part in own.items():
            shape = (end - first, part.shape[1], tokens[name][-1][1], part.shape[3])
            whole[name] = self._scratch(name, shape, part)
            into.turn(part, whole[name], (0, heads), (2, tokens[name]))
        if mask is not None and mask.shape[-1] == own["key"].shape[2]:  # of this rank's tokens
            whole["mask"] = self._scratch("mask", (*mask.shape[:-1], tokens["key"][-1][1]), mask)
            into.gather(mask, whole["mask"], mask.ndim - 1, tokens["key"])
        masks |= {n: whole.pop(n) for n in list(whole) if n in masks}
        whole["attended"] = self._scratch("attended", tuple(whole["query"].shape), attended)
        back.turn(whole["attended"], attended, (2, tokens["query"]), (0, heads))
        return [into, super().bind(graph, _in_rows(whole) | masks), back], attended

    def _by_channels(self, part: Tensor, taken: Tensor, tokens: Sequence[Place]) -> BoundCall:
        """Return the exchange by which a feature is shared out by channels, its tokens all there."""
        turned = Exchange(self.ranks, "sharing a feature's channels out", self.counts.add)
        turned.turn(part, taken, (2, self.share.places(part.shape[2])), (1, tokens))
        return turned

    def _bind_finish(self, values: Mapping[str, Tensor]) -> BoundCall:
        """Bind what is behind the blocks: this rank's rows, all ranks' rows, the output of them."""
        dims = self._all_dims(values)
        entry = self.whole.graphs[self.entry.rows]
        ((name, io),) = entry.outputs.items()
        own = self._buffer((self.entry.rows, name), io, dims)
        axis = next(i for i, dim in enumerate(io.shape) if str(dim).startswith(LOCAL))
        places = side_by_side(self.share.counts(str(io.shape[axis]).removeprefix(LOCAL), dims))
        shape = [*own.shape[:axis], places[-1][1], *own.shape[axis + 1 :]]
        whole = values[MODEL_OUTPUT]
        if self.entry.joined is not None:
            whole = self._scratch("rows", tuple(shape), own)
        gathered = Exchange(self.ranks, "gathering the model's output", self.counts.end_step)
        gathered.gather(own, whole, axis, places)
        calls = [super().bind(self.entry.rows, {**values, name: own}), gathered]
        if self.entry.joined is not None:
            calls.append(super().bind(self.entry.joined, {**values, name: whole}))
        return InOrder(calls)

    def _bind_gram(self, values: Mapping[str, Tensor]) -> BoundCall:
        """Bind the inner products of residuals, of which each rank has the tokens' that are its."""
        gram, count = values["gram"], values["history"][0].numel()
        own = torch.zeros_like(gram)

        def join() -> None:
            joined = self._joined({"mean": own.flatten().tolist()}, count)
            gram.copy_(torch.tensor(joined["mean"]).view(gram.shape))

        return InOrder([super().bind("gram", {**values, "gram": own}), Then(join)])

    def _bind_decision(self, measure: str, decide: str, values: Mapping[str, Tensor]) -> BoundCall:
        """Bind a policy's graphs: this rank's sums, all ranks' sums, the decision by them."""
        entry = self.whole.graphs[measure]
        tokens = [n for n, io in entry.inputs.items() if any(isinstance(d, str) for d in io.shape)]
        count = values[tokens[0]].numel()
        sums = {
            n: torch.zeros([int(d) for d in io.shape], device=self.device)
            for n, io in entry.outputs.items()
        }

        def join() -> None:
            found = {n: [float(t)] for n, t in sums.items()}
            for name, (value,) in self._joined(found, count).items():
                sums[name].fill_(value)

        calls = [super().bind(measure, {**values, **sums}), Then(join)]
        return InOrder([*calls, super().bind(decide, {**values, **sums})])

    def _joined(self, own: Mapping[str, Sequence[float]], count: int) -> dict[str, list[float]]:
        """Return sums of all ranks' sums, and means of their means by how many elements each has.

        Every rank adds the same numbers in the same order.

        Args:
            own: Name, which begins with ``sum`` or ``mean`` → this rank's.
            count: Elements that they are of.
        """
        self.backend.synchronize()
        flat = [value for values in own.values() for value in values]
        all_ranks = self.ranks.totals([float(count), *flat], "adding sums over tokens")
        self.counts.note_bytes += FLOAT_BYTES * len(all_ranks[0]) * (self.ranks.size - 1)
        whole, found, at = sum(numbers[0] for numbers in all_ranks), dict[str, list[float]](), 1
        for name, values in own.items():
            end = at + len(values)
            weights = [n[0] / whole if name.startswith("mean") else 1.0 for n in all_ranks]
            columns = zip(*(numbers[at:end] for numbers in all_ranks), strict=True)
            found[name] = [sum(w * v for w, v in zip(weights, c, strict=True)) for c in columns]
            at = end
        return found

    def _looks_at_tokens(self, resolved: ResolvedSetting) -> bool:
        """Tell whether a policy looks at what each rank has a part of."""
        if resolved.policy.spec.feature == FEATURE:
            return True
        signal = resolved.signal
        made = [
            graph.outputs[signal.value]
            for graph in self.manifest.graphs.values()
            if signal is not None
            and graph.runs in ("signal", "probe")
            and signal.value in graph.outputs
        ]
        return any(str(dim).startswith(LOCAL) for io in made for dim in io.shape)

    def _heads(self) -> list[int]:
        """Return the heads of every attention that blocks are cut at."""
        parts = {part.graph for block in self.entry.blocks.values() for part in block}
        outputs = [self.whole.graphs[name].outputs for name in parts]
        return [
            int(io.shape[0]) for made in outputs for n, io in made.items() if n.startswith("query_")
        ]

    def _all_dims(self, values: Mapping[str, Tensor]) -> dict[str, int]:
        dims = whole_dims(self.whole, values)
        return dims | self.share.local_dims(dims)

    def _places(self, local_dim: int | str) -> list[Place]:
        """Return where each rank's tokens are when all ranks' lie side by side."""
        return side_by_side(self.share.counts(str(local_dim).removeprefix(LOCAL), self._dims))

    def _buffer(self, key: tuple[str, ...], io: IoEntry, dims: Mapping[str, int]) -> Tensor:
        """Return the buffer of a value that no session has, one for all blocks."""
        shape = shape_of(io, dims)
        return self._once(
            (*key, shape),
            lambda: torch.zeros(shape, dtype=getattr(torch, io.dtype), device=self.device),
        )

    def _scratch(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        key = (name, tuple(shape), like.dtype)
        return self._once(
            key, lambda: torch.zeros(tuple(shape), dtype=like.dtype, device=like.device)
        )

    def _once(self, key: tuple[Any, ...], make: Callable[[], Made]) -> Made:
        if key not in self._kept:
            self._kept[key] = make()
        found: Made = self._kept[key]
        return found


def _in_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return [heads, batch, tokens, size] as an attention takes it, [rows, 1, tokens, size]."""
    return {n: t.view(-1, 1, *t.shape[2:]) for n, t in tensors.items()}


def _narrowed(
    whole: Tensor, own: Tensor, axis: int, parts: Sequence[tuple[Place, Place]]
) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of what lies where in the whole, and in a rank's part."""
    return [
        (whole.narrow(axis, first, end - first), own.narrow(axis, at, stop - at))
        for (first, end), (at, stop) in parts
    ]
