# SPDX-License-Identifier: Apache-2.0
"""Models that make sound: their latents are frames of one token each."""

from __future__ import annotations

from .row import TEXT_MASK, Row, Same, prompt, run, step

__all__ = ["AUDIO_MODELS"]

AUDIO_MODELS: tuple[Row, ...] = (
    Row(
        "AceStepTransformer1DModel",
        {
            "hidden_states": step("batch frames audio_acoustic_hidden_dim"),
            "timestep": run(fill="fraction"),
            "timestep_r": Same("timestep"),
            "encoder_hidden_states": prompt("batch text_tokens hidden_size"),
            "context_latents": prompt("batch frames in_channels-audio_acoustic_hidden_dim"),
        },
        pipelines=("AceStepPipeline",),
        name="ace_step",
        multiples={"frames": "patch_size"},
        latent_scale=(1, 1),
        timestep_scale=1000.0,
    ),
    Row(
        "LongCatAudioDiTTransformer",
        {
            "hidden_states": step("batch frames latent_dim"),
            "timestep": run(fill="fraction"),
            "encoder_hidden_states": prompt("batch text_tokens dit_text_dim"),
            "encoder_attention_mask": prompt("batch text_tokens", dtype="bool", fill="mask"),
            "attention_mask": prompt("batch frames", dtype="bool", fill="mask"),
            "latent_cond": prompt("batch frames latent_dim", needs="use_latent_condition"),
        },
        pipelines=("LongCatAudioDiTPipeline",),
        name="longcat_audio",
        latent_scale=(1, 1),
        timestep_scale=1000.0,
    ),
    Row(
        "MiniMaxMusic3Transformer1DModel",
        {
            "hidden_states": step("batch in_channels frames"),
            "timestep": run(fill="fraction"),
            "encoder_hidden_states": prompt("batch frames condition_dim"),
        },
        name="minimax_music_3",
        latent_scale=(1, 1),
    ),
    Row(
        "StableAudio3DiTModel",
        {
            "hidden_states": step("batch io_channels frames"),
            "timestep": run(fill="fraction"),
            "encoder_hidden_states": prompt("batch text_tokens cond_token_dim"),
            "global_hidden_states": prompt("batch global_cond_dim"),
            "encoder_attention_mask": TEXT_MASK,
        },
        pipelines=("StableAudio3Pipeline",),
        name="stable_audio_3",
        multiples={"frames": "patch_size"},
        latent_scale=(1, 1),
    ),
)
"""In the order in which each came to be cut."""
