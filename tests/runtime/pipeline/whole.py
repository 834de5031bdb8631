# SPDX-License-Identifier: Apache-2.0
"""Whole small pipelines of random weights: tokenizer, text encoders, VAE and scheduler too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderOobleck,
    CogVideoXDDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LongCatAudioDiTVae,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.stable_audio import StableAudioProjectionModel
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

__all__ = ["WHOLE", "save_pipeline"]

ROOT = Path(__file__).parents[3]
WORDS = 64


def tokenizer(longest: int = 128) -> Any:
    return AutoTokenizer.from_pretrained(
        ROOT / "models/shapes_wan/tokenizer", model_max_length=longest
    )


def t5(width: int) -> Any:
    return T5EncoderModel(
        T5Config(vocab_size=WORDS, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


def umt5(width: int) -> Any:
    return UMT5EncoderModel(
        UMT5Config(vocab_size=WORDS, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


def clip(width: int, projected: int | None = None) -> Any:
    config = CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=projected or width,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=2,
    )
    return CLIPTextModel(config) if projected is None else CLIPTextModelWithProjection(config)


def picture_vae(channels: int) -> Any:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        latent_channels=channels,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def dynamic() -> Any:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def flux(config: Any) -> dict[str, Any]:
    return {
        "scheduler": dynamic(),
        "vae": picture_vae(config.in_channels // 4),
        "tokenizer": tokenizer(77),
        "text_encoder": clip(config.pooled_projection_dim),
        "tokenizer_2": tokenizer(),
        "text_encoder_2": t5(config.joint_attention_dim),
    }


def sd3(config: Any) -> dict[str, Any]:
    half = config.joint_attention_dim // 2
    encoder = {"width": half, "projected": config.pooled_projection_dim // 2}
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": picture_vae(config.in_channels),
        "tokenizer": tokenizer(77),
        "text_encoder": clip(**encoder),
        "tokenizer_2": tokenizer(77),
        "text_encoder_2": clip(**encoder),
        "tokenizer_3": tokenizer(),
        "text_encoder_3": t5(config.joint_attention_dim),
    }


def qwen_image_vae(channels: int) -> dict[str, Any]:
    return {
        "scheduler": dynamic(),
        "tokenizer": tokenizer(1024),
        "vae": AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=channels,
            dim_mult=[1, 1, 1, 1],
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
        ),
    }


def qwen_image(config: Any) -> dict[str, Any]:
    text = {
        "vocab_size": WORDS,
        "hidden_size": config.joint_attention_dim,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 2,
        "out_hidden_size": config.joint_attention_dim,
    }
    return {
        **qwen_image_vae(config.in_channels // 4),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ),
    }


def pixart(config: Any) -> dict[str, Any]:
    return {
        "scheduler": DPMSolverMultistepScheduler(),
        "vae": picture_vae(config.in_channels),
        "tokenizer": tokenizer(),
        "text_encoder": t5(config.caption_channels),
    }


def ltx(config: Any) -> dict[str, Any]:
    return {
        "scheduler": dynamic(),
        "tokenizer": tokenizer(),
        "text_encoder": t5(config.caption_channels),
        "vae": AutoencoderKLLTXVideo(
            latent_channels=config.in_channels,
            block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
        ),
    }


def ltx_2(config: Any) -> dict[str, Any]:
    heads = {"num_attention_heads": 2, "attention_head_dim": config.caption_channels // 2}
    each = {"num_layers": 1, "num_learnable_registers": None, **heads}
    return {
        "scheduler": dynamic(), "tokenizer": tokenizer(1024),
        "text_encoder": LlamaModel(LlamaConfig(
            vocab_size=WORDS, hidden_size=config.caption_channels, intermediate_size=16,
            num_hidden_layers=1, num_attention_heads=2,
        )),
        "connectors": LTX2TextConnectors(
            caption_channels=config.caption_channels, text_proj_in_factor=2,
            video_hidden_dim=config.caption_channels, audio_hidden_dim=config.caption_channels,
            **{f"{kind}_connector_{n}": v for kind in ("video", "audio") for n, v in each.items()},
        ),
        "vae": AutoencoderKLLTX2Video(
            latent_channels=config.in_channels, block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8, 16, 32), layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 4, spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        ),
        "audio_vae": AutoencoderKLLTX2Audio(
            base_channels=config.audio_in_channels, latent_channels=2, num_res_blocks=1, mel_bins=12
        ),
        "vocoder": LTX2Vocoder(in_channels=24, hidden_channels=32, output_sampling_rate=16000),
    }  # fmt: skip


def longcat_audio(config: Any) -> dict[str, Any]:
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
        "tokenizer": tokenizer(),
        "text_encoder": umt5(config.dit_text_dim),
        "vae": LongCatAudioDiTVae(
            channels=8, c_mults=[1, 2], strides=[2], latent_dim=config.latent_dim,
            encoder_latent_dim=2 * config.latent_dim, downsampling_ratio=2,
        ),
    }  # fmt: skip


def stable_audio(config: Any) -> dict[str, Any]:
    width = config.cross_attention_input_dim
    return {
        "scheduler": EDMDPMSolverMultistepScheduler(),
        "tokenizer": tokenizer(16),
        "text_encoder": t5(width),
        "projection_model": StableAudioProjectionModel(width, width, 0, 64),
        "vae": AutoencoderOobleck(
            encoder_hidden_size=8,
            downsampling_ratios=[2, 2],
            channel_multiples=[1, 2],
            decoder_channels=8,
            decoder_input_channels=config.in_channels,
            sampling_rate=4,
        ),
    }


def cogvideox(config: Any) -> dict[str, Any]:
    return {
        "scheduler": CogVideoXDDIMScheduler(),
        "tokenizer": tokenizer(),
        "text_encoder": t5(config.text_embed_dim),
        "vae": AutoencoderKLCogVideoX(
            latent_channels=config.in_channels,
            block_out_channels=(8,) * 4,
            norm_num_groups=4,
            layers_per_block=1,
        ),
    }


def hunyuan(config: Any) -> dict[str, Any]:
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0), "tokenizer": tokenizer(1024),
        "text_encoder": LlamaModel(LlamaConfig(
            vocab_size=WORDS, hidden_size=config.text_embed_dim, intermediate_size=16,
            num_hidden_layers=3, num_attention_heads=2,
        )),
        "tokenizer_2": tokenizer(77), "text_encoder_2": clip(config.pooled_projection_dim),
        "vae": AutoencoderKLHunyuanVideo(
            latent_channels=config.in_channels, block_out_channels=(8,) * 4, norm_num_groups=4,
            layers_per_block=1,
        ),
    }  # fmt: skip


def decoder(width: int, layers: int = 1) -> dict[str, int]:
    """Return the config of a small language model."""
    return {
        "vocab_size": WORDS, "hidden_size": width, "intermediate_size": 16, "head_dim": 8,
        "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2,
        "pad_token_id": 0,
    }  # fmt: skip


def cogview4(config: Any) -> dict[str, Any]:
    return {
        "scheduler": dynamic(),
        "tokenizer": tokenizer(1024),
        "text_encoder": GlmModel(GlmConfig(**decoder(config.text_embed_dim))),
        "vae": picture_vae(config.in_channels),
    }


def sana(config: Any) -> dict[str, Any]:
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "tokenizer": tokenizer(1024),
        "text_encoder": Gemma2Model(Gemma2Config(**decoder(config.caption_channels))),
        "vae": AutoencoderDC(
            latent_channels=config.in_channels,
            attention_head_dim=4,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8,) * 6,
            decoder_block_out_channels=(8,) * 6,
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
            encoder_qkv_multiscales=((),) * 6,
            decoder_qkv_multiscales=((),) * 6,
            scaling_factor=0.41407,
        ),
    }


def krea_2(config: Any) -> dict[str, Any]:
    layers = config.num_text_layers
    vision = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 2,
        "out_hidden_size": config.text_hidden_dim,
        "deepstack_visual_indexes": [0],
    }
    text = decoder(config.text_hidden_dim, layers)
    return {
        **qwen_image_vae(config.in_channels // 4),
        "text_encoder": Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)),
        "text_encoder_select_layers": tuple(range(1, layers + 1)),
    }


def aura_flow(config: Any) -> dict[str, Any]:
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.73),
        "tokenizer": tokenizer(),
        "text_encoder": umt5(config.joint_attention_dim),
        "vae": picture_vae(config.in_channels),
    }


WHOLE: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "flux": ("FluxPipeline", flux),
    "sd3": ("StableDiffusion3Pipeline", sd3),
    "qwen_image": ("QwenImagePipeline", qwen_image),
    "pixart": ("PixArtSigmaPipeline", pixart),
    "ltx": ("LTXPipeline", ltx),
    "ltx_2": ("LTX2Pipeline", ltx_2),
    "cogvideox": ("CogVideoXPipeline", cogvideox),
    "hunyuan_video": ("HunyuanVideoPipeline", hunyuan),
    "longcat_audio": ("LongCatAudioDiTPipeline", longcat_audio),
    "stable_audio": ("StableAudioPipeline", stable_audio),
    "cogview4": ("CogView4Pipeline", cogview4),
    "sana": ("SanaPipeline", sana),
    "krea_2": ("Krea2Pipeline", krea_2),
    "aura_flow": ("AuraFlowPipeline", aura_flow),
}
"""Small model of `cases` → its pipeline, and how the other parts are made."""


def save_pipeline(name: str, model: Any, folder: Path) -> Any:
    """Save a whole pipeline around a small transformer; returns it."""
    torch.manual_seed(0)
    pipeline, parts = WHOLE[name]
    pipe = getattr(diffusers, pipeline)(transformer=model, **parts(model.config))
    pipe.save_pretrained(folder)
    return pipe
