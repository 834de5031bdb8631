# SPDX-License-Identifier: Apache-2.0
r"""What caching adds where a run has few steps, beside running fewer steps.

Every reused step of a short run is compared, as is leaving it out of the step list: PSNR of decoded frames
against the uncached run of as many steps, and against a long uncached run of the same seed.

    python benchmarks/few_steps.py out/demo/bundle

The same for a checkpoint distilled to few steps (models/shapes_wan/distil.py), whose bundle's default config says
how it runs; the long runs stay those of the first bundle, its teacher:

    python benchmarks/few_steps.py out/demo/bundle --student out/four_steps/bundle --calibration solved.json
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from page import OUT, Out, Table, write

from freewheel.bundle.reader import Bundle
from freewheel.bundle.sampler import list_sampler
from freewheel.configs.load import load_config
from freewheel.policies.promise import EQUAL_PSNR
from freewheel.policies.setting import CacheSetting, GuardSetting
from freewheel.policies.solved import SolvedConfig
from freewheel.runtime.pipeline.generate import Generator
from freewheel.runtime.pipeline.request import GenerationRequest
from freewheel.runtime.settings import choose_setting
from freewheel.tuning.bench import read_prompts
from freewheel.tuning.quality import compare_videos

HELD_OUT = Path(__file__).with_name("held_out.txt")
ALWAYS = 1e9
"""A threshold below which every distance is: what the guard does not compute is reused."""
POLICIES: Mapping[str, CacheSetting] = {
    "hold": CacheSetting(policy="teacache", parameters={"threshold": ALWAYS}),
    "taylor": CacheSetting(policy="taylorseer", parameters={"interval": 1000, "order": 1}),
    "first block": CacheSetting(policy="firstblock", parameters={"threshold": ALWAYS}),
}
DIVISIONS = ((2, 0), (4, 0), (6, 0), (2, 2))
"""First and last blocks that a reused step runs too."""


def divided() -> dict[str, CacheSetting]:
    """Return settings that reuse some blocks of a step, by name."""
    found = {}
    for first, last in DIVISIONS:
        parameters = {"threshold": ALWAYS, "first_blocks": first, "last_blocks": last}
        found[f"blocks {first}+{last}"] = CacheSetting(policy="dbcache", parameters=parameters)
    return found


def settings(steps: int, distilled: bool) -> Iterator[tuple[str, int, CacheSetting]]:
    """Yield name, computed steps and setting of each policy and the steps that it reuses.

    The first step is always computed, and one other reused; of a distilled model also several, and
    parts of one.
    """
    for reused in range(1, steps if distilled else 2):
        policies = {**POLICIES, **(divided() if distilled and reused == 1 else {})}
        for chosen in combinations(range(1, steps), reused):
            exact = [i for i in range(steps) if i not in chosen]
            guard = GuardSetting(first_exact=1, last_exact=0, exact_steps=exact)
            where = ", ".join(str(step + 1) for step in chosen)
            for name, setting in policies.items():
                if name == "taylor" and chosen[0] < 2:
                    continue  # a line wants two computed steps
                named = f"{name}, step{'s' * (reused > 1)} {where}"
                yield named, steps - reused, setting.model_copy(update={"guard": guard})


def shorter(steps: int, distilled: bool) -> Iterator[tuple[str, int, str]]:
    """Yield name, steps and sampler of each way to leave one step, or several, out of the list."""
    levels = [1000 * (steps - i) / steps for i in range(steps)]
    for less in range(1, steps if distilled else 2):
        for left_out in combinations(range(1, steps), less):
            where = ", ".join(str(step + 1) for step in left_out)
            kept = [level for i, level in enumerate(levels) if i not in left_out]
            yield f"without step{'s' * (less > 1)} {where}", len(kept), list_sampler(kept)


@dataclass
class Runs:
    """What was measured of one way to run, over the prompts.

    Attributes:
        ideal: Speedup by the blocks that run, over the uncached run.
        near: dB from the uncached short run.
        far: dB from the long run.
        seconds: Of the denoise loop.
    """

    ideal: float
    near: list[float] = field(default_factory=list)
    far: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def requests(
    short: GenerationRequest, steps: int, solved: Mapping[str, CacheSetting], *, distilled: bool
) -> Iterator[tuple[str, float, GenerationRequest]]:
    """Yield name, computed steps and request of each short run, the whole one first."""
    short = replace(short, steps=steps)
    yield f"{steps} steps", steps, short
    for name, fewer, sampler in shorter(steps, distilled):
        yield name, fewer, replace(short, steps=fewer, sampler=sampler)
    for name, computed, setting in settings(steps, distilled):
        yield name, computed, replace(short, cache=setting)
    for name, setting in solved.items():
        yield name, setting.parameters["computed_steps"], replace(short, cache=setting)


def main(
    bundle: Annotated[Path, typer.Argument(help="Of the demo model.")],
    out: Out = OUT,
    steps: Annotated[list[int], typer.Option(help="Lengths of short runs.")] = [4, 8],  # noqa: B006
    long: Annotated[int, typer.Option(help="Steps of the long run.")] = 50,
    prompts: Annotated[int, typer.Option(help="Held-out prompts.")] = 8,
    sampler: Annotated[str, typer.Option(help="Of the short runs.")] = "distilled",
    student: Annotated[
        Path | None, typer.Option(help="Bundle of the distilled model: the short runs are its.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="What `calibrate` wrote of the student: its schedules run.")
    ] = None,
) -> None:
    """Measure."""
    opened = Bundle(bundle)
    generator = Generator(opened)
    off = choose_setting(opened, "off", {}, lambda text: None)
    runner, generation, solved = generator, off.generation, {}
    if student is not None:
        other = Bundle(student)
        runner = Generator(other)
        generation = choose_setting(other, None, {}, typer.echo).generation
        steps, sampler = [generation.steps], generation.sampler or sampler
        if calibration is not None:
            solved = schedules(other, calibration, generation.steps)
    found: dict[int, dict[str, Runs]] = {count: {} for count in steps}
    for index, prompt in enumerate(read_prompts(HELD_OUT)[:prompts]):
        plain = GenerationRequest(
            prompt=prompt, cache=off.cache, defaults=off.generation, seed=index
        )
        target = generator.generate(replace(plain, steps=long)).frames
        short = replace(plain, defaults=generation, sampler=sampler)
        for count, runs in found.items():
            if not index:  # what is made lazily is not timed
                runner.generate(replace(short, steps=count))
            asked = requests(short, count, solved, distilled=student is not None)
            made = {name: (computed, runner.generate(run)) for name, computed, run in asked}
            if student is not None:
                same = replace(
                    short, defaults=off.generation, steps=count, flow_shift=generation.flow_shift
                )
                made["undistilled, with guidance"] = count, generator.generate(same)
            whole = next(iter(made.values()))[1]
            for name, (computed, result) in made.items():
                told = result.statistics
                assert told.computed_steps == computed, name
                calls = told.steps * len(told.branches) / told.ideal_speedup
                run = runs.setdefault(name, Runs(count * len(whole.statistics.branches) / calls))
                near, far = (compare_videos(result.frames, f).psnr for f in (whole.frames, target))
                run.near.append(near or EQUAL_PSNR)
                run.far.append(far or EQUAL_PSNR)
                run.seconds.append(told.loop_seconds)
        typer.echo(f"{index + 1} of {prompts}", err=True)
    name, title = "few_steps", "Few steps"
    if student is not None:
        name, title = f"{name}_distilled", f"{title} of a distilled model"
    tables = [
        table(runs, f"Sampler {sampler}, {count} steps, mean of {prompts} held-out captions:", long)
        for count, runs in found.items()
    ]
    measured = {n: {name: vars(run) for name, run in runs.items()} for n, runs in found.items()}
    figures = {"prompts": prompts, "long": long, "sampler": sampler, "runs": measured}
    typer.echo(write(out, name, title, figures, *tables))


def schedules(bundle: Bundle, calibration: Path, steps: int) -> dict[str, CacheSetting]:
    """Return the solved schedules that compute less than all steps, by name."""
    config = load_config(f"{calibration}#solved")
    assert isinstance(config, SolvedConfig)
    counts = sorted((len(s.computed) for s in config.schedules), reverse=True)
    found = {}
    for computed in counts[counts[0] == steps :]:
        chosen = choose_setting(
            bundle, f"{calibration}#solved", {"computed_steps": str(computed)}, typer.echo
        )
        found[f"solved, {computed} computed"] = chosen.cache
    return found


def table(runs: Mapping[str, Runs], text: str, long: int) -> Table:
    """Return the table of one length of runs."""
    whole = np.median(next(iter(runs.values())).seconds)
    rows = [
        [
            name,
            f"{run.ideal:.2f}",
            f"{whole / np.median(run.seconds):.2f}",
            f"{np.mean(run.near):.1f}",
            f"{np.mean(run.far):.1f}",
            f"{min(run.far):.1f}",
        ]
        for name, run in runs.items()
    ]
    near, far = "dB from the short run", f"dB from {long} steps"
    columns = ["run", "ideal speedup", "speedup", near, far, "worst"]
    return Table(columns, rows, text)


if __name__ == "__main__":
    typer.run(main)
