# SPDX-License-Identifier: Apache-2.0
"""Forecast what a run holds besides the model's own buffers, where the model runs.

These are the pipeline's other parts and the VAE's work; on a host also weights that engines convert
for themselves, and the program.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from ...engines import backend_class
from ...runtime.pipeline.parts import loaded_bytes
from ..cut.declared import Cut
from ..sizes import Size, read_part
from .footprint import LiveBytes

__all__ = ["memory_beside", "runs_on_host"]

PROGRAM_BYTES = 500 << 20
"""Python with torch, diffusers, transformers and OpenVINO loaded; 0.45 to 0.5 GB were measured."""

VAE_CHUNKS = 3
"""Latent frames after which a causal VAE's work repeats itself."""


def memory_beside(
    cut: Cut,
    size: Size,
    pipeline: Path | None,
    *,
    backend: str,
    precision: str,
    offload: bool = False,
) -> dict[str, int]:
    """Return part → bytes of what a run needs besides the model's buffers, where these lie.

    Args:
        cut: The cut model.
        size: What is asked for.
        pipeline: Folder of the diffusers pipeline; without one its parts are left out.
        backend: Backend that will run the model.
        precision: Precision of the body.
        offload: Whether a GPU holds one part of the pipeline at a time.
    """
    on_host = runs_on_host(backend)
    parts = {"program": PROGRAM_BYTES} if on_host else {}
    if pipeline is not None:
        loaded = loaded_bytes(pipeline)
        work = vae_bytes(pipeline, size, encodes="image_states" in cut.inputs)
        if offload and not on_host:
            at_work = {**loaded, "vae": loaded.get("vae", 0) + work}
            parts["largest part of the pipeline"] = max(at_work.values())
        else:
            parts["other parts of the pipeline"] = sum(loaded.values())
            parts["VAE at work"] = work
    if not on_host:
        return parts
    converted = converted_bytes(cut, backend, precision)
    return {**parts, "converted weights": converted} if converted else parts


def runs_on_host(backend: str) -> bool:
    """Tell whether a backend computes in the host's memory."""
    # Backends of the CPU say so as a class; the others find their GPU when made.
    return getattr(backend_class(backend), "device", None) == torch.device("cpu")


def converted_bytes(cut: Cut, backend: str, precision: str) -> int:
    """Return the bytes of block weights that engines hold converted; 0 where they compute in them.

    One block's worth, in float32: engines of templates convert what they are bound to at each call.
    """
    computed_in = getattr(backend_class(backend), "computed_in", lambda p: p)(precision)
    if computed_in == precision:
        return 0
    templates = {name for s in cut.stages for name in (s.block, s.context)}
    return sum(
        4 * p.numel()
        for s in cut.segments
        if s.name in templates
        for p in s.module.parameters()
        if str(p.dtype).removeprefix("torch.") == precision
    )


def vae_bytes(pipeline: Path, size: Size, *, encodes: bool) -> int:
    """Estimate what Wan's VAE needs to decode a video (and to encode one, for image-to-video).

    The peak of PyTorch's intermediates in float32; 1.5 GB were forecast where 1.9 were measured, so
    a quarter is added for what convolutions copy. 0 for VAEs of other classes.
    """
    config = read_part(pipeline, "vae/config.json")
    if config.get("_class_name") != "AutoencoderKLWan":
        return 0
    with torch.device("meta"):
        vae: Any = diffusers.AutoencoderKLWan.from_config(config).eval()
    by_time, by_space = config["scale_factor_temporal"], config["scale_factor_spatial"]
    latent_frames = (size.frames - 1) // by_time + 1
    chunks = min(latent_frames, VAE_CHUNKS)
    grid = (size.height // by_space, size.width // by_space)
    live = LiveBytes()
    with live, torch.no_grad():
        vae.decode(torch.empty(1, config["z_dim"], chunks, *grid, device="meta"))
        if encodes:
            frames = (chunks - 1) * by_time + 1
            vae.encode(torch.empty(1, 3, frames, size.height, size.width, device="meta"))
    # Frames are appended to those before, for which both lie in memory for a moment.
    more = 2 * (latent_frames - chunks) * by_time * size.height * size.width * 3 * 4
    return int(live.peak * 5 // 4 + more)
