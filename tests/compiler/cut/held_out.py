# SPDX-License-Identifier: Apache-2.0
"""Classes that no part of the cutter was written for: their rows stand here and not in the table."""

from __future__ import annotations

from typing import Any

from freewheel.compiler.cut.row import PATCH_IMAGE, PATCH_VIDEO, Row, prompt, run, step

IMAGE = step("batch in_channels height width")

HELD_OUT: dict[str, tuple[Row, dict[str, Any]]] = {
    "cogview4": (
        Row(
            "CogView4Transformer2DModel",
            {
                "hidden_states": IMAGE,
                "timestep": run(),
                "encoder_hidden_states": prompt("batch text_tokens text_embed_dim"),
                "original_size": prompt("batch 2", fill=9),
                "target_size": prompt("batch 2", fill=9),
                "crop_coords": prompt("batch 2", fill=9),
            },
            multiples=PATCH_IMAGE,
        ),
        {
            "attention_head_dim": 4, "condition_dim": 4, "in_channels": 4,
            "num_attention_heads": 4, "num_layers": 4, "out_channels": 4, "patch_size": 2,
            "text_embed_dim": 8, "time_embed_dim": 8,
        },
    ),
    "pixart": (
        Row(
            "PixArtTransformer2DModel",
            {
                "hidden_states": IMAGE,
                "timestep": run(),
                "encoder_hidden_states": prompt("batch text_tokens cross_attention_dim"),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            },
            multiples=PATCH_IMAGE,
        ),
        {
            "attention_head_dim": 2, "caption_channels": None, "cross_attention_dim": 8,
            "in_channels": 4, "norm_type": "ada_norm_single", "num_attention_heads": 2,
            "num_embeds_ada_norm": 8, "num_layers": 4, "out_channels": 8, "patch_size": 2,
            "sample_size": 8, "use_additional_conditions": False,
        },
    ),
    "longcat_image": (
        Row(
            "LongCatImageTransformer2DModel",
            {
                "hidden_states": step("batch tokens in_channels"),
                "timestep": run(),
                "guidance": prompt("batch"),
                "encoder_hidden_states": prompt("batch text_tokens joint_attention_dim"),
                "img_ids": prompt("tokens 3", fill="positions"),
                "txt_ids": prompt("text_tokens 3", fill="positions"),
            },
        ),
        {
            "attention_head_dim": 16, "axes_dims_rope": [4, 4, 8], "in_channels": 4,
            "joint_attention_dim": 32, "num_attention_heads": 2, "num_layers": 4,
            "num_single_layers": 4, "patch_size": 1, "pooled_projection_dim": 32,
        },
    ),
    "skyreels_v2": (
        Row(
            "SkyReelsV2Transformer3DModel",
            {
                "hidden_states": step("batch in_channels frames height width"),
                "timestep": run(),
                "encoder_hidden_states": prompt("batch text_tokens text_dim"),
            },
            multiples=PATCH_VIDEO,
        ),
        {
            "attention_head_dim": 12, "cross_attn_norm": True, "ffn_dim": 32, "freq_dim": 32,
            "in_channels": 4, "num_attention_heads": 2, "num_layers": 4, "out_channels": 4,
            "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
            "text_dim": 16,
        },
    ),
    "sana": (
        Row(
            "SanaTransformer2DModel",
            {
                "hidden_states": IMAGE,
                "timestep": run(),
                "encoder_hidden_states": prompt("batch text_tokens caption_channels"),
            },
        ),
        {
            "attention_head_dim": 4, "caption_channels": 8, "cross_attention_dim": 8,
            "cross_attention_head_dim": 4, "in_channels": 4, "num_attention_heads": 2,
            "num_cross_attention_heads": 2, "num_layers": 4, "out_channels": 4, "patch_size": 1,
            "sample_size": 32,
        },
    ),
}  # fmt: skip
"""Name → row and config."""
