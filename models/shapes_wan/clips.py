# SPDX-License-Identifier: Apache-2.0
"""Draw procedural captioned clips: one shape, one colour, one motion, one background.

A clip is a pure function of its ``ClipSpec``, and a spec of the generator's state.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

Rgb = tuple[float, float, float]

COLORS: dict[str, Rgb] = {
    "red": (0.92, 0.16, 0.18),
    "green": (0.18, 0.75, 0.30),
    "blue": (0.20, 0.38, 0.95),
    "yellow": (0.97, 0.85, 0.20),
    "magenta": (0.88, 0.25, 0.80),
    "cyan": (0.20, 0.82, 0.88),
    "orange": (0.98, 0.55, 0.12),
    "white": (0.96, 0.96, 0.96),
}
SHAPES = ("circle", "square", "triangle", "ring", "star")
MOTIONS = (
    "moving right",
    "moving left",
    "moving up",
    "moving down",
    "growing",
    "shrinking",
    "spinning",
    "standing still",
)
BACKGROUNDS: dict[str, Rgb] = {
    "black": (0.04, 0.04, 0.05),
    "gray": (0.42, 0.43, 0.45),
    "navy": (0.06, 0.09, 0.28),
    "brown": (0.33, 0.20, 0.11),
}
ROUND_SHAPES = frozenset({"circle", "ring"})
"""Shapes that look the same at every angle: a clip of one spinning equals one standing still."""

FRAMES = 17
SIZE = 96
TRAINING_SEED = 7
TRAINING_CLIPS = 3600


@dataclass(frozen=True, order=True)
class Caption:
    """The four words a clip is described by."""

    color: str
    shape: str
    motion: str
    background: str

    def __str__(self) -> str:
        """Spell the prompt, such as ``a red circle moving right on a gray background``."""
        return f"a {self.color} {self.shape} {self.motion} on a {self.background} background"


@dataclass(frozen=True)
class ClipSpec:
    """Everything that determines a clip's pixels.

    Lengths are in half frame widths: the frame spans -1 to 1, y points down.
    """

    caption: Caption
    center_x: float
    center_y: float
    radius: float
    amplitude: float


def all_captions() -> list[Caption]:
    """List the 1,280 captions in a fixed order."""
    return [Caption(*words) for words in itertools.product(COLORS, SHAPES, MOTIONS, BACKGROUNDS)]


def draw_spec(generator: torch.Generator) -> ClipSpec:
    """Draw a spec; each of the four words is uniform and independent of the others."""

    def pick(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    caption = Caption(pick(tuple(COLORS)), pick(SHAPES), pick(MOTIONS), pick(tuple(BACKGROUNDS)))
    return ClipSpec(
        caption,
        center_x=uniform(-0.18, 0.18),
        center_y=uniform(-0.18, 0.18),
        radius=uniform(0.26, 0.40),
        amplitude=uniform(0.40, 0.55),
    )


def training_specs(count: int = TRAINING_CLIPS) -> list[ClipSpec]:
    """List the specs of the clips whose latents the transformer is trained on."""
    generator = torch.Generator().manual_seed(TRAINING_SEED)
    return [draw_spec(generator) for _ in range(count)]


def unseen_captions() -> list[Caption]:
    """List the captions that no training clip carries; each of their words is seen in others."""
    seen = {spec.caption for spec in training_specs()}
    return [caption for caption in all_captions() if caption not in seen]


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Measure how far points lie outside a shape centred on the origin.

    Args:
        shape: One of ``SHAPES``.
        x: Any shape, float32.
        y: As ``x``; points down.
        radius: Broadcasts against ``x``; the shape's nominal size.

    Returns:
        Approximate distance in the units of ``x``, negative inside.
    """
    if shape == "circle":
        return torch.sqrt(x * x + y * y + 1e-9) - radius
    if shape == "ring":
        return (torch.sqrt(x * x + y * y + 1e-9) - radius * 0.78).abs() - radius * 0.24
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - radius * 0.85
    if shape == "triangle":
        return torch.maximum(math.sqrt(3) * x.abs() / 2 - y / 2, y) - radius * 0.55
    if shape == "star":
        return _star_distance(x, y, radius)
    known = ", ".join(f"'{name}'" for name in SHAPES)
    raise ValueError(f"shape: found '{shape}', expected one of {known}; pass one of them")


