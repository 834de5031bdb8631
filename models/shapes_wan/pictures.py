# SPDX-License-Identifier: Apache-2.0
"""Draw the model card's pictures: a contact sheet, and how the body residual changes by step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from diffusers import WanPipeline
from generate import Frames, Pair, generate_clips
from torch import Tensor, nn

mpl.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen

SHEET_COLUMNS = 6


def draw_contact_sheet(pairs: Sequence[Pair], clips: Sequence[Frames], path: Path) -> None:
    """Draw one row per clip, with evenly spaced frames and the prompt above them."""
    figure, axes = plt.subplots(len(clips), 1, figsize=(7, 1.45 * len(clips)), layout="constrained")
    for axis, pair, clip in zip(np.atleast_1d(axes), pairs, clips, strict=True):
        index = np.linspace(0, len(clip) - 1, SHEET_COLUMNS).round().astype(int)
        row = np.pad(clip[index], ((0, 0), (0, 0), (0, 4), (0, 0)), constant_values=255)
        axis.imshow(np.concatenate(list(row), axis=1))
        axis.set_title(f"{pair.caption} (seed {pair.seed})", fontsize=9, loc="left")
        axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


@contextmanager
def recorded_residuals(transformer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the body residual of every call: last block's output minus first block's input.

    Yields:
        A list that grows by one [batch, tokens, channels] tensor per call of the transformer.
    """
    residuals: list[Tensor] = []
    entered: list[Tensor] = []
    enter = transformer.blocks[0].register_forward_pre_hook(
        lambda _, inputs: entered.append(inputs[0].detach().clone())
    )
    leave = transformer.blocks[-1].register_forward_hook(
        lambda _, __, output: residuals.append(output.detach() - entered.pop())
    )
    try:
        yield residuals
    finally:
        enter.remove()
        leave.remove()


def relative_changes(residuals: Sequence[Tensor]) -> list[float]:
    """Measure ``mean|r[i] - r[i-1]| / mean|r[i-1]|`` for each step after the first."""
    return [
        float((now - before).abs().mean() / before.abs().mean())
        for before, now in pairwise(residuals)
    ]


def measure_residual_changes(
    pipeline: WanPipeline, pairs: Sequence[Pair], *, steps: int, guidance_scale: float
) -> dict[str, list[list[float]]]:
    """Measure the residual's relative change along uncached runs.

    Returns:
        Per branch, ``cond`` and ``uncond``, one curve of ``steps - 1`` values per pair.
    """
    curves: dict[str, list[list[float]]] = {"cond": [], "uncond": []}
    for pair in pairs:
        with recorded_residuals(pipeline.transformer) as residuals, torch.no_grad():
            list(generate_clips(pipeline, [pair], steps=steps, guidance_scale=guidance_scale))
        # The pipeline calls the transformer with the prompt, then without, at each step.
        assert len(residuals) == 2 * steps, "expected two transformer calls per step"
        curves["cond"].append(relative_changes(residuals[0::2]))
        curves["uncond"].append(relative_changes(residuals[1::2]))
    return curves


def draw_residual_changes(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Plot each branch's mean curve over the runs, with the range of the runs as a band."""
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for branch, runs in curves.items():
        values = np.array(runs)
        step_index = np.arange(1, values.shape[1] + 1)
        (line,) = axis.plot(step_index, values.mean(0), label=branch)
        axis.fill_between(
            step_index, values.min(0), values.max(0), color=line.get_color(), alpha=0.15
        )
    axis.set_xlabel("step_index")
    axis.set_ylabel("relative L1 change of the body residual")
    axis.set_ylim(bottom=0)
    axis.grid(visible=True, alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
