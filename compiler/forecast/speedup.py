# SPDX-License-Identifier: Apache-2.0
"""Predict what a cache setting saves: exactly where its decisions fold, and say so where not."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import diffusers
import torch
from torch.func import functional_call

from ...bundle.manifest import ResolvedGeneration
from ...bundle.reader import Bundle
from ...policies import policy_class
from ...policies.schedule import Schedule
from ...policies.setting import CacheSetting
from ...runtime.forecast.fold import fold
from ...runtime.pipeline.schedulers import make_scheduler
from ...runtime.timesteps import timestep_inputs
from ..cut.declared import Cut
from ..graphs.filters import signals_of
from ..samplers import sampler_name
from ..sizes import bundle_pipeline, read_part
from .flops import step_flops

__all__ = ["Prediction", "predict", "timestep_tables", "timesteps_of"]

DEFAULT_SAMPLER = "unipc"


@dataclass(frozen=True)
class Prediction:
    """What a setting does in one branch of a run.

    Attributes:
        policy: Policy name.
        steps: Steps of the run.
        computed_steps: Of these; None where decisions depend on content.
        ideal_speedup: Steps / computed steps.
        flops_speedup: Operations of the uncached denoise loop / operations of the cached one: what
            a machine limited by arithmetic would measure.
        reason: Why there is no number, empty where there is one.
    """

    policy: str
    steps: int
    computed_steps: int | None = None
    ideal_speedup: float | None = None
    flops_speedup: float | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def predict(
    cut: Cut, dims: Mapping[str, int], setting: CacheSetting, tables: Mapping[str, Any]
) -> Prediction:
    """Fold a setting over a schedule, or say why it can't be.

    Args:
        cut: The cut model.
        dims: Size of every named dimension, for the operations.
        setting: Policy, parameters and guard.
        tables: ``timesteps`` [steps] and every table that depends on timesteps alone.

    Raises:
        ConfigError: unknown policy, parameter or signal.
    """
    spec = policy_class(setting.policy).spec
    steps = len(tables["timesteps"])
    signals = signals_of(cut)
    signal = spec.signal_of(setting.signal, signals)
    seen = spec.content
    if seen is None and signal is not None and signals[signal][1] != "run":
        seen = signal
    if seen is not None:
        return Prediction(setting.policy, steps, reason=f"depends on content: looks at '{seen}'")
    folded = fold(setting, tables, Schedule.of(tables["timesteps"].tolist()))
    computed = round(folded.computed_steps)
    slots = max(1, spec.history.kept(spec.resolve(setting.parameters)))
    flops = step_flops(cut, dims, slots)
    cached = computed * flops.computed + (steps - computed) * flops.reused
    return Prediction(
        setting.policy,
        steps,
        computed_steps=computed,
        ideal_speedup=folded.ideal_speedup,
        flops_speedup=steps * flops.computed / cached,
    )


def timesteps_of(bundle: Bundle, generation: ResolvedGeneration, steps: int) -> torch.Tensor:
    """Return the timesteps of a run, float32 [steps], as its scheduler has them.

    Args:
        bundle: Its pipeline names the scheduler where the config names none; else UniPC.
        generation: A config's values, of which sampler and flow shift count.
        steps: Denoise steps.
    """
    config = read_part(bundle_pipeline(bundle), "scheduler/scheduler_config.json")
    wanted = str(config.get("_class_name", ""))
    shift = generation.flow_shift
    name = generation.sampler or sampler_name(wanted)
    if name is None and config:
        scheduler_class = getattr(diffusers, wanted)
        known = inspect.signature(scheduler_class.__init__).parameters
        shifted = {n: shift for n in ("flow_shift", "shift") if n in known}
        scheduler = scheduler_class.from_config(config, **shifted)
    else:
        scheduler = make_scheduler(
            name or DEFAULT_SAMPLER, shift, config if name == sampler_name(wanted) else None
        )
    scheduler.set_timesteps(steps)
    return torch.as_tensor(scheduler.timesteps, dtype=torch.float32)


def timestep_tables(bundle: Bundle, cut: Cut, timesteps: torch.Tensor) -> dict[str, Any]:
    """Compute the tables that depend on timesteps alone, with PyTorch: no engine is needed.

    Args:
        bundle: Holds the weights.
        cut: The cut model.
        timesteps: float32 [steps].

    Returns:
        ``timesteps`` and every output of the segments that run once per run, as arrays.
    """
    given = timestep_inputs(bundle.manifest.inputs, timesteps)
    tables = {"timesteps": timesteps.numpy()}
    for segment in cut.segments:
        if segment.runs != "run":
            continue
        weights = {
            n: bundle.tensor(segment.prefix + n) for n, _ in segment.module.named_parameters()
        }
        with torch.no_grad():
            outputs = functional_call(
                segment.module, weights, tuple(given[n] for n in segment.inputs)
            )
        results = outputs if isinstance(outputs, tuple) else (outputs,)
        tables |= {n: t.numpy() for n, t in zip(segment.outputs, results, strict=True)}
    return tables
