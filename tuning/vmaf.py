# SPDX-License-Identifier: Apache-2.0
"""VMAF of each frame, where an ffmpeg with libvmaf is at hand."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core.extras import missing

__all__ = ["vmaf_of_frames"]

Frames = NDArray[np.uint8]

GRAPH = (
    "[0:v]format=yuv420p[a];[1:v]format=yuv420p[b];[a][b]libvmaf=log_fmt=json:log_path=vmaf.json"
)


def vmaf_of_frames(video: Frames, reference: Frames) -> list[float] | None:
    """Measure how near each frame is to the reference's, 0 to 100.

    VMAF's model was made with whole-screen videos of 1080 lines; smaller ones read low.

    Args:
        video: uint8 [frames, height, width, 3].
        reference: The same, of the uncached run.

    Returns:
        A value per frame; None where no ffmpeg with libvmaf is found, or it refuses the size.
    """
    program = _ffmpeg()
    if program is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        size = f"{video.shape[2]}x{video.shape[1]}"
        command = [program, "-v", "error"]
        for name, frames in (("video", video), ("reference", reference)):
            (Path(folder) / name).write_bytes(np.ascontiguousarray(frames).tobytes())
            command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-i", name]
        command += ["-lavfi", GRAPH, "-f", "null", "-"]
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        log = Path(folder) / "vmaf.json"
        if done.returncode or not log.is_file():
            return None
        frames_ = json.loads(log.read_text(encoding="utf-8"))["frames"]
        return [float(f["metrics"]["vmaf"]) for f in frames_]


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
