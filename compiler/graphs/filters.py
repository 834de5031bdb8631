# SPDX-License-Identifier: Apache-2.0
"""The signal of latents seen through a band filter that follows the noise level.

It costs two small graphs and no weight, so every model has it whose latents lie on a grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import pi
from typing import Literal

import torch
from torch import Tensor, nn

from ...engines.base import TensorSpec
from ...policies.schedule import TRAIN_TIMESTEPS
from ..cut.declared import Cut, Segment

__all__ = ["FILTERED_LATENTS", "filter_segments", "signal_spec", "signals_of"]

FILTERED_LATENTS = "filtered_latents"
"""Signal, and the graph that gives it."""

NOISE_LEVEL = "noise_level"
LEAST = 1e-6
"""Noise levels nearer to 0 or 1 count as so near."""

Known = tuple[str, Literal["run", "step"]]


class NoiseLevel(nn.Module):
    """Timesteps → noise levels of a flow model."""

    def forward(self, timesteps: Tensor) -> Tensor:
        """Return float32 [steps, 1] of float32 [steps]."""
        return (timesteps / TRAIN_TIMESTEPS).unsqueeze(1)


class BandFilter(nn.Module):
    """Latents → what a linear denoiser at this noise level would keep of them, axis by axis.

    Along each axis a frequency f, in cycles per element, is multiplied by
    ``g(f) = a·P / (a²·P + σ²)`` with ``a = 1 − σ`` and ``P = 1/|f|^power``, divided by the mean of
    all frequencies' g. The gain is real and even, so the axis is multiplied by one symmetric
    matrix, ``cos·g·cosᵀ + sin·g·sinᵀ``, and no complex number arises.

    Reference: Chung et al. 2026, SeaCache, arXiv 2602.18993, spectral filter and its normalisation
        (eq. 7); power 3 for video, 2 for images.
    """

    def __init__(self, axes: int, channels: int) -> None:
        super().__init__()
        self.axes, self.channels = axes, channels
        self.power = 3 if axes == 3 else 2

    def forward(self, latents: Tensor, noise_level: Tensor) -> Tensor:
        """Return the first ``channels`` of the latents, filtered along their last ``axes``.

        Args:
            latents: float32 [batch, channels or more, (frames,) height, width].
            noise_level: float32 [1].
        """
        filtered = latents[:, : self.channels]
        filtered = filtered @ self._matrix(filtered.shape[-1], noise_level)
        filtered = self._matrix(filtered.shape[-2], noise_level) @ filtered
        if self.axes == 3:
            planes = filtered.flatten(-2)
            mixed = self._matrix(filtered.shape[-3], noise_level) @ planes
            filtered = mixed.reshape(filtered.shape)
        return filtered

    def _matrix(self, size: int, noise_level: Tensor) -> Tensor:
        """Return the filter of an axis of this size, float32 [size, size]."""
        noise = noise_level.clamp(LEAST, 1 - LEAST)
        kept = 1 - noise
        index = torch.arange(size, device=noise.device)
        count = index[-1:] + 1  # a tensor: ONNX has no remainder by a size
        frequency = torch.minimum(index, count - index).to(torch.float32) / count
        gain = kept / (kept * kept + noise * noise * frequency**self.power)
        gain = gain / gain.sum()
        # Products are brought below the size first: angles of thousands of turns lose their digits.
        turns = (index.unsqueeze(1) * index.unsqueeze(0)) % count
        angle = turns.to(torch.float32) * (2 * pi / count)
        cos, sin = torch.cos(angle), torch.sin(angle)
        return (cos * gain) @ cos + (sin * gain) @ sin


def filter_segments(cut: Cut) -> tuple[Segment, ...]:
    """Return the filter's graphs; none where latents come as a sequence of tokens."""
    latents = cut.inputs["latents"].spec
    axes = _axes(latents)
    if not axes:
        return ()
    finish = next(s.outputs["model_output"] for s in cut.segments if "model_output" in s.outputs)
    # Condition that a pipeline puts beside the latents is the same at every step.
    channels, given = finish.shape[1], latents.shape[1]
    assert isinstance(channels, int), "channels are no dimension"
    assert isinstance(given, int), "channels are no dimension"
    kept = min(channels, given)
    noise = TensorSpec("float32", ("steps", 1))
    return (
        Segment(
            NOISE_LEVEL,
            "run",
            NoiseLevel(),
            {"timesteps": TensorSpec("float32", ("steps",))},
            {NOISE_LEVEL: noise},
        ),
        Segment(
            FILTERED_LATENTS,
            "signal",
            BandFilter(axes, kept),
            {"latents": latents, NOISE_LEVEL: TensorSpec("float32", (1,))},
            {FILTERED_LATENTS: _filtered(latents, kept)},
        ),
    )


def signals_of(cut: Cut) -> Mapping[str, Known]:
    """Return a cut's signals, and that of the filter where there is one."""
    if not _axes(cut.inputs["latents"].spec):
        return cut.signals
    return {**cut.signals, FILTERED_LATENTS: (FILTERED_LATENTS, "step")}


def signal_spec(cut: Cut, kind: str) -> TensorSpec:
    """Return dtype and dimensions of the value that carries one of `signals_of`."""
    if kind == FILTERED_LATENTS:
        return filter_segments(cut)[-1].outputs[FILTERED_LATENTS]
    return cut.signal_spec(kind)


def _axes(latents: TensorSpec) -> int:
    """Return along how many axes latents lie on a grid: three, two, or 0 for tokens."""
    for axes in (("frames", "height", "width"), ("height", "width")):
        if latents.shape[2:] == axes:
            return len(axes)
    return 0


def _filtered(latents: TensorSpec, channels: int) -> TensorSpec:
    return TensorSpec("float32", (latents.shape[0], channels, *latents.shape[2:]))
