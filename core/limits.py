# SPDX-License-Identifier: Apache-2.0
"""The largest values that any program of this project takes."""

from __future__ import annotations

from .errors import RequestError

__all__ = ["LARGEST_SEED", "LARGEST_SIZE", "check_size"]

LARGEST_SEED = 2**63 - 1
"""Of the initial noise: an int64."""

LARGEST_SIZE = 1 << 15
"""Pixels of a side, and frames of a video."""


def check_size(name: str, value: int) -> None:
    """Refuse a height, width or count of frames that is absurd.

    Raises:
        RequestError: it is above 32,768.
    """
    if value > LARGEST_SIZE:
        raise RequestError(
            f"--{name} {value}",
            f"is above {LARGEST_SIZE}",
            "give pixels, such as 480" if name != "frames" else "give frames, such as 81",
        )
