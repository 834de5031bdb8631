# SPDX-License-Identifier: Apache-2.0
r"""What caching adds where a run has few steps, beside running fewer steps.

Every reused step of a short run is compared, as is leaving it out: PSNR of decoded frames against
the uncached run of as many steps, and against a long uncached run of the same seed.

    python benchmarks/few_steps.py out/demo/bundle
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from page import OUT, Out, Table, write

from freewheel.bundle.reader import Bundle
from freewheel.policies.promise import EQUAL_PSNR
from freewheel.policies.setting import CacheSetting, GuardSetting
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


def settings(steps: int) -> dict[str, CacheSetting]:
    """Return a setting for each policy and each step that it reuses; the first is always computed."""
    found = {}
    for step in range(1, steps):
        exact = [i for i in range(steps) if i != step]
        guard = GuardSetting(first_exact=1, last_exact=0, exact_steps=exact)
        for name, setting in POLICIES.items():
            if name == "taylor" and step < 2:
                continue  # a line wants two computed steps
            found[f"{name}, step {step}"] = setting.model_copy(update={"guard": guard})
    return found


def main(
    bundle: Annotated[Path, typer.Argument(help="Of the demo model.")],
    out: Out = OUT,
    steps: Annotated[list[int], typer.Option(help="Lengths of short runs.")] = [4, 8],  # noqa: B006
    long: Annotated[int, typer.Option(help="Steps of the long run.")] = 50,
    prompts: Annotated[int, typer.Option(help="Held-out prompts.")] = 8,
    sampler: Annotated[str, typer.Option(help="Of the short runs.")] = "distilled",
) -> None:
    """Measure."""
    opened = Bundle(bundle)
    generator = Generator(opened)
    off = choose_setting(opened, "off", {}, lambda text: None)
    rows: dict[str, list[list[float]]] = {}
    for index, prompt in enumerate(read_prompts(HELD_OUT)[:prompts]):
        plain = GenerationRequest(
            prompt=prompt, cache=off.cache, defaults=off.generation, seed=index
        )
        target = generator.generate(replace(plain, steps=long)).frames
        for count in steps:
            short = replace(plain, steps=count, sampler=sampler)
            whole = generator.generate(short).frames
            fewer = generator.generate(replace(short, steps=count - 1)).frames
            made = {f"{count} steps": whole, f"{count - 1} steps": fewer}
            for name, setting in settings(count).items():
                result = generator.generate(replace(short, cache=setting))
                assert result.statistics.computed_steps == count - 1, name
                made[f"{count} steps, {name}"] = result.frames
            for name, frames in made.items():
                near, far = (compare_videos(frames, other).psnr for other in (whole, target))
                rows.setdefault(f"{name} (of {count})", []).append(
                    [near or EQUAL_PSNR, far or EQUAL_PSNR]
                )
        typer.echo(f"{index + 1} of {prompts}", err=True)
    means = {name: [round(float(v), 2) for v in np.mean(r, axis=0)] for name, r in rows.items()}
    table = Table(
        ["run", "dB from the short run", f"dB from {long} steps"],
        [[name, f"{near:.2f}", f"{far:.2f}"] for name, (near, far) in means.items()],
        f"Sampler {sampler}, mean of {prompts} held-out captions:",
    )
    figures = {"prompts": prompts, "long": long, "sampler": sampler, "psnr": rows, "means": means}
    typer.echo(write(out, "few_steps", "Few steps", figures, table))


if __name__ == "__main__":
    typer.run(main)
