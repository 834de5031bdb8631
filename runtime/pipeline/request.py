# SPDX-License-Identifier: Apache-2.0
"""One run, as it is asked for, and the pictures and videos that it begins with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ...bundle.manifest import ResolvedGeneration
from ...bundle.sampler import check_sampler
from ...core.errors import ConfigError, RequestError
from ...core.limits import LARGEST_SEED, check_size
from ...policies.setting import CacheSetting
from .video import open_frames, open_image

__all__ = ["VALUES", "GenerationRequest", "size_like"]

VALUES = (
    "steps",
    "height",
    "width",
    "frames",
    "guidance_scale",
    "guidance_scale_2",
    "seed",
    "sampler",
    "flow_shift",
)
"""What a run says of itself as resolved."""


@dataclass(frozen=True)
class GenerationRequest:
    """One run; None takes the config's value.

    Attributes:
        prompt: What to show; None for a pipeline that takes no text.
        cache: Resolved cache setting.
        defaults: Generation values of the config.
        negative_prompt: What not to show.
        steps: Denoise steps.
        height: Pixels.
        width: Pixels.
        frames: Frames of the video.
        guidance_scale: 1 turns guidance off.
        seed: Of the initial noise.
        sampler: Which one denoises.
        flow_shift: Of its noise levels.
        guidance_scale_2: Of the second expert, where there are two.
        image: First frame of a video, or the picture to begin with. Where neither height nor width
            is asked for, what is made takes its proportions, at the area that the config names.
        video: Video to begin with.
        mask: Picture or video, white where something new is to be made.
        strength: From 0 to 1, how much of what the run begins with is made anew.
        extra: What else the pipeline's call takes, by its names.
    """

    prompt: str | None
    cache: CacheSetting
    defaults: ResolvedGeneration
    negative_prompt: str = ""
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    sampler: str | None = None
    flow_shift: float | None = None
    guidance_scale_2: float | None = None
    image: Path | None = None
    video: Path | None = None
    mask: Path | None = None
    strength: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def value(self, name: str) -> Any:
        """Return a setting: the request's, else the config's.

        A request's guidance is that of both experts, unless it names the second's too.
        """
        found = getattr(self, name, None)
        if name == "guidance_scale_2" and self.guidance_scale is not None:
            return found
        return getattr(self.defaults, name) if found is None else found

    @property
    def true_guidance(self) -> float:
        """Guidance scale beside one that the model embeds; 1 is none."""
        scale = self.extra.get("true_cfg_scale", 1.0)
        return float(scale) if isinstance(scale, (int, float)) else 1.0

    @property
    def asked(self) -> list[str]:
        """Names of the values that the request gives itself."""
        names = (*VALUES, "prompt", "image", "video", "mask", "strength")
        own = [n for n in names if getattr(self, n) is not None and n != "seed"]
        return [*own, "negative_prompt"] if self.negative_prompt else own

    def check(self) -> None:
        """Refuse values that no model takes, before anything is loaded.

        Raises:
            RequestError: steps outside [1, 1000], a size beyond 32,768, a guidance scale that is
                not finite, a seed outside [0, 2**63), a sampler that is not known, a flow shift
                that is not above 0, a strength outside (0, 1], or a picture or video that can't be
                read.
            ConfigError: a bound on PSNR, and another value than its quality was measured at.
        """
        self._check_bound()
        steps, seed, guidance = (self.value(n) for n in ("steps", "seed", "guidance_scale"))
        if not 1 <= steps <= 1000:
            raise RequestError(f"--steps {steps}", "is outside [1, 1000]", "use 20 to 50")
        if not 0 <= seed <= LARGEST_SEED:
            raise RequestError(f"--seed {seed}", "is outside [0, 2**63)", "use --seed 42")
        if not math.isfinite(guidance):
            raise RequestError(
                f"--guidance {guidance}", "is not finite", "use 1 to 10; 1 turns guidance off"
            )
        if self.guidance_scale_2 is not None and not math.isfinite(self.guidance_scale_2):
            raise RequestError(
                f"--guidance-2 {self.guidance_scale_2}", "is not finite", "use 1 to 10"
            )
        shift = self.value("flow_shift")
        if not (math.isfinite(shift) and shift > 0):
            raise RequestError(f"--shift {shift}", "is no number above 0", "use 1 to 12")
        if self.value("sampler") is not None:
            check_sampler(self.value("sampler"))
        for name in ("height", "width", "frames"):
            check_size(name, self.value(name))
        if self.strength is not None and not 0 < self.strength <= 1:
            raise RequestError(f"--strength {self.strength}", "is outside (0, 1]", "use 0.3 to 0.9")
        if self.image is not None:
            open_image(self.image)
        for flag, path in (("--video", self.video), ("--mask", self.mask)):
            if path is not None:
                open_frames(path, flag)

    def _check_bound(self) -> None:
        bound = self.cache.min_psnr
        for name in (n for n in VALUES if n != "seed" and bound is not None):
            given, made = getattr(self, name), getattr(self.defaults, name)
            if given not in (None, made):
                raise ConfigError(
                    f"min_psnr {bound:g}",
                    f"was measured at {name} {made}, and the run asks for {given}",
                    f"leave {name} out, or calibrate with it",
                )


def size_like(image: Image.Image, area: int, multiple: int) -> tuple[int, int]:
    """Return the height and width of about ``area`` pixels in the proportions of ``image``.

    Both are multiples of ``multiple``, rounded down as Wan's own scripts do.
    """
    ratio = image.height / image.width
    height, width = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
    return max(multiple, height // multiple * multiple), max(multiple, width // multiple * multiple)
