"""PSNR and SSIM against their definitions, at any frame size."""

from __future__ import annotations

import numpy as np
import pytest

from freewheel.tuning.quality import compare_frames, compare_videos


def video(shape: tuple[int, ...] = (3, 16, 20, 3), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, shape, dtype=np.uint8)


def test_equal_videos_have_no_finite_psnr() -> None:
    found = compare_videos(video(), video())
    assert found.psnr is None
    assert found.ssim == pytest.approx(1.0)


@pytest.mark.parametrize("offset", [1, 5, 50])
def test_psnr_is_its_definition(offset: int) -> None:
    found = compare_videos(video() + np.uint8(offset), video())
    assert found.psnr == pytest.approx(20 * np.log10(255 / offset))


def test_psnr_is_over_all_frames_together() -> None:
    reference, changed = video(), video()
    changed[0] += 30  # one frame of three
    found = compare_videos(changed, reference)
    assert found.psnr == pytest.approx(10 * np.log10(255**2 / (900 / 3)))


def test_ssim_tells_noise_from_sameness() -> None:
    assert compare_videos(video(), video(seed=1)).ssim < 0.1


@pytest.mark.parametrize("side", [3, 4, 6, 7, 8])
def test_tiny_frames_are_compared(side: int) -> None:
    shape = (2, side, side, 3)
    assert compare_videos(video(shape), video(shape)).ssim == pytest.approx(1.0)


def test_frames_are_compared_one_by_one() -> None:
    reference, changed = video(), video()
    changed[1] += 30
    found = compare_frames(changed, reference)
    assert [q.psnr for q in found] == [None, pytest.approx(20 * np.log10(255 / 30)), None]
    assert found[0].ssim == found[2].ssim == pytest.approx(1.0)
    assert np.mean([q.ssim for q in found]) == pytest.approx(
        compare_videos(changed, reference).ssim
    )
