# SPDX-License-Identifier: Apache-2.0
"""Where Wan 2.1 is cut: `WanTransformer3DModel` of diffusers, text-to-video and image-to-video.

The modules below restate the transformer's forward pass over diffusers' own submodules (whose
parameter names therefore match the checkpoint), arranged by how often a value changes. Residual
stream, normalisation statistics, modulation and gating are float32 whatever the body's precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn

from ...core.dtypes import Precision
from ...core.errors import CheckpointError
from ...engines.base import TensorSpec
from ..cut.declared import Cut, Family, ModelInput, Segment, Stage, StoredDtype
from ..cut.transformer import on_meta
from .layers import (
    layer_norm,
    linear,
    merge_heads,
    rms_norm,
    rotate,
    set_weight_dtypes,
    split_heads,
)

__all__ = ["WAN"]

MATMUL_NAMES = ("to_q", "to_k", "to_v", "to_out", "add_k_proj", "add_v_proj", "net")


class Prompt(nn.Module):
    """Text states (and image states) → context of every cross-attention, once per prompt."""

    condition_embedder: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.condition_embedder = nn.Module()
        self.condition_embedder.text_embedder = model.condition_embedder.text_embedder
        if model.condition_embedder.image_embedder is not None:
            self.condition_embedder.image_embedder = model.condition_embedder.image_embedder

    def forward(
        self, text_states: Tensor, image_states: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return ``context`` [batch, text_tokens, channels] (and ``image_context``), float32."""
        text = self.condition_embedder.text_embedder
        hidden = linear(text.linear_1, text_states, torch.float32)
        context = linear(text.linear_2, F.gelu(hidden, approximate="tanh"), torch.float32)
        if image_states is None:
            return (context,)
        image = self.condition_embedder.image_embedder
        hidden = layer_norm(image.norm1, image_states)
        hidden = F.gelu(linear(image.ff.net[0].proj, hidden, torch.float32))
        hidden = linear(image.ff.net[2], hidden, torch.float32)
        return context, layer_norm(image.norm2, hidden)


