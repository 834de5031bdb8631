# SPDX-License-Identifier: Apache-2.0
"""Generate clips from (caption, seed) pairs with the stock diffusers pipeline."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from architecture import TEXT_TOKENS
from clips import FRAMES, SIZE, Caption, all_captions, unseen_captions
from diffusers import WanPipeline

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Pair:
    """A caption, and the seed of the noise that generation starts from."""

    caption: Caption
    seed: int


def held_out_pairs(count: int) -> list[Pair]:
    """List up to 77 pairs whose captions no training clip carried, in a shuffled, fixed order."""
    return _pair(unseen_captions(), first_seed=10_000, count=count)


def tuning_pairs(count: int) -> list[Pair]:
    """List pairs to choose settings on; they share no caption or seed with ``held_out_pairs``."""
    unseen = set(unseen_captions())
    seen = [caption for caption in all_captions() if caption not in unseen]
    return _pair(seen, first_seed=20_000, count=count)


def _pair(captions: Sequence[Caption], *, first_seed: int, count: int) -> list[Pair]:
    if count > len(captions):
        raise ValueError(f"count: found {count}, expected at most {len(captions)}; ask for fewer")
    shuffled = random.Random(1).sample(captions, count)
    return [Pair(caption, first_seed + index) for index, caption in enumerate(shuffled)]


def load_pipeline(model: Path) -> WanPipeline:
    """Load the model in float32, without progress bars."""
    pipeline = WanPipeline.from_pretrained(model)
    pipeline.text_encoder.to(torch.float32)  # transformers keeps the file's float16
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate_clips(
    pipeline: WanPipeline,
    pairs: Sequence[Pair],
    *,
    steps: int,
    guidance_scale: float,
    text_tokens: int = TEXT_TOKENS,
    batch: int = 4,
) -> Iterator[Frames]:
    """Yield each pair's clip in order: [frames, size, size, 3], RGB.

    Each clip has a generator of its own, so that its noise doesn't depend on the batch.
    """
    for first in range(0, len(pairs), batch):
        part = pairs[first : first + batch]
        output = pipeline(
            [str(pair.caption) for pair in part],
            negative_prompt=[""] * len(part),
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            max_sequence_length=text_tokens,
            generator=[torch.Generator().manual_seed(pair.seed) for pair in part],
            output_type="np",
        )
        yield from (output.frames * 255).round().astype(np.uint8)
