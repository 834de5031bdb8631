"""VMAF of frames: equal ones are near the best, worse ones lower, and none without libvmaf."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from freewheel.tuning import vmaf
from freewheel.tuning.vmaf import EQUAL_DB, vmaf_of_frames, xpsnr_of_video


def moving_bars(count: int = 4) -> np.ndarray:
    wave = np.sin(np.arange(96) / 5 + np.arange(count)[:, None] / 2) * 100 + 128
    return np.broadcast_to(wave[:, None, :, None], (count, 64, 96, 3)).astype(np.uint8)


def test_worse_frames_have_lower_values() -> None:
    reference = moving_bars()
    spoilt = reference.copy()
    spoilt[2] = np.random.default_rng(0).integers(0, 255, spoilt[2].shape)
    equal, worse = vmaf_of_frames(reference, reference), vmaf_of_frames(spoilt, reference)
    if equal is None or worse is None:
        pytest.skip("no ffmpeg with libvmaf is here")
    assert len(equal) == len(worse) == 4
    assert min(equal) > 90
    assert worse[2] < 40
    assert worse[0] == pytest.approx(equal[0], abs=1)


def test_xpsnr_falls_with_the_error() -> None:
    reference = moving_bars()
    near, far = (np.clip(reference.astype(int) + d, 0, 255).astype(np.uint8) for d in (2, 20))
    equal, better, worse = (xpsnr_of_video(v, reference) for v in (reference, near, far))
    if equal is None or better is None or worse is None:
        pytest.skip("no ffmpeg with libvmaf is here")
    assert equal == EQUAL_DB > better > worse + 10


def test_no_value_without_libvmaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmaf, "_ffmpeg", lambda: None)
    assert vmaf_of_frames(moving_bars(), moving_bars()) is None
    assert xpsnr_of_video(moving_bars(), moving_bars()) is None


def test_a_program_that_fails_gives_no_value(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(vmaf, "_ffmpeg", lambda: str(program))
    assert vmaf_of_frames(moving_bars(), moving_bars()) is None


def test_an_ffmpeg_that_lacks_the_filter_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, filters in (("plain", "V->V scale"), ("whole", " .. libvmaf  VV->V  calculate")):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho '{filters}'\n")
        program.chmod(0o755)
    monkeypatch.setattr(vmaf, "missing", lambda extra: ["imageio-ffmpeg"])
    for name, expected in (("plain", None), ("whole", str(tmp_path / "whole"))):
        monkeypatch.setattr(vmaf.shutil, "which", lambda _, name=name: str(tmp_path / name))
        vmaf._ffmpeg.cache_clear()
        assert vmaf._ffmpeg() == expected
    vmaf._ffmpeg.cache_clear()
