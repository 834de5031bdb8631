# SPDX-License-Identifier: Apache-2.0
"""Classes that no part of the cutter was written for: their rows stand here and not in the table."""

from __future__ import annotations

from typing import Any

from freewheel.compiler.cut.row import Row, prompt, run, step

WHOLE = "text_tokens+tokens"

HELD_OUT: dict[str, tuple[Row, dict[str, Any]]] = {
    "ideogram_4": (
        Row(
            "Ideogram4Transformer2DModel",
            {
                "hidden_states": step(f"batch {WHOLE} in_channels"),
                "timestep": run(fill="fraction"),
                "encoder_hidden_states": prompt(f"batch {WHOLE} llm_features_dim"),
                "position_ids": prompt(f"batch {WHOLE} 3", dtype="int64", fill=9),
                "segment_ids": prompt(f"batch {WHOLE}", dtype="int64", fill=1),
                "indicator": prompt(f"batch {WHOLE}", dtype="int64", fill=4),
            },
        ),
        {
            "adaln_dim": 16, "attention_head_dim": 8, "in_channels": 16, "intermediate_size": 32,
            "llm_features_dim": 24, "mrope_section": [2, 1, 1], "num_attention_heads": 4,
            "num_layers": 4,
        },
    ),
    "stable_audio": (
        Row(
            "StableAudioDiTModel",
            {
                "hidden_states": step("batch in_channels tokens"),
                "timestep": run(fill="fraction"),
                "encoder_hidden_states": prompt("batch text_tokens cross_attention_input_dim"),
                "global_hidden_states": prompt("batch 1 global_states_input_dim"),
                "rotary_embedding": (
                    prompt("tokens+1 attention_head_dim//2"),
                    prompt("tokens+1 attention_head_dim//2"),
                ),
            },
            pipelines=("StableAudioPipeline",),
            name="stable_audio",
            latent_scale=(1, 1),
            usual={"tokens": 1024},
        ),
        {
            "attention_head_dim": 8, "cross_attention_dim": 8, "cross_attention_input_dim": 8,
            "global_states_input_dim": 16, "in_channels": 4, "num_attention_heads": 2,
            "num_key_value_attention_heads": 1, "num_layers": 4, "out_channels": 4,
            "sample_size": 32, "time_proj_dim": 16,
        },
    ),
}  # fmt: skip
"""Name → row and config."""
