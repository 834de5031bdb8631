# SPDX-License-Identifier: Apache-2.0
"""VMAF and XPSNR of videos, where an ffmpeg with libvmaf is at hand."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core.extras import missing

__all__ = ["EQUAL_DB", "vmaf_of_frames", "xpsnr_of_video"]

Frames = NDArray[np.uint8]

CHROMA = "[0:v]format=yuv420p[a];[1:v]format=yuv420p[b];[a][b]"

EQUAL_DB = 100.0
"""XPSNR that equal videos count for."""


def vmaf_of_frames(video: Frames, reference: Frames) -> list[float] | None:
    """Measure how near each frame is to the reference's, 0 to 100.

    VMAF's model was made with whole-screen videos of 1080 lines; smaller ones read low.

    Args:
        video: uint8 [frames, height, width, 3].
        reference: The same, of the uncached run.

    Returns:
        A value per frame; None where no ffmpeg with libvmaf is found, or it refuses the size.
    """
    found = _compared(video, reference, "libvmaf=log_fmt=json:log_path=log")
    if found is None:
        return None
    return [float(f["metrics"]["vmaf"]) for f in json.loads(found)["frames"]]


def xpsnr_of_video(video: Frames, reference: Frames) -> float | None:
    """Measure XPSNR of the luma: PSNR with errors weighted by how visible their surroundings make them.

    Args:
        video: uint8 [frames, height, width, 3].
        reference: The same, of the uncached run.

    Returns:
        dB over all frames, `EQUAL_DB` where they are equal; None as of `vmaf_of_frames`.

    Reference: Helmrich et al. 2020, ICASSP, as ffmpeg's filter ``xpsnr`` computes it.
    """
    found = _compared(video, reference, "xpsnr=stats_file=log")
    values = re.search(r"average.*? y: *(\S+)", found or "")
    return None if values is None else min(float(values[1]), EQUAL_DB)


def _compared(video: Frames, reference: Frames, filter_: str) -> str | None:
    """Return what a filter of ffmpeg wrote to ``log`` about two videos."""
    program = _ffmpeg()
    if program is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        size = f"{video.shape[2]}x{video.shape[1]}"
        command = [program, "-v", "error"]
        for name, frames in (("video", video), ("reference", reference)):
            (Path(folder) / name).write_bytes(np.ascontiguousarray(frames).tobytes())
            command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-i", name]
        command += ["-lavfi", CHROMA + filter_, "-f", "null", "-"]
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        log = Path(folder) / "log"
        is_there = done.returncode == 0 and log.is_file()
        return log.read_text(encoding="utf-8") if is_there else None


@cache
def _ffmpeg() -> str | None:
    """Return the first ffmpeg that has libvmaf: the system's, then that of the extra `video`."""
    found = [shutil.which("ffmpeg")]
    if not missing("video"):
        from imageio_ffmpeg import get_ffmpeg_exe

        found.append(get_ffmpeg_exe())
    for program in found:
        if program is not None:
            filters = subprocess.run(
                [program, "-hide_banner", "-filters"], capture_output=True, text=True, check=False
            )
            if " libvmaf " in filters.stdout:
                return program
    return None
