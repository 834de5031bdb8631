# SPDX-License-Identifier: Apache-2.0
"""Models that make or edit videos."""

from __future__ import annotations

from ...bundle.streams import LATENTS
from .row import (
    PATCH_IMAGE,
    PATCH_VIDEO,
    TEXT_MASK,
    Ignored,
    Input,
    Row,
    Same,
    prompt,
    run,
    size,
    step,
)
from .video_patches import (
    ANY_FLOW,
    CHRONO_EDIT,
    CONSIS_ID,
    COSMOS,
    EASY_ANIMATE,
    HUNYUAN_VIDEO_15,
    KANDINSKY_5,
    LATTE,
    MINIMAX_H3,
    MOCHI,
    WAN_ANIMATE,
)

__all__ = ["VIDEO_MODELS"]

COGVIDEO_TABLE = prompt(
    "frames*(height//patch_size)*(width//patch_size) attention_head_dim",
    needs="use_rotary_positional_embeddings",
)

CONSIS_ID_FACE = prompt("1 image_tokens LFE_vit_dim", needs="is_train_face")

H3_VIDEO = "frames*(height//patch_size[1])*(width//patch_size[2])"
H3_ROWS = f"text_tokens+{H3_VIDEO}+audio_tokens"

ALLEGRO_GRID = prompt("1 frames*(height//patch_size)*(width//patch_size)", dtype="int64", fill=1)


def _ltx_2_text(width: str) -> Input:
    """Return what the connectors give: up to LTX-2 the transformer brings it to its width itself."""
    return prompt(f"batch text_tokens ({width},caption_channels)[use_prompt_embeddings]")


def _allegro_table(positions: str) -> tuple[Input, Input]:
    """Return cosines and sines of one axis of Allegro's grid."""
    table = prompt(f"{positions} attention_head_dim//3")
    return table, table


