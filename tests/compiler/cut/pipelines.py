# SPDX-License-Identifier: Apache-2.0
"""Small models in their pipelines, without text encoders or VAE: called with embeddings of a prompt."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from cases import Case
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLMagvit,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    MiniMaxH3Scheduler,
    UniPCMultistepScheduler,
)
from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import (
    MiniMaxH3CoreDenoiseStep,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "runtime" / "pipeline"))
from whole import longcat_audio, stable_audio

__all__ = [
    "CALLED",
    "MODULAR",
    "PIPELINES",
    "UNCUT",
    "UNLEARNT",
    "UNTRIED",
    "pipeline_of",
    "watched_calls",
]

TOKENS, REAL = 6, 4
"""Tokens of a prompt, and how many of the negative one's are no padding."""


def embeds(width: int, tokens: int = TOKENS, *, seed: int = 0) -> Tensor:
    """Return a prompt's embeddings, [1, tokens, width]."""
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))


def both(width: int, *, name: str = "prompt_embeds", tokens: int = TOKENS) -> dict[str, Tensor]:
    """Return embeddings of a prompt and of a negative one."""
    return {name: embeds(width, tokens), f"negative_{name}": embeds(width, tokens, seed=1)}


def masks(name: str, tokens: int = TOKENS, dtype: torch.dtype = torch.int64) -> dict[str, Tensor]:
    """Return masks of a prompt without padding, and of a negative one with some."""
    ones = torch.ones(1, tokens, dtype=dtype)
    return {name: ones, f"negative_{name}": ones * (torch.arange(tokens) < REAL)}


def flow(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**options)


def shifted() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


SQUARE = {"height": 64, "width": 96}
VIDEO = {"height": 32, "width": 48, "num_frames": 5}
UNBINNED = {"use_resolution_binning": False, "clean_caption": False}


def pixart(config: Any) -> dict[str, Any]:
    mask = masks("prompt_attention_mask")
    return {**both(config.caption_channels), **mask, **SQUARE, **UNBINNED, "negative_prompt": None}


def sana(config: Any, **size: int) -> dict[str, Any]:
    return {**pixart(config), **size, "guidance_scale": 3.0}


def cogview(config: Any) -> dict[str, Any]:
    return {**both(config.text_embed_dim), **SQUARE, "guidance_scale": 3.0}


def stable_diffusion_3(config: Any) -> dict[str, Any]:
    pooled = {
        "pooled_prompt_embeds": embeds(config.pooled_projection_dim)[:, 0],
        "negative_pooled_prompt_embeds": embeds(config.pooled_projection_dim, seed=1)[:, 0],
    }
    return {**both(config.joint_attention_dim), **pooled, **SQUARE, "guidance_scale": 3.0}


def hunyuan_image(config: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"height": 128, "width": 192, "distilled_guidance_scale": 3.5}
    for last, width, tokens in (
        ("", config.text_embed_dim, TOKENS),
        ("_2", config.text_embed_2_dim, 5),
    ):
        arguments |= both(width, name=f"prompt_embeds{last}", tokens=tokens)
        arguments |= masks(f"prompt_embeds_mask{last}", tokens)
    return arguments


def hunyuan_video_15(config: Any) -> dict[str, Any]:
    arguments = hunyuan_image(config) | VIDEO
    del arguments["distilled_guidance_scale"]
    return arguments | {"height": 64, "width": 96}


def ltx_2(config: Any) -> dict[str, Any]:
    """Guidance by the prompt alone: the others call the transformer with blocks left out."""
    none = {"stg_scale": 0.0, "audio_stg_scale": 0.0}
    none |= {"modality_scale": 1.0, "audio_modality_scale": 1.0}
    mask = masks("prompt_attention_mask")
    width = 2 * config.caption_channels
    return {**both(width), **mask, **VIDEO, "num_frames": 9, "height": 64, "width": 96, **none}


