# SPDX-License-Identifier: Apache-2.0
"""The table of models: what a diffusers transformer takes, and when each input may change.

A row says nothing about how the model computes: that is found in its own `forward`.
"""

from __future__ import annotations

from .image_models import IMAGE_MODELS
from .row import PATCH_IMAGE, PATCH_VIDEO, TEXT_MASK, Row, prompt, run, size, step
from .video_models import VIDEO_MODELS

__all__ = ["MODELS", "row_of"]

MODELS: tuple[Row, ...] = (
    Row(
        "WanTransformer3DModel",
        {
            "hidden_states": step("batch in_channels frames height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens text_dim"),
            "encoder_hidden_states_image": prompt(
                "batch image_tokens image_dim", needs="image_dim"
            ),
        },
        pipelines=("WanPipeline", "WanImageToVideoPipeline"),
        multiples=PATCH_VIDEO,
        signals={
            "temb": "condition_embedder.time_embedder",
            "timestep_proj": "condition_embedder.time_proj",
        },
        fixed={"text_tokens": ("image_dim", 512)},
        refused={
            "pos_embed_seq_len": (
                "first-and-last-frame models (two images per batch element) can't be cut yet",
                "use a text-to-video or image-to-video checkpoint",
            )
        },
    ),
    Row(
        "FluxTransformer2DModel",
        {
            "hidden_states": step("batch tokens in_channels"),
            "timestep": run(fill="fraction"),
            "guidance": prompt("batch", needs="guidance_embeds"),
            "encoder_hidden_states": prompt("batch text_tokens joint_attention_dim"),
            "pooled_projections": prompt("batch pooled_projection_dim"),
            "img_ids": prompt("tokens 3", fill="positions"),
            "txt_ids": prompt("text_tokens 3", fill="positions"),
        },
        pipelines=("FluxPipeline",),
        latent_scale=(1, 8),
        timestep_scale=1000.0,
        packed=2,
    ),
    Row(
        "HunyuanVideoTransformer3DModel",
        {
            "hidden_states": step("batch in_channels frames height width"),
            "timestep": run(),
            "guidance": prompt("batch", needs="guidance_embeds"),
            "encoder_hidden_states": prompt("batch text_tokens text_embed_dim"),
            "encoder_attention_mask": TEXT_MASK,
            "pooled_projections": prompt("batch pooled_projection_dim"),
        },
        pipelines=("HunyuanVideoPipeline",),
        multiples={"frames": "patch_size_t", **PATCH_IMAGE},
    ),
    Row(
        "LTXVideoTransformer3DModel",
        {
            "hidden_states": step("batch frames*height*width in_channels"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens caption_channels"),
            "encoder_attention_mask": TEXT_MASK,
            "num_frames": size("frames"),
            "height": size("height"),
            "width": size("width"),
            "rope_interpolation_scale": prompt("3"),
        },
        pipelines=("LTXPipeline",),
        latent_scale=(8, 32),
    ),
    *IMAGE_MODELS,
    *VIDEO_MODELS,
)
"""Every class that has a row."""


def row_of(model: str) -> Row | None:
    """Return a class's row; None if the table has none."""
    return next((row for row in MODELS if row.model == model), None)
