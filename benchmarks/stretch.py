# SPDX-License-Identifier: Apache-2.0
r"""What a solved schedule costs in runs of other steps than its own, and in runs that begin in their midst.

    python benchmarks/stretch.py out/demo/bundle --out out/stretch

A schedule that is calibrated at one number of steps is run at others, beside one that is calibrated there with as
many computed steps, and beside as many evenly spread ones with a line through the last two residuals. Runs in
the midst go on from a noised video of the same caption, another seed: from the schedule's step of their noise
level, and with all of its steps stretched over the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import WanVideoToVideoPipeline
from numpy.typing import NDArray
from page import OUT, Out, Table, write
from quality import captions

from freewheel.bundle.reader import Bundle
from freewheel.policies.decision_loop import DecisionLoop
from freewheel.policies.promise import EQUAL_PSNR
from freewheel.policies.schedule import Schedule
from freewheel.policies.setting import CacheSetting, GuardSetting
from freewheel.policies.solved import SolvedConfig
from freewheel.runtime.pipeline.generate import Generation, Generator
from freewheel.runtime.pipeline.request import GenerationRequest
from freewheel.runtime.settings import choose_setting
from freewheel.tuning.gram import GramRecorder
from freewheel.tuning.lockstep import Lockstep, sampler_table
from freewheel.tuning.quality import compare_videos
from freewheel.tuning.search import candidates, search
from freewheel.tuning.solved_configs import schedule_of

WINDOW, HISTORY = 16, 6
RECIPE = (2.0, 3)
"""The weight of early errors, and residuals of a mix, that schedules are solved for."""
CALIBRATION_SEED, HELD_OUT_SEED, VIDEO_SEED = 1000, 0, 100


class Runs:
    """Runs of one size of a bundle."""

    def __init__(self, bundle: Bundle, pixels: int, frames: int) -> None:
        self.bundle, self.pixels, self.frames = bundle, pixels, frames
        self.generator = Generator(bundle)
        self.base = choose_setting(bundle, "off", {}, typer.echo)
        self.from_video = WanVideoToVideoPipeline.from_pipe(self.generator.pipe)
        self.from_video.set_progress_bar_config(disable=True)

    def run(
        self, prompt: str, steps: int, cache: CacheSetting, seed: int, recorder: Any = None
    ) -> Generation:
        """Make a video from noise."""
        asked = GenerationRequest(
            prompt=prompt,
            cache=cache,
            defaults=self.base.generation,
            steps=steps,
            seed=seed,
            height=self.pixels,
            width=self.pixels,
            frames=self.frames,
        )
        return self.generator.generate(asked, recorder=recorder)

    def go_on(
        self, prompt: str, steps: int, strength: float, cache: CacheSetting, video: torch.Tensor
    ) -> NDArray[np.uint8]:
        """Return frames of a run that begins in the midst, from a video's latents."""
        scheduler = self.from_video.scheduler
        scheduler.set_timesteps(steps)
        level = float(scheduler.sigmas[steps - int(steps * strength)])
        noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(HELD_OUT_SEED))
        self.generator.transformer.use(cache)
        answer = self.from_video(
            None,
            prompt,
            negative_prompt="",
            latents=(1 - level) * video + level * noise,
            height=self.pixels,
            width=self.pixels,
            num_inference_steps=steps,
            strength=strength,
            guidance_scale=self.base.generation.guidance_scale,
            max_sequence_length=16,
            output_type="np",
        )
        return np.asarray((answer.frames[0] * 255).round(), np.uint8)

    def schedule(self, steps: int) -> Schedule:
        """Return timesteps and noise levels of a run from noise."""
        scheduler = self.generator.pipe.scheduler
        scheduler.set_timesteps(steps)
        return Schedule.of(scheduler.timesteps, scheduler.sigmas[:steps])

    def calibrated(self, steps: int, count: int, prompts: Sequence[str]) -> CacheSetting:
        """Return the schedule of so many computed steps solved for `RECIPE`, fitted on its cached runs."""
        recorder = GramRecorder(self.generator.transformer.session.model, window=WINDOW)
        for index, prompt in enumerate(prompts):
            self.run(prompt, steps, CacheSetting(), CALIBRATION_SEED + index, recorder)
        grams, levels = recorder.grams(), recorder.tables["sigmas"]
        scale = self.base.generation.guidance_scale
        guidance = dict(zip(grams.branches, (scale, 1.0 - scale), strict=True))
        table = sampler_table(self.bundle, recorder.tables["timesteps"])
        assert table is not None, "the bundle has a table of the run's sampler"
        model = self.generator.transformer.session.model
        lockstep = Lockstep(model, recorder.starts, table, guidance, history=HISTORY)
        found = candidates(grams, guidance, np.append(levels, 0.0), history=HISTORY)[count]
        best = search(lockstep, [found[RECIPE]], rounds=0)
        return SolvedConfig(
            infer_steps=steps,
            sigmas=[float(level) for level in levels],
            schedules=[schedule_of(best)],
        ).setting()


