# SPDX-License-Identifier: Apache-2.0
"""Draw settings side by side as one moving picture: each video, and its decisions as time runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = ["Panel", "moving_picture"]

Frames = NDArray[np.uint8]

GAP, LABEL, STRIP, TEXT = 8, 22, 14, 13
INK, FAINT, COMPUTED, REUSED, PAPER = "#1f2328", "#d1d9e0", "#d9622b", "#b6d3ea", "#ffffff"
WIDTH = 192
"""Pixels of a video, whose proportions are kept."""

LOOPS, FEWEST, MOST = 2, 24, 24
"""Times that videos play while the slowest strip fills; pictures in all; and of a video at most."""


@dataclass(frozen=True)
class Panel:
    """One setting.

    Attributes:
        name: What it goes by.
        frames: uint8 [frames, height, width, 3].
        computed: Whether each denoise step ran the body; None of a step that did not run.
        seconds: Of the denoise loop.
        speedup: Seconds of the uncached run / these.
    """

    name: str
    frames: Frames
    computed: Sequence[bool | None]
    seconds: float
    speedup: float


def moving_picture(panels: Sequence[Panel]) -> Frames:
    """Draw panels in a row; strips fill at the panels' relative speeds.

    A strip has a cell per denoise step, dark where the body ran, light where it was reused. The
    slowest fills while the videos play twice; what a setting took appears when its own is full.

    Args:
        panels: Settings whose videos are of one shape.

    Returns:
        uint8 [frames, height, width, 3].
    """
    count, height, width, _ = panels[0].frames.shape
    size = (WIDTH, round(height * WIDTH / width))
    shown = np.linspace(0, count - 1, min(count, MOST)).round().astype(int)
    total = len(shown) * max(LOOPS, -(-FEWEST // len(shown)))
    slowest = max(panel.seconds for panel in panels)
    font = ImageFont.load_default(size=TEXT)
    whole = (len(panels) * (WIDTH + GAP) + GAP, LABEL + size[1] + GAP + STRIP + LABEL)
    pictures = []
    for index in range(total):
        picture = Image.new("RGB", whole, PAPER)
        draw = ImageDraw.Draw(picture)
        for number, panel in enumerate(panels):
            left, top = GAP + number * (WIDTH + GAP), LABEL + size[1] + GAP
            frame = Image.fromarray(panel.frames[shown[index % len(shown)]])
            picture.paste(frame.resize(size, Image.Resampling.BICUBIC), (left, LABEL))
            draw.text((left, 3), panel.name, fill=INK, font=font)
            share = min(1.0, slowest * (index + 1) / total / panel.seconds)
            _draw_strip(draw, panel.computed, share, left, top)
            if share == 1:
                draw.text((left, top + STRIP + 3), _took(panel), fill=INK, font=font)
        pictures.append(np.asarray(picture))
    return np.stack(pictures)


def _draw_strip(
    draw: ImageDraw.ImageDraw, computed: Sequence[bool | None], share: float, left: int, top: int
) -> None:
    """Draw the cells of the steps that a share of the run's time has reached, and the others empty.

    A computed step takes its share of the time, and a reused one none.
    """
    reached = share * computed.count(True)
    begun = 0
    for step, is_computed in enumerate(computed):
        begun += is_computed is True
        x0, x1 = (round(left + WIDTH * at / len(computed)) for at in (step, step + 1))
        color = FAINT if is_computed is None else COMPUTED if is_computed else REUSED
        if begun <= reached:
            draw.rectangle((x0, top, x1 - 2, top + STRIP - 2), fill=color)
        else:
            draw.rectangle((x0, top, x1 - 2, top + STRIP - 2), outline=FAINT)


def _took(panel: Panel) -> str:
    if panel.speedup == 1:
        return f"{len(panel.computed)} steps, {panel.seconds:.2f} s"
    return f"{panel.computed.count(True)} computed, {panel.speedup:.2f} times"