def connectors(config: Any) -> LTX2TextConnectors:
    """Return the connectors of prompts to a model: of one width, or of two since LTX-2.3."""
    heads = {
        "video": (2, config.cross_attention_dim),
        "audio": (2, config.audio_cross_attention_dim),
    }
    if config.use_prompt_embeddings:
        heads = dict.fromkeys(heads, (2, config.caption_channels))
    options: dict[str, Any] = {}
    for kind, (count, width) in heads.items():
        options[f"{kind}_connector_num_attention_heads"] = count
        options[f"{kind}_connector_attention_head_dim"] = width // count
        options[f"{kind}_connector_num_layers"] = 1
        options[f"{kind}_connector_num_learnable_registers"] = None
        options[f"{kind}_hidden_dim"] = width
    return LTX2TextConnectors(
        caption_channels=config.caption_channels,
        text_proj_in_factor=2,
        per_modality_projections=not config.use_prompt_embeddings,
        **options,
    )


LTX_2_PARTS: dict[str, Callable[[Any], Any]] = {
    "connectors": connectors,
    "vae": lambda config: AutoencoderKLLTX2Video(
        latent_channels=config.in_channels,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 3,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    ),
    "audio_vae": lambda config: AutoencoderKLLTX2Audio(
        base_channels=config.audio_in_channels, latent_channels=2, num_res_blocks=1, mel_bins=12
    ),
}


def bria_fibo_2(config: Any) -> dict[str, Any]:
    """One text for the gist, and one for each block that reads the text."""
    texts = 1 + len(config.injection_layer_ids)
    prompts = both(config.cap_feat_dim, tokens=texts * TOKENS)
    return {
        **{name: one.unflatten(1, (texts, TOKENS)) for name, one in prompts.items()},
        **masks("prompt_embeds_mask", dtype=torch.bool),
        **SQUARE,
        "guidance_scale": 3.0,
    }


class Unchecked:
    """Checks no prompt: embeddings of one are given."""

    def to(self, device: torch.device | str) -> None:
        """Stay."""


class Squashed:
    """Stands for a VAE where a pipeline always decodes: pictures are latents, squashed to 0 … 1."""

    config = SimpleNamespace(scaling_factor=1.0)

    def decode(self, latents: Tensor) -> SimpleNamespace:
        """Return pixels of -1 … 1, one for each latent."""
        return SimpleNamespace(sample=2 * latents.sigmoid() - 1)


def hunyuan_dit(config: Any) -> dict[str, Any]:
    return {
        **both(config.cross_attention_dim, tokens=config.text_len),
        **masks("prompt_attention_mask", config.text_len),
        **both(config.cross_attention_dim_t5, name="prompt_embeds_2", tokens=config.text_len_t5),
        **masks("prompt_attention_mask_2", config.text_len_t5),
        **SQUARE,
        "use_resolution_binning": False,
        "guidance_scale": 3.0,
    }


