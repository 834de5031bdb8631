# SPDX-License-Identifier: Apache-2.0
"""Rank every policy at every speedup by what a suite of recorded runs foretells."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.progress import Progress
from ..policies.setting import CacheSetting
from .contest import (
    BY_CONTENT,
    Ideals,
    adacache_settings,
    by_content,
    even_settings,
    fitted_settings,
)
from .suite import Foretold, Suite

__all__ = ["SPEEDUPS", "Ranked", "contest_of", "rank"]

SPEEDUPS = (2.0, 2.5, 3.0, 4.0)
"""Ideal ones, steps over computed steps."""

COUNTED = 2
"""Runs by which thresholds are found."""


@dataclass(frozen=True)
class Ranked:
    """One setting, and what the suite tells of it; ``name`` is ``policy speedup``."""

    name: str
    foretold: Foretold


def contest_of(
    suite: Suite,
    policies: Collection[str],
    calibration: Path | None,
    ideals: Mapping[str, Ideals] | None = None,
) -> dict[str, CacheSetting]:
    """Return one setting per policy and speedup, by ``policy speedup``.

    Args:
        suite: Its first runs tell the thresholds of what decides by content.
        policies: Of the bundle.
        calibration: What `calibrate` wrote, for policies that need tables; None leaves them out.
        ideals: By policy; ``taylorseer``'s are of all that do not decide by content. None takes
            `SPEEDUPS` for all.

    Raises:
        ConfigError: the calibration can't be read.
    """
    few = replace(suite, runs=suite.runs[:COUNTED])
    plain: Mapping[str, Ideals] = {p: {x: x for x in SPEEDUPS} for p in ("taylorseer", *BY_CONTENT)}
    ideals = plain if ideals is None else ideals
    tabled = ideals["taylorseer"]
    found = dict(even_settings(suite.steps, tabled)) | dict(adacache_settings())
    if calibration is not None:
        found |= dict(fitted_settings(calibration, tabled))
    return found | dict(
        by_content(lambda s: few.foretell(s).computed_steps, suite.steps, ideals, policies)
    )


def rank(
    suite: Suite, policies: Collection[str], calibration: Path | None, progress: Progress
) -> Sequence[Ranked]:
    """Foretell every setting of `contest_of`, the nearest first within each speedup.

    Raises:
        ConfigError: the calibration can't be read.
    """
    settings = contest_of(suite, policies, calibration)
    progress.phase("rank", len(settings))
    found = []
    for name, setting in settings.items():
        found.append(Ranked(name, suite.foretell(setting)))
        progress.advance(name)
    return sorted(found, key=lambda ranked: (ranked.name.split()[-1], ranked.foretold.mean))
