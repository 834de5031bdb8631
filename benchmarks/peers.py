# SPDX-License-Identifier: Apache-2.0
"""Quality of other projects' caches on the demo checkpoint, at the computed steps of `quality.py`.

    pip install --no-deps --target out/peers cache-dit==1.5.3
    PYTHONPATH=out/peers python benchmarks/peers.py --out out/bench

Runs the plain diffusers pipeline with diffusers' own hooks and, where it can be imported, cache-dit, on
the captions and seeds of `quality.py`, beside the same pipeline uncached. Thresholds come from one
uncached run on a training caption, by simulating each law on what it will see. Steps are counted
where they happen: calls of the middle block's self-attention and feed-forward, per branch. A speedup is
the uncached pipeline's seconds over the peer's, text encoder and decoder included, the median of the pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from page import OUT, Out, Table, write
from perceptual import LPIPS_WEIGHTS, Lpips
from quality import (
    COLUMNS,
    FIRST_SEED,
    MODEL,
    SEEN,
    captions,
    cells_of,
    seen_by_eye,
    summarised,
)

from freewheel.policies.promise import EQUAL_PSNR
from freewheel.tuning.contest import even_steps
from freewheel.tuning.quality import Quality, compare_videos
from freewheel.tuning.rank import SPEEDUPS

BRANCHES = 2
RETENTION = 0.1
MAX_SKIP = 8

Enable = Callable[[Any], Callable[[], None]]
"""Switches a peer's cache on in a pipeline, and returns what switches it off."""


