# SPDX-License-Identifier: Apache-2.0
"""Turn a diffusers scheduler into a table of numbers, so that a runtime without Python can step it.

A deterministic multistep sampler is linear in the sample and in the model outputs. Written as a
recurrence over what was seen from outside, the next sample is

    x[t+1] = Σ_k a[t][k] · x[t−k]  +  Σ_k b[t][k] · v[t−k],      k = 0 … window − 1

with x the samples and v the model outputs. The window is 1 for Euler, 2 for DPM++ 2M and 3 for
UniPC of order 2: its predictor starts from the *corrected* sample, which is no x of the loop, but
the previous step's equation gives it as a combination of x[t], x[t−1] and the outputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from ..bundle.manifest import ResolvedConfig, SamplerEntry
from ..bundle.sampler import SAMPLERS, TABULATED, step_list
from ..bundle.sampler_table import Matrix, SamplerTable
from ..bundle.store import NO_STORE, Store
from ..bundle.streams import LATENTS, beside
from ..core.errors import BuildError
from ..runtime.pipeline.schedulers import make_scheduler
from .code_version import code_version
from .defaults import scheduler_shift
from .sizes import read_part

__all__ = ["STEP_COUNTS", "bring_samplers", "probe", "sampler_name", "write_tables"]

STEP_COUNTS = (*range(1, 61), 100)
MAX_WINDOW = 4
TOLERANCE = 1e-7
"""Schedulers compute their factors in float32; what they disagree with themselves is below this."""
LARGER = 64.0
"""Times a unit: what is linear gives as much more."""


class NotRunError(BuildError):
    """The scheduler itself stops within a run of this many steps."""


def sampler_name(scheduler_class: str) -> str | None:
    """Return our name of a tabulated diffusers scheduler class, or None."""
    return next((n for n in TABULATED if SAMPLERS[n] == scheduler_class), None)


def _own_name(config: Mapping[str, Any]) -> str:
    """Return the name of a pipeline's own sampler: ours, or its class where that is of no flow model.

    Empty where nothing is known of it, and where it is a flow model's that has no table.
    """
    scheduler_class = str(config.get("_class_name", ""))
    is_flow = scheduler_class.startswith("FlowMatch")
    is_flow |= config.get("prediction_type", "flow_prediction") == "flow_prediction"
    name = sampler_name(scheduler_class)
    if not scheduler_class or (is_flow and scheduler_class in SAMPLERS.values()):
        return name or ""
    return "" if scheduler_class.startswith("FlowMatch") else scheduler_class


def probe(scheduler: Any, steps: int, window: int | None = None) -> SamplerTable:
    """Find the recurrence of a scheduler at one step count by feeding it unit vectors.

    The start sample is the first unit vector and each model output the next one, so every sample
    comes out as its factors of them.

    Args:
        scheduler: A fresh diffusers scheduler.
        steps: Steps of the run.
        window: Look back exactly so far; None takes the least that is exact.

    Raises:
        BuildError: no recurrence within `MAX_WINDOW` gives its samples: it is not linear, draws
            noise, or looks further back.
    """
    where = f"sampler '{type(scheduler).__name__}', {steps} steps"
    samples, timesteps, sigmas = _respond(scheduler, steps, where)
    bent = 0.0
    if window is None:  # a few steps that clip are a recurrence as well, at one size
        larger = _respond(scheduler, steps, where, LARGER)[0] / LARGER
        bent = float(np.abs(larger - samples).max() / max(1.0, float(np.abs(samples).max())))
    for size in [window] if window is not None else range(1, MAX_WINDOW + 1):
        rows, fault = _fit(samples, size)
        fault = max(fault, bent)
        if fault < TOLERANCE:
            return SamplerTable(timesteps, sigmas, rows[:, :size], rows[:, size:])
    raise BuildError(
        where,
        f"is no linear recurrence over {MAX_WINDOW} samples (off by {fault:.1e})",
        f"use one of {', '.join(dict.fromkeys(SAMPLERS[n] for n in TABULATED))}",
    )


def _set_timesteps(scheduler: Any, steps: int) -> None:
    """Set a run of so many steps; some schedulers count the end of the last one as another.

    Raises:
        ValueError: no run of the scheduler has so many.
    """
    for count in (steps, steps + 1):
        with suppress(ValueError):
            scheduler.set_timesteps(count)
            if len(scheduler.timesteps) == steps:
                return
    raise ValueError(f"no run has {steps} steps")


def _respond(
    scheduler: Any, steps: int, where: str, size: float = 1.0
) -> tuple[Matrix, Matrix, Matrix]:
    """Return every sample as factors of the start and the outputs, and the noise schedule."""
    unit = size * torch.eye(steps + 1, dtype=torch.float64)
    try:
        _set_timesteps(scheduler, steps)
        scaled = getattr(scheduler, "scale_model_input", None)
        samples = [unit[:1]]
        for index, timestep in enumerate(scheduler.timesteps):
            if scaled is not None and not torch.equal(scaled(samples[-1], timestep), samples[-1]):
                raise ValueError("the model is given samples that it scales")
            samples.append(
                scheduler.step(
                    unit[index + 1 : index + 2], timestep, samples[-1], return_dict=False
                )[0]
            )
    except Exception as error:  # whatever a scheduler raises, it can't be tabulated
        raise NotRunError(where, f"can't be probed: {error}", "leave it out") from error
    timesteps = np.asarray(scheduler.timesteps, np.float64)
    levels = getattr(scheduler, "sigmas", None)  # none: a flow model's, as sessions take them
    sigmas = timesteps / 1000 if levels is None else np.asarray(levels, np.float64)[:steps]
    return torch.cat(samples).double().numpy(), timesteps, sigmas


def _fit(samples: Matrix, window: int) -> tuple[Matrix, float]:
    """Fit the rows of a recurrence; return them and the largest error of any factor.

    An error is relative to a sample's largest factor where that is above 1: near pure noise, a
    prediction of the noise divides by almost nothing.
    """
    steps = len(samples) - 1
    unit = np.eye(steps + 1)
    rows, worst = np.zeros((steps, 2 * window)), 0.0
    for step in range(steps):
        reach = min(window, step + 1)
        seen = [samples[step - k] for k in range(reach)] + [
            unit[step - k + 1] for k in range(reach)
        ]
        basis = np.stack(seen, axis=1)
        # The least solution, where early steps leave several.
        factors = np.linalg.lstsq(basis, samples[step + 1], rcond=1e-10)[0]
        largest = max(1.0, float(np.abs(samples[step + 1]).max()))
        worst = max(worst, float(np.abs(basis @ factors - samples[step + 1]).max()) / largest)
        rows[step, :reach] = factors[:reach]
        rows[step, window : window + reach] = factors[reach:]
    return rows, worst


def bring_samplers(
    bundle: Path,
    pipeline: Path | None,
    configs: Iterable[ResolvedConfig],
    latents: Sequence[str],
    output_sign: int,
    scheduler: str = "",
    store: Store = NO_STORE,
) -> list[SamplerEntry]:
    """Tabulate the samplers at the flow shifts of a pipeline's scheduler and of every config.

    Latents beside the first have tables of their own where the pipeline has a scheduler for them, at
    its shift.

    Args:
        bundle: The bundle's folder.
        pipeline: Folder of the diffusers pipeline, or None.
        configs: What the bundle carries; the step lists that they name are tabulated too.
        latents: `Manifest.latents`.
        output_sign: As `write_tables` takes it.
        scheduler: Class of the model's scheduler where no folder tells; empty is one of a flow model.
        store: Where tables are kept.
    """
    carried = [config.generation for config in configs]
    named = [g.sampler for g in carried if g.sampler is not None]
    entries = []
    for name in latents:
        part = beside(name, LATENTS, "scheduler")
        own = read_part(pipeline, f"{part}/scheduler_config.json")
        if name != LATENTS and not own:
            continue
        shifts = {scheduler_shift(pipeline, part)}
        if name == LATENTS:
            shifts |= {g.flow_shift for g in carried}
        entries += write_tables(
            bundle,
            own or ({"_class_name": scheduler} if scheduler else None),
            shifts,
            lists=[n for n in named if step_list(n) is not None],
            latents=name,
            output_sign=output_sign,
            store=store,
        )
    return entries


def write_tables(
    bundle: Path,
    scheduler_config: Mapping[str, Any] | None,
    shifts: Iterable[float],
    step_counts: Iterable[int] = STEP_COUNTS,
    *,
    lists: Iterable[str] = (),
    latents: str = LATENTS,
    output_sign: int = 1,
    store: Store = NO_STORE,
) -> list[SamplerEntry]:
    """Write ``samplers/<name>-<shift>.safetensors`` for every sampler and shift.

    Args:
        bundle: The bundle's folder.
        scheduler_config: The pipeline's scheduler config, with ``_class_name``, or None.
        shifts: Flow shifts to tabulate.
        step_counts: Step counts to tabulate.
        lists: Samplers of a list of timesteps, each of one step count, to tabulate too.
        latents: Whose samples they make.
        output_sign: -1 where the pipeline turns the model output round before the scheduler has it.
        store: Where tables are kept.

    Returns:
        Manifest entries, the pipeline's own sampler first. A scheduler of no flow model is its model's
        only one, and has none where it draws noise.
    """
    own = _own_name(scheduler_config or {})
    is_flow = own in TABULATED or own == ""
    names = [*sorted(TABULATED, key=lambda n: n != own), *sorted(set(lists))]
    if not is_flow:
        names = [own] if hasattr(diffusers, own) else []
    (bundle / "samplers").mkdir(exist_ok=True)
    prefix = beside(latents, LATENTS, "")
    entries = []
    for name in names:
        config = scheduler_config if name == own else None
        listed = step_list(name)
        counts = sorted(set(step_counts)) if listed is None else [len(listed)]
        for shift in sorted(set(shifts)):
            about = (name, shift, json.dumps(config), tuple(counts), output_sign)
            file = f"samplers/{prefix}{name}-{shift:g}.safetensors"
            try:
                store.bring(
                    ["sampler", code_version(), *about],
                    bundle / file,
                    partial(_write_tables, *about),
                )
            except BuildError:
                if is_flow:
                    raise
                continue
            tables = load_file(bundle / file)
            columns = next(iter(tables.values())).shape[1]
            entries.append(
                SamplerEntry(
                    name=name,
                    scheduler=type(make_scheduler(name, shift, config)).__name__,
                    flow_shift=shift,
                    window=(columns - 2) // 2,
                    steps=sorted(map(int, tables)),
                    file=file,
                    latents=latents,
                )
            )
    return entries


def _write_tables(
    name: str, shift: float, config: str, counts: tuple[int, ...], output_sign: int, out: Path
) -> None:
    tables = _tables(name, shift, config, counts)
    window = (next(iter(tables.values())).shape[1] - 2) // 2
    signs = np.repeat([1.0, float(output_sign)], [2 + window, window])
    save_file({count: table * signs for count, table in tables.items()}, out)


@cache
def _tables(name: str, shift: float, config: str, counts: tuple[int, ...]) -> dict[str, Matrix]:
    """Return a sampler's table for each step count that it can run; ``config`` is JSON.

    diffusers' UniPC stops at 100 steps of shift 12, where its first two timesteps round to one.
    """
    own = json.loads(config)
    window = probe(make_scheduler(name, shift, own), min(20, max(counts))).window
    tables = {}
    for count in counts:
        with suppress(NotRunError):
            tables[str(count)] = probe(make_scheduler(name, shift, own), count, window).packed()
    return tables
