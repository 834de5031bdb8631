# SPDX-License-Identifier: Apache-2.0
"""Small configs of diffusers transformers.

Blocks are more than are traced, so that a proof covers those that were left out.
"""

from __future__ import annotations

from typing import Any

WAN = {
    "attention_head_dim": 12,
    "cross_attn_norm": True,
    "ffn_dim": 32,
    "freq_dim": 32,
    "in_channels": 4,
    "num_attention_heads": 2,
    "num_layers": 4,
    "out_channels": 4,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
    "text_dim": 16,
}
SD3 = {
    "attention_head_dim": 8,
    "caption_projection_dim": 32,
    "in_channels": 4,
    "joint_attention_dim": 32,
    "num_attention_heads": 4,
    "num_layers": 5,
    "out_channels": 4,
    "patch_size": 1,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 96,
    "sample_size": 32,
}
LTX_2 = {
    "attention_head_dim": 8, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8,
    "audio_in_channels": 6, "audio_num_attention_heads": 2, "audio_out_channels": 6,
    "caption_channels": 12, "cross_attention_dim": 16, "in_channels": 4,
    "num_attention_heads": 2, "num_layers": 4, "out_channels": 4, "patch_size": 1,
    "patch_size_t": 1, "qk_norm": "rms_norm_across_heads",
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "wan": ("WanTransformer3DModel", WAN),
    "wan_i2v": ("WanTransformer3DModel", {**WAN, "image_dim": 16, "added_kv_proj_dim": 24}),
    "flux": (
        "FluxTransformer2DModel",
        {
            "attention_head_dim": 16, "axes_dims_rope": [4, 4, 8], "in_channels": 4,
            "joint_attention_dim": 32, "num_attention_heads": 2, "num_layers": 4,
            "num_single_layers": 4, "patch_size": 1, "pooled_projection_dim": 32,
            "guidance_embeds": True,
        },
    ),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        {
            "attention_head_dim": 10, "guidance_embeds": True, "in_channels": 4,
            "num_attention_heads": 2, "num_layers": 3, "num_refiner_layers": 3,
            "num_single_layers": 3, "out_channels": 4, "patch_size": 1, "patch_size_t": 1,
            "pooled_projection_dim": 8, "rope_axes_dim": [2, 4, 4], "text_embed_dim": 16,
        },
    ),
    "hunyuan_one_refiner": (
        "HunyuanVideoTransformer3DModel",
        {
            "attention_head_dim": 10, "guidance_embeds": False, "in_channels": 4,
            "num_attention_heads": 2, "num_layers": 2, "num_refiner_layers": 1,
            "num_single_layers": 2, "out_channels": 4, "patch_size": 1, "patch_size_t": 1,
            "pooled_projection_dim": 8, "rope_axes_dim": [2, 4, 4], "text_embed_dim": 16,
        },
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {
            "attention_head_dim": 8, "caption_channels": 16, "cross_attention_dim": 16,
            "in_channels": 4, "num_attention_heads": 2, "num_layers": 4, "out_channels": 4,
            "qk_norm": "rms_norm_across_heads",
        },
    ),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        {
            "attention_head_dim": 16, "axes_dims_rope": [8, 4, 4], "in_channels": 16,
            "joint_attention_dim": 16, "num_attention_heads": 4, "num_layers": 4,
            "out_channels": 4, "patch_size": 2,
        },
    ),
    "sd3": ("SD3Transformer2DModel", SD3),
    "sd35": (
        "SD3Transformer2DModel",
        {**SD3, "dual_attention_layers": [0, 1, 2], "qk_norm": "rms_norm"},
    ),
    "bria": (
        "BriaTransformer2DModel",
        {
            "attention_head_dim": 8, "axes_dims_rope": [0, 4, 4], "in_channels": 4,
            "joint_attention_dim": 32, "num_attention_heads": 2, "num_layers": 4,
            "num_single_layers": 4, "patch_size": 1, "pooled_projection_dim": None,
        },
    ),
    "bria_fibo": (
        "BriaFiboTransformer2DModel",
        {
            "attention_head_dim": 8, "axes_dims_rope": [0, 4, 4], "in_channels": 48,
            "joint_attention_dim": 64, "num_attention_heads": 2, "num_layers": 3,
            "num_single_layers": 3, "patch_size": 1, "pooled_projection_dim": None,
            "text_encoder_dim": 32,
        },
    ),
    "bria_fibo_2": (
        "BriaFibo2Transformer2DModel",
        {
            "axes_dims": [4, 6, 6], "axes_lens": [64, 32, 32], "cap_feat_dim": 16, "dim": 32,
            "gist_max_text_len": 32, "gist_min_text_len": 4, "gist_step": 2, "in_channels": 4,
            "injection_layer_ids": [1, 5, 6], "max_num_gist_tokens": 8, "min_num_gist_tokens": 4,
            "n_heads": 2, "n_layers": 8, "n_refiner_layers": 3, "perceiver_num_layers": 1,
        },
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        {
            "approximator_hidden_dim": 16, "approximator_layers": 1, "approximator_num_channels": 8,
            "attention_head_dim": 16, "axes_dims_rope": [4, 4, 8], "in_channels": 4,
            "joint_attention_dim": 32, "num_attention_heads": 2, "num_layers": 4,
            "num_single_layers": 4, "patch_size": 1,
        },
    ),
    "ovis_image": (
        "OvisImageTransformer2DModel",
        {
            "attention_head_dim": 16, "axes_dims_rope": [4, 4, 8], "in_channels": 4,
            "joint_attention_dim": 32, "num_attention_heads": 2, "num_layers": 4,
            "num_single_layers": 4, "out_channels": 4, "patch_size": 1,
        },
    ),
    "chrono_edit": (
        "ChronoEditTransformer3DModel",
        {
            "attention_head_dim": 8, "cross_attn_norm": True, "ffn_dim": 32, "freq_dim": 16,
            "in_channels": 16, "num_attention_heads": 2, "num_layers": 4, "out_channels": 16,
            "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 64,
            "rope_temporal_skip_len": 8, "text_dim": 32,
        },
    ),
    "sana_video": (
        "SanaVideoTransformer3DModel",
        {
            "attention_head_dim": 12, "caption_channels": 16, "cross_attention_dim": 24,
            "cross_attention_head_dim": 12, "in_channels": 16, "mlp_ratio": 2.5,
            "num_attention_heads": 2, "num_cross_attention_heads": 2, "num_layers": 4,
            "out_channels": 16, "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32, "sample_size": 8,
        },
    ),
    "krea_2": (
        "Krea2Transformer2DModel",
        {
            "attention_head_dim": 8, "axes_dims_rope": [4, 2, 2], "in_channels": 16,
            "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
            "num_layers": 4, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
            "num_text_layers": 3, "text_hidden_dim": 16, "text_intermediate_size": 16,
            "text_num_attention_heads": 2, "text_num_key_value_heads": 1, "timestep_embed_dim": 8,
        },
    ),
    "prx": (
        "PRXTransformer2DModel",
        {
            "axes_dim": [8, 8], "context_in_dim": 16, "depth": 4, "hidden_size": 32,
            "in_channels": 16, "num_heads": 2, "patch_size": 2,
        },
    ),
    "joy_image_edit": (
        "JoyImageEditTransformer3DModel",
        {
            "hidden_size": 32, "in_channels": 16, "num_attention_heads": 2, "num_layers": 4,
            "patch_size": [1, 2, 2], "rope_dim_list": [4, 6, 6], "text_dim": 16, "theta": 256,
        },
    ),
    "z_image": (
        "ZImageTransformer2DModel",
        {
            "all_f_patch_size": [1], "all_patch_size": [2], "axes_dims": [8, 4, 4],
            "axes_lens": [256, 32, 32], "cap_feat_dim": 16, "dim": 16, "in_channels": 16,
            "n_heads": 1, "n_kv_heads": 2, "n_layers": 4, "n_refiner_layers": 2, "qk_norm": True,
            "rope_theta": 256.0, "t_scale": 1000.0,
        },
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            "attention_head_dim": 8, "caption_channels": 8, "cross_attention_dim": 16,
            "in_channels": 4, "norm_type": "ada_norm_single", "num_attention_heads": 2,
            "num_embeds_ada_norm": 8, "num_layers": 4, "out_channels": 8, "patch_size": 2,
            "sample_size": 8, "use_additional_conditions": False,
        },
    ),
    "pixart_alpha": (
        "PixArtTransformer2DModel",
        {
            "attention_head_dim": 12, "caption_channels": 8, "cross_attention_dim": 24,
            "in_channels": 4, "norm_type": "ada_norm_single", "num_attention_heads": 2,
            "num_embeds_ada_norm": 8, "num_layers": 4, "out_channels": 8, "patch_size": 2,
            "sample_size": 128, "use_additional_conditions": True,
        },
    ),
    "sana": (
        "SanaTransformer2DModel",
        {
            "attention_head_dim": 8, "caption_channels": 8, "cross_attention_dim": 16,
            "cross_attention_head_dim": 8, "in_channels": 4, "num_attention_heads": 2,
            "num_cross_attention_heads": 2, "num_layers": 4, "out_channels": 4, "patch_size": 1,
            "sample_size": 32,
        },
    ),
    "cogview3_plus": (
        "CogView3PlusTransformer2DModel",
        {
            "attention_head_dim": 4, "condition_dim": 2, "in_channels": 4,
            "num_attention_heads": 4, "num_layers": 4, "out_channels": 4, "patch_size": 2,
            "pos_embed_max_size": 32, "sample_size": 8, "text_embed_dim": 8, "time_embed_dim": 8,
        },
    ),
    "cogview4": (
        "CogView4Transformer2DModel",
        {
            "attention_head_dim": 4, "condition_dim": 4, "in_channels": 4,
            "num_attention_heads": 4, "num_layers": 4, "out_channels": 4, "patch_size": 2,
            "text_embed_dim": 8, "time_embed_dim": 8,
        },
    ),
    "hunyuan_image": (
        "HunyuanImageTransformer2DModel",
        {
            "attention_head_dim": 8, "in_channels": 4, "num_attention_heads": 2, "num_layers": 3,
            "num_refiner_layers": 3, "num_single_layers": 3, "out_channels": 4,
            "patch_size": [1, 1], "rope_axes_dim": [4, 4], "text_embed_dim": 16,
        },
    ),
    "hunyuan_image_glyphs": (
        "HunyuanImageTransformer2DModel",
        {
            "attention_head_dim": 8, "guidance_embeds": True, "in_channels": 4,
            "num_attention_heads": 2, "num_layers": 3, "num_refiner_layers": 2,
            "num_single_layers": 3, "out_channels": 4, "patch_size": [1, 1],
            "rope_axes_dim": [4, 4], "text_embed_dim": 16, "text_embed_2_dim": 12,
        },
    ),
    "hunyuan_image_distilled": (
        "HunyuanImageTransformer2DModel",
        {
            "attention_head_dim": 8, "guidance_embeds": True, "in_channels": 4,
            "num_attention_heads": 2, "num_layers": 3, "num_refiner_layers": 2,
            "num_single_layers": 3, "out_channels": 4, "patch_size": [1, 1],
            "rope_axes_dim": [4, 4], "text_embed_dim": 16, "text_embed_2_dim": 12,
            "use_meanflow": True,
        },
    ),
    "hunyuan_video_15": (
        "HunyuanVideo15Transformer3DModel",
        {
            "attention_head_dim": 8, "image_embed_dim": 12, "in_channels": 9, "mlp_ratio": 2.0,
            "num_attention_heads": 2, "num_layers": 4, "num_refiner_layers": 2, "out_channels": 4,
            "patch_size": 1, "patch_size_t": 1, "rope_axes_dim": [2, 2, 4], "target_size": 16,
            "task_type": "t2v", "text_embed_2_dim": 8, "text_embed_dim": 16,
        },
    ),
    "lumina_2": (
        "Lumina2Transformer2DModel",
        {
            "axes_dim_rope": [4, 2, 2], "axes_lens": [32, 32, 32], "cap_feat_dim": 8,
            "ffn_dim_multiplier": 1.0, "hidden_size": 32, "in_channels": 4, "multiple_of": 16,
            "num_attention_heads": 4, "num_kv_heads": 2, "num_layers": 4,
            "num_refiner_layers": 2, "patch_size": 2, "sample_size": 16,
        },
    ),
    "mochi": (
        "MochiTransformer3DModel",
        {
            "activation_fn": "swiglu", "attention_head_dim": 8, "in_channels": 4,
            "max_sequence_length": 16, "num_attention_heads": 2, "num_layers": 4, "patch_size": 2,
            "pooled_projection_dim": 16, "qk_norm": "rms_norm", "text_embed_dim": 16,
            "time_embed_dim": 4,
        },
    ),
    "longcat_image": (
        "LongCatImageTransformer2DModel",
        {
            "attention_head_dim": 16, "axes_dims_rope": [4, 4, 8], "in_channels": 4,
            "joint_attention_dim": 32, "num_attention_heads": 2, "num_layers": 4,
            "num_single_layers": 4, "patch_size": 1, "pooled_projection_dim": 32,
        },
    ),
    "nucleus_image": (
        "NucleusMoEImageTransformer2DModel",
        {
            "attention_head_dim": 16, "axes_dims_rope": [8, 4, 4],
            "capacity_factors": 2.0, "in_channels": 16, "joint_attention_dim": 16,
            "moe_intermediate_dim": 24, "num_attention_heads": 8, "num_experts": 4,
            "num_layers": 6, "out_channels": 4, "patch_size": 2,
        },
    ),
    "flux_2": (
        "Flux2Transformer2DModel",
        {
            "attention_head_dim": 16, "axes_dims_rope": [4, 4, 4, 4], "in_channels": 4,
            "joint_attention_dim": 32, "num_attention_heads": 2, "num_layers": 4,
            "num_single_layers": 4, "patch_size": 1, "timestep_guidance_channels": 32,
        },
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {
            "attention_head_dim": 16, "in_channels": 4, "max_text_seq_length": 11,
            "num_attention_heads": 2, "num_layers": 4, "out_channels": 4, "patch_size": 2,
            "sample_frames": 9, "sample_height": 8, "sample_width": 8, "text_embed_dim": 8,
            "time_embed_dim": 8, "use_rotary_positional_embeddings": True,
        },
    ),
    "skyreels_v2": (
        "SkyReelsV2Transformer3DModel",
        {
            "attention_head_dim": 12, "cross_attn_norm": True, "ffn_dim": 32, "freq_dim": 32,
            "in_channels": 4, "num_attention_heads": 2, "num_layers": 4, "out_channels": 4,
            "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
            "text_dim": 16,
        },
    ),
    "motif_video": (
        "MotifVideoTransformer3DModel",
        {
            "attention_head_dim": 12, "image_embed_dim": 4, "in_channels": 33,
            "num_attention_heads": 2, "num_decoder_layers": 0, "num_layers": 3,
            "num_single_layers": 3, "out_channels": 16, "patch_size": 1, "patch_size_t": 1,
            "rope_axes_dim": [4, 4, 4], "text_embed_dim": 32,
        },
    ),
    "allegro": (
        "AllegroTransformer3DModel",
        {
            "attention_head_dim": 24, "caption_channels": 8, "cross_attention_dim": 48,
            "in_channels": 4, "num_attention_heads": 2, "num_layers": 4, "out_channels": 4,
            "sample_frames": 8, "sample_height": 8, "sample_width": 8,
        },
    ),
    "flux_3": (
        "Flux3Transformer2DModel",
        {
            "attention_head_dim": 16, "axes_dims_rope": [4, 4, 4, 4],
            "cond_in_channels": 4, "in_channels": 4, "joint_attention_dim": 32,
            "num_attention_heads": 2, "num_layers": 4, "num_single_layers": 4,
        },
    ),
    "aura_flow": (
        "AuraFlowTransformer2DModel",
        {
            "attention_head_dim": 8, "caption_projection_dim": 32, "in_channels": 4,
            "joint_attention_dim": 32, "num_attention_heads": 4, "num_mmdit_layers":
            4, "num_single_dit_layers": 4, "out_channels": 4, "patch_size": 2,
            "pos_embed_max_size": 1024, "sample_size": 32,
        },
    ),
    "ace_step": (
        "AceStepTransformer1DModel",
        {
            "audio_acoustic_hidden_dim": 8, "head_dim": 8, "hidden_size": 32,
            "in_channels": 24, "intermediate_size": 64, "num_attention_heads": 4,
            "num_hidden_layers": 6, "num_key_value_heads": 2, "patch_size": 2,
            "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 16,
        },
    ),
    "ernie_image": (
        "ErnieImageTransformer2DModel",
        {
            "eps": 1e-06, "ffn_hidden_size": 16, "hidden_size": 32, "in_channels": 16,
            "num_attention_heads": 2, "num_layers": 4, "out_channels": 16, "patch_size": 1,
            "qk_layernorm": True, "rope_axes_dim": [8, 4, 4], "rope_theta": 256, "text_in_dim": 16,
        },
    ),
    "glm_image": (
        "GlmImageTransformer2DModel",
        {
            "attention_head_dim": 8, "condition_dim": 8, "in_channels": 4, "num_attention_heads": 2,
            "num_layers": 4, "out_channels": 4, "patch_size": 2,
            "prior_vq_quantizer_codebook_size": 64, "text_embed_dim": 32, "time_embed_dim": 16,
        },
    ),
    "kandinsky_6": (
        "Kandinsky6Transformer3DModel",
        {
            "axes_dims": [4, 6, 6], "ca_rope": True, "cross_gates": True, "ff_dim": 48,
            "fix_modulation": True, "in_audio_dim": 4, "in_text_dim": 16, "in_text_dim2": 12,
            "in_visual_dim": 4, "model_dim": 32, "num_text_blocks": 2, "num_visual_blocks": 4,
            "out_audio_dim": 4, "out_visual_dim": 4, "text_token_padding": True, "time_dim": 24,
        },
    ),
    "consis_id": (
        "ConsisIDTransformer3DModel",
        {
            "LFE_depth": 5, "LFE_dim_head": 4, "LFE_ff_mult": 1, "LFE_id_dim": 6, "LFE_num_heads": 2,
            "LFE_num_id_token": 2, "LFE_num_querie": 3, "LFE_output_dim": 16, "LFE_vit_dim": 8,
            "attention_head_dim": 12, "cross_attn_dim_head": 4, "cross_attn_num_heads": 2,
            "in_channels": 4, "is_train_face": True, "local_face_scale": 0.5,
            "max_text_seq_length": 11, "num_attention_heads": 2, "num_layers": 4, "out_channels": 4,
            "sample_frames": 9, "sample_height": 8, "sample_width": 8, "text_embed_dim": 8,
            "time_embed_dim": 8, "use_rotary_positional_embeddings": True,
        },
    ),
    "minimax_h3": (
        "MiniMaxH3Transformer3DModel",
        {
            "attention_head_dim": 16, "audio_in_channels": 32, "ffn_dim": 32, "freq_dim": 8,
            "hidden_size": 24, "in_channels": 24, "num_attention_heads": 2, "num_layers": 4,
            "num_refiner_layers": 2, "patch_size": [1, 2, 2], "rope_freq_dim": 2, "text_dim": 8,
            "time_embed_dim": 16, "time_embed_hidden_dim": 24,
        },
    ),
    "any_flow": (
        "AnyFlowTransformer3DModel",
        {
            "attention_head_dim": 12, "cross_attn_norm": True, "deltatime_type": "r", "ffn_dim": 32,
            "freq_dim": 32, "gate_value": 0.25, "in_channels": 4, "num_attention_heads": 2,
            "num_layers": 4, "out_channels": 4, "patch_size": [1, 2, 2], "rope_max_seq_len": 32,
            "text_dim": 16,
        },
    ),
    "longcat_audio": (
        "LongCatAudioDiTTransformer",
        {
            "dit_depth": 4, "dit_dim": 64, "dit_heads": 4, "dit_text_dim": 32, "latent_dim": 8,
        },
    ),
    "wan_vace": (
        "WanVACETransformer3DModel",
        {**WAN, "in_channels": 16, "num_layers": 6, "out_channels": 16, "vace_in_channels": 96,
         "vace_layers": [0, 2, 4]},
    ),
    "ltx_2": ("LTX2VideoTransformer3DModel", LTX_2),
    "ltx_2_3": (
        "LTX2VideoTransformer3DModel",
        {
            **LTX_2, "audio_cross_attn_mod": True, "audio_gated_attn": True, "cross_attn_mod": True,
            "gated_attn": True, "perturbed_attn": True, "rope_type": "split",
            "use_prompt_embeddings": False,
        },
    ),
    "hunyuan_dit": (
        "HunyuanDiT2DModel",
        {
            "activation_fn": "gelu-approximate", "attention_head_dim": 8, "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8, "hidden_size": 16, "in_channels": 4,
            "num_attention_heads": 2, "num_layers": 6, "patch_size": 2, "pooled_projection_dim": 4,
            "sample_size": 8, "text_len": 7, "text_len_t5": 5,
        },
    ),
    "minimax_music_3": (
        "MiniMaxMusic3Transformer1DModel",
        {
            "attention_head_dim": 8, "condition_dim": 16, "ff_inner_dim": 32,
            "fourier_embedding_dim": 8, "in_channels": 8, "num_attention_heads": 2,
            "num_layers": 4, "rotary_dim": 4,
        },
    ),
    "easy_animate": (
        "EasyAnimateTransformer3DModel",
        {
            "attention_head_dim": 16, "in_channels": 4, "mmdit_layers": 3, "num_attention_heads": 2,
            "num_layers": 6, "out_channels": 4, "patch_size": 2, "text_embed_dim": 8,
            "time_embed_dim": 8,
        },
    ),
    "cosmos": (
        "CosmosTransformer3DModel",
        {
            "adaln_lora_dim": 4, "attention_head_dim": 12, "concat_padding_mask": True,
            "extra_pos_embed_type": "learnable", "in_channels": 4, "max_size": [8, 32, 32],
            "mlp_ratio": 2, "num_attention_heads": 2, "num_layers": 4, "out_channels": 4,
            "patch_size": [1, 2, 2], "rope_scale": [2.0, 1.0, 1.0], "text_embed_dim": 16,
        },
    ),
    "latte": (
        "LatteTransformer3DModel",
        {
            "activation_fn": "gelu-approximate", "attention_bias": True, "attention_head_dim": 8,
            "caption_channels": 12, "cross_attention_dim": 16, "in_channels": 4,
            "norm_elementwise_affine": False, "norm_type": "ada_norm_single",
            "num_attention_heads": 2, "num_layers": 3, "out_channels": 8, "patch_size": 2,
            "sample_size": 8, "video_length": 3,
        },
    ),
    "stable_audio_3": (
        "StableAudio3DiTModel",
        {
            "cond_token_dim": 16, "depth": 4, "embed_dim": 32, "ff_mult": 2, "global_cond_dim": 12,
            "io_channels": 8, "local_add_cond_dim": 5, "num_heads": 4, "num_memory_tokens": 3,
            "patch_size": 1, "timestep_features_dim": 16, "use_differential_attention": True,
        },
    ),
    "kandinsky_5": (
        "Kandinsky5Transformer3DModel",
        {
            "axes_dims": [4, 6, 6], "ff_dim": 64, "in_text_dim": 16, "in_text_dim2": 12,
            "in_visual_dim": 4, "model_dim": 32, "num_text_blocks": 2, "num_visual_blocks": 4,
            "out_visual_dim": 4, "time_dim": 16,
        },
    ),
    "dit": (
        "DiTTransformer2DModel",
        {
            "attention_head_dim": 8, "in_channels": 4, "num_attention_heads": 2,
            "num_embeds_ada_norm": 1000, "num_layers": 4, "out_channels": 8, "patch_size": 2,
            "sample_size": 8,
        },
    ),
    "lumina_next": (
        "LuminaNextDiT2DModel",
        {
            "cross_attention_dim": 32, "hidden_size": 24, "in_channels": 4, "multiple_of": 16,
            "num_attention_heads": 3, "num_kv_heads": 1, "num_layers": 4, "sample_size": 16,
        },
    ),
    "wan_animate": (
        "WanAnimateTransformer3DModel",
        {
            **WAN, "added_kv_proj_dim": 24, "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2, "image_dim": 16, "in_channels": 12,
            "inject_face_latents_blocks": 2, "latent_channels": 4, "motion_dim": 4,
            "motion_encoder_channel_sizes": {"16": 16, "4": 16, "8": 16},
            "motion_encoder_dim": 16, "motion_encoder_size": 16, "motion_style_dim": 8,
            "num_layers": 6,
        },
    ),
}  # fmt: skip
"""Name → class and config."""
