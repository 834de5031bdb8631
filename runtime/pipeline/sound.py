# SPDX-License-Identifier: Apache-2.0
"""Recordings, and how they are written."""

from __future__ import annotations

import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...core.output import replaced_whole

__all__ = ["Sound", "write_sound"]


@dataclass(frozen=True)
class Sound:
    """A recording.

    Attributes:
        samples: float32 [channels, samples], from -1 to 1.
        rate: Samples a second.
    """

    samples: NDArray[np.float32]
    rate: int


def write_sound(sound: Sound, path: Path) -> None:
    """Write a recording as a .wav of 16 bits, whole or not at all.

    Samples beyond -1 and 1 are cut off there.

    Raises:
        OutputError: it can't be written.
    """
    samples = (sound.samples.clip(-1, 1) * 32767).round().astype("<i2")
    with (
        replaced_whole(path, "choose another --out") as partial,
        wave.open(str(partial), "wb") as file,
    ):
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(sound.rate)
        file.writeframes(np.ascontiguousarray(samples.T).tobytes())
