# SPDX-License-Identifier: Apache-2.0
"""Tell a run's decisions before it starts, where they depend on timesteps alone."""

from __future__ import annotations

import numpy as np
import torch

from ..configs.setting import CacheSetting
from ..policies import policy as find_policy
from .body import allocate
from .model import LoadedModel
from .replay import Replay, replay
from .trace import Trace

__all__ = ["forecast", "is_folded"]


def is_folded(model: LoadedModel, setting: CacheSetting) -> bool:
    """Tell whether a setting's decisions depend on timesteps alone."""
    spec = find_policy(setting.policy).spec
    signals = model.manifest.signals
    signal = setting.signal or next((s for s in spec.signals if s in signals), None)
    return spec.feature is None and (signal is None or signals[signal].known == "run")


def forecast(model: LoadedModel, timesteps: torch.Tensor, setting: CacheSetting) -> Replay | None:
    """Fold a policy over a schedule.

    Args:
        model: Engines; only those that run once per run are used.
        timesteps: [steps], as the scheduler has them.
        setting: Policy, parameters, guard.

    Returns:
        The decisions of every branch and prompt, or None where they depend on content.

    Raises:
        ConfigError: unknown policy, parameter or signal.
    """
    if not is_folded(model, setting):
        return None
    wanted = timesteps.detach().to(model.device, torch.float32)
    branches = sorted(setting.branches) or ["cond"]
    arrays = {"timesteps": wanted.cpu().numpy(), "branches": np.array(branches)}
    for name, graph in model.manifest.graphs.items():
        if graph.runs == "run":
            tables = allocate(graph.outputs, {"steps": len(wanted)}, model.device)
            model.bind(name, {"timesteps": wanted, **tables}).run()
            model.backend.synchronize()
            arrays |= {
                f"{b}/{n}": t.float().cpu().numpy() for b in branches for n, t in tables.items()
            }
    return replay(Trace(arrays), setting)