class Watched:
    """What an uncached run showed: per call of the transformer, the residuals of block 0 and of all."""

    def __init__(self, transformer: Any) -> None:
        self.first: list[torch.Tensor] = []
        self.whole: list[torch.Tensor] = []
        self._before: torch.Tensor | None = None
        blocks = transformer.blocks
        self._hooks = [
            blocks[0].register_forward_hook(self._on_first),
            blocks[-1].register_forward_hook(self._on_last),
        ]

    def _on_first(self, module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        self._before = inputs[0]
        self.first.append(output - inputs[0])

    def _on_last(self, module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        self.whole.append(output - self._before)

    def remove(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()


class Counter:
    """Counts steps in which the middle block's attention, and its feed-forward, were computed."""

    def __init__(self, transformer: Any) -> None:
        middle = transformer.blocks[len(transformer.blocks) // 2]
        self.calls = [0, 0]
        for index, module in enumerate((middle.attn1.to_q, middle.ffn.net[2])):
            module.register_forward_hook(lambda *_, i=index: self._count(i))

    def _count(self, index: int) -> None:
        self.calls[index] += 1

    def take(self) -> tuple[float, float]:
        """Return attention and feed-forward steps per branch since the last time."""
        found = (self.calls[0] / BRANCHES, self.calls[1] / BRANCHES)
        self.calls = [0, 0]
        return found


def first_block_steps(first: Sequence[torch.Tensor], threshold: float) -> int:
    """Return the steps that a first-block cache computes in one branch."""
    kept, count = first[0], 1
    for residual in first[1:]:
        if float((residual - kept).abs().mean() / kept.abs().mean()) >= threshold:
            kept, count = residual, count + 1
    return count


def magnitude_steps(ratios: Sequence[float], threshold: float) -> int:
    """Return the steps that MagCache computes."""
    count, product, error, skipped = 0, 1.0, 0.0, 0
    for t, ratio in enumerate(ratios):
        if t >= int(RETENTION * len(ratios) + 0.5):
            product, skipped = product * ratio, skipped + 1
            error += abs(1 - product)
            if error <= threshold and skipped <= MAX_SKIP:
                continue
            product, error, skipped = 1.0, 0.0, 0
        count += 1
    return count


def nearest(steps: Callable[[float], int], wanted: int) -> float:
    """Return the least threshold whose steps are nearest to those wanted."""
    return float(min(np.geomspace(1e-3, 4.0, 400), key=lambda x: (abs(steps(x) - wanted), x)))


def peers(watched: Watched, steps: int) -> Iterator[tuple[str, Enable]]:
    """Yield every peer at every speedup by ``project: method speedup``."""
    first, whole = watched.first[::BRANCHES], watched.whole[::BRANCHES]
    norms = [r.norm(dim=-1) for r in whole]
    ratios = [1.0, *(float((b / a).mean()) for a, b in pairwise(norms))]
    for speedup in SPEEDUPS:
        count = int(steps // speedup)
        near = nearest(lambda x: first_block_steps(first, x), count)
        magnitude = nearest(lambda x: magnitude_steps(ratios, x), count)
        yield from diffusers_peers(speedup, near, magnitude, ratios, steps)
        yield from cache_dit_peers(speedup, near, even_steps(count, steps), steps)


def diffusers_peers(
    speedup: float, near: float, magnitude: float, ratios: list[float], steps: int
) -> Iterator[tuple[str, Enable]]:
    """Yield diffusers' hooks; TaylorSeer's has whole intervals only.

    Left out: hooks that reuse attention alone (PyramidAttentionBroadcast, FasterCache) compute the
    feed-forward of every step, and have no equal number of computed steps.
    """
    from diffusers.hooks import (
        FirstBlockCacheConfig,
        MagCacheConfig,
        TaylorSeerCacheConfig,
    )

    def hooks(make: Callable[[Any], Any]) -> Enable:
        def enable(pipe: Any) -> Callable[[], None]:
            pipe.transformer.enable_cache(make(pipe))
            return lambda: pipe.transformer.disable_cache()

        return enable

    yield f"diffusers: FirstBlockCache {speedup:g}", hooks(lambda _: FirstBlockCacheConfig(near))
    yield (
        f"diffusers: MagCache {speedup:g}",
        hooks(
            lambda _: MagCacheConfig(
                threshold=magnitude,
                max_skip_steps=MAX_SKIP,
                retention_ratio=RETENTION,
                num_inference_steps=steps,
                mag_ratios=ratios,
            )
        ),
    )
    if speedup != int(speedup):
        return
    interval = int(speedup)
    yield (
        f"diffusers: TaylorSeer {speedup:g}",
        hooks(
            lambda _: TaylorSeerCacheConfig(
                cache_interval=interval,
                max_order=1,
                taylor_factors_dtype=torch.float32,
                # By default it matches names that Wan's modules don't have, and caches nothing.
                cache_identifiers=[r"blocks\.\d+\.(attn1|attn2|ffn)"],
            )
        ),
    )


def cache_dit_peers(
    speedup: float, near: float, exact: list[int], steps: int
) -> Iterator[tuple[str, Enable]]:
    """Yield cache-dit's caches: its own decisions, and an even mask of exactly as many steps."""
    try:
        import cache_dit
    except ImportError as error:
        typer.echo(f"cache-dit is left out: {error}", err=True)
        return

    def cached(config: dict[str, Any], *, order: int) -> Enable:
        def enable(pipe: Any) -> Callable[[], None]:
            calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
            cache_dit.enable_cache(
                pipe,
                cache_config=cache_dit.DBCacheConfig(
                    Fn_compute_blocks=1, Bn_compute_blocks=0, num_inference_steps=steps, **config
                ),
                calibrator_config=calibrator if order else None,
            )
            return lambda: cache_dit.disable_cache(pipe)

        return enable

    own = {"residual_diff_threshold": near, "max_warmup_steps": 1}
    mask = [int(t in exact) for t in range(steps)]
    even = {"steps_computation_mask": mask, "steps_computation_policy": "static"}
    if speedup == SPEEDUPS[0]:  # the same law as diffusers' first-block cache: once shows it
        yield f"cache-dit: DBCache F1B0 {speedup:g}", cached(own, order=0)
    yield f"cache-dit: DBCache F1B0, TaylorSeer, even {speedup:g}", cached(even, order=1)


@contextmanager
def switched_on(pipe: Any, enable: Enable) -> Iterator[None]:
    """Run with a peer's cache."""
    disable = enable(pipe)
    try:
        yield
    finally:
        disable()


def row(
    name: str,
    steps: list[tuple[float, float]],
    quality: list[Quality],
    looks: list[dict[str, float | None]],
    speedups: list[float],
) -> dict[str, Any]:
    """Return every pair's measures, their means and worst cases, spelled as `quality.py` does."""
    found: dict[str, Any] = {
        "name": name,
        "pairs": len(quality),
        "computed_steps": float(np.mean([ffn for _, ffn in steps])),
        "attention_steps": float(np.mean([attention for attention, _ in steps])),
        "speedup": float(np.median(speedups)),
        "psnr": [EQUAL_PSNR if q.psnr is None else q.psnr for q in quality],
        "ssim": [q.ssim for q in quality],
        **{name: [own[name] for own in looks] for name in SEEN},
    }
    return found | summarised(found)


def main(
    out: Out = OUT,
    pairs: Annotated[int, typer.Option(help="Held-out captions, one seed each.")] = 16,
    first: Annotated[int, typer.Option(help="Index of the first held-out caption.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoise steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 3.0,
    only: Annotated[str, typer.Option(help="Peers whose name holds this.")] = "",
    lpips_weights: Annotated[Path | None, LPIPS_WEIGHTS] = None,
) -> None:
    """Measure; the file is written after every pair."""
    lpips = None if lpips_weights is None else Lpips(lpips_weights)
    # It also puts the demo model's folder on the path.
    texts = captions(first + pairs, held_out=True)[first:]
    from generate import load_pipeline

    pipe = load_pipeline(MODEL)
    counter = Counter(pipe.transformer)

    def generate(prompt: str, seed: int) -> Any:
        frames = pipe(
            prompt,
            negative_prompt="",
            height=96,
            width=96,
            num_frames=17,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).frames[0]
        return (frames * 255).round().astype(np.uint8)

    watched = Watched(pipe.transformer)
    generate(captions(1, held_out=False)[0], FIRST_SEED)
    watched.remove()
    chosen = [(n, e) for n, e in peers(watched, steps) if only in n]
    counted: dict[str, list[tuple[float, float]]] = {n: [] for n, _ in chosen}
    quality: dict[str, list[Quality]] = {n: [] for n, _ in chosen}
    looks: dict[str, list[dict[str, float | None]]] = {n: [] for n, _ in chosen}
    speedups: dict[str, list[float]] = {n: [] for n, _ in chosen}
    failed: dict[str, str] = {}
    for index, prompt in enumerate(texts):
        began = time.perf_counter()
        reference = generate(prompt, FIRST_SEED)
        uncached_seconds = time.perf_counter() - began
        for name, enable in chosen:
            if name in failed:
                continue
            counter.take()
            try:
                with switched_on(pipe, enable):
                    began = time.perf_counter()
                    frames = generate(prompt, FIRST_SEED)
                    taken = time.perf_counter() - began
            except Exception as error:
                # A peer that can't run here is a row of the table, not the end of it.
                failed[name] = f"{type(error).__name__}: {error}"
                continue
            counted[name].append(counter.take())
            quality[name].append(compare_videos(frames, reference))
            looks[name].append(seen_by_eye(frames, reference, lpips))
            speedups[name].append(uncached_seconds / taken)
        rows = [
            row(n, counted[n], quality[n], looks[n], speedups[n]) for n, _ in chosen if quality[n]
        ]
        found = {"steps": steps, "guidance_scale": guidance, "rows": rows, "failed": failed}
        table = Table(["setting", *COLUMNS], [[r["name"], *cells_of(r)] for r in rows])
        faults = [f"{name} failed: {fault}." for name, fault in failed.items()]
        text = write(out, "peers", "Other projects' caches", found, table, *faults)
        typer.echo(f"{time.strftime('%X')} {index + 1} of {len(texts)}", err=True)
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
