# SPDX-License-Identifier: Apache-2.0
"""Tell a run's decisions before it starts, where they depend on timesteps alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...policies import policy as find_policy
from ...policies.decision_loop import Array, DecisionLoop, DecisionRecord
from ...policies.schedule import Schedule
from ...policies.setting import CacheSetting
from ..buffers import allocate
from ..model import Model
from ..resolved_setting import resolve
from ..statistics import mean_count
from ..timesteps import timestep_inputs

__all__ = ["Folded", "fold", "forecast"]


@dataclass(frozen=True)
class Folded:
    """The decisions of a whole run, known before it starts; every prompt gets the same.

    Attributes:
        branches: Branch → its decisions, one a step.
    """

    branches: Mapping[str, list[DecisionRecord]]

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return len(next(iter(self.branches.values())))

    @property
    def computed_steps(self) -> int | float:
        """Computed steps of a branch; where branches differ, their mean."""
        return mean_count([sum(d.compute for d in b) for b in self.branches.values()])

    @property
    def ideal_speedup(self) -> float:
        """Steps / computed steps."""
        return self.steps / self.computed_steps


def fold(setting: CacheSetting, tables: Mapping[str, Array], schedule: Schedule) -> Folded:
    """Take every decision of a run from the tables that depend on timesteps alone.

    Args:
        setting: Policy, parameters, guard; the policy looks at no content.
        tables: Name → [steps, width].
        schedule: Steps of the run.

    Raises:
        ConfigError: unknown policy, parameter or signal.
    """
    spec, steps = find_policy(setting.policy).spec, len(schedule)
    signal = spec.signal_of(setting.signal, tables)
    branches = {}
    for branch in sorted(setting.branches) or ["cond"]:
        law = DecisionLoop.eager(setting.for_branch(branch), step_count=steps, schedule=schedule)
        seen = [None] * steps if signal is None else list(tables[signal])
        branches[branch] = [
            law.decide(None if s is None else s.reshape(-1, s.shape[-1])) for s in seen
        ]
    return Folded(branches)


def forecast(model: Model, timesteps: torch.Tensor, setting: CacheSetting) -> Folded | None:
    """Fold a policy over a schedule.

    Args:
        model: Engines; only those that run once per run are used.
        timesteps: [steps], as the scheduler has them; noise levels are a flow model's.
        setting: Policy, parameters, guard.

    Returns:
        The decisions of every branch and prompt, or None where they depend on content.

    Raises:
        ConfigError: unknown policy, parameter or signal.
    """
    resolved = resolve(model.manifest, setting)
    if not resolved.is_folded:
        return None
    wanted = timesteps.detach().to(model.device, torch.float32)
    given = timestep_inputs(model.manifest.inputs, wanted)
    known: dict[str, torch.Tensor] = {}
    for name, graph in model.manifest.graphs.items():
        if graph.runs == "run":
            steps = len(given[next(iter(graph.inputs))])
            tables = allocate(graph.outputs, {"steps": steps}, model.device)
            model.bind(name, {**given, **tables}).run()
            model.backend.synchronize()
            known |= {n: t.float().cpu() for n, t in tables.items()}
    return fold(resolved.setting, known, Schedule.of(wanted.tolist()))
