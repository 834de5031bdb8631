# SPDX-License-Identifier: Apache-2.0
"""Quality of solved schedules on runs that nothing was fitted on, which a request's bound is kept by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..core.errors import RequestError
from ..policies.config import CachingConfig
from ..policies.promise import COVERAGE, EQUAL_PSNR, FEWEST_RUNS
from ..policies.setting import CacheSetting
from ..policies.solved import SolvedConfig
from ..runtime.pipeline.generate import Generator
from ..runtime.pipeline.request import GenerationRequest
from .quality import compare_videos

__all__ = ["check_count", "held_out_psnr", "taking", "with_psnr"]


def check_count(count: int, prompts: int) -> None:
    """Refuse a number of held-out prompts that promises nothing, or leaves none to fit on.

    Raises:
        RequestError: as said.
    """
    where = f"--hold-out {count}"
    if 0 < count < FEWEST_RUNS:
        raise RequestError(
            where,
            f"promises nothing to {100 * COVERAGE:.0f} of 100 runs: not even the worst of so "
            "few is bad enough",
            f"hold {FEWEST_RUNS} or more out; 20 or more make the promise sharper",
        )
    if count and count >= prompts:
        raise RequestError(
            where,
            f"leaves none of {prompts} prompts to fit on",
            f"give {count + 8} prompts or more, or hold fewer out",
        )


def taking(setting: CacheSetting, count: int) -> CacheSetting:
    """Return a setting of ``solved`` that takes the schedule of ``count`` computed steps."""
    return setting.model_copy(
        update={"parameters": {**setting.parameters, "computed_steps": count}}
    )


def held_out_psnr(
    generator: Generator,
    run: GenerationRequest,
    config: SolvedConfig,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """Run one request with every schedule, and return each one's PSNR against the uncached run.

    Args:
        generator: Of the bundle.
        run: Uncached.
        config: Schedules.
        on_step: As of `Generator.generate`.

    Raises:
        RequestError: what is made has no pictures.
    """
    exact = generator.generate(run, on_step=on_step).frames
    if not exact.size:
        raise RequestError(
            "--hold-out", "compares pictures, and the pipeline makes none", "leave it out"
        )
    setting, found = config.setting(), []
    for schedule in config.schedules:
        cached = replace(run, cache=taking(setting, len(schedule.computed)))
        psnr = compare_videos(generator.generate(cached, on_step=on_step).frames, exact).psnr
        found.append(EQUAL_PSNR if psnr is None else round(min(psnr, EQUAL_PSNR), 3))
    return found


def with_psnr(
    configs: Mapping[str, CachingConfig], scores: Sequence[Sequence[float]]
) -> dict[str, CachingConfig]:
    """Return configs whose solved schedules tell their PSNR.

    Args:
        configs: By name; ``solved`` has a schedule of every number that others have.
        scores: What `held_out_psnr` found with ``solved`` for each run.
    """
    whole = configs["solved"]
    assert isinstance(whole, SolvedConfig), "by its name"
    by_count = {
        len(schedule.computed): [own[index] for own in scores]
        for index, schedule in enumerate(whole.schedules)
    }
    found = dict(configs)
    for name, config in configs.items():
        if isinstance(config, SolvedConfig):
            schedules = [
                s.model_copy(update={"psnr": by_count[len(s.computed)]}) for s in config.schedules
            ]
            found[name] = config.model_copy(update={"schedules": schedules})
    return found
