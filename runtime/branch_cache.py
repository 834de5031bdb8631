# SPDX-License-Identifier: Apache-2.0
"""The cache of one branch: residual history, signals, and the compiled policy that reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping

import torch
from torch import Tensor

from ..bundle.dims import shape_of
from ..bundle.sections import Sections
from ..bundle.streams import HIDDEN, HISTORY, RESIDUAL, kept_name
from ..engines.base import BoundCall
from ..policies.deadline import Pace
from ..policies.decision_loop import DecisionRecord
from ..policies.schedule import Schedule
from .body import Body
from .buffers import allocate
from .decider import Decider
from .model import Model
from .resolved_setting import ResolvedSetting
from .ring import ResidualRing
from .signals import ROLES, SignalBuffers

__all__ = ["BranchCache"]


class BranchCache:
    """Everything one branch remembers between steps of a run."""

    def __init__(
        self,
        model: Model,
        resolved: ResolvedSetting,
        body: Body,
        shared: Mapping[str, Tensor],
        *,
        record: bool,
    ) -> None:
        """Allocate history, signal and feature buffers; bind ``delta``, ``reuse`` and the policy.

        Args:
            model: Engines.
            resolved: Policy and parameters.
            body: The branch's body.
            shared: Buffers that branches share.
            record: Whether features and residuals are wanted for a trace, whatever the policy.
        """
        self._resolved, self._body, self._record = resolved, body, record
        spec, graphs = resolved.policy.spec, model.manifest.graphs
        dims = body.dims
        self.computed_steps: list[int] = []
        begun = {stream: shared[stream] for stream in model.manifest.cached}
        before, after = begun, dict(body.results)
        if resolved.sections is not None:  # what is reused is what the blocks between add
            body.divide(resolved.sections)
            before, after = body.before, body.after
        self.wants_tap = spec.feature == "attention_output" or record
        if self.wants_tap:
            body.bind_taps()
        self._features: list[Tensor] = []
        if spec.feature == "attention_output":
            frame = (dims["tokens_per_frame"], body.taps[0].shape[-1])
            self._features = [tap[0].view(-1, *frame) for tap in body.taps]
        elif spec.feature == "model_output":
            declared = graphs["finish"].outputs["model_output"]
            output = shape_of(declared, dims)
            self._features = [
                torch.zeros(output[1:], device=model.device).view(-1, *output[-2:])
                for _ in range(2)
            ]
        depth = max(resolved.depth, 1) if record else resolved.depth
        self.ring: ResidualRing | None = None
        self._gram: Tensor | None = None
        if depth:
            # Streams that last blocks alone need have graphs of their own.
            ends = ["", *(f".{stream}" for stream in before if stream not in begun)]
            residuals = {n: io for end in ends for n, io in graphs[f"delta{end}"].outputs.items()}
            shapes = {s: shape_of(residuals[kept_name(s, RESIDUAL)], dims) for s in before}
            dtype = getattr(torch, residuals[RESIDUAL].dtype)
            self.ring = ResidualRing(depth, shapes, dtype, model.device)
            around = {**before, **_of_each(after, "{}_out")}
            slots = ({**around, **_kept(self.ring.slot(i), RESIDUAL)} for i in range(depth))
            self._deltas = [[model.bind(f"delta{end}", slot) for end in ends] for slot in slots]
            past = {**around, **_kept(self.ring.history, HISTORY), "mix": self.ring.mix}
            self._reuse = model.chain([model.bind(f"reuse{end}", past) for end in ends])
            self._bind_gram(model)
            self._replay: BoundCall | None = None
            if record:
                replayed = allocate(graphs["delta"].outputs, dims, model.device)
                self._replayed = replayed[RESIDUAL]
                whole = {**begun, **_of_each(body.results, "{}_out"), **replayed}
                self._replay = model.bind("delta", whole)
        self._tables: Mapping[str, Tensor] = {}
        self._signals = self._bind_signal(model, shared)
        self._decider = Decider(
            model,
            resolved.policy,
            resolved.parameters,
            resolved.setting.guard,
            self._arrangements(),
            model.decide_graph(resolved),
        )
        self._folded: list[DecisionRecord] | None = None

    def _bind_gram(self, model: Model) -> None:
        """Prepare the inner products of all slots, where the policy keeps them."""
        if "gram" not in self._resolved.policy.spec.kept:
            return
        assert self.ring is not None, "called where history is kept"
        size = self._resolved.policy.spec.history.maximum
        self._factors = torch.zeros(size, size, device=model.device)
        self._gram = torch.zeros(size, size, device=model.device)
        history = self.ring.history[HIDDEN]
        values = {"history": history, "factors": self._factors, "gram": self._gram}
        self._gram_call = model.bind("gram", values)

    def _bind_signal(self, model: Model, shared: Mapping[str, Tensor]) -> SignalBuffers | None:
        """Prepare the signal's buffers, and what fills each: copies of rows or inputs, or graphs."""
        signal = self._resolved.signal
        if signal is None:
            return None
        roles = [role for role in ROLES if role in self._resolved.policy.spec.kept]
        spots = range(1 + len(roles))
        graph = next(
            (
                n
                for n, g in model.manifest.graphs.items()
                if g.runs in ("signal", "probe") and signal.value in g.outputs
            ),
            None,
        )
        if graph is None:
            if signal.known == "run":
                tables = (g.outputs for g in model.manifest.graphs.values() if g.runs == "run")
                table = next(t[signal.value] for t in tables if signal.value in t)
                shape, read = (1, math.prod(shape_of(table, {"steps": 1}))), self._table_row
            else:
                source = shared[signal.value]
                shape = (source.shape.numel() // source.shape[-1], source.shape[-1])
                read = lambda step_index: source  # noqa: E731 - named as the method is
            buffers = [torch.zeros(shape, device=model.device) for _ in spots]

            def copy_to(buffer: Tensor) -> Callable[[int], object]:
                return lambda step_index: buffer.copy_(read(step_index).view(buffer.shape))

            return SignalBuffers(roles, buffers, [copy_to(b) for b in buffers])
        values = {**shared, **self._body.context, **self._body.first}
        if self._resolved.sections is not None:
            values["hidden_out"] = self._body.before[HIDDEN]
        made = {signal.value: model.manifest.graphs[graph].outputs[signal.value]}
        buffers = [allocate(made, self._body.dims, model.device)[signal.value] for _ in spots]
        calls = [model.bind(graph, {**values, signal.value: b}) for b in buffers]

        def run(call: BoundCall) -> Callable[[int], object]:
            return lambda step_index: self._run_signal(call)

        flat = [b.flatten(0, -2) for b in buffers]
        return SignalBuffers(roles, flat, [run(c) for c in calls])

    def _table_row(self, step_index: int) -> Tensor:
        assert self._resolved.signal is not None, "called where there is one"
        return self._tables[self._resolved.signal.value][step_index]

    def _run_signal(self, call: BoundCall) -> None:
        if self._resolved.sections is not None:
            self._body.run_first(self._next_tap)
        call.run()

    def _arrangements(self) -> dict[Hashable, dict[str, Tensor]]:
        """List the ways in which rotating buffers can stand: those of signals, then the feature."""
        stands: Iterable[tuple[tuple[int, ...], dict[str, Tensor]]] = [((), {})]
        if self._signals is not None:
            stands = self._signals.arrangements()
        found: dict[Hashable, dict[str, Tensor]] = {}
        steady = {} if self._gram is None else {"gram": self._gram}
        for stand, rotated in stands:
            values = {**rotated, **steady}
            if not self._features:
                found[stand, 0] = values
            for turn, feature in enumerate(self._features):
                pair = {"feature": feature, "previous_feature": self._features[1 - turn]}
                found[stand, turn] = {**values, **pair}
        return found

    def reset(self, tables: Mapping[str, Tensor], schedule: Schedule) -> None:
        """Forget the last run; take every decision of the coming one now, if they fold."""
        self._tables, self._schedule = tables, schedule
        self.rejoin(0)

    def rejoin(self, step_index: int) -> None:
        """Forget what came before a gap: the branch computes at ``step_index`` and caches on."""
        self._forget()
        self._first, self._folded = step_index, None
        if self._resolved.is_folded:
            steps = range(step_index, len(self._schedule))
            self._folded = [self._decide_and_assume(t) for t in steps]
            self._forget()

    def _forget(self) -> None:
        self.computed_steps.clear()
        if self.ring is not None:
            self.ring.reset()
        for tap in self._body.taps if self.wants_tap else ():
            tap.zero_()
        for feature in self._features:
            feature.zero_()
        if self._gram is not None:
            self._gram.zero_()
        if self._signals is not None:
            self._signals.reset()
        self._decider.reset(self._schedule)

    def _decide_and_assume(self, step_index: int) -> DecisionRecord:
        decision = self._ask(step_index, Pace())
        if decision.compute:
            self._note_computed(step_index)
        return decision

    def _note_computed(self, step_index: int) -> None:
        self.computed_steps.insert(0, step_index)
        if self._signals is not None:
            self._signals.mark_computed()

    @property
    def sections(self) -> Sections | None:
        """Where the policy divides the body; None where it does not."""
        return self._resolved.sections

    @property
    def depth(self) -> int:
        """Residuals that the policy mixes."""
        return self._resolved.depth

    @property
    def folded(self) -> list[DecisionRecord] | None:
        """Every decision from `reset` or `rejoin` on where they are known ahead, else None."""
        return self._folded

    def decide(self, step_index: int, pace: Pace) -> DecisionRecord:
        """Decide about the coming step; ``hidden`` holds its input already."""
        if self._folded is not None:
            return self._folded[step_index - self._first]
        return self._ask(step_index, pace)

    def affordable(self, decision: DecisionRecord) -> DecisionRecord:
        """Return a decision that computes in place of one that mixes more residuals than are held.

        A table of mixes, or another branch's decision, knows nothing of this branch's gaps.
        """
        if decision.compute or not any(decision.mix[len(self.computed_steps) :]):
            return decision
        return DecisionRecord(True, [], decision.distance)

    def _ask(self, step_index: int, pace: Pace) -> DecisionRecord:
        stand: tuple[int, ...] = ()
        if self._signals is not None:
            self._signals.advance(step_index)
            stand = self._signals.stand
        turn = self._last_tap if self._features else 0
        held = self.computed_steps[: self._resolved.depth]
        return self.affordable(self._decider.decide(step_index, held, (stand, turn), pace))

    @property
    def _last_tap(self) -> int:
        return (len(self.computed_steps) - 1) % 2

    @property
    def _next_tap(self) -> int | None:
        return len(self.computed_steps) % 2 if self.wants_tap else None

    def compute(self, step_index: int) -> None:
        """Run what the decision left of the body; write the residual to the next slot, for `keep`."""
        tap = self._next_tap
        self._note_computed(step_index)
        is_divided = self._resolved.sections is not None
        if is_divided:
            self._body.run_cached(tap)
        else:
            self._body.run(tap)
        for delta in self._deltas[self.ring.next_slot] if self.ring is not None else ():
            delta.run()
        if is_divided:
            self._body.run_last(tap)

    @property
    def computed_residuals(self) -> list[Tensor]:
        """What `compute` wrote and `keep` has not taken yet, of each stream; none without history."""
        return [] if self.ring is None else list(self.ring.slot(self.ring.next_slot).values())

    def keep(self, step_index: int) -> None:
        """Take the residual that `compute` wrote into the history."""
        if self.ring is None:
            return
        self.ring.push(step_index)
        if self._gram is not None:
            self._factors.copy_(self.ring.differences())
            self._gram_call.run()

    def keep_output(self, model_output: Tensor) -> None:
        """Take what ``finish`` gave after a computation, where the policy looks at it."""
        if self._resolved.policy.spec.feature == "model_output":
            kept = self._features[self._last_tap]
            kept.copy_(model_output[0].view(kept.shape))

    def reuse(self, decision: DecisionRecord) -> None:
        """Write hidden states as the mix of past residuals has them; run what follows at every step."""
        assert self.ring is not None, "the guard computes until a residual exists"
        self.ring.set_mix(decision.mix)
        self._reuse.run()
        if self._resolved.sections is not None:
            self._body.run_last()

    def recorded(self, decision: DecisionRecord) -> tuple[Tensor, Tensor | None]:
        """Return the residual and, after a computation, the feature of the step just run."""
        assert self._record, "only a recording cache keeps them for every step"
        assert self._replay is not None, "bound when recording"
        self._replay.run()
        return self._replayed, self._body.taps[self._last_tap] if decision.compute else None


def _kept(tensors: Mapping[str, Tensor], wanted: str) -> dict[str, Tensor]:
    """Return tensors of streams by what graphs call them: ``audio_history`` for ``audio_hidden``."""
    return {kept_name(stream, wanted): tensor for stream, tensor in tensors.items()}


def _of_each(tensors: Mapping[str, Tensor], spelled: str) -> dict[str, Tensor]:
    return {spelled.format(stream): tensor for stream, tensor in tensors.items()}
