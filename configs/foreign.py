# SPDX-License-Identifier: Apache-2.0
"""What LightX2V's config files say beside caching and generation, and what becomes of it here.

A key that steers kernels, memory or devices is accepted and named as without effect: `build`
settles those. A key that makes another picture is refused by name, for dropping it would too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ABSENT_POLICIES", "is_without_effect", "refusals"]

WITHOUT_EFFECT = re.compile(
    "|".join(
        (
            # Notes, and which model and task the file is for.
            r"_?comment|model_cls|model_type|task|task_variant|transformer_model_name|subfolder",
            # Kernels and their number formats.
            r"\w*attn(_\d+)?_type|attention_type|attn_impl|\w+_attn_setting|sparse_type",
            r"\w*rms_(norm_)?type|layer_norm_type|modulate_type|rope_type|mm_config|moe_backend",
            r"(\w+_)?use_compile|flashinfer_\w+|use_adaln_cache|enable_(text_)?kv_cache",
            r"use_fp32_\w+|fp32_\w+|enable_bf16|\w+_dtype|keep_latents_dtype_in_scheduler",
            # Quantised weights: `build` takes the checkpoint as it is.
            r"\w+_(quantized|quant_scheme|quantized_ckpt|original_ckpt)|mx\w+_fuse_enable",
            r"weight_auto_quant|input_scale_file",
            # Memory.
            r"(\w+_)?cpu_offload|(\w+_)?offload_\w+|use_event_offload|lazy_load|unload_modules",
            r"text_encoder_release_block_offload_buffers|use_tiling_vae|cosmos3_meta_init",
            # Several devices.
            r"parallel|\w+_parallel|tp_mm_type|hunyuan_cfg_mode|hunyuan_image3_pipeline_layout",
            # Sizes of the model, which its checkpoint tells.
            r"patch_size|num_channels_latents|tokenizer_max_length|use_image_encoder",
            r"vae_(scale_factor|spatial_scale_factor|stride)|text_encoder_out_layers",
            r"dim|(in|out|text|freq|ffn|action|raw_action|action_\w+)_dim|hidden_size|num_layers|num_heads|heads_num|eps",
            r"qk_norm|cross_attn_norm|window_size|rope_dim_list|rope_theta|(in|out)_channels",
            r"mm_(double|single)_blocks_depth|use_img_emb|use_31_block|log_scale",
            # Files: where they lie, how they are written.
            r"vae_path|t5_tokenizer_path|video_codec_options|audio_mux_prefer_copy|log_time",
            r"fps|target_fps|video_duration|save_video_fps",
            # Details of what REFUSED names by its switch.
            r"resolution_rate|changing_resolution_steps|lora_dynamic_apply|taylor_cache_\w+",
        )
    )
)


@dataclass(frozen=True)
class Refusal:
    """Keys that make another picture.

    Attributes:
        keys: Pattern of the keys.
        reason: Why dropping them would, and what to do.
        harmless: Values that say nothing.
    """

    keys: str
    reason: str
    harmless: tuple[Any, ...] = (None, False)


REFUSED = (
    Refusal(
        r"changing_resolution",
        "a run keeps its size here; remove the key, or set it to false",
    ),
    Refusal(
        r"lora_configs|lora_path|lora_strength",
        "the run would lack the LoRA; remove the key and give `freewheel run --lora FILE:SCALE`",
        (None, []),
    ),
    Refusal(
        r"use_taylor_cache",
        "name the policy by 'feature_caching': 'TaylorSeer', with 'interval' and 'order'",
    ),
    Refusal(
        r"h3_step_update|is_sr_running",
        "the timesteps are the pipeline's scheduler's, never a config's",
    ),
    Refusal(r"flow_shift|video_flow_shift|audio_flow_shift", "is 'sample_shift' here"),
    Refusal(
        r"aspect_ratio|image_size|infer_align_image_size|max_image_area|target_size"
        r"|max_resolution|video_(height|width)|num_video_frames",
        "a size is 'target_height', 'target_width' and 'target_video_length' here",
    ),
    Refusal(
        r"use_system_prompt|use_prompt_enhancer|bot_task|add_(resolution|duration)_template"
        r"|max_new_tokens|text_(do_sample|stream_output|temperature|top_k|top_p)",
        "rewrites the prompt; here the prompt is encoded as it is given",
        (None, False, "None"),
    ),
    Refusal(
        r"enable_sound|motion_frame|adapter_model_path|enable_text_cfg|use_timestep_transform"
        r"|sample_text_guide_scale|enable_reuse|norm_output_audio|infinitetalk_\w+|audio_\w+"
        r"|sample_audio_guide_scale",
        "of speech or sound, which no config here says anything of",
    ),
    Refusal(
        r"action_\w+|domain_name|view_point|decode_video"
        r"|policy_(use_state|history_length|flip_gripper|prompt_format)"
        r"|num_action_classes|memory_(frames|window_size)|chunk_latent_frames|stabilization_level"
        r"|temporal_context_size|select_window_out_flag|use_prope|use_bi_model_as_main"
        r"|video_action_freq_ratio|global_downsample_rate|training_mode|und_expert_\w+"
        r"|load_pretrained_backbones|(vlm|wan)_path",
        "of a model that is rolled on by actions or past frames, which is no family here",
    ),
    Refusal(
        r"save_(camera|colmap|conf|depth|gs|normal|points|rendered|sky_mask)|render_(depth|interp_\w+)"
        r"|apply_(sky|edge|confidence)_mask|compress_(pts|gs)\w*|(model_sky|edge_normal|edge_depth)_threshold|sky_mask_source"
        r"|confidence_percentile|video_(strategy|min_frames|max_frames)|disable_heads"
        r"|(config|ckpt)_path|wm_extended_scope",
        "of a model that rebuilds a scene, which is no family here",
    ),
    Refusal(
        r"inpaint_mask_enabled|fls|refer_\w+",
        "edits or follows a picture that no run here is given",
    ),
)

ABSENT_POLICIES = {
    "DynamicBlock": (
        "lets every block decide for itself",
        "'DualBlock', which decides once a step",
    ),
}
"""LightX2V's policies that are none here → what they do, and what is nearest here."""


def is_without_effect(key: str, value: Any) -> bool:
    """Tell whether a key of LightX2V's changes nothing here: by its kind, or at this value."""
    refusal = _refusal(key)
    if refusal is not None:
        return value in refusal.harmless
    return WITHOUT_EFFECT.fullmatch(key) is not None


def refusals(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the keys that can't be dropped, by the reason why."""
    found: dict[str, list[str]] = {}
    for key, value in data.items():
        refusal = _refusal(key)
        if refusal is not None and value not in refusal.harmless:
            found.setdefault(refusal.reason, []).append(key)
    return found


def _refusal(key: str) -> Refusal | None:
    """Return why a key is refused; what names a kernel or a device first of all is not."""
    if WITHOUT_EFFECT.fullmatch(key):
        return None
    return next((r for r in REFUSED if re.fullmatch(r.keys, key)), None)
