# SPDX-License-Identifier: Apache-2.0
"""Models that make or edit videos."""

from __future__ import annotations

from .row import PATCH_VIDEO, TEXT_MASK, Row, prompt, run, step

__all__ = ["VIDEO_MODELS"]

VIDEO_MODELS = (
    Row(
        "ChronoEditTransformer3DModel",
        {
            "hidden_states": step("batch in_channels frames height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens text_dim"),
            "encoder_hidden_states_image": prompt(
                "batch image_tokens image_dim", needs="image_dim"
            ),
        },
        pipelines=("ChronoEditPipeline",),
        multiples=PATCH_VIDEO,
    ),
    Row(
        "SanaVideoTransformer3DModel",
        {
            "hidden_states": step("batch in_channels frames height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens caption_channels"),
            "encoder_attention_mask": TEXT_MASK,
        },
        pipelines=("SanaVideoPipeline",),
        multiples=PATCH_VIDEO,
    ),
)
"""In the order in which each came to be cut."""