class Context(nn.Module):
    """Context → keys and values of one block's cross-attention, once per prompt and block."""

    attn2: Any

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.attn2 = nn.Module()
        for name in ("to_k", "to_v", "norm_k"):
            setattr(self.attn2, name, getattr(block.attn2, name))
        self.heads: int = block.attn2.heads
        self.dtype = dtype
        if block.attn2.add_k_proj is not None:
            for name in ("add_k_proj", "add_v_proj", "norm_added_k"):
                setattr(self.attn2, name, getattr(block.attn2, name))

    def forward(self, context: Tensor, image_context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return key and value (and the image's), [batch, heads, text_tokens, head size]."""
        attn = self.attn2
        key = rms_norm(attn.norm_k, linear(attn.to_k, context, self.dtype))
        value = linear(attn.to_v, context, self.dtype)
        pairs = [key, value]
        if image_context is not None:
            key = rms_norm(attn.norm_added_k, linear(attn.add_k_proj, image_context, self.dtype))
            pairs += [key, linear(attn.add_v_proj, image_context, self.dtype)]
        return tuple(split_heads(x, self.heads).to(self.dtype) for x in pairs)


class Timestep(nn.Module):
    """Timesteps → embedding tables, all steps of a run in one batch."""

    condition_embedder: Any
    sinusoid: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.condition_embedder = nn.Module()
        self.condition_embedder.time_embedder = model.condition_embedder.time_embedder
        self.condition_embedder.time_proj = model.condition_embedder.time_proj
        self.sinusoid = model.condition_embedder.timesteps_proj

    def forward(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``temb`` [steps, channels] and ``timestep_proj`` [steps, 6 * channels]."""
        embedder, project = self.condition_embedder.time_embedder, self.condition_embedder.time_proj
        wave = self.sinusoid(timesteps)
        hidden = F.silu(linear(embedder.linear_1, wave, torch.float32))
        temb = linear(embedder.linear_2, hidden, torch.float32)
        return temb, linear(project, F.silu(temb), torch.float32)


class Rotary(nn.Module):
    """Latent shape → rotary tables, once per shape."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        with torch.device("cpu"):
            rope: Any = WanRotaryPosEmbed(
                config["attention_head_dim"], config["patch_size"], config["rope_max_seq_len"]
            )
        self.sizes = [rope.t_dim // 2, rope.h_dim // 2, rope.w_dim // 2]
        self.patch = config["patch_size"]
        # Tables hold each value twice, once per channel of a pair; one of them is enough.
        self.register_buffer("cos", rope.freqs_cos[:, 0::2].contiguous(), persistent=False)
        self.register_buffer("sin", rope.freqs_sin[:, 1::2].contiguous(), persistent=False)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``rope_cos`` and ``rope_sin`` [1, tokens, head size / 2]; reads the shape only."""
        return self._table(self.cos, latents), self._table(self.sin, latents)

    def _table(self, source: Tensor, latents: Tensor) -> Tensor:
        frames, height, width = (s // p for s, p in zip(latents.shape[2:], self.patch, strict=True))
        by_frame, by_row, by_column = source.split(self.sizes, dim=1)
        grid = (frames, height, width, -1)
        parts = [
            by_frame[:frames].unsqueeze(1).unsqueeze(1).expand(grid),
            by_row[:height].unsqueeze(0).unsqueeze(2).expand(grid),
            by_column[:width].unsqueeze(0).unsqueeze(0).expand(grid),
        ]
        return torch.cat(parts, dim=-1).flatten(0, 2).unsqueeze(0)


class Head(nn.Module):
    """Latents → hidden states."""

    patch_embedding: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.patch_embedding = model.patch_embedding

    def forward(self, latents: Tensor) -> Tensor:
        """Return ``hidden`` [batch, tokens, channels], float32."""
        conv = self.patch_embedding
        x = F.conv3d(latents, conv.weight.float(), conv.bias.float(), stride=conv.stride)
        return x.flatten(2).transpose(1, 2)


class Modulate(nn.Module):
    """Hidden states → the first block's modulated input, for policies that look at it."""

    norm1: Any
    scale_shift_table: Tensor

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.scale_shift_table = block.norm1, block.scale_shift_table

    def forward(self, hidden: Tensor, timestep_proj: Tensor) -> Tensor:
        """Return ``modulated_input`` [batch, tokens, channels], float32."""
        shift, scale = (self.scale_shift_table.float() + timestep_proj).chunk(6, dim=1)[:2]
        return layer_norm(self.norm1, hidden) * (1 + scale) + shift


class Block(nn.Module):
    """One transformer block, with its gated self-attention output tapped."""

    norm1: Any
    attn1: Any
    norm2: Any
    attn2: Any
    ffn: Any
    norm3: Any
    scale_shift_table: Tensor

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        for name in ("norm1", "attn1", "norm2", "ffn", "norm3", "scale_shift_table"):
            setattr(self, name, getattr(block, name))
        self.attn2 = nn.Module()
        for name in ("to_q", "norm_q", "to_out"):
            setattr(self.attn2, name, getattr(block.attn2, name))
        self.heads, self.dtype = block.attn1.heads, dtype

    def forward(
        self,
        hidden: Tensor,
        timestep_proj: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        context_key: Tensor,
        context_value: Tensor,
        image_key: Tensor | None = None,
        image_value: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return ``hidden_out`` and ``attention_output`` [batch, tokens, channels], float32."""
        modulation = self.scale_shift_table.float() + timestep_proj
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.chunk(6, dim=1)

        x = layer_norm(self.norm1, hidden) * (1 + scale) + shift
        attention_output = self._self_attention(x, rope_cos, rope_sin).float() * gate
        hidden = hidden + attention_output

        query = rms_norm(
            self.attn2.norm_q, linear(self.attn2.to_q, layer_norm(self.norm2, hidden), self.dtype)
        )
        query = split_heads(query, self.heads).to(self.dtype)
        x = F.scaled_dot_product_attention(query, context_key, context_value)
        if image_key is not None and image_value is not None:
            x = x + F.scaled_dot_product_attention(query, image_key, image_value)
        hidden = hidden + linear(self.attn2.to_out[0], merge_heads(x), self.dtype).float()

        x = layer_norm(self.norm3, hidden) * (1 + ffn_scale) + ffn_shift
        x = F.gelu(linear(self.ffn.net[0].proj, x, self.dtype), approximate="tanh")
        hidden = hidden + linear(self.ffn.net[2], x, self.dtype).float() * ffn_gate
        return hidden, attention_output

    def _self_attention(self, x: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        attn = self.attn1
        query = split_heads(rms_norm(attn.norm_q, linear(attn.to_q, x, self.dtype)), self.heads)
        key = split_heads(rms_norm(attn.norm_k, linear(attn.to_k, x, self.dtype)), self.heads)
        value = split_heads(linear(attn.to_v, x, self.dtype), self.heads)
        query = rotate(query, rope_cos, rope_sin).to(self.dtype)
        key = rotate(key, rope_cos, rope_sin).to(self.dtype)
        x = F.scaled_dot_product_attention(query, key, value)
        return linear(attn.to_out[0], merge_heads(x), self.dtype)


class Finish(nn.Module):
    """Hidden states → model output."""

    norm_out: Any
    proj_out: Any
    scale_shift_table: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm_out, self.proj_out = model.norm_out, model.proj_out
        self.scale_shift_table = model.scale_shift_table
        self.patch = model.config.patch_size

    def forward(self, hidden_out: Tensor, temb: Tensor, latents: Tensor) -> Tensor:
        """Return ``model_output`` [batch, out channels, frames, height, width], float32.

        ``latents`` gives its shape only.
        """
        modulation = self.scale_shift_table.float() + temb.unsqueeze(1)
        shift, scale = modulation.chunk(2, dim=1)
        x = layer_norm(self.norm_out, hidden_out) * (1 + scale) + shift
        x = linear(self.proj_out, x, torch.float32)
        frames, height, width = (s // p for s, p in zip(latents.shape[2:], self.patch, strict=True))
        x = x.reshape(x.shape[0], frames, height, width, *self.patch, -1)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def cut_wan(config: Mapping[str, Any], precision: Precision, stored: StoredDtype) -> Cut:
    """Cut a Wan transformer of any size.

    Args:
        config: The transformer's diffusers config.
        precision: Precision of ``body``: block templates and their context.
        stored: Checkpoint tensor name → stored dtype.
    """
    if config.get("pos_embed_seq_len") is not None:
        raise CheckpointError(
            "transformer/config.json, 'pos_embed_seq_len'",
            "first-and-last-frame models (two images per batch element) can't be cut yet",
            "use a text-to-video or image-to-video checkpoint",
        )
    model = on_meta(WanTransformer3DModel, {**config, "num_layers": 1})
    config = {**model.config, "num_layers": config["num_layers"]}
    set_weight_dtypes(model, precision, stored, blocks=["blocks."], matmuls=MATMUL_NAMES)
    dtype = getattr(torch, precision)
    block = model.blocks[0]
    channels = config["num_attention_heads"] * config["attention_head_dim"]
    heads, head_size = config["num_attention_heads"], config["attention_head_dim"]
    has_image = config["image_dim"] is not None
    history_dtype = "bfloat16" if precision == "bfloat16" else "float32"

    def f32(*shape: int | str) -> TensorSpec:
        return TensorSpec("float32", shape)

    latents = f32("batch", config["in_channels"], "frames", "height", "width")
    hidden = f32("batch", "tokens", channels)
    rope = f32(1, "tokens", head_size // 2)
    timestep_proj, temb = f32(1, 6, channels), f32(1, channels)
    key = TensorSpec(precision, ("batch", heads, "text_tokens", head_size))
    image_key = TensorSpec(precision, ("batch", heads, "image_tokens", head_size))

    text = {"text_states": f32("batch", "text_tokens", config["text_dim"])}
    context = {"context": f32("batch", "text_tokens", channels)}
    pairs = {"context_key": key, "context_value": key}
    inputs = {
        "latents": ModelInput("hidden_states", "step", latents),
        "timesteps": ModelInput("timestep", "run", f32("steps")),
        "text_states": ModelInput("encoder_hidden_states", "prompt", text["text_states"]),
    }
    if has_image:
        text["image_states"] = f32("batch", "image_tokens", config["image_dim"])
        context["image_context"] = f32("batch", "image_tokens", channels)
        pairs |= {"image_key": image_key, "image_value": image_key}
        inputs["image_states"] = ModelInput(
            "encoder_hidden_states_image", "prompt", text["image_states"]
        )
    block_inputs = {
        "hidden": hidden, "timestep_proj": timestep_proj, "rope_cos": rope, "rope_sin": rope, **pairs
    }  # fmt: skip
    block_outputs = {"hidden_out": hidden, "attention_output": hidden}
    traced_block = Block(block, dtype)
    segments = (
        Segment("prompt", "prompt", Prompt(model), text, context),
        Segment(
            "context", "prompt_block", Context(block, dtype), context, pairs, "blocks.{block}.", precision
        ),
        Segment(
            "timestep", "run", Timestep(model), {"timesteps": f32("steps")},
            {"temb": f32("steps", channels), "timestep_proj": f32("steps", 6 * channels)},
        ),
        Segment(
            "rotary", "shape", Rotary(config), {"latents": latents}, {"rope_cos": rope, "rope_sin": rope}
        ),
        Segment("head", "step", Head(model), {"latents": latents}, {"hidden": hidden}),
        Segment(
            "modulate", "signal", Modulate(block), {"hidden": hidden, "timestep_proj": timestep_proj},
            {"modulated_input": hidden}, "blocks.0.",
        ),
        Segment(
            "block", "block", traced_block, block_inputs, block_outputs, "blocks.{block}.", precision,
            dropped=("attention_output",),
        ),
        Segment(
            "block_tapped", "block", traced_block, block_inputs, block_outputs, "blocks.{block}.",
            precision,
        ),
        Segment(
            "finish", "step", Finish(model), {"hidden_out": hidden, "temb": temb, "latents": latents},
            {"model_output": f32("batch", config["out_channels"], "frames", "height", "width")},
        ),
    )  # fmt: skip
    p_t, p_h, p_w = config["patch_size"]
    return Cut(
        segments=segments,
        stages=(Stage("block", "context", "block_tapped", config["num_layers"]),),
        inputs=inputs,
        signals={
            "temb": ("temb", "run"),
            "timestep_proj": ("timestep_proj", "run"),
            "modulated_input": ("modulated_input", "step"),
        },
        feature_block=config["num_layers"] // 2,
        dims={
            "tokens": (("frames", p_t), ("height", p_h), ("width", p_w)),
            "tokens_per_frame": (("height", p_h), ("width", p_w)),
        },
        history_dtype=history_dtype,
        example_dims={"frames": 3 * p_t, "height": 5 * p_h, "width": 7 * p_w, "tokens": 3 * 5 * 7},
        limits={
            dim: config["rope_max_seq_len"] * patch
            for dim, patch in (("frames", p_t), ("height", p_h), ("width", p_w))
        },
    )


WAN = Family("wan", "WanTransformer3DModel", ("WanPipeline", "WanImageToVideoPipeline"), cut_wan)