PIPELINES: dict[str, tuple[str, Callable[[], Any], Callable[[Any], dict[str, Any]]]] = {
    "qwen_image": ("QwenImagePipeline", shifted, lambda c: {
        **both(c.joint_attention_dim), **masks("prompt_embeds_mask"), **SQUARE,
        "true_cfg_scale": 3.0,
    }),
    "sd3": ("StableDiffusion3Pipeline", flow, stable_diffusion_3),
    "sd35": ("StableDiffusion3Pipeline", flow, stable_diffusion_3),
    "bria": ("BriaPipeline", shifted, lambda c: {
        **both(c.joint_attention_dim), **SQUARE, "guidance_scale": 3.0,
    }),
    "bria_fibo_2": ("BriaFibo2Pipeline", shifted, bria_fibo_2),
    "chroma": ("ChromaPipeline", shifted, lambda c: {
        **both(c.joint_attention_dim), **masks("prompt_attention_mask", dtype=torch.float32),
        **SQUARE, "guidance_scale": 3.0,
    }),
    "ovis_image": ("OvisImagePipeline", shifted, lambda c: {
        **both(c.joint_attention_dim), **SQUARE, "guidance_scale": 3.0, "negative_prompt": None,
    }),
    "prx": ("PRXPipeline", flow, lambda c: {
        **both(c.context_in_dim), **masks("prompt_attention_mask", dtype=torch.bool), **SQUARE,
        "use_resolution_binning": False, "guidance_scale": 3.0,
    }),
    "pixart": ("PixArtSigmaPipeline", DPMSolverMultistepScheduler, pixart),
    "pixart_alpha": ("PixArtAlphaPipeline", DPMSolverMultistepScheduler, pixart),
    "sana": ("SanaPipeline", flow, sana),
    "sana_video": ("SanaVideoPipeline", flow, lambda c: sana(c, frames=5, height=64, width=96)),
    "cogview3_plus": ("CogView3PlusPipeline", CogVideoXDDIMScheduler, cogview),
    "cogview4": ("CogView4Pipeline", shifted, cogview),
    "hunyuan_image_glyphs": ("HunyuanImagePipeline", flow, hunyuan_image),
    "hunyuan_image_distilled": ("HunyuanImagePipeline", flow, hunyuan_image),
    "flux_2": ("Flux2Pipeline", shifted, lambda c: {
        "prompt_embeds": embeds(c.joint_attention_dim), **SQUARE,
    }),
    "cogvideox": ("CogVideoXPipeline", CogVideoXDDIMScheduler, lambda c: {
        **both(c.text_embed_dim), **VIDEO, "guidance_scale": 3.0,
    }),
    "skyreels_v2": (
        "SkyReelsV2Pipeline",
        lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        lambda c: {**both(c.text_dim), **VIDEO, "guidance_scale": 3.0},
    ),
    "motif_video": ("MotifVideoPipeline", flow, lambda c: {
        **both(c.text_embed_dim), **masks("prompt_attention_mask"), **VIDEO,
    }),
    "z_image": ("ZImagePipeline", flow, lambda c: {
        "prompt_embeds": [embeds(c.cap_feat_dim)[0]], "guidance_scale": 3.0, **SQUARE,
        "negative_prompt_embeds": [embeds(c.cap_feat_dim, 9, seed=1)[0]],
    }),
    "lumina_2": ("Lumina2Pipeline", flow, lambda c: {
        **both(c.cap_feat_dim), **masks("prompt_attention_mask"), **SQUARE, "guidance_scale": 3.0,
    }),
    "mochi": (
        "MochiPipeline",
        lambda: flow(invert_sigmas=True),
        lambda c: {
            **both(c.text_embed_dim), **masks("prompt_attention_mask", dtype=torch.bool), **VIDEO,
            "num_frames": 7, "guidance_scale": 3.0,
        },
    ),
    "hunyuan_video_15": ("HunyuanVideo15Pipeline", flow, hunyuan_video_15),
    "wan_vace": ("WanVACEPipeline", flow, lambda c: {
        **both(c.text_dim), **VIDEO, "guidance_scale": 3.0,
        "conditioning_scale": torch.linspace(0.5, 1.0, len(c.vace_layers)).tolist(),
    }),
    "ltx_2": ("LTX2Pipeline", shifted, ltx_2),
    "ltx_2_3": ("LTX2Pipeline", shifted, ltx_2),
    "hunyuan_dit": ("HunyuanDiTPipeline", DDPMScheduler, hunyuan_dit),
    "any_flow": ("AnyFlowPipeline", FlowMapEulerDiscreteScheduler, lambda c: {
        **both(c.text_dim), **VIDEO, "guidance_scale": 3.0,
    }),
    "easy_animate": ("EasyAnimatePipeline", shifted, lambda c: {
        **both(c.text_embed_dim), **masks("prompt_attention_mask"), **VIDEO, "guidance_scale": 3.0,
    }),
    "latte": ("LattePipeline", lambda: DDIMScheduler(clip_sample=False), lambda c: {
        **both(c.caption_channels), "height": 64, "width": 96, "video_length": c.video_length,
        "negative_prompt": None, "clean_caption": False, "guidance_scale": 3.0,
    }),
    "cosmos": ("CosmosTextToWorldPipeline", EDMEulerScheduler, lambda c: {
        **both(c.text_embed_dim), **VIDEO, "num_frames": 9, "guidance_scale": 3.0,
    }),
    "dit": ("DiTPipeline", lambda: DDIMScheduler(clip_sample=False), lambda c: {
        "class_labels": [3], "guidance_scale": 3.0,
    }),
    "lumina_next": ("LuminaPipeline", flow, lambda c: {
        **both(c.cross_attention_dim), **masks("prompt_attention_mask"), **SQUARE,
        "guidance_scale": 3.0,
    }),
    "aura_flow": ("AuraFlowPipeline", flow, lambda c: {
        **both(c.joint_attention_dim), **masks("prompt_attention_mask"), **SQUARE,
        "guidance_scale": 3.0,
    }),
    "allegro": ("AllegroPipeline", EulerAncestralDiscreteScheduler, lambda c: {
        **both(c.caption_channels), **masks("prompt_attention_mask"), **VIDEO, "num_frames": 8,
        "negative_prompt": None, "clean_caption": False, "guidance_scale": 3.0,
    }),
    "krea_2": ("Krea2Pipeline", shifted, lambda c: {
        **{n: one.unsqueeze(2).repeat(1, 1, c.num_text_layers, 1)
           for n, one in both(c.text_hidden_dim).items()},
        **masks("prompt_embeds_mask", dtype=torch.bool), **SQUARE, "guidance_scale": 3.0,
    }),
    "ernie_image": ("ErnieImagePipeline", flow, lambda c: {
        "prompt_embeds": [embeds(c.text_in_dim)[0]], **SQUARE, "guidance_scale": 3.0,
        "negative_prompt_embeds": [embeds(c.text_in_dim, 9, seed=1)[0]],
    }),
    "nucleus_image": ("NucleusMoEImagePipeline", shifted, lambda c: {
        **both(c.joint_attention_dim), **masks("prompt_embeds_mask"), **SQUARE,
        "guidance_scale": 3.0,
    }),
}  # fmt: skip
"""Case → pipeline, its scheduler, and what it is called with, of the model's config."""

