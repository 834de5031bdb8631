# SPDX-License-Identifier: Apache-2.0
"""What it costs to forecast the whole residual instead of every module's output.

    python benchmarks/taylor_granularity.py --out out/bench

TaylorSeer as published keeps finite differences of each self-attention, cross-attention and
feed-forward output and applies the current gates to their forecasts; Freewheel keeps the residual of
the whole stack. Both run here on the demo model, same prompts, seeds, order and interval: the former as a
PyTorch reference over diffusers' own blocks, the latter through a bundle. Quality is PSNR of
decoded frames against the uncached run; memory is what one branch keeps.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from freewheel.bundle.reader import Bundle
from freewheel.compiler.build import build
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.engines import backend
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.pipeline.generate import Generator
from freewheel.runtime.pipeline.request import GenerationRequest
from freewheel.runtime.settings import config_entries
from freewheel.tuning.quality import compare_videos

MODEL = Path(__file__).resolve().parent.parent / "models" / "shapes_wan"
PROMPTS = (
    "a cyan circle moving down on a brown background",
    "a white square growing on a navy background",
    "a magenta triangle moving left on a black background",
    "an orange ring shrinking on a gray background",
)


class Clock:
    """Where the pipeline stands, told by its cache contexts."""

    def __init__(self) -> None:
        self.branch, self.step, self.interval = "cond", 0, 1


class ForecastModule(torch.nn.Module):
    """A module whose output is forecast on the steps that are not computed.

    Reference: Liu et al. 2025, TaylorSeer, arXiv 2503.06923: order-1 finite difference of the
    module's own output, per branch.
    """

    def __init__(self, module: torch.nn.Module, clock: Clock) -> None:
        super().__init__()
        self.module, self._clock = module, clock
        self._history: dict[str, list[tuple[int, torch.Tensor]]] = {}

    def forward(self, *arguments: Any, **named: Any) -> torch.Tensor:
        """Compute, or extrapolate the line through the last two computed outputs."""
        clock = self._clock
        history = self._history.setdefault(clock.branch, [])
        if clock.step == 0:
            history.clear()
        if clock.step % clock.interval == 0:
            output: torch.Tensor = self.module(*arguments, **named)
            history.insert(0, (clock.step, output))
            del history[2:]
            return output
        (s, newest), *older = history
        if not older:
            return newest
        p, previous = older[0]
        return newest + (newest - previous) * ((clock.step - s) / (s - p))

    def kept_bytes(self) -> int:
        """Return the bytes kept for one branch."""
        return sum(t.nbytes for _, t in next(iter(self._history.values())))


@contextmanager
def per_module(transformer: Any, clock: Clock) -> Iterator[list[ForecastModule]]:
    """Put forecasts around every block's three modules."""
    wrapped = []
    original = transformer.cache_context

    @contextmanager
    def context(name: str, **where: Any) -> Iterator[None]:
        clock.branch, clock.step = name, where["step_index"]
        with original(name, **where):
            yield

    transformer.cache_context = context
    for block in transformer.blocks:
        for name in ("attn1", "attn2", "ffn"):
            forecast = ForecastModule(getattr(block, name), clock)
            setattr(block, name, forecast)
            wrapped.append(forecast)
    try:
        yield wrapped
    finally:
        transformer.cache_context = original
        for block in transformer.blocks:
            for name in ("attn1", "attn2", "ffn"):
                setattr(block, name, getattr(block, name).module)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("out/bench"),
    steps: Annotated[int, typer.Option(help="Denoise steps.")] = 30,
    intervals: Annotated[str, typer.Option(help="Comma-separated.")] = "2,3,4",
) -> None:
    """Compare the two granularities of TaylorSeer on the demo model."""
    from diffusers import WanTransformer3DModel

    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out))
    try:
        configs = config_entries(["shapes_wan_off"], typer.echo)
        build(plan(BuildRequest(str(MODEL), folder / "b", [backend("openvino")], configs)))
        generator = Generator(Bundle(folder / "b"))
        rows = measure(
            generator, WanTransformer3DModel, steps, [int(i) for i in intervals.split(",")]
        )
    finally:
        shutil.rmtree(folder)
    lines = [
        f"demo model, {steps} steps, order 1, {len(PROMPTS)} prompts, PSNR in dB against uncached",
        "",
        "| interval | whole residual, mean (worst) | per module, mean (worst) | kept per branch |",
        "|--:|--:|--:|--:|",
    ]
    for row in rows:
        whole, module = row["whole"], row["per_module"]
        lines.append(
            f"| {row['interval']} | {np.mean(whole):.1f} ({min(whole):.1f}) | {np.mean(module):.1f} "
            f"({min(module):.1f}) | {row['whole_bytes'] / 1e6:.2f} / {row['per_module_bytes'] / 1e6:.2f} MB |"
        )
    text = "\n".join(lines) + "\n"
    (out / "taylor_granularity.json").write_text(json.dumps(rows, indent=1))
    (out / "taylor_granularity.md").write_text(text)
    typer.echo(text)


def measure(
    generator: Generator, transformer_class: Any, steps: int, intervals: list[int]
) -> list[dict[str, Any]]:
    """Return PSNR of both forms per interval and prompt, and the bytes each keeps."""
    defaults = generator.bundle.manifest.configs["shapes_wan_off"].generation
    model = transformer_class.from_pretrained(MODEL, subfolder="transformer", dtype=torch.float32)
    attached, pipe, clock = generator.transformer, generator.pipe, Clock()
    rows: list[dict[str, Any]] = [
        {"interval": i, "whole": [], "per_module": [], "whole_bytes": 0, "per_module_bytes": 0}
        for i in intervals
    ]
    for seed, prompt in enumerate(PROMPTS):

        def request(
            cache: CacheSetting, prompt: str = prompt, seed: int = seed
        ) -> GenerationRequest:
            return GenerationRequest(
                prompt, cache, defaults=defaults, steps=steps, seed=1000 + seed
            )

        reference = generator.generate(request(CacheSetting()))
        for row in rows:
            setting = CacheSetting(policy="taylorseer", parameters={"interval": row["interval"]})
            whole = generator.generate(request(setting))
            row["whole"].append(compare_videos(whole.frames, reference.frames).psnr)
            tokens = reference.latents[:, :1, :, ::2, ::2].numel()
            row["whole_bytes"] = (
                2 * 4 * tokens * model.config.num_attention_heads * model.config.attention_head_dim
            )
            clock.interval = row["interval"]
            pipe.transformer = model
            try:
                with per_module(model, clock) as wrapped, torch.no_grad():
                    found = generator.generate(request(CacheSetting()))
                row["per_module_bytes"] = sum(w.kept_bytes() for w in wrapped)
            finally:
                pipe.transformer = attached
            row["per_module"].append(compare_videos(found.frames, reference.frames).psnr)
    return rows


if __name__ == "__main__":
    typer.run(main)
