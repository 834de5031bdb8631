# SPDX-License-Identifier: Apache-2.0
"""Read a clip's colour, background, motion and shape from its pixels, by rules alone.

Nothing here is fitted: every threshold is halfway between what two kinds of procedural clip show.
A round shape (circle, ring) that spins looks like one that stands still, so a caption of either
motion agrees with a reading of either; ``is_motion_readable`` tells which captions are concerned.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from clips import (
    BACKGROUNDS,
    COLORS,
    ROUND_SHAPES,
    SHAPES,
    Caption,
    Rgb,
    coverage,
    pixel_centers,
    signed_distance,
)

Floats = npt.NDArray[np.float64]

# What procedural clips show between their first and last three frames.
NOMINAL_TRAVEL = 0.83  # half frame widths
NOMINAL_GROWTH = 2.1  # natural logarithm of the ratio of areas
NOMINAL_TURN = 1.5 * math.pi  # radians, first to last frame
MOVING_SHARE = 0.5  # of the nominal value; less reads as standing still

FOLDS = {"triangle": 3, "square": 4, "star": 5}
SMALLEST_AREA = 0.004  # of a frame of area 4; the smallest procedural shape covers 0.018
LEAST_CONTRAST = 0.1  # RGB distance between shape and background
COLOR_VOTE = 0.75  # share of frames that must show the same colour
VISIBLE_SHARE = 2 / 3  # share of frames that must show a shape


@dataclass(frozen=True)
class Reading:
    """What the pixels say; a field is ``None`` where they say nothing clear.

    Attributes:
        color: The colour that at least three quarters of the frames show.
        background: The nearest background.
        motion: The motion whose measure is the largest share of its nominal value.
        shape: The shape whose outline overlaps best.
        overlap: Intersection over union with that outline, mean of every fourth frame, in [0, 1].
        travel_x: Centroid shift between the clip's ends, half frame widths, right positive.
        travel_y: As ``travel_x``, down positive.
        growth: Natural logarithm of the ratio of areas between the clip's ends.
        turn: Rotation from first to last frame, radians; 0 for round shapes.
    """

    color: str | None
    background: str
    motion: str | None
    shape: str | None
    overlap: float = 0.0
    travel_x: float = 0.0
    travel_y: float = 0.0
    growth: float = 0.0
    turn: float = 0.0


@dataclass(frozen=True)
class Agreement:
    """Which of a caption's four words a reading confirms."""

    color: bool
    motion: bool
    background: bool
    shape: bool


def is_motion_readable(caption: Caption) -> bool:
    """Tell whether the caption's motion can be seen: a round shape's spin cannot."""
    return not (caption.shape in ROUND_SHAPES and caption.motion in {"spinning", "standing still"})


def compare_reading(caption: Caption, reading: Reading) -> Agreement:
    """Compare a reading with the caption; spinning and standing still are one for round shapes."""
    if is_motion_readable(caption):
        motion = reading.motion == caption.motion
    else:
        motion = reading.motion in {"spinning", "standing still"}
    return Agreement(
        color=reading.color == caption.color,
        motion=motion,
        background=reading.background == caption.background,
        shape=reading.shape == caption.shape,
    )


def read_clip(frames: npt.NDArray[np.generic]) -> Reading:
    """Read a clip.

    Args:
        frames: [frames, size, size, 3], RGB; uint8, or floating point in [0, 1].
    """
    pixels = frames / 255.0 if frames.dtype == np.uint8 else frames.astype(np.float64)
    rows = _background_rows(pixels)
    background = _nearest(rows.mean(0), BACKGROUNDS)
    mask = _foreground_mask(pixels, rows)
    pixel_area = (2 / mask.shape[-1]) ** 2
    areas = mask.sum((1, 2)) * pixel_area
    visible = areas > SMALLEST_AREA
    if visible.mean() < VISIBLE_SHARE:
        return Reading(color=None, background=background, motion=None, shape=None)

    mask, areas = mask[visible], areas[visible]
    centroids = _centroids(mask)
    shape, overlap = _best_shape(mask[::4], centroids[::4], areas[::4])
    travel_x, travel_y = _ends_difference(centroids)
    growth = float(_ends_difference(np.log(areas)))
    turn = _turn(mask, centroids, shape)
    return Reading(
        color=_voted_color(pixels[visible], mask),
        background=background,
        motion=_strongest_motion(travel_x, travel_y, growth, turn),
        shape=shape,
        overlap=overlap,
        travel_x=float(travel_x),
        travel_y=float(travel_y),
        growth=growth,
        turn=turn,
    )


def _nearest(color: Floats, palette: Mapping[str, Rgb]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(color - np.array(palette[name]))))


def _background_rows(pixels: Floats) -> Floats:
    """Take each row's colour at the frame's sides, where shapes are seldom: [size, 3]."""
    sides = np.concatenate([pixels[:, :, :4], pixels[:, :, -4:]], axis=2)
    return np.median(sides.transpose(1, 0, 2, 3).reshape(sides.shape[1], -1, 3), axis=1)


