# SPDX-License-Identifier: Apache-2.0
"""Configs of policies with a threshold: fitted to recorded runs, at the thresholds for given speedups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..policies import policy_config
from ..policies.config import CachingConfig
from ..policies.custom import DAMPED, CustomConfig
from ..policies.magcache import MagCacheConfig
from ..policies.schedule import Schedule
from ..policies.teacache import TeaCacheConfig
from ..runtime.forecast.fold import forecast
from ..runtime.model import Model
from .fit import PolynomialFit, fit_polynomial
from .gram import GramRecorder
from .lockstep import Lockstep
from .sensitivity import computed_steps, measure

__all__ = ["polynomials", "threshold_configs"]

SEARCHED_THRESHOLDS = 40

FITTED = ("teacache", "custom", "magcache", "sencache")
"""Policies with a threshold that configs are made for."""

SIGNALS = ("timestep_proj", "temb")
"""In the order of TeaCache's sets of coefficients: with ``use_ret_steps``, without."""


def polynomials(recorder: GramRecorder, warn: Callable[[str], None]) -> dict[str, PolynomialFit]:
    """Fit TeaCache's polynomial to each signal that depends on the timestep alone.

    Args:
        recorder: Recorded uncached runs.
        warn: Told of fits that don't explain the residual's change.
    """
    changes = [run for runs in recorder.changes.values() for run in runs]
    fits = {}
    for signal in (s for s in SIGNALS if s in recorder.tables):
        fits[signal] = fit_polynomial(recorder.tables[signal], changes)
        if fits[signal].refusal:
            warn(f"TeaCache's polynomial for '{signal}' is refused: {fits[signal].refusal}")
    return fits


def threshold_configs(
    model: Model,
    recorder: GramRecorder,
    fits: dict[str, PolynomialFit],
    speedups: Sequence[float],
    common: dict[str, Any],
    lockstep: Lockstep | None,
) -> tuple[dict[str, CachingConfig], dict[str, str]]:
    """Find, for each policy with a threshold, the least one that reaches each speedup.

    Args:
        model: Engines.
        recorder: Recorded uncached runs.
        fits: TeaCache's polynomial by signal, as `polynomials` returns them.
        speedups: Ideal speedups.
        common: Keys that all configs share.
        lockstep: Runs that differences are measured in, for SenCache's tables; None leaves it out.

    Returns:
        Configs by name, ``teacache_2x`` and the like, and why one is missing, by name.
    """
    schedule = Schedule.of(*(recorder.tables[n].tolist() for n in ("timesteps", "sigmas")))
    timesteps = torch.from_numpy(recorder.tables["timesteps"])
    ratios = {
        n: [1.0, *(round(float(r), 5) for r in np.mean(runs, axis=0))]
        for n, runs in recorder.ratios.items()
    }
    makers: dict[str, Callable[[float], CachingConfig]] = {
        "magcache": lambda t: MagCacheConfig(
            **common,
            magcache_thresh=t,
            magcache_ratios=ratios,
            magcache_K=8,
            magcache_retention=0.1,
        )
    }
    fit = fits.get("temb")
    if fit is not None and not fit.refusal:
        coefficients = [list(fit.coefficients)]
        makers["teacache"] = lambda t: TeaCacheConfig(
            **common, teacache_thresh=t, coefficients=coefficients, use_ret_steps=False
        )
        makers["custom"] = lambda t: CustomConfig(
            **common, **DAMPED, teacache_thresh=t, coefficients=coefficients, use_ret_steps=False
        )
    carried = model.manifest.policies
    if lockstep is not None and "sencache" in carried:
        tables = measure(lockstep, next(iter(recorder.ratios)), schedule)
        makers["sencache"] = lambda t: policy_config("sencache").model_validate(
            {
                **common,
                "threshold": t,
                "timesteps": tables.timesteps,
                "latent_sensitivity": tables.latents,
                "timestep_sensitivity": tables.timestep,
            }
        )
    configs: dict[str, CachingConfig] = {}
    left_out = {
        f"{policy}_{speedup:g}x": f"the bundle has no policy '{policy}'; build with --policy {policy} too"
        for policy in FITTED
        for speedup in speedups
        if policy not in carried
    }
    for policy, make in makers.items():
        if policy not in carried:
            continue
        reached = []
        for threshold in np.geomspace(0.01, 4.0, SEARCHED_THRESHOLDS):
            config = make(round(float(threshold), 4))
            told = forecast(model, timesteps, config.setting())
            if told is not None:
                reached.append((told.ideal_speedup, config))
            elif lockstep is not None:  # it looks at the latents, and the uncached ones are here
                computed = computed_steps(lockstep, config.setting(), schedule)
                reached.append((len(schedule) / computed, config))
        for speedup in speedups:
            name = f"{policy}_{speedup:g}x"
            found = next((c for ideal, c in reached if ideal >= speedup), None)
            if found is None:
                best = max(ideal for ideal, _ in reached)
                left_out[name] = f"no threshold up to 4 computes so little; {best:.2f} at most"
            else:
                configs[name] = found
    return configs, left_out