def evenly(steps: int, count: int) -> CacheSetting:
    """Return a setting of so many computed steps, with a line through the last two residuals."""
    guard = GuardSetting(
        first_exact=1, last_exact=0, exact_steps=[steps * i // count for i in range(count)]
    )
    parameters = {"interval": 1000, "order": 1}
    return CacheSetting(policy="taylorseer", parameters=parameters, guard=guard)


def computed(cache: CacheSetting, schedule: Schedule) -> int:
    """Return how many steps a setting whose decisions are known ahead computes."""
    law = DecisionLoop.eager(cache, step_count=len(schedule), schedule=schedule)
    return sum(law.decide().compute for _ in range(len(schedule)))


def stretched(cache: CacheSetting) -> CacheSetting:
    """Return a solved setting that begins every run at its first step."""
    own = {n: v for n, v in cache.parameters.items() if n != "sigmas"}
    return cache.model_copy(update={"parameters": own})


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle of the demo model.")],
    out: Out = OUT,
    made: Annotated[int, typer.Option(help="Steps that the schedule is calibrated at.")] = 20,
    count: Annotated[int, typer.Option(help="Steps of these that it computes.")] = 10,
    others: Annotated[
        str, typer.Option(help="Steps of other runs, by commas.")
    ] = "12,16,18,22,25,30,40",
    strengths: Annotated[str, typer.Option(help="Of runs in the midst, by commas.")] = "0.75,0.5",
    prompts: Annotated[int, typer.Option(help="Captions to calibrate on.")] = 8,
    pairs: Annotated[int, typer.Option(help="Held-out captions, one seed each.")] = 16,
    pixels: Annotated[int, typer.Option(help="Height and width.")] = 96,
    frames: Annotated[int, typer.Option(help="Frames.")] = 17,
) -> None:
    """Measure; the file is written after every held-out caption."""
    runs = Runs(Bundle(bundle), pixels, frames)
    texts = captions(prompts, held_out=False)
    kept = runs.calibrated(made, count, texts)
    typer.echo(f"calibrated at {made}", err=True)
    whole: dict[int, dict[str, CacheSetting]] = {made: {"own": kept, "evenly": evenly(made, count)}}
    counts = {made: count}
    for steps in (int(text) for text in others.split(",") if text):
        counts[steps] = computed(kept, runs.schedule(steps))
        whole[steps] = {
            "own": runs.calibrated(steps, counts[steps], texts),
            "stretched": kept,
            "evenly": evenly(steps, counts[steps]),
        }
        typer.echo(f"calibrated at {steps}, {counts[steps]} computed", err=True)
    midst: dict[float, dict[str, CacheSetting]] = {}
    of_midst: dict[float, dict[str, int]] = {}
    for strength in (float(text) for text in strengths.split(",") if text):
        rest = runs.schedule(made)
        first = made - int(made * strength)
        rest = Schedule(rest.timesteps[first:], rest.sigmas[first:])
        own = computed(kept, rest)
        midst[strength] = {
            "own": kept,
            "stretched": stretched(kept),
            "evenly": evenly(len(rest), own),
        }
        of_midst[strength] = {n: computed(c, rest) for n, c in midst[strength].items()}
    psnr: dict[str, list[float]] = {}
    for index, prompt in enumerate(captions(pairs, held_out=True)):
        for steps, settings in whole.items():
            exact = runs.run(prompt, steps, CacheSetting(), HELD_OUT_SEED).frames
            for name, cache in settings.items():
                made_frames = runs.run(prompt, steps, cache, HELD_OUT_SEED).frames
                psnr.setdefault(f"{steps} {name}", []).append(_psnr(made_frames, exact))
        video = runs.run(prompt, made, CacheSetting(), VIDEO_SEED).latents
        for strength, settings in midst.items():
            exact = runs.go_on(prompt, made, strength, CacheSetting(), video)
            for name, cache in settings.items():
                made_frames = runs.go_on(prompt, made, strength, cache, video)
                psnr.setdefault(f"{strength} {name}", []).append(_psnr(made_frames, exact))
        figures = {
            "made": made,
            "pairs": index + 1,
            "prompts": prompts,
            "pixels": pixels,
            "frames": frames,
            "computed": counts,
            "computed_in_the_midst": of_midst,
            "psnr": psnr,
        }
        text = write(out, "stretch", "Other runs than the calibration's", figures, *tables(figures))
        typer.echo(f"{index + 1} of {pairs}", err=True)
    typer.echo(text)


def _psnr(frames: NDArray[np.uint8], exact: NDArray[np.uint8]) -> float:
    found = compare_videos(frames, exact).psnr
    return EQUAL_PSNR if found is None else found


def tables(figures: Mapping[str, Any]) -> tuple[Table, Table]:
    """Return PSNR of runs of other steps, and of runs in the midst."""
    made, psnr = figures["made"], figures["psnr"]

    def look(name: str) -> str | None:
        own = psnr.get(name)
        return None if own is None else f"{np.mean(own):.1f} ({min(own):.1f})"

    def loss(steps: int) -> str | None:
        if steps == made:
            return None
        return f"{np.mean(psnr[f'{steps} own']) - np.mean(psnr[f'{steps} stretched']):.1f}"

    whole = [
        [
            str(steps),
            count,
            look(f"{steps} own"),
            look(f"{steps} stretched"),
            loss(steps),
            look(f"{steps} evenly"),
        ]
        for steps, count in sorted(figures["computed"].items())
    ]
    midst = [
        [
            f"{strength:g}",
            f"{counts['own']} of {int(made * strength)}",
            look(f"{strength} own"),
            look(f"{strength} evenly"),
            f"{counts['stretched']} of {int(made * strength)}",
            look(f"{strength} stretched"),
        ]
        for strength, counts in figures["computed_in_the_midst"].items()
    ]
    about = (
        f"{figures['prompts']} captions calibrated on, {figures['pairs']} held out, {figures['frames']} frames of "
        f"{figures['pixels']} × {figures['pixels']}. PSNR in dB against the uncached run, mean (worst)."
    )
    return (
        Table(
            [
                "steps of the run", "computed", "calibrated at these steps",
                f"stretched from {made}", "loss", "evenly spread, a line",
            ],
            whole, about,
        ),
        Table(
            [
                "`--strength`", "computed", "from the schedule's step of that noise level",
                "evenly spread, a line", "computed", "all of the schedule stretched over the run",
            ],
            midst, f"Runs of {made} steps that begin in their midst:",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
