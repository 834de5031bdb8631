# SPDX-License-Identifier: Apache-2.0
"""Evaluate a policy on a recorded run, without the model, in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import RequestError
from ..policies import form_of
from ..policies import policy as find_policy
from ..policies.decision_loop import DecisionLoop, DecisionRecord, difference_gram
from ..policies.schedule import Schedule
from ..policies.setting import CacheSetting
from ..runtime.statistics import ideal_speedup, mean_count
from .trace import Trace

__all__ = ["BranchReplay", "Replay", "replay"]

FIRST_BLOCKS = "first_block_residual"

LawFactory = Callable[[CacheSetting, Schedule], DecisionLoop]


@dataclass(frozen=True)
class BranchReplay:
    """What a policy would have done in one branch.

    Attributes:
        computed: Whether each step would have been computed.
        distance: Accumulated distance after each decision; None where the policy has none.
        mix: Factors of past residuals at reused steps, newest first; empty on computed steps.
        reuse_error: mean|r̂ − r| / mean|r| of each reused residual; None on computed steps.
    """

    computed: list[bool]
    distance: list[float | None]
    mix: list[list[float]]
    reuse_error: list[float | None]


@dataclass(frozen=True)
class Replay:
    """A whole replay.

    Attributes:
        policy: Name.
        steps: Of the run.
        branches: By name.
        form: That of the law, where it has several.
        always_run: Part of the blocks that reused steps run too; 0 where the trace does not tell.
    """

    policy: str
    steps: int
    branches: dict[str, BranchReplay]
    form: str = ""
    always_run: float = 0.0

    @property
    def computed_steps(self) -> int | float:
        """Computed steps of a branch; where branches differ, their mean."""
        return mean_count([sum(b.computed) for b in self.branches.values()])

    @property
    def ideal_speedup(self) -> float:
        """Steps / those that its blocks would be enough for, as of a run."""
        return ideal_speedup(self.steps, self.computed_steps, self.always_run)

    @property
    def error(self) -> float:
        """Root mean square of ``reuse_error`` over all steps (0 where computed) and branches.

        What settings are ranked by before any is run.
        """
        errors = [e or 0.0 for branch in self.branches.values() for e in branch.reuse_error]
        return float(np.sqrt(np.mean(np.square(errors))))

    def as_dict(self) -> dict[str, Any]:
        """Return what ``replay --json`` prints."""
        return {
            "policy": self.policy,
            "form": self.form,
            "steps": self.steps,
            "computed_steps": self.computed_steps,
            "always_run": self.always_run,
            "ideal_speedup": self.ideal_speedup,
            "branches": {n: vars(b) for n, b in self.branches.items()},
        }


def eager_law(setting: CacheSetting, schedule: Schedule) -> DecisionLoop:
    """Return the Python law of a setting."""
    return DecisionLoop.eager(setting, step_count=len(schedule), schedule=schedule)


def replay(trace: Trace, setting: CacheSetting, law: LawFactory = eager_law) -> Replay:
    """Run a policy over a trace.

    Args:
        trace: A run recorded with the cache off.
        setting: Policy, parameters, guard.
        law: Makes the law that decides; the eager one unless a compiled graph is to be driven.

    Raises:
        ConfigError: unknown policy, parameter or signal.
        RequestError: the trace lacks what the policy looks at, or was recorded with reuse.
    """
    spec = find_policy(setting.policy).spec
    signal = spec.signal_of(setting.signal, spec.signals)
    parameters = spec.resolve(setting.parameters)
    always_run = 0.0
    if signal == FIRST_BLOCKS:
        always_run = _always_run(trace, setting)
    branches = {}
    leader = trace.branches[0]
    for branch in trace.branches:
        if trace.has(branch, "computed") and not trace.get(branch, "computed").all():
            raise RequestError(
                f"trace, branch '{branch}'",
                "was recorded with steps reused, so what was not computed is not known",
                "record with --cache off",
            )
        taken = _decide(
            trace,
            leader if spec.one_decision else branch,
            law(setting.for_branch(branch), trace.schedule),
            signal,
        )
        branches[branch] = _replay_branch(trace, branch, taken)
    form = form_of(setting.policy, parameters)
    return Replay(setting.policy, trace.steps, branches, form, always_run)


def _always_run(trace: Trace, setting: CacheSetting) -> float:
    """Return the part of the blocks that reused steps run; the trace's signal is of as many first ones.

    Raises:
        RequestError: it is of others.
    """
    spec, blocks = find_policy(setting.policy).spec, trace.arrays.get("blocks")
    recorded = int(trace.arrays.get("first_blocks", 1))
    own = [spec.always_run(spec.resolve(one.parameters)) for one in setting.every_branch()]
    for first, _ in own:
        if first != recorded:
            raise RequestError(
                f"trace, array '{FIRST_BLOCKS}'",
                f"is of {recorded} first blocks, and the policy looks at {first}",
                f"record with --record-signals --cache dbcache --set threshold=0 "
                f"--set first_blocks={first}",
            )
    return 0.0 if blocks is None else sum(own[0]) / int(blocks)


Taken = list[tuple[DecisionRecord, list[int]]]
"""Decisions, each with the steps whose residuals were held when it was taken."""


def _decide(trace: Trace, branch: str, law: DecisionLoop, signal: str | None) -> Taken:
    """Take every decision from what ``branch`` saw."""
    signals = trace.get(branch, signal) if signal is not None else None
    features = None
    if law.spec.feature == "attention_output":
        features = trace.get(branch, "feature")
        features = features.reshape(trace.steps, *trace.frame_shape(), features.shape[-1])
    elif law.spec.feature is not None:
        features = trace.get(branch, law.spec.feature)
    residuals = trace.get(branch, "residual") if "gram" in law.spec.kept else None
    taken: Taken = []
    for step in range(trace.steps):
        held = list(law.computed_steps)
        seen = None if signals is None else signals[step].reshape(-1, signals.shape[-1])
        feature = None
        if features is not None and law.last_computed is not None:
            feature = features[law.last_computed]
        gram = None
        if residuals is not None:
            gram = difference_gram([residuals[s] for s in held], law.spec.history.maximum)
        taken.append((law.decide(seen, feature, gram), held))
    return taken


def _replay_branch(trace: Trace, branch: str, taken: Taken) -> BranchReplay:
    """Compare what the decisions reuse in ``branch`` with its own residuals."""
    residuals = trace.get(branch, "residual") if trace.has(branch, "residual") else None
    result = BranchReplay([], [], [], [])
    for step, (decision, held) in enumerate(taken):
        mix = [] if decision.compute else decision.mix[: len(held)]
        result.computed.append(decision.compute)
        result.distance.append(decision.distance)
        result.mix.append(mix)
        is_known = residuals is not None and not decision.compute
        result.reuse_error.append(_reuse_error(residuals, held, mix, step) if is_known else None)
    return result


def _reuse_error(
    residuals: NDArray[np.float32] | None, held: list[int], mix: list[float], step: int
) -> float:
    assert residuals is not None, "asked for where residuals are known"
    forecast = np.tensordot(np.array(mix, dtype=np.float32), residuals[held], axes=1)
    actual = residuals[step]
    return float(np.abs(forecast - actual).mean() / np.abs(actual).mean())
