# SPDX-License-Identifier: Apache-2.0
"""The cache of one branch: residual history, signals, and the compiled policy that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ..bundle.manifest import PolicyEntry, SignalEntry
from ..configs.policy_spec import Value
from ..configs.setting import CacheSetting
from ..engines.base import BoundCall
from .body import Body
from .decider import Decider, Verdict
from .dims import shape_of
from .model import LoadedModel
from .ring import ResidualRing

__all__ = ["BranchCache", "ResolvedSetting"]


@dataclass(frozen=True)
class ResolvedSetting:
    """A cache setting checked against the bundle.

    Attributes:
        setting: As asked for.
        policy: The policy's entry in the manifest.
        parameters: Every parameter, defaults filled in.
        signal_name: Signal kind given to the policy, or None.
        signal: The signal's entry, or None.
    """

    setting: CacheSetting
    policy: PolicyEntry
    parameters: Mapping[str, Value]
    signal_name: str | None
    signal: SignalEntry | None

    @property
    def is_folded(self) -> bool:
        """Whether decisions depend on timesteps alone, and so can be taken ahead of the loop."""
        if self.policy.spec.feature is not None:
            return False
        return self.signal is None or self.signal.known == "run"

    @property
    def depth(self) -> int:
        """Residuals that the policy mixes."""
        return self.policy.spec.history.kept(self.parameters)


class BranchCache:
    """Everything one branch remembers between steps of a run."""

    def __init__(
        self,
        model: LoadedModel,
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
        hidden, dims = shared["hidden"], body.dims
        self.computed_steps: list[int] = []
        self.wants_tap = spec.feature is not None or record
        if self.wants_tap:
            body.bind_taps()
        depth = max(resolved.depth, 1) if record else resolved.depth
        self.ring: ResidualRing | None = None
        if depth:
            declared = graphs["delta"].outputs["residual"]
            shape, dtype = shape_of(declared, dims), getattr(torch, declared.dtype)
            self.ring = ResidualRing(depth, shape, dtype, model.device)
            before = {"hidden": hidden, "hidden_out": body.hidden_out}
            self._deltas = [
                model.bind("delta", {**before, "residual": self.ring.slot(i)}) for i in range(depth)
            ]
            past = {"history": self.ring.history, "mix": self.ring.mix}
            self._reuse = model.chain([model.bind("reuse", {**before, **past})])
            self._replay: BoundCall | None = None
            if record:
                self._replayed = torch.zeros(shape, dtype=dtype, device=model.device)
                self._replay = model.bind("delta", {**before, "residual": self._replayed})
        self._bind_signal(model, shared)
        self._decider = Decider(
            model,
            resolved.policy,
            resolved.parameters,
            resolved.setting.guard,
            self._arrangements(dims),
        )
        self._verdicts: list[Verdict] | None = None

    def _bind_signal(self, model: LoadedModel, shared: Mapping[str, Tensor]) -> None:
        """Prepare the signal's buffers: a row of a table, or two that ``modulate`` fills in turn."""
        signal = self._resolved.signal
        self._signals: list[Tensor] = []
        self._signal_calls: list[BoundCall] = []
        if signal is None:
            return
        if signal.known == "run":
            row = shared[signal.value]
            self._signals = [torch.zeros_like(row).view(1, -1) for _ in range(2)]
            return
        buffers = [torch.zeros_like(shared["hidden"]) for _ in range(2)]
        graph = next(
            n
            for n, g in model.manifest.graphs.items()
            if g.runs == "signal" and signal.value in g.outputs
        )
        values = {**shared, **self._body.context}
        self._signal_calls = [model.bind(graph, {**values, signal.value: b}) for b in buffers]
        self._signals = [b.flatten(0, -2) for b in buffers]

    def _arrangements(self, dims: Mapping[str, int]) -> list[dict[str, Tensor]]:
        """List the ways in which rotating buffers can stand, by signal then feature parity."""
        spec = self._resolved.policy.spec
        features = []
        if spec.feature is not None:
            shape = (-1, dims["tokens_per_frame"], self._body.taps[0].shape[-1])
            features = [t[0].view(shape) for t in self._body.taps]
        found = []
        for signal, feature in product(
            range(len(self._signal_calls) or 1), range(len(features) or 1)
        ):
            values: dict[str, Tensor] = {}
            if self._signals:
                values |= {
                    "signal": self._signals[signal],
                    "previous_signal": self._signals[1 - signal],
                }
            if features:
                values |= {"feature": features[feature], "previous_feature": features[1 - feature]}
            found.append(values)
        return found

    def reset(self, tables: Mapping[str, Tensor], step_count: int) -> None:
        """Forget the last run; take every decision of the coming one now, if they fold."""
        self._tables, self._step_count = tables, step_count
        self._forget()
        self._verdicts = None
        if self._resolved.is_folded:
            self._verdicts = [self._decide_and_assume(t) for t in range(step_count)]
            self._forget()

    def _forget(self) -> None:
        self.computed_steps.clear()
        if self.ring is not None:
            self.ring.reset()
        for tap in self._body.taps if self.wants_tap else ():
            tap.zero_()
        for signal in self._signals:
            signal.zero_()
        self._decider.reset(self._step_count)

    def _decide_and_assume(self, step_index: int) -> Verdict:
        verdict = self._ask(step_index)
        if verdict.compute:
            self.computed_steps.insert(0, step_index)
        return verdict

    @property
    def depth(self) -> int:
        """Residuals that the policy mixes."""
        return self._resolved.depth

    @property
    def folded(self) -> list[Verdict] | None:
        """Every decision of the run where they are known ahead, else None."""
        return self._verdicts

    def decide(self, step_index: int) -> Verdict:
        """Decide about the coming step; ``hidden`` holds its input already."""
        if self._verdicts is not None:
            return self._verdicts[step_index]
        return self._ask(step_index)

    def _ask(self, step_index: int) -> Verdict:
        signal = self._resolved.signal
        turn = 0
        if signal is not None and signal.known == "run":
            table = self._tables[signal.value]
            self._signals[1].copy_(self._signals[0])
            self._signals[0].copy_(table[step_index].reshape(1, -1))
        elif signal is not None:
            turn = step_index % 2
            self._signal_calls[turn].run()
        if self._resolved.policy.spec.feature is not None:
            turn = 2 * turn + self._last_tap if self._signal_calls else self._last_tap
        held = self.computed_steps[: self._resolved.depth]
        return self._decider.decide(step_index, held, turn)

    @property
    def _last_tap(self) -> int:
        return (len(self.computed_steps) - 1) % 2

    def compute(self, step_index: int) -> None:
        """Run the body and keep its residual in the next slot of the ring."""
        self.computed_steps.insert(0, step_index)
        self._body.run(self._last_tap if self.wants_tap else None)
        if self.ring is not None:
            self._deltas[self.ring.next_slot].run()
            self.ring.push(step_index)

    def reuse(self, verdict: Verdict) -> None:
        """Write hidden states as the mix of past residuals has them."""
        assert self.ring is not None, "the guard computes until a residual exists"
        self.ring.set_mix(verdict.mix)
        self._reuse.run()

    def recorded(self, verdict: Verdict) -> tuple[Tensor, Tensor | None]:
        """Return the residual and, after a computation, the feature of the step just run."""
        assert self._record, "only a recording cache keeps them for every step"
        assert self._replay is not None, "bound when recording"
        self._replay.run()
        return self._replayed, self._body.taps[self._last_tap] if verdict.compute else None
