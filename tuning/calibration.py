# SPDX-License-Identifier: Apache-2.0
"""What a calibration is asked for, and what comes out: configs, fits, and the file that holds them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import RequestError, nearest
from ..core.output import write_text
from ..policies.config import CachingConfig
from ..policies.solved import HISTORY
from ..runtime.model import DeviceOptions
from .checkpoints import Checkpoints
from .effort import PRESETS
from .fit import PolynomialFit
from .held_out import check_count
from .search import OBJECTIVES

__all__ = ["SPEEDUPS", "Calibration", "CalibrationRequest", "Told", "save_calibration"]

SPEEDUPS = (1.5, 2.0, 2.5, 3.0, 4.0)
"""Ideal speedups that configs are written for, unless others are asked for."""


@dataclass(frozen=True)
class CalibrationRequest:
    """What to record and to solve for.

    Attributes:
        prompts: One uncached run each; the last ``hold_out`` are fitted on nothing.
        first_seed: Seed of the first prompt's noise; each further prompt takes the next.
        speedups: Ideal speedups to write configs for.
        steps: Denoise steps; None takes the bundle's default config's.
        guidance: Guidance scale; None takes the config's.
        history: Residuals that solved mixes use.
        window: Steps back that they may reach in uncached runs.
        refine: Prompts on whose cached runs solved schedules are chosen and their mixes fitted; 0
            takes both from the uncached runs.
        search: Times that every computed step of a chosen schedule is tried elsewhere, at most.
        objective: What schedules are chosen by: the prompts' ``mean``, or the ``worst`` of them.
        paths: Whether schedules are also looked for by `paths.best_paths`, of all numbers of computed
            steps at once.
        hold_out: Prompts that are run with every schedule, so that a request may ask for a quality.
        backend: Name of a backend; None takes the bundle's first.
        options: How engines are driven; None drives them plainly.
        checkpoints: Keeps recorded runs and found schedules, for a calibration that was ended.
    """

    prompts: Sequence[str]
    first_seed: int = 1000
    speedups: Sequence[float] = SPEEDUPS
    steps: int | None = None
    guidance: float | None = None
    history: int = HISTORY
    window: int = 16
    refine: int = PRESETS["normal"].refine
    search: int = PRESETS["normal"].search
    objective: str = "mean"
    paths: bool = False
    hold_out: int = 0
    backend: str | None = None
    options: DeviceOptions | None = None
    checkpoints: Checkpoints | None = None

    def check(self) -> None:
        """Refuse what can't be calibrated, before anything is loaded.

        Raises:
            RequestError: no prompt, or a speedup, an objective or a number that can't be.
        """
        if not self.prompts:
            raise RequestError("calibrate", "has no prompt", "give --prompts FILE")
        for value in self.speedups:
            if not 1 < value < math.inf:
                raise RequestError(f"--speedup {value:g}", "is not above 1", "try --speedup 2")
        if self.objective not in OBJECTIVES:
            raise RequestError(
                f"--objective '{self.objective}'",
                "is not known",
                nearest(self.objective, list(OBJECTIVES)),
            )
        if not 1 <= self.history <= HISTORY:
            raise RequestError(f"--history {self.history}", f"is outside [1, {HISTORY}]", "use 3")
        check_count(self.hold_out, len(self.prompts))


@dataclass(frozen=True)
class Told:
    """What a written config will do.

    Attributes:
        computed: Whether each step of a branch is computed; None where content decides.
        distance_db: Of solved schedules, the final sample's distance from the uncached one's over
            the refined prompts: −10·log₁₀ of the relative mean square, higher is nearer
            (`solved_from` has its negative). None of others, which calibration does not run.
    """

    computed: list[bool] | None
    distance_db: float | None


@dataclass(frozen=True)
class Calibration:
    """What came out.

    Attributes:
        configs: Caching configs by name, ``teacache_2x`` and the like.
        fits: TeaCache's polynomial per signal.
        left_out: Why a config that was asked for is missing, by name.
        told: Decisions and quality of each config, by name.
        about: Checkpoint, steps, guidance, size, prompts and seconds.
    """

    configs: dict[str, CachingConfig]
    fits: dict[str, PolynomialFit]
    left_out: dict[str, str]
    told: dict[str, Told]
    about: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return what the file holds; ``--cache FILE#NAME`` reads its ``configs``."""
        return {
            "configs": {
                n: c.model_dump(exclude_none=True, mode="json") for n, c in self.configs.items()
            },
            "calibration": {
                **self.about,
                "fits": {n: vars(f) for n, f in self.fits.items()},
                "left_out": self.left_out,
            },
        }


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write the file whole or not at all.

    Raises:
        OutputError: it can't be written.
    """
    write_text(path, _text(calibration.as_dict()), "choose another --out")


def _text(data: dict[str, Any]) -> str:
    """Write JSON with one config per line: their tables are long and read by programs."""
    configs = [f"  {json.dumps(n)}: {json.dumps(c)}" for n, c in data["configs"].items()]
    about = json.dumps(data["calibration"], indent=1).replace("\n", "\n ")
    lines = ",\n".join(configs)
    return f'{{\n "configs": {{\n{lines}\n }},\n "calibration": {about}\n}}\n'
