# SPDX-License-Identifier: Apache-2.0
"""Read and write pictures and videos, and lay videos side by side as a contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageSequence

from ...core.errors import OutputError, RequestError
from ...core.extras import require_extra
from ...core.output import check_file, replaced_whole

__all__ = [
    "FRAMES",
    "SUFFIXES",
    "check_output",
    "contact_sheet",
    "open_frames",
    "open_image",
    "write_video",
]

Frames = NDArray[np.uint8]
FRAMES = (".mp4", ".gif", ".webp", ".png")
SUFFIXES = (*FRAMES, ".wav")
"""Of what `run` writes: frames, or sound alone."""
MOST_FPS = 1000
WEBP_QUALITY = 90
MOVING_PICTURES = (".gif", ".webp")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm")
"""Suffixes of files that are read by imageio; Pillow reads all others."""


def check_output(path: Path, fps: int = 8) -> None:
    """Fail before a long run rather than after it; nothing is made or written.

    Args:
        path: The file to be written later; its folder may be missing.
        fps: Frames per second.

    Raises:
        OutputError: unknown suffix, or the file can't be written there.
        RequestError: ``fps`` is outside [1, 1000].
        DependencyError: it is an mp4, and what writes those is not installed.
    """
    _check_suffix(path, SUFFIXES)
    if not 1 <= fps <= MOST_FPS:
        raise RequestError(f"--fps {fps}", f"is outside [1, {MOST_FPS}]", "use 8 to 30")
    if path.suffix.lower() == ".mp4":
        require_extra("video", f"--out {path}")
    check_file(path, "--out")


def write_video(frames: Frames, path: Path, fps: int = 8) -> None:
    """Write ``frames`` in the format of the suffix, whole or not at all.

    Args:
        frames: uint8 [frames, height, width, 3]; a png shows them side by side.
        path: ``.mp4`` (H.264), ``.gif``, ``.webp`` or ``.png``. Its folder is made where there is none.
        fps: Frames per second, 1 to 1000; a png has none.

    Raises:
        OutputError: it can't be written, or has another suffix.
        RequestError: ``fps`` is out of range.
        DependencyError: it is an mp4, and what writes those is not installed.
    """
    _check_suffix(path, FRAMES)
    check_output(path, fps)
    with replaced_whole(path, "choose another --out") as partial:
        if path.suffix.lower() == ".mp4":
            import imageio.v3 as iio

            even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
            iio.imwrite(
                partial,
                even,
                plugin="FFMPEG",
                fps=fps,
                codec="libx264",
                macro_block_size=2,
                output_params=["-crf", "14"],
            )
        elif path.suffix.lower() in MOVING_PICTURES:
            first, *others = [Image.fromarray(frame) for frame in frames]
            # GIF knows no quality, and Pillow wants whole milliseconds of WebP.
            first.save(
                partial,
                save_all=True,
                append_images=others,
                duration=round(1000 / fps),
                loop=0,
                quality=WEBP_QUALITY,
            )
        else:
            Image.fromarray(np.concatenate(list(frames), axis=1)).save(partial)


def _check_suffix(path: Path, known: Sequence[str]) -> None:
    if path.suffix.lower() not in known:
        raise OutputError(
            str(path), f"has suffix '{path.suffix}'", f"use one of {', '.join(known)}"
        )


def contact_sheet(videos: Mapping[str, Frames], columns: int = 5, scale: int = 2) -> Frames:
    """Draw labelled videos as rows of a few frames each.

    Args:
        videos: Label → uint8 [frames, height, width, 3], all of one shape.
        columns: Frames shown of each, evenly spread.
        scale: Enlargement of each frame.

    Returns:
        uint8 [rows, columns, 3], one picture.
    """
    shape = next(iter(videos.values())).shape
    height, width = shape[1] * scale, shape[2] * scale
    label, gap = 20, 4
    sheet = Image.new(
        "RGB", (columns * (width + gap) + gap, len(videos) * (height + label + gap)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for row, (name, frames) in enumerate(videos.items()):
        top = row * (height + label + gap)
        draw.text((gap, top + 4), name, fill="black")
        for column, index in enumerate(
            np.linspace(0, len(frames) - 1, columns).round().astype(int)
        ):
            frame = Image.fromarray(frames[index]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(frame, (gap + column * (width + gap), top + label))
    return np.asarray(sheet)


def open_frames(path: Path, flag: str) -> list[Image.Image]:
    """Read a video's frames, or a picture as one frame, as RGB.

    Args:
        path: A picture, a .gif or .webp, or a video.
        flag: Option that names it, for the messages.

    Raises:
        RequestError: it is missing, damaged, or neither.
        DependencyError: it is a video, and what reads those is not installed.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in VIDEOS:
            require_extra("video", f"{flag} {path}")
            import imageio.v3 as iio

            return [Image.fromarray(frame) for frame in iio.imiter(path, plugin="FFMPEG")]
        with Image.open(path) as opened:
            return [frame.convert("RGB") for frame in ImageSequence.Iterator(opened)]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(
            f"{flag} '{path}'", f"can't be read: {error}", "give a png, jpeg, gif or mp4"
        ) from error


def open_image(path: Path) -> Image.Image:
    """Read a picture as RGB.

    Raises:
        RequestError: it is missing, damaged or no picture.
    """
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(
            f"--image '{path}'", f"can't be read: {error}", "give a png or jpeg"
        ) from error
