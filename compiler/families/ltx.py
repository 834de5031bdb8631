# SPDX-License-Identifier: Apache-2.0
"""Where LTX-Video is cut: `LTXVideoTransformer3DModel` of diffusers.

Latents come packed, one token per position, so their grid is an input of its own: the number of
frames, rows and columns, each as indices whose length tells it. Its rotary embedding turns
channels of all heads together; tables are as wide as the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import LTXVideoTransformer3DModel
from torch import Tensor, nn

from ...core.dtypes import Precision
from ...core.errors import CheckpointError
from ...engines.base import TensorSpec
from ..cut.declared import Cut, Family, ModelInput, Segment, Stage, StoredDtype
from ..cut.transformer import on_meta
from .layers import (
    Sinusoid,
    embed,
    feed_forward,
    gelu_tanh,
    layer_norm,
    linear,
    merge_heads,
    rms_norm,
    rotate,
    set_weight_dtypes,
    split_heads,
)

__all__ = ["LTX"]

MATMUL_NAMES = ("to_q", "to_k", "to_v", "to_out", "net")

ROTARY_BASE = (20, 2048, 2048)
"""Frames, rows and columns of pixels that positions are relative to; fixed in diffusers."""

ROTARY_THETA = 10000.0


class Prompt(nn.Module):
    """Text states → context of every cross-attention; the latents' grid → rotary tables."""

    caption_projection: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.caption_projection = model.caption_projection
        config = model.config
        self.channels = config.num_attention_heads * config.attention_head_dim
        self.patch = (config.patch_size_t, config.patch_size, config.patch_size)

    def forward(
        self,
        text_states: Tensor,
        text_mask: Tensor,
        frame_index: Tensor,
        row_index: Tensor,
        column_index: Tensor,
        rope_scale: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return context, its attention bias and the rotary tables, float32.

        ``context`` is [batch, text_tokens, channels]; ``text_bias`` [batch, 1, 1, text_tokens],
        what is added to scores; ``rope_cos`` and ``rope_sin`` [1, tokens, channels / 2].
        """
        context = embed(self.caption_projection, text_states, gelu_tanh)
        text_bias = ((1 - text_mask) * -10000.0).unsqueeze(1).unsqueeze(1)
        angles = self._angles((frame_index, row_index, column_index), rope_scale)
        return context, text_bias, angles.cos().unsqueeze(0), angles.sin().unsqueeze(0)

    def _angles(self, index: tuple[Tensor, Tensor, Tensor], scale: Tensor) -> Tensor:
        """Return [tokens, channels / 2]: frequencies of the three axes by turns, zeros in front."""
        axes = [index[i] * scale[i] * self.patch[i] / ROTARY_BASE[i] * 2 - 1 for i in range(3)]
        sizes = [i.shape[0] for i in index]
        grid = torch.stack(
            [
                axes[0].view(-1, 1, 1).expand(sizes),
                axes[1].view(1, -1, 1).expand(sizes),
                axes[2].view(1, 1, -1).expand(sizes),
            ],
            dim=-1,
        ).flatten(0, 2)
        steps = torch.linspace(0.0, 1.0, self.channels // 6, device=scale.device)
        frequencies = ROTARY_THETA**steps * (math.pi / 2)
        angles = (grid.unsqueeze(1) * frequencies.unsqueeze(1)).flatten(1)
        return F.pad(angles, (self.channels % 6 // 2, 0))


class Context(nn.Module):
    """Context → keys and values of one block's cross-attention, once per prompt and block."""

    attn2: Any

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.attn2 = nn.Module()
        for name in ("to_k", "to_v", "norm_k"):
            setattr(self.attn2, name, getattr(block.attn2, name))
        self.heads, self.dtype = block.attn2.heads, dtype

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return key and value, [batch, heads, text_tokens, head size]."""
        attn = self.attn2
        key = rms_norm(attn.norm_k, linear(attn.to_k, context, self.dtype))
        value = linear(attn.to_v, context, self.dtype)
        return (
            split_heads(key, self.heads).to(self.dtype),
            split_heads(value, self.heads).to(self.dtype),
        )


class Timestep(nn.Module):
    """Timesteps → embedding tables, all steps of a run in one batch."""

    time_embed: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.time_embed = model.time_embed
        self.sinusoid = Sinusoid()

    def forward(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``temb`` [steps, channels] and ``timestep_proj`` [steps, 6 * channels]."""
        temb = embed(self.time_embed.emb.timestep_embedder, self.sinusoid(timesteps))
        return temb, linear(self.time_embed.linear, F.silu(temb), torch.float32)


class Head(nn.Module):
    """Latents → hidden states."""

    proj_in: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.proj_in = model.proj_in

    def forward(self, latents: Tensor) -> Tensor:
        """Return ``hidden`` [batch, tokens, channels], float32."""
        return linear(self.proj_in, latents, torch.float32)


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
        return rms_norm(self.norm1, hidden) * (1 + scale) + shift


class Block(nn.Module):
    """One transformer block, with its gated self-attention output tapped."""

    norm1: Any
    attn1: Any
    norm2: Any
    attn2: Any
    ff: Any
    scale_shift_table: Tensor

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        for name in ("norm1", "attn1", "norm2", "ff", "scale_shift_table"):
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
        text_bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return ``hidden_out`` and ``attention_output`` [batch, tokens, channels], float32."""
        modulation = self.scale_shift_table.float() + timestep_proj
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation.chunk(6, dim=1)

        x = rms_norm(self.norm1, hidden) * (1 + scale) + shift
        attention_output = self._self_attention(x, rope_cos, rope_sin).float() * gate
        hidden = hidden + attention_output

        query = rms_norm(self.attn2.norm_q, linear(self.attn2.to_q, hidden, self.dtype))
        query = split_heads(query, self.heads).to(self.dtype)
        x = F.scaled_dot_product_attention(
            query, context_key, context_value, text_bias.to(self.dtype)
        )
        hidden = hidden + linear(self.attn2.to_out[0], merge_heads(x), self.dtype).float()

        x = rms_norm(self.norm2, hidden) * (1 + ff_scale) + ff_shift
        hidden = hidden + feed_forward(self.ff, x, self.dtype) * ff_gate
        return hidden, attention_output

    def _self_attention(self, x: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        attn = self.attn1
        query, key = (
            self._rotated(rms_norm(norm, linear(layer, x, self.dtype)), rope_cos, rope_sin)
            for norm, layer in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k))
        )
        value = split_heads(linear(attn.to_v, x, self.dtype), self.heads)
        x = F.scaled_dot_product_attention(query, key, value)
        return linear(attn.to_out[0], merge_heads(x), self.dtype)

    def _rotated(self, x: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        """Rotate all heads as one, then split them."""
        whole = rotate(x.unsqueeze(1), rope_cos, rope_sin).squeeze(1)
        return split_heads(whole, self.heads).to(self.dtype)


class Finish(nn.Module):
    """Hidden states → model output."""

    norm_out: Any
    proj_out: Any
    scale_shift_table: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm_out, self.proj_out = model.norm_out, model.proj_out
        self.scale_shift_table = model.scale_shift_table

    def forward(self, hidden_out: Tensor, temb: Tensor) -> Tensor:
        """Return ``model_output`` [batch, tokens, out channels], float32."""
        shift, scale = (self.scale_shift_table.float() + temb).unsqueeze(1).unbind(0)
        x = layer_norm(self.norm_out, hidden_out) * (1 + scale) + shift
        return linear(self.proj_out, x, torch.float32)


def cut_ltx(config: Mapping[str, Any], precision: Precision, stored: StoredDtype) -> Cut:
    """Cut an LTX-Video transformer of any size.

    Args:
        config: The transformer's diffusers config.
        precision: Precision of ``body``: block templates and their context.
        stored: Checkpoint tensor name → stored dtype.

    Raises:
        CheckpointError: an activation that this file does not restate.
    """
    model = on_meta(LTXVideoTransformer3DModel, {**config, "num_layers": 1})
    config = {**model.config, "num_layers": config.get("num_layers", 28)}
    if config["activation_fn"] != "gelu-approximate":
        raise CheckpointError(
            "transformer/config.json, 'activation_fn'",
            f"is '{config['activation_fn']}', which can't be cut yet",
            "use a checkpoint with 'gelu-approximate'",
        )
    set_weight_dtypes(
        model, precision, stored, blocks=["transformer_blocks."], matmuls=MATMUL_NAMES
    )
    dtype = getattr(torch, precision)
    block = model.transformer_blocks[0]
    heads, head_size = config["num_attention_heads"], config["attention_head_dim"]
    channels, layers = heads * head_size, config["num_layers"]

    def f32(*shape: int | str) -> TensorSpec:
        return TensorSpec("float32", shape)

    latents = f32("batch", "tokens", config["in_channels"])
    hidden = f32("batch", "tokens", channels)
    rope = f32(1, "tokens", channels // 2)
    timestep_proj, temb = f32(1, 6, channels), f32(1, channels)
    text_bias = f32("batch", 1, 1, "text_tokens")
    context = f32("batch", "text_tokens", channels)
    key = TensorSpec(precision, ("batch", heads, "text_tokens", head_size))
    inputs = {
        "latents": ModelInput("hidden_states", "step", latents),
        "timesteps": ModelInput("timestep", "run", f32("steps")),
        "text_states": ModelInput(
            "encoder_hidden_states", "prompt", f32("batch", "text_tokens", config["caption_channels"])
        ),
        "text_mask": ModelInput("encoder_attention_mask", "prompt", f32("batch", "text_tokens")),
        "frame_index": ModelInput("num_frames", "prompt", f32("frames")),
        "row_index": ModelInput("height", "prompt", f32("height")),
        "column_index": ModelInput("width", "prompt", f32("width")),
        "rope_scale": ModelInput("rope_interpolation_scale", "prompt", f32(3)),
    }  # fmt: skip
    pairs = {"context_key": key, "context_value": key}
    block_inputs = {
        "hidden": hidden, "timestep_proj": timestep_proj, "rope_cos": rope, "rope_sin": rope, **pairs,
        "text_bias": text_bias,
    }  # fmt: skip
    block_outputs = {"hidden_out": hidden, "attention_output": hidden}
    traced_block, prefix = Block(block, dtype), "transformer_blocks.{block}."
    segments = (
        Segment(
            "prompt", "prompt", Prompt(model),
            {n: i.spec for n, i in inputs.items() if i.runs == "prompt"},
            {"context": context, "text_bias": text_bias, "rope_cos": rope, "rope_sin": rope},
        ),
        Segment(
            "context", "prompt_block", Context(block, dtype), {"context": context}, pairs, prefix,
            precision,
        ),
        Segment(
            "timestep", "run", Timestep(model), {"timesteps": f32("steps")},
            {"temb": f32("steps", channels), "timestep_proj": f32("steps", 6 * channels)},
        ),
        Segment("head", "step", Head(model), {"latents": latents}, {"hidden": hidden}),
        Segment(
            "modulate", "signal", Modulate(block), {"hidden": hidden, "timestep_proj": timestep_proj},
            {"modulated_input": hidden}, "transformer_blocks.0.",
        ),
        Segment(
            "block", "block", traced_block, block_inputs, block_outputs, prefix, precision,
            dropped=("attention_output",),
        ),
        Segment(
            "block_tapped", "block", traced_block, block_inputs, block_outputs, prefix, precision
        ),
        Segment(
            "finish", "step", Finish(model), {"hidden_out": hidden, "temb": temb},
            {"model_output": f32("batch", "tokens", config["out_channels"] or config["in_channels"])},
        ),
    )  # fmt: skip
    return Cut(
        segments=segments,
        stages=(Stage("block", "context", "block_tapped", layers),),
        inputs=inputs,
        signals={
            "temb": ("temb", "run"),
            "timestep_proj": ("timestep_proj", "run"),
            "modulated_input": ("modulated_input", "step"),
        },
        feature_block=layers // 2,
        dims={
            "tokens": (("frames", 1), ("height", 1), ("width", 1)),
            "tokens_per_frame": (("height", 1), ("width", 1)),
        },
        history_dtype="bfloat16" if precision == "bfloat16" else "float32",
        example_dims={"frames": 3, "height": 5, "width": 7, "tokens": 3 * 5 * 7},
        latent_scale=(8, 32),
    )


LTX = Family("ltx", "LTXVideoTransformer3DModel", ("LTXPipeline",), cut_ltx)
