# SPDX-License-Identifier: Apache-2.0
"""The moving picture of several settings."""

from __future__ import annotations

import numpy as np
from PIL import ImageColor

from freewheel.tuning import moving_picture as drawn
from freewheel.tuning.moving_picture import Panel, moving_picture

VIDEO = np.full((6, 48, 96, 3), 90, np.uint8)
WIDE = drawn.WIDTH + drawn.GAP


def panels() -> list[Panel]:
    return [
        Panel("uncached", VIDEO, [True] * 8, 2.0, 1.0),
        Panel("teacache", VIDEO, [True, False] * 4, 1.0, 2.0),
    ]


def cells(picture: np.ndarray, number: int) -> str:
    """Read a panel's strip: c of a computed step, r of a reused one, . of one that is to come."""
    row = drawn.LABEL + drawn.WIDTH // 2 + drawn.GAP + drawn.STRIP // 2
    left = drawn.GAP + number * WIDE
    middles = [round(left + drawn.WIDTH * (step + 0.5) / 8) for step in range(8)]
    known = {
        ImageColor.getrgb(drawn.COMPUTED): "c",
        ImageColor.getrgb(drawn.REUSED): "r",
        ImageColor.getrgb(drawn.PAPER): ".",
    }
    return "".join(known[tuple(int(v) for v in picture[row, x])] for x in middles)


def test_strips_fill_at_the_settings_own_speeds() -> None:
    pictures = moving_picture(panels())
    assert pictures.shape[0] == drawn.FEWEST
    assert [cells(pictures[-1], number) for number in (0, 1)] == ["cccccccc", "crcrcrcr"]
    halfway = pictures[len(pictures) // 2 - 1]
    assert [cells(halfway, number) for number in (0, 1)] == ["cccc....", "crcrcrcr"]
    quarter = pictures[len(pictures) // 4 - 1]
    assert [cells(quarter, number) for number in (0, 1)] == ["cc......", "crcr...."]


def test_what_a_setting_took_appears_when_it_is_done() -> None:
    pictures = moving_picture(panels())
    below = pictures[:, drawn.LABEL + drawn.WIDTH // 2 + drawn.GAP + drawn.STRIP :]
    has_text = (below < 128).any(axis=(1, 3))  # by column
    slow, fast = has_text[:, :WIDE].any(axis=1), has_text[:, WIDE:].any(axis=1)
    assert list(np.flatnonzero(slow)) == [len(pictures) - 1]
    assert np.flatnonzero(fast)[0] == len(pictures) // 2 - 1


def test_a_long_video_is_thinned_and_keeps_its_proportions() -> None:
    long = [Panel("uncached", np.zeros((81, 30, 60, 3), np.uint8), [True], 1.0, 1.0)]
    pictures = moving_picture(long)
    assert pictures.shape[0] == drawn.LOOPS * drawn.MOST
    black = (pictures[0] == 0).all(axis=-1)
    assert (black.any(axis=1).sum(), black.any(axis=0).sum()) == (drawn.WIDTH // 2, drawn.WIDTH)
