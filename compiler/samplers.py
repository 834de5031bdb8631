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
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from ..bundle.manifest import ResolvedConfig, SamplerEntry
from ..bundle.sampler import SAMPLERS, TABULATED, step_list
from ..bundle.sampler_table import Matrix, SamplerTable
from ..bundle.store import NO_STORE, Store
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


class NotRunError(BuildError):
    """The scheduler itself stops within a run of this many steps."""


def sampler_name(scheduler_class: str) -> str | None:
    """Return our name of a tabulated diffusers scheduler class, or None."""
    return next((n for n in TABULATED if SAMPLERS[n] == scheduler_class), None)


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
    for size in [window] if window is not None else range(1, MAX_WINDOW + 1):
        rows, fault = _fit(samples, size)
        if fault < TOLERANCE:
            return SamplerTable(timesteps, sigmas, rows[:, :size], rows[:, size:])
    raise BuildError(
        where, f"is no linear recurrence over {MAX_WINDOW} samples (off by {fault:.1e})",
        f"use one of {', '.join(dict.fromkeys(SAMPLERS[n] for n in TABULATED))}",
    )  # fmt: skip


def _respond(scheduler: Any, steps: int, where: str) -> tuple[Matrix, Matrix, Matrix]:
    """Return every sample as factors of the start and the outputs, and the noise schedule."""
    unit = torch.eye(steps + 1, dtype=torch.float64)
    try:
        scheduler.set_timesteps(steps)
        samples = [unit[:1]]
        for index, timestep in enumerate(scheduler.timesteps):
            samples.append(
                scheduler.step(
                    unit[index + 1 : index + 2], timestep, samples[-1], return_dict=False
                )[0]
            )
    except Exception as error:  # whatever a scheduler raises, it can't be tabulated
        raise NotRunError(where, f"can't be probed: {error}", "leave it out") from error
    timesteps = np.asarray(scheduler.timesteps, np.float64)
    sigmas = np.asarray(scheduler.sigmas, np.float64)[:steps]
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
    output_sign: int,
    store: Store = NO_STORE,
) -> list[SamplerEntry]:
    """Tabulate the samplers at the flow shifts of a pipeline's scheduler and of every config.

    Args:
        bundle: The bundle's folder.
        pipeline: Folder of the diffusers pipeline, or None.
        configs: What the bundle carries; the step lists that they name are tabulated too.
        output_sign: As `write_tables` takes it.
        store: Where tables are kept.
    """
    carried = [config.generation for config in configs]
    shifts = {scheduler_shift(pipeline), *(g.flow_shift for g in carried)}
    named = [g.sampler for g in carried if g.sampler is not None]
    return write_tables(
        bundle,
        read_part(pipeline, "scheduler/scheduler_config.json") or None,
        shifts,
        lists=[name for name in named if step_list(name) is not None],
        output_sign=output_sign,
        store=store,
    )


def write_tables(
    bundle: Path,
    scheduler_config: Mapping[str, Any] | None,
    shifts: Iterable[float],
    step_counts: Iterable[int] = STEP_COUNTS,
    *,
    lists: Iterable[str] = (),
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
        output_sign: -1 where the pipeline turns the model output round before the scheduler has it.
        store: Where tables are kept.

    Returns:
        Manifest entries, the pipeline's own sampler first.
    """
    own = sampler_name(str((scheduler_config or {}).get("_class_name", "")))
    names = sorted(TABULATED, key=lambda n: n != own)
    (bundle / "samplers").mkdir(exist_ok=True)
    entries = []
    for name in (*names, *sorted(set(lists))):
        config = scheduler_config if name == own else None
        listed = step_list(name)
        counts = sorted(set(step_counts)) if listed is None else [len(listed)]
        for shift in sorted(set(shifts)):
            about = (name, shift, json.dumps(config), tuple(counts), output_sign)
            file = f"samplers/{name}-{shift:g}.safetensors"
            store.bring(
                ["sampler", code_version(), *about], bundle / file, partial(_write_tables, *about)
            )
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