SOUND: dict[str, tuple[str, Callable[[], Any], Callable[[Any], dict[str, Any]]]] = {
    "longcat_audio": ("LongCatAudioDiTPipeline", lambda: flow(invert_sigmas=True), lambda c: {
        "prompt": PROMPT, "negative_prompt": "a blue square", "audio_duration_s": 0.002,
        "guidance_scale": 3.0,
    }),
    "stable_audio": ("StableAudioPipeline", EDMDPMSolverMultistepScheduler, lambda c: {
        "prompt": PROMPT, "negative_prompt": "a blue square", "audio_end_in_s": 20.0,
        "guidance_scale": 3.0,
    }),
}  # fmt: skip
"""Likewise of sound: rows are learnt from these pipelines, which encode their prompts themselves."""

CALLED = {**PIPELINES, **SOUND}


UNLEARNT = {
    "z_image": r"'x\.1': 2 inputs change at every step",
    "wan_vace": r"can't be called with .*more than one video",
    "ltx_2": r"can't be called with .*not enough values to unpack",
    "ltx_2_3": r"can't be called with .*not enough values to unpack",
    "any_flow": r"'encoder_hidden_states': has a dimension \(2, .* no sizes tell",
}
"""Case whose row is not learnt from its pipeline's calls → what is said: a list for each prompt, one video
at once, two outputs, two prompts whatever the guidance."""

UNCUT = (
    "hunyuan_video_15",
    "hunyuan_image_glyphs",
    "lumina_2",
    "mochi",
    "hunyuan_dit",
    "chroma",
    "lumina_next",
    "ernie_image",
    "latte",
)
"""Cases that need a patch, or more than the three blocks that are tried: learnt, and then refused,
for torch can't trace them, or they are traced at one size alone, or with a size that a value tells (Mochi)."""

UNTRIED = ("hunyuan_image_distilled", "cosmos")
"""Cases that are learnt, and were not yet cut by what was learnt."""

PROMPT = "a red circle"

PARTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "bria": {"vae": lambda config: AutoencoderKL(shift_factor=0.0)},
    "motif_video": {
        "guider": lambda config: ClassifierFreeGuidance(guidance_scale=3.0),
        "vae": lambda config: AutoencoderKLWan(base_dim=8, z_dim=config.out_channels),
    },
    "wan_vace": {"vae": lambda config: AutoencoderKLWan(base_dim=8, z_dim=config.out_channels)},
    "hunyuan_video_15": {
        "guider": lambda config: ClassifierFreeGuidance(guidance_scale=3.0),
        "vae": lambda config: AutoencoderKLHunyuanVideo15(
            latent_channels=config.out_channels,
            block_out_channels=(32,) * 5,
            spatial_compression_ratio=16,
            temporal_compression_ratio=4,
        ),
    },
    "easy_animate": {
        "vae": lambda config: AutoencoderKLMagvit(
            latent_channels=config.in_channels, block_out_channels=(8,) * 4, norm_num_groups=8
        )
    },
    "cosmos": {"safety_checker": lambda config: Unchecked()},
    "dit": {"vae": lambda config: Squashed()},
    "ltx_2": LTX_2_PARTS,
    "ltx_2_3": LTX_2_PARTS,
}
"""What a pipeline asks of parts that its latents do not pass through."""

ENCODED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "longcat_audio": longcat_audio,
    "stable_audio": stable_audio,
}
"""Parts of pipelines that encode their prompt themselves, whatever they are called with."""


class MiniMaxH3:
    """The blocks of MiniMax-H3 behind its encoders, called as a pipeline is.

    Its schedulers count the end of the last step as a step.
    """

    def __init__(self, model: Any) -> None:
        made = MiniMaxH3CoreDenoiseStep().init_pipeline()
        made.update_components(
            transformer=model,
            scheduler=MiniMaxH3Scheduler(shift=12.0),
            audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
        )
        vars(self)["made"] = made

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["made"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.made, name, value)

    def __call__(
        self, *, num_inference_steps: int, output_type: str, return_dict: bool, **arguments: Any
    ) -> tuple[Tensor, Tensor]:
        names = ["latents", "audio_latents"]
        found = self.made(**arguments, num_inference_steps=num_inference_steps + 1, output=names)
        return found["latents"], found["audio_latents"]


def minimax_h3(one: Case) -> tuple[Any, dict[str, Any]]:
    config: Any = one.model.config
    tags = torch.ones(TOKENS, dtype=torch.int64)
    size = {"height": 32, "width": 64, "num_frames": 124}
    return MiniMaxH3(one.model), {
        "prompt_embeds": embeds(config.text_dim),
        "text_token_tags": tags,
        **size,
    }


MODULAR: dict[str, Callable[[Case], tuple[Any, dict[str, Any]]]] = {"minimax_h3": minimax_h3}
"""Cases whose pipeline is put together of blocks."""


def pipeline_of(name: str, one: Case) -> tuple[Any, Mapping[str, Any]]:
    """Return a case's pipeline around its model, and what it is called with."""
    if name in MODULAR:
        return MODULAR[name](one)
    pipeline, scheduler, arguments = CALLED[name]
    made: Any = getattr(diffusers, pipeline)
    parts: dict[str, Any] = {
        part: None
        for part, parameter in inspect.signature(made.__init__).parameters.items()
        if part != "self" and parameter.default is parameter.empty
    }
    config: Any = one.model.config
    parts |= {part: make(config) for part, make in PARTS.get(name, {}).items()}
    parts |= ENCODED[name](config) if name in ENCODED else {}
    return made(**{**parts, "transformer": one.model, "scheduler": scheduler()}), arguments(config)


def watched_calls(name: str, one: Case) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return what a case's pipeline is called with to learn its row: at first, and for each size."""
    config: Any = one.model.config
    first = CALLED[name][2](config)
    call = inspect.signature(getattr(diffusers, CALLED[name][0]).__call__).parameters
    first |= {key: 1.0 for key in ("guidance_scale", "true_cfg_scale") if key in call}
    sizes = {"height": "height", "width": "width", "num_frames": "frames", "frames": "frames"}
    sizes["audio_duration_s"] = "frames"
    others = {
        size: {key: 2 * first[key] - (key in ("num_frames", "frames"))}
        for key, size in sizes.items()
        if key in first
    }
    others["text_tokens"] = {
        key: value[:, :REAL]
        for key, value in first.items()
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == TOKENS
    }
    others["batch"] = {
        key: value.repeat(2, *[1] * (value.ndim - 1))
        for key, value in first.items()
        if isinstance(value, Tensor)
    }
    if "prompt" in first:
        text = first["prompt"]
        others |= {"text_tokens": {"prompt": f"{text}, {text}"}, "batch": {"prompt": [text] * 2}}
    return first, others