def _foreground_mask(pixels: Floats, rows: Floats) -> Floats:
    """Estimate how much of each pixel the shape covers: [frames, size, size] in [0, 1]."""
    difference = pixels - rows[None, :, None]
    distance = np.sqrt(np.einsum("fyxc,fyxc->fyx", difference, difference))
    strongest = np.quantile(distance, 0.995)
    if strongest < LEAST_CONTRAST:
        return np.zeros_like(distance)
    direction = np.median(difference[distance > strongest / 2], axis=0)
    mask = np.clip(difference @ direction / (direction @ direction), 0, 1)
    return np.where(mask > 0.25, mask, 0)


def _voted_color(pixels: Floats, mask: Floats) -> str | None:
    votes = Counter(
        _nearest(np.median(frame[cover > 0.8], axis=0), COLORS)
        for frame, cover in zip(pixels, mask, strict=True)
        if (cover > 0.8).any()
    )
    if not votes:
        return None
    color, count = votes.most_common(1)[0]
    return color if count >= COLOR_VOTE * len(pixels) else None


@cache
def _grid(size: int) -> tuple[Floats, Floats]:
    x, y = pixel_centers(size)
    return x.double().numpy(), y.double().numpy()


def _centroids(mask: Floats) -> Floats:
    """Locate the shape in each frame: [frames, 2], x and y in half frame widths."""
    x, y = _grid(mask.shape[-1])
    weight = mask.sum((1, 2))
    return np.stack([(mask * x).sum((1, 2)) / weight, (mask * y).sum((1, 2)) / weight], axis=1)


def _ends_difference(series: Floats) -> Floats:
    count = min(3, max(1, len(series) // 2))
    return np.asarray(series[-count:].mean(0) - series[:count].mean(0))


def _strongest_motion(travel_x: float, travel_y: float, growth: float, turn: float) -> str:
    shares = {
        "moving right": travel_x / NOMINAL_TRAVEL,
        "moving left": -travel_x / NOMINAL_TRAVEL,
        "moving down": travel_y / NOMINAL_TRAVEL,
        "moving up": -travel_y / NOMINAL_TRAVEL,
        "growing": growth / NOMINAL_GROWTH,
        "shrinking": -growth / NOMINAL_GROWTH,
        "spinning": abs(turn) / NOMINAL_TURN,
    }
    motion = max(shares, key=lambda name: float(shares[name]))
    return motion if shares[motion] >= MOVING_SHARE else "standing still"


def _angular_moment(mask: Floats, center: Floats, fold: int) -> complex:
    """Sum ``rho**2 * exp(i * fold * phi)`` over a frame; its phase turns ``fold`` times as fast."""
    x, y = _grid(mask.shape[-1])
    covered = mask > 0
    offset = (x[covered] - center[0]) + 1j * (y[covered] - center[1])
    phase = np.exp(1j * fold * np.angle(offset))
    return complex((mask[covered] * np.abs(offset) ** 2 * phase).sum())


def _turn(mask: Floats, centroids: Floats, shape: str) -> float:
    """Follow the shape's angle from frame to frame; exact below half a symmetry step per frame."""
    if shape in ROUND_SHAPES:
        return 0.0
    fold = FOLDS[shape]
    phases = [
        np.angle(_angular_moment(frame, center, fold))
        for frame, center in zip(mask, centroids, strict=True)
    ]
    unwrapped = np.unwrap(phases)
    return float(unwrapped[-1] - unwrapped[0]) / fold


@cache
def _reference(shape: str) -> tuple[float, float]:
    """Measure a shape of radius 1/2 at angle 0: its area over radius², and its moment's phase."""
    outline = _outline(shape, 192, np.zeros(2), 0.5, 0.0)
    area = float(outline.sum()) * (2 / 192) ** 2 / 0.25
    if shape in ROUND_SHAPES:
        return area, 0.0
    return area, float(np.angle(_angular_moment(outline, np.zeros(2), FOLDS[shape])))


def _outline(shape: str, size: int, center: Floats, radius: float, angle: float) -> Floats:
    x, y = pixel_centers(size)
    x, y = x - float(center[0]), y - float(center[1])
    cosine, sine = math.cos(angle), math.sin(angle)
    distance = signed_distance(
        shape, cosine * x + sine * y, -sine * x + cosine * y, torch.tensor(radius)
    )
    return coverage(distance, size).double().numpy()


def _best_shape(mask: Floats, centroids: Floats, areas: Floats) -> tuple[str, float]:
    """Lay each shape, at the mask's place, area and angle, over the mask; keep the best fit."""
    overlaps = {
        shape: float(
            np.mean(
                [
                    _overlap(frame, center, area, shape)
                    for frame, center, area in zip(mask, centroids, areas, strict=True)
                ]
            )
        )
        for shape in SHAPES
    }
    shape = max(overlaps, key=lambda name: overlaps[name])
    return shape, overlaps[shape]


def _overlap(mask: Floats, center: Floats, area: float, shape: str) -> float:
    unit_area, unit_phase = _reference(shape)
    angle = 0.0
    if shape not in ROUND_SHAPES:
        fold = FOLDS[shape]
        angle = float(np.angle(_angular_moment(mask, center, fold)) - unit_phase) / fold
    outline = _outline(shape, mask.shape[-1], center, math.sqrt(area / unit_area), angle)
    return float(np.minimum(mask, outline).sum() / np.maximum(mask, outline).sum())
