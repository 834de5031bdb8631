# SPDX-License-Identifier: Apache-2.0
"""Guidance over ranks: each branch of a run on a rank of its own, one exchange of outputs per step.

Every rank runs the whole pipeline (prompt, scheduler, callbacks) and answers its transformer's
calls: its own branches from its engines, the others' by a promise (`Awaited`). The first operation
on any output of a step trades them all. A branch's state, history and decisions live on its rank;
where a policy has one decision for all branches, the branch that runs a step first tells the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.errors import FreewheelError, RankError
from ...policies.decision_loop import DecisionRecord
from ..session import Session
from ..statistics import BranchStatistics
from .alike import begun, check_alike, check_no_deadline
from .awaited import Awaited
from .counts import ExchangeCounts
from .ranks import FRAME_BYTES, Ranks

__all__ = ["GuidanceOverRanks"]


@dataclass(frozen=True)
class _Output:
    branch: str
    step_index: int
    buffer: Tensor


class GuidanceOverRanks:
    """The branches of one transformer's runs, shared out over the ranks of a job.

    Branches belong to ranks in the order in which a run first calls them. All ranks must make the
    same calls; a failure on one ends the run on all.

    Attributes:
        counts: Bytes of the current or last run.
    """

    def __init__(self, ranks: Ranks, on_exchange: Callable[[], None]) -> None:
        """Prepare for runs.

        Args:
            ranks: One for each branch.
            on_exchange: Called once the outputs of a step, and what was decided, are on all ranks.
        """
        self._ranks, self._on_exchange = ranks, on_exchange
        self._session: Session | None = None
        self._runs = 0
        self.counts = ExchangeCounts()
        self._abandon()

    def _abandon(self) -> None:
        self._is_new = False
        self._owners: dict[str, int] = {}
        self._pending: list[_Output] = []
        self._step_index = -1

    def begin(self, session: Session) -> None:
        """Start a run of a session that has begun it.

        Raises:
            RequestError: it has a deadline.
        """
        check_no_deadline(session)
        self._abandon()
        self._session, self._is_new = session, True
        self._runs += 1
        self.counts = ExchangeCounts()
        session.on_decision = self._tell_decision

    def is_mine(self, branch: str) -> bool:
        """Tell whether this rank runs a branch; a new one goes to the next rank."""
        owner = self._owners.setdefault(branch, len(self._owners) % self._ranks.size)
        return owner == self._ranks.rank

    def call(self, step_index: int, latents: Tensor) -> None:
        """Announce a transformer call, before any branch's part of it.

        Raises:
            RankError: the ranks are about to run different things.
        """
        if step_index != self._step_index:
            self._exchange()
            self._step_index = step_index
        if self._is_new:
            self._is_new = False
            self._compare(latents)

    def give(self, branch: str, step_index: int, output: Tensor) -> Tensor:
        """Take this rank's output of a branch, and return what the pipeline is to have.

        Args:
            branch: A branch that `is_mine`.
            step_index: The step.
            output: The model output, the caller's own; it is not written to again.
        """
        self._pending.append(_Output(branch, step_index, output.contiguous()))
        return Awaited(self._pending[-1].buffer, self._exchange)

    def expect(self, branch: str, step_index: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the promise of another rank's output of a branch.

        Args:
            branch: A branch that is not this rank's.
            step_index: The step.
            inputs: Per-step inputs, of which the shape counts.
        """
        session = self._session
        assert session is not None, "called within a run"
        decision = None
        if session.decides_once and not session.has_decided(step_index):
            notes = self._tell("decision", step_index, "waiting for its decision")
            told = notes[self._owners[branch]]["decision"]
            decision = DecisionRecord(told["compute"], told["mix"], told["distance"])
        session.follow(step_index, decision)
        buffer = torch.empty(
            session.output_shape(inputs), dtype=torch.float32, device=session.model.device
        )
        self._pending.append(_Output(branch, step_index, buffer))
        return Awaited(buffer, self._exchange)

    def fail(self, error: Exception) -> None:
        """End the run on all ranks because it failed here; returns once they know, or are gone."""
        if isinstance(error, RankError):
            return  # it came from there
        if not isinstance(error, FreewheelError):
            error = FreewheelError("transformer", f"failed: {type(error).__name__}: {error}")
        parts = {"where": error.where, "what": error.what, "hint": error.hint}
        room = FRAME_BYTES // 8
        with suppress(RankError):
            self._tell(
                "failure",
                self._step_index,
                "saying that it failed here",
                error={n: text[:room] for n, text in parts.items()},
            )
        self._abandon()

    def warnings(self) -> list[str]:
        """Return what a user would want to know of the last run: a rank that had nothing to do."""
        if len(self._owners) >= self._ranks.size or not self._owners:
            return []
        (branch,) = self._owners
        return [
            f"the run had one branch, '{branch}': rank {self._ranks.members[1]} computed nothing and "
            f"waited for rank {self._ranks.members[0]}; "
            "give guidance two branches, or start one process"
        ]

    def _compare(self, latents: Tensor) -> None:
        """Raise `RankError` where the ranks begin different runs."""
        session = self._session
        assert session is not None, "called within a run"
        notes = self._tell("begin", 0, "comparing runs", **begun(session, latents))
        check_alike(notes, self._ranks.members)
        declared = session.manifest.graphs["finish"].outputs["model_output"]
        self.counts.formula = " · ".join(("4", *(str(d) for d in declared.shape)))
        shape = session.output_shape({"latents": latents})
        self.counts.formula_bytes = 4 * torch.Size(shape).numel()
        self.counts.formula_bytes_reused = self.counts.formula_bytes

    def _tell_decision(self, step_index: int, decision: DecisionRecord) -> None:
        self._tell("decision", step_index, "telling its decision", decision=vars(decision))

    def _exchange(self) -> None:
        """Trade the outputs of the step that were given or promised; nothing where that is done."""
        if not self._pending:
            return
        session, pending = self._session, self._pending
        assert session is not None, "outputs belong to a run"
        self._pending = []
        step_index = pending[0].step_index
        given = [o for o in pending if self._owners[o.branch] == self._ranks.rank]
        records = {
            o.branch: _record(session.statistics.branches[o.branch], step_index) for o in given
        }
        doing = f"trading outputs of step {step_index}"
        notes = self._tell("outputs", step_index, doing, records=records)
        promised = [(self._owners[o.branch], o) for o in pending if o not in given]
        for owner, output in promised:
            record = notes[owner]["records"][output.branch]
            known = session.statistics.branches.setdefault(
                output.branch, BranchStatistics(session.steps)
            )
            known.add(step_index, **record)
        buffers = [(owner, output.buffer) for owner, output in promised]
        sent = self._ranks.trade([o.buffer for o in given], buffers, doing)
        self.counts.decided(computes=any(record["computed"] for record in records.values()))
        self.counts.end_step(sent)
        self._on_exchange()

    def _tell(self, kind: str, step_index: int, doing: str, **more: Any) -> list[dict[str, Any]]:
        """Give every rank a note of the same kind about the same step of the same run.

        Raises:
            RankError: a rank is gone, failed, or is elsewhere.
        """
        branches = [o.branch for o in self._pending]
        own = {"kind": kind, "run": self._runs, "step": step_index, "branches": branches}
        notes = self._ranks.tell({**own, **more}, doing)
        self.counts.note_bytes += FRAME_BYTES * (self._ranks.size - 1)
        if kind == "failure":
            return notes
        members = self._ranks.members
        for rank, note in enumerate(notes):
            if note["kind"] == "failure":
                error = note["error"]
                self._abandon()
                raise RankError(
                    f"rank {self._ranks.members[rank]}, {error['where']}",
                    error["what"],
                    error["hint"],
                )
        for rank, note in enumerate(notes):
            apart = [f"{n} {note[n]}, not {own[n]}" for n in own if note[n] != own[n]]
            if apart:
                self._abandon()
                raise RankError(
                    f"rank {members[rank]}",
                    f"is out of step with rank {members[self._ranks.rank]}: {'; '.join(apart)}",
                    "make the same calls on every rank, and end all of them where one fails",
                )
        return notes


def _record(branch: BranchStatistics, step_index: int) -> dict[str, Any]:
    return {
        "computed": branch.computed[step_index],
        "distance": branch.distance[step_index],
        "mix": branch.mix[step_index],
        "seconds": branch.seconds[step_index],
    }
