# SPDX-License-Identifier: Apache-2.0
"""The table of models: what a diffusers transformer takes, and when each input may change.

A row says nothing about how the model computes: that is found in its own `forward`.
"""

from __future__ import annotations

from ...core.errors import CheckpointError, nearest
from .audio_models import AUDIO_MODELS
from .image_models import IMAGE_MODELS
from .row import PATCH_IMAGE, PATCH_VIDEO, TEXT_MASK, Row, prompt, run, size, step
from .video_models import VIDEO_MODELS

__all__ = ["FAMILIES", "MODELS", "family_of", "row_of"]

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
        name="wan",
        multiples=PATCH_VIDEO,
        signals={
            "temb": "condition_embedder.time_embedder",
            "timestep_proj": "condition_embedder.time_proj",
        },
        fixed={"text_tokens": ("image_dim", 512)},
        usual={"image_tokens": 257},
        refused={
            "pos_embed_seq_len": (
                None,
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
        name="flux",
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
        name="hunyuan",
        multiples={"frames": "patch_size_t", **PATCH_IMAGE},
        refused={
            "image_condition_type": (
                "token_replace",
                "is 'token_replace': models that replace the first frame's tokens can't be cut yet",
                "use a text-to-video checkpoint, or one that concatenates the image's latents",
            )
        },
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
        name="ltx",
        latent_scale=(8, 32),
        signals={
            "temb": "time_embed.emb.timestep_embedder",
            "timestep_proj": "time_embed.linear",
        },
    ),
    *IMAGE_MODELS,
    *VIDEO_MODELS,
    *AUDIO_MODELS,
)
"""Every class that has a row."""


FAMILIES = tuple(row for row in MODELS if row.name)
"""The rows that bundles are made by."""


def row_of(model: str) -> Row | None:
    """Return a class's row; None if the table has none."""
    return next((row for row in MODELS if row.model == model), None)


def family_of(model: str, where: str) -> Row:
    """Return the row that a class's bundles are made by.

    Args:
        model: As ``_class_name`` in the transformer's config spells it.
        where: The config that it was read from.

    Raises:
        CheckpointError: there is none.
    """
    row = row_of(model)
    if row is not None and row.name:
        return row
    raise CheckpointError(
        where,
        f"'_class_name' is '{model}', which no family cuts",
        f"{nearest(model, [row.model for row in FAMILIES])}; --trace-with 'a prompt' learns what it "
        "takes from its pipeline's calls",
    )