VIDEO_MODELS: tuple[Row, ...] = (
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
        name="chrono_edit",
        patches=CHRONO_EDIT,
        multiples=PATCH_VIDEO,
        usual={"image_tokens": 257},
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
        name="sana_video",
        multiples=PATCH_VIDEO,
    ),
    Row(
        "CogVideoXTransformer3DModel",
        {
            "hidden_states": step("batch frames in_channels height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens text_embed_dim"),
            "image_rotary_emb": (COGVIDEO_TABLE, COGVIDEO_TABLE),
        },
        pipelines=("CogVideoXPipeline",),
        name="cogvideox",
        multiples=PATCH_IMAGE,
    ),
    Row(
        "SkyReelsV2Transformer3DModel",
        {
            "hidden_states": step("batch in_channels frames height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens text_dim"),
            "encoder_hidden_states_image": prompt(
                "batch image_tokens image_dim", needs="image_dim"
            ),
        },
        pipelines=("SkyReelsV2Pipeline", "SkyReelsV2ImageToVideoPipeline"),
        name="skyreels_v2",
        multiples=PATCH_VIDEO,
        usual={"image_tokens": 257},
    ),
    Row(
        "MotifVideoTransformer3DModel",
        {
            "hidden_states": step("batch in_channels frames height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens text_embed_dim"),
            "encoder_attention_mask": TEXT_MASK,
        },
        pipelines=("MotifVideoPipeline",),
        name="motif_video",
        multiples={"frames": "patch_size_t", **PATCH_IMAGE},
    ),
    Row(
        "HunyuanVideo15Transformer3DModel",
        {
            "hidden_states": step("batch in_channels frames height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens text_embed_dim"),
            "encoder_attention_mask": TEXT_MASK,
            "encoder_hidden_states_2": prompt("batch text_tokens_2 text_embed_2_dim"),
            "encoder_attention_mask_2": prompt("batch text_tokens_2", fill="mask"),
            "image_embeds": prompt("batch image_tokens image_embed_dim"),
        },
        pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
        name="hunyuan_video_15",
        multiples={"frames": "patch_size_t", **PATCH_IMAGE},
        latent_scale=(4, 16),
        usual={"text_tokens_2": 256, "image_tokens": 729},
        patches=HUNYUAN_VIDEO_15,
        refused={
            "use_meanflow": (
                True,
                "is true: distilled models that take a second timestep can't be cut yet",
                "use the checkpoint that is not distilled",
            )
        },
    ),
    Row(
        "MochiTransformer3DModel",
        {
            "hidden_states": step("batch in_channels frames height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens text_embed_dim"),
            "encoder_attention_mask": TEXT_MASK,
        },
        pipelines=("MochiPipeline",),
        name="mochi",
        multiples=PATCH_IMAGE,
        latent_scale=(6, 8),
        patches=MOCHI,
    ),
    Row(
        "AllegroTransformer3DModel",
        {
            "hidden_states": step("batch in_channels frames height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch 1 text_tokens caption_channels"),
            "encoder_attention_mask": TEXT_MASK,
            "image_rotary_emb": (
                (
                    _allegro_table("frames"),
                    _allegro_table("height//patch_size"),
                    _allegro_table("width//patch_size"),
                ),
                (ALLEGRO_GRID, ALLEGRO_GRID, ALLEGRO_GRID),
            ),
        },
        pipelines=("AllegroPipeline",),
        name="allegro",
        multiples=PATCH_IMAGE,
    ),
    Row(
        "WanVACETransformer3DModel",
        {
            "hidden_states": step("batch in_channels frames height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens text_dim"),
            "encoder_hidden_states_image": prompt(
                "batch image_tokens image_dim", needs="image_dim"
            ),
            "control_hidden_states": prompt("batch vace_in_channels frames height width"),
            "control_hidden_states_scale": prompt("len(vace_layers)"),
        },
        pipelines=("WanVACEPipeline",),
        name="wan_vace",
        multiples=PATCH_VIDEO,
        whole=True,
        usual={"image_tokens": 257},
    ),
    Row(
        "LTX2VideoTransformer3DModel",
        {
            "hidden_states": step("batch frames*height*width in_channels"),
            "audio_hidden_states": step("batch audio_tokens audio_in_channels"),
            "timestep": run(),
            "sigma": Same("timestep"),
            "encoder_hidden_states": _ltx_2_text("cross_attention_dim"),
            "audio_encoder_hidden_states": _ltx_2_text("audio_cross_attention_dim"),
            "encoder_attention_mask": TEXT_MASK,
            "audio_encoder_attention_mask": TEXT_MASK,
            "num_frames": size("frames"),
            "height": size("height"),
            "width": size("width"),
            "video_coords": prompt("batch 3 frames*height*width 2", fill="positions"),
            "audio_coords": prompt("batch 1 audio_tokens 2", fill="positions"),
            "isolate_modalities": False,
            "audio_num_frames": Ignored(),
            "fps": Ignored(),
            "use_cross_timestep": Ignored(),
        },
        pipelines=("LTX2Pipeline",),
        name="ltx_2",
        latent_scale=(8, 32),
        usual={"audio_tokens": 126},
    ),
    Row(
        "Kandinsky6Transformer3DModel",
        {
            "hidden_states": step(
                "batch frames height width (1+visual_cond)*in_visual_dim+visual_cond"
            ),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens in_text_dim"),
            "pooled_projections": prompt("batch in_text_dim2"),
            "encoder_attention_mask": prompt("batch text_tokens", dtype="bool", fill="mask"),
        },
        pipelines=("Kandinsky6TI2VAPipeline",),
        name="kandinsky_6",
        multiples=PATCH_VIDEO,
    ),
    Row(
        "ConsisIDTransformer3DModel",
        {
            "hidden_states": step("batch frames in_channels height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens text_embed_dim"),
            "image_rotary_emb": (COGVIDEO_TABLE, COGVIDEO_TABLE),
            "id_cond": prompt("1 LFE_id_dim", needs="is_train_face"),
            "id_vit_hidden": [CONSIS_ID_FACE] * 5,
        },
        pipelines=("ConsisIDPipeline",),
        name="consis_id",
        multiples=PATCH_IMAGE,
        whole=True,
        usual={"image_tokens": 577},
        patches=CONSIS_ID,
    ),
    Row(
        "MiniMaxH3Transformer3DModel",
        {
            "hidden_states": step(
                f"batch {H3_VIDEO} in_channels*patch_size[0]*patch_size[1]*patch_size[2]"
            ),
            "audio_hidden_states": step("batch audio_tokens audio_in_channels"),
            "encoder_hidden_states": prompt("batch text_tokens text_dim"),
            "timestep": run(
                "2",
                of=(LATENTS, "audio_latents"),
                indices="timestep_indices",
                fill="fraction",
            ),
            "timestep_indices": prompt(H3_ROWS, dtype="int64", fill=2),
            "token_tags": prompt(H3_ROWS, dtype="int64", fill=3),
            "position_ids": prompt(f"{H3_ROWS} 3", fill="positions"),
            "video_indices": prompt(H3_VIDEO, dtype="int64", fill="places", behind="text_tokens"),
            "audio_indices": prompt(
                "audio_tokens", dtype="int64", fill="places", behind=f"text_tokens+{H3_VIDEO}"
            ),
            "text_indices": prompt("text_tokens", dtype="int64", fill="places"),
        },
        pipelines=("MiniMaxH3ModularPipeline",),
        name="minimax_h3",
        scheduler="MiniMaxH3Scheduler",
        multiples=PATCH_VIDEO,
        latent_scale=(4, 16),
        usual={"audio_tokens": 400},
        patches=MINIMAX_H3,
    ),
    Row(
        "AnyFlowTransformer3DModel",
        {
            "hidden_states": step("batch frames in_channels height width"),
            "timestep": run(over=("hidden_states", 1)),
            "r_timestep": run(of=("next",), over=("hidden_states", 1)),
            "encoder_hidden_states": prompt("batch text_tokens text_dim"),
            "encoder_hidden_states_image": prompt(
                "batch image_tokens image_dim", needs="image_dim"
            ),
        },
        pipelines=("AnyFlowPipeline",),
        name="any_flow",
        scheduler="FlowMapEulerDiscreteScheduler",
        multiples=PATCH_VIDEO,
        usual={"image_tokens": 257},
        patches=ANY_FLOW,
    ),
    Row(
        "EasyAnimateTransformer3DModel",
        {
            "hidden_states": step("batch in_channels frames height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens text_embed_dim"),
        },
        pipelines=("EasyAnimatePipeline",),
        name="easy_animate",
        multiples=PATCH_IMAGE,
        patches=EASY_ANIMATE,
    ),
    Row(
        "CosmosTransformer3DModel",
        {
            "hidden_states": step("batch in_channels frames height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens text_embed_dim"),
            "fps": 30,
            "padding_mask": prompt("1 1 8*height 8*width", needs="concat_padding_mask"),
        },
        pipelines=("CosmosTextToWorldPipeline",),
        name="cosmos",
        multiples=PATCH_VIDEO,
        latent_scale=(8, 8),
        patches=COSMOS,
    ),
    Row(
        "LatteTransformer3DModel",
        {
            "hidden_states": step("batch in_channels video_length height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens caption_channels"),
            "enable_temporal_attentions": True,
        },
        pipelines=("LattePipeline",),
        name="latte",
        multiples=PATCH_IMAGE,
        latent_scale=(1, 8),
        patches=LATTE,
    ),
    Row(
        "Kandinsky5Transformer3DModel",
        {
            "hidden_states": step(
                "batch frames height width (1+visual_cond)*in_visual_dim+visual_cond"
            ),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens in_text_dim"),
            "pooled_projections": prompt("batch in_text_dim2"),
            "visual_rope_pos": [
                prompt("frames", dtype="int64", fill=9),
                prompt("height//patch_size[1]", dtype="int64", fill=9),
                prompt("width//patch_size[2]", dtype="int64", fill=9),
            ],
            "text_rope_pos": prompt("text_tokens", dtype="int64", fill=9),
            "scale_factor": prompt("3", fill="fraction"),
        },
        pipelines=("Kandinsky5T2IPipeline", "Kandinsky5T2VPipeline"),
        name="kandinsky_5",
        multiples=PATCH_VIDEO,
        patches=KANDINSKY_5,
    ),
    Row(
        "WanAnimateTransformer3DModel",
        {
            "hidden_states": step("batch in_channels frames height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens text_dim"),
            "encoder_hidden_states_image": prompt(
                "batch image_tokens image_dim", needs="image_dim"
            ),
            "pose_hidden_states": prompt("batch latent_channels frames-1 height width"),
            "face_pixel_values": prompt(
                "batch 3 4*frames-7 motion_encoder_size motion_encoder_size"
            ),
        },
        pipelines=("WanAnimatePipeline",),
        name="wan_animate",
        multiples=PATCH_VIDEO,
        whole=True,
        fixed={"text_tokens": ("image_dim", 512)},
        usual={"image_tokens": 257},
        patches=WAN_ANIMATE,
    ),
)
"""In the order in which each came to be cut."""
