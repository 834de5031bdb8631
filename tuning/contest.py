# SPDX-License-Identifier: Apache-2.0
"""The settings that policies are compared at: one of every policy at each speedup."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..configs.load import load_config, read_configs
from ..policies.adacache import CODEBOOKS
from ..policies.custom import DAMPED, PUBLISHED, CustomConfig
from ..policies.setting import CacheSetting, GuardSetting

__all__ = [
    "BY_CONTENT",
    "EVEN",
    "FITTED",
    "Ideals",
    "adacache_settings",
    "by_content",
    "even_settings",
    "even_steps",
    "fitted_settings",
]

EVEN: dict[str, dict[str, Any]] = {
    "taylorseer": {"interval": 1000, "order": 1},
    "hermite": {"interval": 1000},
    "foca": {"interval": 1000},
    "dmd": {"interval": 1000},
    "spectrum": {"warmup": 1, "window": 1000.0},
}
"""Forecasts that are compared at even schedules → parameters that compute nothing by themselves."""

BY_CONTENT = {
    "easycache": GuardSetting(first_exact=7, last_exact=2),
    "firstblock": GuardSetting(),
    "seacache": GuardSetting(first_exact=1, last_exact=1, max_consecutive=2),
    "dicache": GuardSetting(),
    "firstblock+dmd": GuardSetting(),
    "seacache+spectrum": GuardSetting(first_exact=1, last_exact=1),
}
"""Policies and pairs whose thresholds are found by replay → their guards."""

FITTED = ("teacache", "custom", "magcache", "sencache", "solved")
"""Policies whose configs a calibration writes, one per ideal speedup."""

CODEBOOK_NAMES = ("steps_30_slow", "steps_30_fast", "steps_100")

Ideals = Mapping[float, float]
"""Steps over computed steps, by the speedup in the heading."""

TRIED = 60
"""Thresholds from 0.005 to 2."""


def even_steps(count: int, steps: int) -> list[int]:
    """Return ``count`` steps, spread as evenly as can be from step 0 on."""
    return sorted({round(i * steps / count) for i in range(count)})


def even_settings(steps: int, ideals: Ideals) -> Iterator[tuple[str, CacheSetting]]:
    """Yield every forecast of `EVEN` at every speedup, by ``policy speedup``."""
    for speedup, ideal in ideals.items():
        for policy, parameters in EVEN.items():
            guard = GuardSetting(exact_steps=even_steps(int(steps // ideal), steps))
            yield (
                f"{policy} {speedup:g}",
                CacheSetting(policy=policy, parameters=parameters, guard=guard),
            )


def fitted_settings(calibration: Path, ideals: Ideals) -> Iterator[tuple[str, CacheSetting]]:
    """Yield what a calibration wrote for every speedup; ``custom`` in both of its forms.

    Raises:
        ConfigError: as of `read_configs`.
    """
    configs = read_configs(calibration)
    for speedup, ideal in ideals.items():
        for policy in FITTED:
            config = configs.get(f"{policy}_{ideal:g}x")
            if isinstance(config, CustomConfig):
                for name, form in (("custom", DAMPED), ("custom published", PUBLISHED)):
                    yield f"{name} {speedup:g}", config.model_copy(update=form).setting()
            elif config is not None:
                yield f"{policy} {speedup:g}", config.setting()


def adacache_settings() -> Iterator[tuple[str, CacheSetting]]:
    """Yield AdaCache with each of its codebooks, which have no setting for a given speedup."""
    for name in CODEBOOK_NAMES:
        config = load_config("adacache").model_copy(update={"codebook": CODEBOOKS[name]})
        yield f"adacache {name}", config.setting()


def by_content(
    count: Callable[[CacheSetting], float],
    steps: int,
    ideals: Mapping[str, Ideals],
    policies: Collection[str],
) -> Iterator[tuple[str, CacheSetting]]:
    """Yield what decides by content at each speedup, its threshold found by bisection.

    Args:
        count: Computed steps of a setting, which fall as its threshold rises.
        steps: Of a run.
        ideals: By policy.
        policies: Those that there are: of pairs, those whose graphs a bundle has.
    """
    for policy, guard in BY_CONTENT.items():
        if policy not in policies:
            continue
        tried = [
            CacheSetting(policy=policy, parameters={"threshold": round(float(t), 4)}, guard=guard)
            for t in np.geomspace(0.005, 2.0, TRIED)
        ]
        counts: dict[int, float] = {}

        def counted(
            index: int, tried: list[CacheSetting] = tried, counts: dict[int, float] = counts
        ) -> float:
            if index not in counts:
                counts[index] = count(tried[index])
            return counts[index]

        for speedup, ideal in ideals[policy].items():
            wanted = steps // ideal
            low, high = 0, TRIED - 1  # more than wanted is computed at low, or it is the first
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if counted(middle) > wanted else (low, middle)
            best = min((low, high), key=lambda i: abs(counted(i) - wanted))
            yield f"{policy} {speedup:g}", tried[best]
