# SPDX-License-Identifier: Apache-2.0
r"""LPIPS of videos: how differently a trained network sees them. Its weights are the caller's to bring.

Example::

pip install --no-deps --target out/peers lpips==0.1.4
PYTHONPATH=out/peers python benchmarks/quality.py BUNDLE --lpips-weights alexnet-owt-7be5be79.pth
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["LPIPS_WEIGHTS", "Lpips"]

LPIPS_WEIGHTS = typer.Option(
    "--lpips-weights", help="AlexNet's weights as torchvision publishes them, for LPIPS."
)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and deviation of ImageNet's colours, on the scale of -1 to 1."""

Frames = NDArray[np.uint8]


class Lpips:
    """LPIPS on AlexNet, version 0.1: one small network, so torchvision is not needed.

    Args:
        weights: File of the network's weights, a state dict with names of torchvision's ``alexnet``. How the
            differences are weighted comes from the installed package ``lpips``.

    Raises:
        typer.BadParameter: the package is missing, or the file is no such state dict.

    Reference: Zhang et al. 2018, CVPR, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric".
    """

    def __init__(self, weights: Path) -> None:
        package = find_spec("lpips")
        if package is None or package.origin is None:
            raise typer.BadParameter(f"--lpips-weights needs the package lpips; see {__file__}")
        linear = Path(package.origin).parent / "weights" / "v0.1" / "alex.pth"
        self._network = _alexnet_features()
        try:
            given = torch.load(weights, map_location="cpu", weights_only=True)
            self._network.load_state_dict(
                {n: given[f"features.{n}"] for n in self._network.state_dict()}
            )
            heads = torch.load(linear, map_location="cpu", weights_only=True)
            self._heads = [heads[f"lin{k}.model.1.weight"] for k in range(5)]
        except Exception as error:  # torch has no class of its own for what is no checkpoint
            raise typer.BadParameter(
                f"--lpips-weights: {weights} does not hold AlexNet as torchvision keeps it: {error}"
            ) from error

    @torch.no_grad()
    def __call__(self, video: Frames, reference: Frames) -> float:
        """Return the mean distance over the frames; 0 where they are equal.

        Args:
            video: uint8 [frames, height, width, 3], of 64 pixels a side at least.
            reference: The same, of the uncached run.
        """
        seen, wanted = (self._seen(frames) for frames in (video, reference))
        distance = sum(
            nn.functional.conv2d((a - b) ** 2, head).mean()
            for a, b, head in zip(seen, wanted, self._heads, strict=True)
        )
        return float(distance)

    def _seen(self, frames: Frames) -> list[Tensor]:
        """Return the five layers' activations [frames, channels, h, w], of length 1 over channels."""
        x = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = (x - torch.tensor(SHIFT).view(3, 1, 1)) / torch.tensor(SCALE).view(3, 1, 1)
        seen = []
        for layer in self._network:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                seen.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return seen


def _alexnet_features() -> nn.Sequential:
    """Return AlexNet's convolutions, numbered as in torchvision's ``alexnet().features``."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    ).eval()
