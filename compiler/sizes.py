# SPDX-License-Identifier: Apache-2.0
"""From what a user asks for (pixels, frames, steps) to the named dimensions of a cut model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle.dims import all_dims, check_limits, check_video
from ..bundle.guidance import branch_count
from ..bundle.manifest import LatentScale, ResolvedGeneration
from ..bundle.reader import Bundle
from ..core.errors import RequestError
from ..core.limits import check_size
from ..engines.base import TensorSpec
from .checkpoints.folders import read_json
from .cut.declared import Cut

__all__ = [
    "STRIDES",
    "Size",
    "branches_of",
    "bundle_pipeline",
    "dims_of",
    "latent_scale",
    "read_part",
    "shape_at",
    "size_of",
]

STRIDES = {
    "frames": ("scale_factor_temporal", "temporal_compression_ratio"),
    "pixels": ("scale_factor_spatial", "spatial_compression_ratio"),
}
"""Field of `LatentScale` → keys of the VAE's config, as diffusers' classes spell it."""


SIDES = ("height", "width", "frames")
"""Sizes of a video, which patches and the VAE divide."""


@dataclass(frozen=True)
class Size:
    """One request's size.

    Attributes:
        height: Pixels.
        width: Pixels.
        frames: Frames of the video.
        steps: Denoise steps.
        text_tokens: Tokens of the prompt, padding included.
        guidance_scale: Of classifier-free guidance; 1 or less is none.
        true_guidance_scale: Of a pipeline whose model embeds the guidance scale: the scale of the
            guidance by two branches beside it.
    """

    height: int
    width: int
    frames: int
    steps: int
    text_tokens: int
    guidance_scale: float
    true_guidance_scale: float = 1.0


def size_of(
    generation: ResolvedGeneration,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    true_guidance: float | None = None,
) -> Size:
    """Fill a size in: what is wanted, else what the config says.

    Args:
        generation: A config's values.
        height: Pixels; None takes the config's, here and below.
        width: Pixels.
        frames: Frames of the video.
        steps: Denoise steps.
        guidance: Guidance scale.
        true_guidance: Guidance scale beside one that the model embeds; None is none.
    """
    wanted = {
        "height": height,
        "width": width,
        "frames": frames,
        "steps": steps,
        "guidance_scale": guidance,
    }
    asked = generation.model_copy(update={n: v for n, v in wanted.items() if v is not None})
    return Size(
        height=asked.height,
        width=asked.width,
        frames=asked.frames,
        steps=asked.steps,
        text_tokens=asked.text_tokens,
        guidance_scale=asked.guidance_scale,
        true_guidance_scale=1.0 if true_guidance is None else true_guidance,
    )


def branches_of(cut: Cut, size: Size) -> int:
    """Return the branches of a run's steps: 2 where guidance asks the model twice, else 1."""
    return branch_count(cut.inputs.values(), size.guidance_scale, size.true_guidance_scale)


def latent_scale(cut: Cut, pipeline: Path | None) -> LatentScale:
    """Return what one latent stands for: as the VAE's config tells, else as the family does."""
    config = read_part(pipeline, "vae/config.json")
    told = {field: [config[k] for k in keys if config.get(k)] for field, keys in STRIDES.items()}
    usual = dict(zip(STRIDES, cut.latent_scale, strict=True))
    return LatentScale(**{field: next(iter(told[field]), usual[field]) for field in STRIDES})


def dims_of(cut: Cut, size: Size, pipeline: Path | None) -> dict[str, int]:
    """Return the size of every named dimension in one branch of a run.

    Args:
        cut: The cut model.
        size: What is asked for.
        pipeline: Folder of the diffusers pipeline, for the VAE's and the image encoder's scale.

    Raises:
        RequestError: a size that VAE or patches do not divide, or beyond the model's positions.
    """
    for name in SIDES:
        check_size(name, getattr(size, name))
    scale = latent_scale(cut, pipeline)
    by_time, by_space = scale.frames, scale.pixels
    image = read_part(pipeline, "image_encoder/config.json")
    told = {}
    if image.get("model_type") == "clip_vision_model":  # one token more stands for the whole image
        told = {"image_tokens": (image["image_size"] // image["patch_size"]) ** 2 + 1}
    check_video({n: getattr(size, n) for n in SIDES}, scale, cut.dims)
    if size.steps < 1:
        raise RequestError(f"--steps {size.steps}", "is less than 1", "use 20 to 50")
    dims = {
        "batch": 1,
        "frames": (size.frames - 1) // by_time + 1,
        "height": size.height // by_space,
        "width": size.width // by_space,
        "text_tokens": size.text_tokens,
        "steps": size.steps,
        **cut.usual,
        **told,
    }
    scales = {"frames": by_time, "height": by_space, "width": by_space}
    for name, limit in cut.limits.items():
        if name in scales and dims[name] > limit.most:
            raise RequestError(
                f"--{name} {getattr(size, name)}",
                f"is beyond the model's {limit.most} positions, {limit.where}",
                f"use {limit.most * scales[name]} at most",
            )
    found = derived(cut, dims)
    check_limits(cut.limits, found)
    return found


def derived(cut: Cut, dims: Mapping[str, int]) -> dict[str, int]:
    """Add the family's derived dimensions, ``tokens`` among them."""
    return all_dims(cut.dims, cut.sums, dims)


def shape_at(spec: TensorSpec, dims: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of a declared tensor at these sizes."""
    return tuple(dims[d] if isinstance(d, str) else d for d in spec.shape)


def read_part(pipeline: Path | None, name: str) -> dict[str, Any]:
    """Return a JSON file of a diffusers pipeline; empty where it is not there."""
    if pipeline is None or not (pipeline / name).is_file():
        return {}
    return read_json(pipeline / name)


def bundle_pipeline(bundle: Bundle) -> Path | None:
    """Return where the rest of a bundle's pipeline lies, or None."""
    entry = bundle.manifest.pipeline
    if entry.folder is not None:
        return bundle.path(entry.folder)
    return Path(entry.source) if entry.source is not None else None
