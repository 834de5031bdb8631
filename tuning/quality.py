# SPDX-License-Identifier: Apache-2.0
"""How far cached frames are from uncached ones: PSNR and SSIM of decoded video."""

from __future__ import annotations

from dataclasses import dataclass
from math import isinf

import numpy as np
from numpy.typing import NDArray

from ..core.extras import require_extra

__all__ = ["Quality", "compare_frames", "compare_videos"]

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Quality:
    """PSNR in dB (None where the videos are equal) and mean SSIM over frames."""

    psnr: float | None
    ssim: float


def compare_videos(video: Frames, reference: Frames) -> Quality:
    """Compare two videos of equal shape.

    Args:
        video: uint8 [frames, height, width, 3].
        reference: The same, of the uncached run with the same seed.

    Returns:
        PSNR over all frames together and SSIM averaged over frames.

    Raises:
        DependencyError: what measures them is not installed.
    """
    return Quality(_psnr(video, reference), float(np.mean(_ssim(video, reference))))


def compare_frames(video: Frames, reference: Frames) -> list[Quality]:
    """Compare two videos of equal shape frame by frame; see `compare_videos`."""
    ssim = _ssim(video, reference)
    triples = zip(video, reference, ssim, strict=True)
    return [Quality(_psnr(a, b), s) for a, b, s in triples]


def _psnr(video: Frames, reference: Frames) -> float | None:
    require_extra("metrics", "PSNR and SSIM")
    from skimage.metrics import peak_signal_noise_ratio

    with np.errstate(divide="ignore"):
        psnr = float(peak_signal_noise_ratio(reference, video, data_range=255))
    return None if isinf(psnr) else psnr


def _ssim(video: Frames, reference: Frames) -> list[float]:
    require_extra("metrics", "PSNR and SSIM")
    from skimage.metrics import structural_similarity

    # SSIM's window is 7 wide; tiny frames get the largest odd one that fits.
    window = min(7, (min(reference.shape[1:3]) - 1) | 1)
    return [
        float(structural_similarity(a, b, channel_axis=-1, data_range=255, win_size=window))
        for a, b in zip(reference, video, strict=True)
    ]
