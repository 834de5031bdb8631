# SPDX-License-Identifier: Apache-2.0
"""Models that make or edit images."""

from __future__ import annotations

from .patches import BRIA_FIBO_2, CHROMA, ERNIE_IMAGE, GLM_IMAGE, HUNYUAN_IMAGE, LUMINA_2
from .row import PATCH_IMAGE, PATCH_VIDEO, TEXT_MASK, Row, prompt, run, size, step

__all__ = ["IMAGE_MODELS"]

COGVIEW = {
    "hidden_states": step("batch in_channels height width"),
    "timestep": run(),
    "encoder_hidden_states": prompt("batch text_tokens text_embed_dim"),
    "original_size": prompt("batch 2", fill=9),
    "target_size": prompt("batch 2", fill=9),
    "crop_coords": prompt("batch 2", fill=9),
}
HUNYUAN_TABLE = prompt("(height//patch_size)*(width//patch_size) attention_head_dim")

IMAGE_MODELS: tuple[Row, ...] = (
    Row(
        "QwenImageTransformer2DModel",
        {
            "hidden_states": step("batch rows*columns in_channels"),
            "timestep": run(fill="fraction"),
            "encoder_hidden_states": prompt("batch text_tokens joint_attention_dim"),
            "encoder_hidden_states_mask": TEXT_MASK,
            "img_shapes": [[(1, size("rows"), size("columns"))]],
        },
        pipelines=("QwenImagePipeline",),
        name="qwen_image",
        latent_scale=(1, 8),
        timestep_scale=1000.0,
        packed=2,
    ),
    Row(
        "SD3Transformer2DModel",
        {
            "hidden_states": step("batch in_channels height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens joint_attention_dim"),
            "pooled_projections": prompt("batch pooled_projection_dim"),
        },
        pipelines=("StableDiffusion3Pipeline",),
        name="sd3",
        multiples=PATCH_IMAGE,
        latent_scale=(1, 8),
    ),
    Row(
        "BriaTransformer2DModel",
        {
            "hidden_states": step("batch tokens in_channels"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens joint_attention_dim"),
            "img_ids": prompt("tokens 3", fill="positions"),
            "txt_ids": prompt("text_tokens 3", fill="positions"),
        },
        pipelines=("BriaPipeline",),
        name="bria",
        latent_scale=(1, 8),
        packed=2,
    ),
    Row(
        "BriaFibo2Transformer2DModel",
        {
            "hidden_states": step("batch in_channels height width"),
            "timestep": run(fill="fraction"),
            "encoder_hidden_states": prompt(
                "batch 1+len(injection_layer_ids) text_tokens cap_feat_dim"
            ),
            "encoder_attention_mask": prompt("batch text_tokens", dtype="bool", fill="mask"),
        },
        pipelines=("BriaFibo2Pipeline",),
        name="bria_fibo_2",
        multiples=PATCH_IMAGE,
        latent_scale=(1, 8),
        timestep_scale=1000.0,
        patches=BRIA_FIBO_2,
    ),
    Row(
        "BriaFiboTransformer2DModel",
        {
            "hidden_states": step("batch tokens in_channels"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens joint_attention_dim"),
            "text_encoder_layers": prompt(
                "num_layers+num_single_layers batch text_tokens text_encoder_dim", listed=True
            ),
            "img_ids": prompt("tokens 3", fill="positions"),
            "txt_ids": prompt("text_tokens 3", fill="positions"),
            "joint_attention_kwargs": {
                "attention_mask": prompt("batch 1 1 text_tokens+tokens", dtype="bool", fill="mask")
            },
        },
        pipelines=("BriaFiboPipeline",),
        name="bria_fibo",
        latent_scale=(1, 16),
        packed=1,
        whole=True,
    ),
    Row(
        "ChromaTransformer2DModel",
        {
            "hidden_states": step("batch tokens in_channels"),
            "timestep": run(fill="fraction"),
            "encoder_hidden_states": prompt("batch text_tokens joint_attention_dim"),
            "img_ids": prompt("tokens 3", fill="positions"),
            "txt_ids": prompt("text_tokens 3", fill="positions"),
            "attention_mask": prompt("batch text_tokens+tokens", fill="mask"),
        },
        pipelines=("ChromaPipeline",),
        name="chroma",
        latent_scale=(1, 8),
        timestep_scale=1000.0,
        packed=2,
        patches=CHROMA,
    ),
    Row(
        "OvisImageTransformer2DModel",
        {
            "hidden_states": step("batch tokens in_channels"),
            "timestep": run(fill="fraction"),
            "encoder_hidden_states": prompt("batch text_tokens joint_attention_dim"),
            "img_ids": prompt("tokens 3", fill="positions"),
            "txt_ids": prompt("text_tokens 3", fill="positions"),
        },
        pipelines=("OvisImagePipeline",),
        name="ovis_image",
        latent_scale=(1, 8),
        timestep_scale=1000.0,
        packed=2,
    ),
    Row(
        "Krea2Transformer2DModel",
        {
            "hidden_states": step("batch tokens in_channels"),
            "timestep": run(fill="fraction"),
            "encoder_hidden_states": prompt("batch text_tokens num_text_layers text_hidden_dim"),
            "position_ids": prompt("text_tokens+tokens 3", fill="positions"),
            "encoder_attention_mask": TEXT_MASK,
        },
        pipelines=("Krea2Pipeline",),
        name="krea_2",
        latent_scale=(1, 8),
        timestep_scale=1000.0,
        packed=2,
    ),
    Row(
        "PRXTransformer2DModel",
        {
            "hidden_states": step("batch in_channels height width"),
            "timestep": run(fill="fraction"),
            "encoder_hidden_states": prompt("batch text_tokens context_in_dim"),
            "attention_mask": TEXT_MASK,
        },
        pipelines=("PRXPipeline",),
        name="prx",
        multiples=PATCH_IMAGE,
        latent_scale=(1, 8),
        timestep_scale=1000.0,
    ),
    Row(
        "JoyImageEditTransformer3DModel",
        {
            "hidden_states": step("batch in_channels frames height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens text_dim"),
        },
        pipelines=("JoyImageEditPipeline",),
        name="joy_image_edit",
        multiples=PATCH_VIDEO,
    ),
    Row(
        "ZImageTransformer2DModel",
        {
            "x": step("1 in_channels 1 height width", listed=True),
            "t": run("1", fill="fraction"),
            "cap_feats": prompt("1 text_tokens cap_feat_dim", listed=True),
        },
        pipelines=("ZImagePipeline",),
        name="z_image",
        multiples={"height": "all_patch_size[0]", "width": "all_patch_size[0]"},
        latent_scale=(1, 8),
        timestep_scale=-1000.0,
        timestep_offset=1000.0,
        output_sign=-1,
    ),
    Row(
        "PixArtTransformer2DModel",
        {
            "hidden_states": step("batch in_channels height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens caption_channels"),
            "encoder_attention_mask": TEXT_MASK,
            "added_cond_kwargs": {
                "resolution": prompt("batch 2", needs="use_additional_conditions"),
                "aspect_ratio": prompt("batch 1", needs="use_additional_conditions"),
            },
        },
        pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        name="pixart",
        multiples=PATCH_IMAGE,
        latent_scale=(1, 8),
    ),
    Row(
        "SanaTransformer2DModel",
        {
            "hidden_states": step("batch in_channels height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens caption_channels"),
            "encoder_attention_mask": TEXT_MASK,
        },
        pipelines=("SanaPipeline",),
        name="sana",
        multiples=PATCH_IMAGE,
        latent_scale=(1, 32),
    ),
    Row(
        "CogView3PlusTransformer2DModel",
        COGVIEW,
        pipelines=("CogView3PlusPipeline",),
        name="cogview3_plus",
        multiples=PATCH_IMAGE,
        latent_scale=(1, 8),
    ),
    Row(
        "CogView4Transformer2DModel",
        COGVIEW,
        pipelines=("CogView4Pipeline",),
        name="cogview4",
        multiples=PATCH_IMAGE,
        latent_scale=(1, 8),
    ),
    Row(
        "HunyuanImageTransformer2DModel",
        {
            "hidden_states": step("batch in_channels height width"),
            "timestep": run(),
            "guidance": prompt("batch", needs="guidance_embeds"),
            "encoder_hidden_states": prompt("batch text_tokens text_embed_dim"),
            "encoder_attention_mask": TEXT_MASK,
            "encoder_hidden_states_2": prompt(
                "batch text_tokens_2 text_embed_2_dim", needs="text_embed_2_dim"
            ),
            "encoder_attention_mask_2": prompt(
                "batch text_tokens_2", fill="mask", needs="text_embed_2_dim"
            ),
        },
        pipelines=("HunyuanImagePipeline",),
        name="hunyuan_image",
        multiples={"height": "patch_size[0]", "width": "patch_size[1]"},
        latent_scale=(1, 32),
        usual={"text_tokens_2": 128},
        patches=HUNYUAN_IMAGE,
        refused={
            "use_meanflow": (
                True,
                "is true: distilled models that take a second timestep can't be cut yet",
                "use the checkpoint that is not distilled",
            )
        },
    ),
    Row(
        "LongCatImageTransformer2DModel",
        {
            "hidden_states": step("batch tokens in_channels"),
            "timestep": run(fill="fraction"),
            "encoder_hidden_states": prompt("batch text_tokens joint_attention_dim"),
            "img_ids": prompt("tokens 3", fill="positions"),
            "txt_ids": prompt("text_tokens 3", fill="positions"),
        },
        pipelines=("LongCatImagePipeline",),
        name="longcat_image",
        latent_scale=(1, 8),
        timestep_scale=1000.0,
        packed=2,
    ),
    Row(
        "NucleusMoEImageTransformer2DModel",
        {
            "hidden_states": step("batch rows*columns in_channels"),
            "timestep": run(fill="fraction"),
            "encoder_hidden_states": prompt("batch text_tokens joint_attention_dim"),
            "encoder_hidden_states_mask": TEXT_MASK,
            "img_shapes": [(1, size("rows"), size("columns"))],
        },
        pipelines=("NucleusMoEImagePipeline",),
        name="nucleus_image",
        latent_scale=(1, 8),
        timestep_scale=1000.0,
        output_sign=-1,
        packed=2,
    ),
    Row(
        "Flux2Transformer2DModel",
        {
            "hidden_states": step("batch tokens in_channels"),
            "timestep": run(fill="fraction"),
            "guidance": prompt("batch", needs="guidance_embeds"),
            "encoder_hidden_states": prompt("batch text_tokens joint_attention_dim"),
            "img_ids": prompt("batch tokens 4", fill="positions"),
            "txt_ids": prompt("batch text_tokens 4", fill="positions"),
        },
        pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
        name="flux_2",
        latent_scale=(1, 8),
        timestep_scale=1000.0,
        packed=2,
    ),
    Row(
        "Flux3Transformer2DModel",
        {
            "hidden_states": step("batch tokens in_channels"),
            "timestep": run(fill="fraction"),
            "encoder_hidden_states": prompt("batch text_tokens joint_attention_dim"),
            "img_ids": prompt("tokens 4", fill="positions"),
            "txt_ids": prompt("text_tokens 4", fill="positions"),
        },
        name="flux_3",
        latent_scale=(1, 8),
        timestep_scale=1000.0,
        packed=2,
    ),
    Row(
        "AuraFlowTransformer2DModel",
        {
            "hidden_states": step("batch in_channels height width"),
            "timestep": run(fill="fraction"),
            "encoder_hidden_states": prompt("batch text_tokens joint_attention_dim"),
        },
        pipelines=("AuraFlowPipeline",),
        name="aura_flow",
        multiples=PATCH_IMAGE,
        latent_scale=(1, 8),
        timestep_scale=1000.0,
    ),
    Row(
        "Lumina2Transformer2DModel",
        {
            "hidden_states": step("batch in_channels height width"),
            "timestep": run(fill="fraction"),
            "encoder_hidden_states": prompt("batch text_tokens cap_feat_dim"),
            "encoder_attention_mask": prompt("batch text_tokens", dtype="int64", fill="mask"),
        },
        pipelines=("Lumina2Pipeline",),
        name="lumina_2",
        multiples=PATCH_IMAGE,
        latent_scale=(1, 8),
        timestep_scale=-1000.0,
        timestep_offset=1000.0,
        output_sign=-1,
        patches=LUMINA_2,
    ),
    Row(
        "ErnieImageTransformer2DModel",
        {
            "hidden_states": step("batch in_channels height width"),
            "timestep": run(),
            "text_bth": prompt("batch text_tokens text_in_dim"),
            "text_lens": prompt("batch", dtype="int64", fill=9),
        },
        pipelines=("ErnieImagePipeline",),
        name="ernie_image",
        multiples=PATCH_IMAGE,
        latent_scale=(1, 16),
        patches=ERNIE_IMAGE,
    ),
    Row(
        "HunyuanDiT2DModel",
        {
            "hidden_states": step("batch in_channels height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_len cross_attention_dim"),
            "text_embedding_mask": prompt("batch text_len", fill="mask"),
            "encoder_hidden_states_t5": prompt("batch text_len_t5 cross_attention_dim_t5"),
            "text_embedding_mask_t5": prompt("batch text_len_t5", fill="mask"),
            "image_meta_size": prompt("batch 6", fill=9),
            "style": prompt("batch", dtype="int64", fill=1),
            "image_rotary_emb": (HUNYUAN_TABLE, HUNYUAN_TABLE),
        },
        pipelines=("HunyuanDiTPipeline",),
        name="hunyuan_dit",
        multiples=PATCH_IMAGE,
        whole=True,
        latent_scale=(1, 8),
    ),
    Row(
        "GlmImageTransformer2DModel",
        {
            "hidden_states": step("batch in_channels height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens text_embed_dim"),
            "prior_token_id": prompt(
                "batch (height//patch_size)*(width//patch_size)", dtype="int64", fill=9
            ),
            "prior_token_drop": prompt(
                "batch (height//patch_size)*(width//patch_size)", dtype="bool", fill=2
            ),
            "target_size": prompt("batch 2", fill=9),
            "crop_coords": prompt("batch 2", fill=9),
        },
        pipelines=(),
        name="glm_image",
        multiples=PATCH_IMAGE,
        latent_scale=(1, 8),
        timestep_offset=1.0,
        patches=GLM_IMAGE,
    ),
)
"""In the order in which each came to be cut."""