def _star_distance(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Measure the distance to the line from an outer tip to its neighbouring inner corner."""
    sector = 2 * math.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2
    rho = torch.sqrt(x * x + y * y + 1e-9)
    point_x, point_y = rho * torch.cos(angle), rho * torch.sin(angle).abs()
    inner = radius * 0.45
    edge_x, edge_y = inner * math.cos(sector / 2) - radius, inner * math.sin(sector / 2)
    length = torch.sqrt(edge_x * edge_x + edge_y * edge_y)
    return ((point_x - radius) * edge_y - point_y * edge_x) / length


def pixel_centers(size: int) -> tuple[Tensor, Tensor]:
    """Place the pixels of a square frame on [-1, 1].

    Returns:
        x and y, each [size, size], float32.
    """
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x, y


def coverage(distance: Tensor, size: int) -> Tensor:
    """Turn signed distances into anti-aliased coverage in [0, 1]."""
    return torch.sigmoid(-distance / (2 / size * 0.6))


def render(spec: ClipSpec, *, frames: int = FRAMES, size: int = SIZE) -> Tensor:
    """Draw a clip.

    Returns:
        [3, frames, size, size], float32, RGB in [-1, 1].
    """
    center_x, center_y, radius, angle = _poses(spec, frames)
    frame_x, frame_y = pixel_centers(size)
    x = frame_x[None] - center_x[:, None, None]
    y = frame_y[None] - center_y[:, None, None]
    cosine, sine = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    distance = signed_distance(
        spec.caption.shape, cosine * x + sine * y, -sine * x + cosine * y, radius[:, None, None]
    )
    alpha = coverage(distance, size)[None]
    # Both are lit from above, the shape in its own frame, so that a still clip is not flat colour.
    shape_light = 1.0 + 0.12 * (-y[None]).clamp(-0.6, 0.6)
    frame_light = 1.0 + 0.25 * (-frame_y[None, None])
    foreground = _as_column(COLORS[spec.caption.color]) * shape_light
    background = _as_column(BACKGROUNDS[spec.caption.background]) * frame_light
    clip = foreground.clamp(0, 1) * alpha + background.clamp(0, 1) * (1 - alpha)
    return clip * 2 - 1


def _as_column(color: Rgb) -> Tensor:
    return torch.tensor(color)[:, None, None, None]


def _poses(spec: ClipSpec, frames: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Follow the shape: centre x, centre y, radius and angle (radians), each [frames]."""
    time = torch.linspace(-1, 1, frames)
    x, y = torch.full((frames,), spec.center_x), torch.full((frames,), spec.center_y)
    radius, angle = torch.full((frames,), spec.radius), torch.zeros(frames)
    match spec.caption.motion:
        case "moving right":
            x = x * 0.3 + spec.amplitude * time
        case "moving left":
            x = x * 0.3 - spec.amplitude * time
        case "moving up":
            y = y * 0.3 - spec.amplitude * time
        case "moving down":
            y = y * 0.3 + spec.amplitude * time
        case "growing":
            radius = radius * (1.0 + 0.55 * time)
        case "shrinking":
            radius = radius * (1.0 - 0.55 * time)
        case "spinning":
            angle = time * math.pi * 0.75
    return x, y, radius, angle


def sample(
    generator: torch.Generator, *, frames: int = FRAMES, size: int = SIZE
) -> tuple[Tensor, Caption]:
    """Draw a random clip and its caption; the clip is as ``render`` returns it."""
    spec = draw_spec(generator)
    return render(spec, frames=frames, size=size), spec.caption
