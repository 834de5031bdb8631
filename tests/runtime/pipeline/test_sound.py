"""Recordings written and read again."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np

from freewheel.runtime.pipeline.sound import Sound, write_sound


def test_a_recording_is_written_in_order_and_cut_off_at_full_scale(tmp_path: Path) -> None:
    samples = np.array([[0.0, 0.5, 1.5], [0.0, -0.5, -2.0]], np.float32)
    write_sound(Sound(samples, 48000), tmp_path / "out" / "sound.wav")
    with wave.open(str(tmp_path / "out" / "sound.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (2, 2, 48000)
        found = np.frombuffer(file.readframes(3), "<i2").reshape(3, 2).T
    assert found.tolist() == [[0, 16384, 32767], [0, -16384, -32767]]
