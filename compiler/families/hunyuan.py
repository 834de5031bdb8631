# SPDX-License-Identifier: Apache-2.0
"""Where HunyuanVideo is cut: `HunyuanVideoTransformer3DModel` of diffusers.

Three block templates: refiner blocks, which pass on the text stream alone (they look at the
timestep, so they belong to a computed step, not to the prompt), double-stream blocks over text
and video, and single-stream blocks over both. The conditioning vector adds a timestep's part and a
prompt's, as in FLUX.1. Padded text tokens are masked by a bias on scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideoTransformer3DModel
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
    modulate,
    modulation,
    rms_norm,
    rotate,
    set_weight_dtypes,
    split_heads,
)

__all__ = ["HUNYUAN"]

MATMUL_NAMES = (
    "to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net",
    "proj_mlp", "proj_out",
)  # fmt: skip

BLOCKS = (
    "transformer_blocks.",
    "single_transformer_blocks.",
    "context_embedder.token_refiner.refiner_blocks.",
)

MASKED = -1e4
"""What is added to scores of padded tokens: exp() of it is 0 in float32, and float16 holds it."""


def picked(module: Any, names: tuple[str, ...]) -> nn.Module:
    """Return a module that holds only some of another's children, under their names."""
    found = nn.Module()
    for name in names:
        setattr(found, name, getattr(module, name))
    return found


class Prompt(nn.Module):
    """Text states → text stream, its bias on scores, and the prompt's part of the conditioning."""

    context_embedder: Any
    time_text_embed: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.context_embedder = picked(model.context_embedder, ("proj_in",))
        self.context_embedder.time_text_embed = picked(
            model.context_embedder.time_text_embed, ("text_embedder",)
        )
        parts = ("text_embedder", "guidance_embedder")[: 1 + model.config.guidance_embeds]
        self.time_text_embed = picked(model.time_text_embed, parts)
        self.sinusoid = Sinusoid()

    def forward(
        self,
        text_states: Tensor,
        text_mask: Tensor,
        pooled_states: Tensor,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return text, bias and two parts of conditioning, float32.

        ``text`` is [batch, text_tokens, channels]; ``text_bias`` [batch, 1, 1, text_tokens];
        ``refiner_prompt_temb`` and ``prompt_temb`` [batch, channels].
        """
        refiner = self.context_embedder
        weights = text_mask.unsqueeze(2)
        pooled = (text_states * weights).sum(dim=1) / weights.sum(dim=1)
        refiner_temb = embed(refiner.time_text_embed.text_embedder, pooled)
        temb = embed(self.time_text_embed.text_embedder, pooled_states)
        if guidance is not None:
            wave = self.sinusoid(guidance)
            temb = temb + embed(self.time_text_embed.guidance_embedder, wave)
        text_bias = ((1 - text_mask) * MASKED).unsqueeze(1).unsqueeze(1)
        return linear(refiner.proj_in, text_states, torch.float32), text_bias, refiner_temb, temb


class Timestep(nn.Module):
    """Timesteps → their parts of the conditioning, all steps of a run in one batch."""

    context_embedder: Any
    time_text_embed: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.time_text_embed = picked(model.time_text_embed, ("timestep_embedder",))
        self.context_embedder = nn.Module()
        self.context_embedder.time_text_embed = picked(
            model.context_embedder.time_text_embed, ("timestep_embedder",)
        )
        self.sinusoid = Sinusoid()

    def forward(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``step_temb`` and ``refiner_step_temb`` [steps, channels]."""
        wave = self.sinusoid(timesteps)
        refiner = self.context_embedder.time_text_embed
        return (
            embed(self.time_text_embed.timestep_embedder, wave),
            embed(refiner.timestep_embedder, wave),
        )


class Rotary(nn.Module):
    """Latent shape → rotary tables, once per shape."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.patch = (config.patch_size_t, config.patch_size, config.patch_size)
        with torch.device("cpu"):
            for axis, size in enumerate(config.rope_axes_dim):
                powers = torch.arange(0, size, 2, dtype=torch.float32) / size
                table = 1.0 / config.rope_theta**powers
                self.register_buffer(f"frequencies_{axis}", table, persistent=False)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``rope_cos`` and ``rope_sin`` [1, tokens, head size / 2]; reads the shape only."""
        sizes = [s // p for s, p in zip(latents.shape[2:], self.patch, strict=True)]
        parts = []
        for axis, size in enumerate(sizes):
            place = [1, 1, 1, -1]
            place[axis] = size
            frequencies = getattr(self, f"frequencies_{axis}").to(latents.device)
            index = torch.arange(size, dtype=torch.float32, device=latents.device)
            angles = (index.unsqueeze(1) * frequencies).view(place)
            parts.append(angles.expand(*sizes, -1))
        angles = torch.cat(parts, dim=-1).flatten(0, 2).unsqueeze(0)
        return angles.cos(), angles.sin()


class Head(nn.Module):
    """Latents → hidden states."""

    x_embedder: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.x_embedder = model.x_embedder

    def forward(self, latents: Tensor) -> Tensor:
        """Return ``hidden`` [batch, tokens, channels], float32."""
        conv = self.x_embedder.proj
        x = F.conv3d(latents, conv.weight.float(), conv.bias.float(), stride=conv.stride)
        return x.flatten(2).transpose(1, 2)


class Modulate(nn.Module):
    """Hidden states → the first block's modulated input, for policies that look at it."""

    norm1: Any

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1 = block.norm1

    def forward(self, hidden: Tensor, step_temb: Tensor, prompt_temb: Tensor) -> Tensor:
        """Return ``modulated_input`` [batch, tokens, channels], float32."""
        shift, scale = modulation(self.norm1.linear, step_temb + prompt_temb, 6, used=2)
        return modulate(self.norm1.norm, hidden, shift, scale)


class RefinerBlock(nn.Module):
    """One block of the text's refiner."""

    norm1: Any
    attn: Any
    norm2: Any
    ff: Any
    norm_out: Any

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        for name in ("norm1", "attn", "norm2", "ff", "norm_out"):
            setattr(self, name, getattr(block, name))
        self.heads, self.dtype = block.attn.heads, dtype

    def forward(
        self,
        text: Tensor,
        refiner_step_temb: Tensor,
        refiner_prompt_temb: Tensor,
        text_bias: Tensor,
    ) -> Tensor:
        """Return ``text_out`` [batch, text_tokens, channels], float32."""
        temb = refiner_step_temb + refiner_prompt_temb
        gate, ff_gate = modulation(self.norm_out.linear, temb, 2)
        x, attn = layer_norm(self.norm1, text), self.attn
        query, key, value = (
            split_heads(linear(layer, x, self.dtype), self.heads)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        # A pair counts where both tokens are there; the first key counts for every query.
        pairs = torch.minimum(text_bias, text_bias.transpose(2, 3))
        pairs = torch.cat([torch.zeros_like(pairs[..., :1]), pairs[..., 1:]], dim=3)
        x = F.scaled_dot_product_attention(query, key, value, pairs.to(self.dtype))
        text = text + linear(attn.to_out[0], merge_heads(x), self.dtype).float() * gate
        x = layer_norm(self.norm2, text)
        return text + feed_forward(self.ff, x, self.dtype, F.silu) * ff_gate


class DoubleBlock(nn.Module):
    """One double-stream block, with the video's gated attention output tapped."""

    norm1: Any
    norm1_context: Any
    attn: Any
    norm2: Any
    ff: Any
    norm2_context: Any
    ff_context: Any

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        for name in (
            "norm1", "norm1_context", "attn", "norm2", "ff", "norm2_context", "ff_context"
        ):  # fmt: skip
            setattr(self, name, getattr(block, name))
        self.heads, self.dtype = block.attn.heads, dtype

    def forward(
        self,
        hidden: Tensor,
        text: Tensor,
        step_temb: Tensor,
        prompt_temb: Tensor,
        text_bias: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``hidden_out``, ``text_out`` and ``attention_output``, float32."""
        temb = step_temb + prompt_temb
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation(self.norm1.linear, temb, 6)
        t_shift, t_scale, t_gate, t_ff_shift, t_ff_scale, t_ff_gate = modulation(
            self.norm1_context.linear, temb, 6
        )
        attn, dtype = self.attn, self.dtype
        x = modulate(self.norm1.norm, hidden, shift, scale)
        query, key = (
            rotate(rms_norm(norm, self._heads(layer, x)), rope_cos, rope_sin)
            for norm, layer in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k))
        )
        value = self._heads(attn.to_v, x)
        x = modulate(self.norm1_context.norm, text, t_shift, t_scale)
        t_query = rms_norm(attn.norm_added_q, self._heads(attn.add_q_proj, x))
        t_key = rms_norm(attn.norm_added_k, self._heads(attn.add_k_proj, x))
        attended = merge_heads(
            F.scaled_dot_product_attention(
                torch.cat([query, t_query], dim=2).to(dtype),
                torch.cat([key, t_key], dim=2).to(dtype),
                torch.cat([value, self._heads(attn.add_v_proj, x)], dim=2),
                joint_bias(hidden, text_bias).to(dtype),
            )
        )
        tokens = hidden.shape[1]
        attention_output = linear(attn.to_out[0], attended[:, :tokens], dtype).float() * gate
        hidden = hidden + attention_output
        text = text + linear(attn.to_add_out, attended[:, tokens:], dtype).float() * t_gate

        x = modulate(self.norm2, hidden, ff_shift, ff_scale)
        hidden = hidden + feed_forward(self.ff, x, dtype) * ff_gate
        x = modulate(self.norm2_context, text, t_ff_shift, t_ff_scale)
        text = text + feed_forward(self.ff_context, x, dtype) * t_ff_gate
        return hidden, text, attention_output

    def _heads(self, layer: Any, x: Tensor) -> Tensor:
        return split_heads(linear(layer, x, self.dtype), self.heads)


class SingleBlock(nn.Module):
    """One single-stream block: attention and feed-forward side by side over video and text."""

    norm: Any
    proj_mlp: Any
    proj_out: Any
    attn: Any

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        for name in ("norm", "proj_mlp", "proj_out", "attn"):
            setattr(self, name, getattr(block, name))
        self.heads, self.dtype = block.attn.heads, dtype

    def forward(
        self,
        hidden: Tensor,
        text: Tensor,
        step_temb: Tensor,
        prompt_temb: Tensor,
        text_bias: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return ``hidden_out`` and ``text_out``, float32."""
        shift, scale, gate = modulation(self.norm.linear, step_temb + prompt_temb, 3)
        tokens, attn = hidden.shape[1], self.attn
        joint = torch.cat([hidden, text], dim=1)
        x = modulate(self.norm.norm, joint, shift, scale)
        query, key = (
            rms_norm(norm, split_heads(linear(layer, x, self.dtype), self.heads))
            for norm, layer in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k))
        )
        query, key = (
            torch.cat([rotate(h[:, :, :tokens], rope_cos, rope_sin), h[:, :, tokens:]], dim=2)
            for h in (query, key)
        )
        value = split_heads(linear(attn.to_v, x, self.dtype), self.heads)
        bias = joint_bias(hidden, text_bias).to(self.dtype)
        attended = F.scaled_dot_product_attention(
            query.to(self.dtype), key.to(self.dtype), value, bias
        )
        expanded = gelu_tanh(linear(self.proj_mlp, x, self.dtype))
        both = torch.cat([merge_heads(attended), expanded], dim=2)
        joint = joint + linear(self.proj_out, both, self.dtype).float() * gate
        return joint[:, :tokens], joint[:, tokens:]


def joint_bias(hidden: Tensor, text_bias: Tensor) -> Tensor:
    """Return the bias on scores of video and text, [batch, 1, 1, tokens + text_tokens]."""
    none = torch.zeros_like(hidden[:, :, 0]).unsqueeze(1).unsqueeze(1)
    return torch.cat([none, text_bias], dim=3)


class Finish(nn.Module):
    """Hidden states → model output."""

    norm_out: Any
    proj_out: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm_out, self.proj_out = model.norm_out, model.proj_out
        config = model.config
        self.patch = (config.patch_size_t, config.patch_size, config.patch_size)

    def forward(
        self, hidden_out: Tensor, step_temb: Tensor, prompt_temb: Tensor, latents: Tensor
    ) -> Tensor:
        """Return ``model_output`` [batch, out channels, frames, height, width], float32.

        ``latents`` gives its shape only.
        """
        scale, shift = modulation(self.norm_out.linear, step_temb + prompt_temb, 2)
        x = modulate(self.norm_out.norm, hidden_out, shift, scale)
        x = linear(self.proj_out, x, torch.float32)
        frames, height, width = (s // p for s, p in zip(latents.shape[2:], self.patch, strict=True))
        x = x.reshape(x.shape[0], frames, height, width, -1, *self.patch)
        return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def cut_hunyuan(config: Mapping[str, Any], precision: Precision, stored: StoredDtype) -> Cut:
    """Cut a HunyuanVideo transformer of any size.

    Args:
        config: The transformer's diffusers config.
        precision: Precision of ``body``: the block templates.
        stored: Checkpoint tensor name → stored dtype.

    Raises:
        CheckpointError: a model that replaces the first frame's tokens, or without normalised keys.
    """
    for key, wanted in (
        ("image_condition_type", (None, "latent_concat")),
        ("qk_norm", ("rms_norm",)),
    ):
        if config.get(key, wanted[0]) not in wanted:
            raise CheckpointError(
                f"transformer/config.json, '{key}'", f"is '{config[key]}', which can't be cut yet",
                "use a text-to-video checkpoint, or one that concatenates the image's latents",
            )  # fmt: skip
    short = dict.fromkeys(("num_layers", "num_single_layers", "num_refiner_layers"), 1)
    model = on_meta(HunyuanVideoTransformer3DModel, {**config, **short})
    layers, single_layers = config.get("num_layers", 20), config.get("num_single_layers", 40)
    refiner_layers = config.get("num_refiner_layers", 2)
    full: Any = model.config  # with diffusers' defaults
    set_weight_dtypes(model, precision, stored, blocks=BLOCKS, matmuls=MATMUL_NAMES)
    dtype = getattr(torch, precision)
    channels = full.num_attention_heads * full.attention_head_dim
    p_t, p = full.patch_size_t, full.patch_size

    def f32(*shape: int | str) -> TensorSpec:
        return TensorSpec("float32", shape)

    latents = f32("batch", full.in_channels, "frames", "height", "width")
    hidden, text = f32("batch", "tokens", channels), f32("batch", "text_tokens", channels)
    rope = f32(1, "tokens", full.attention_head_dim // 2)
    bias = {"text_bias": f32("batch", 1, 1, "text_tokens")}
    temb = {"step_temb": f32(1, channels), "prompt_temb": f32("batch", channels)}
    refiner_temb = {f"refiner_{n}": spec for n, spec in temb.items()}
    inputs = {
        "latents": ModelInput("hidden_states", "step", latents),
        "timesteps": ModelInput("timestep", "run", f32("steps")),
        "text_states": ModelInput(
            "encoder_hidden_states", "prompt", f32("batch", "text_tokens", full.text_embed_dim)
        ),
        "text_mask": ModelInput("encoder_attention_mask", "prompt", f32("batch", "text_tokens")),
        "pooled_states": ModelInput(
            "pooled_projections", "prompt", f32("batch", full.pooled_projection_dim)
        ),
    }
    if full.guidance_embeds:
        inputs["guidance"] = ModelInput("guidance", "prompt", f32("batch"))
    tables = {"rope_cos": rope, "rope_sin": rope}
    streams = {"hidden_out": hidden, "text_out": text}
    block_inputs = {"hidden": hidden, "text": text, **temb, **bias, **tables}
    double = DoubleBlock(model.transformer_blocks[0], dtype)
    tapped = {**streams, "attention_output": hidden}
    prefix = "transformer_blocks.{block}."
    segments = (
        Segment(
            "prompt", "prompt", Prompt(model),
            {n: i.spec for n, i in inputs.items() if i.runs == "prompt"},
            {
                "text": text, **bias, "refiner_prompt_temb": temb["prompt_temb"],
                "prompt_temb": temb["prompt_temb"],
            },
        ),
        Segment(
            "timestep", "run", Timestep(model), {"timesteps": f32("steps")},
            {"step_temb": f32("steps", channels), "refiner_step_temb": f32("steps", channels)},
        ),
        Segment("rotary", "shape", Rotary(full), {"latents": latents}, tables),
        Segment("head", "step", Head(model), {"latents": latents}, {"hidden": hidden}),
        Segment(
            "modulate", "signal", Modulate(model.transformer_blocks[0]), {"hidden": hidden, **temb},
            {"modulated_input": hidden}, "transformer_blocks.0.",
        ),
        Segment(
            "refiner", "block",
            RefinerBlock(model.context_embedder.token_refiner.refiner_blocks[0], dtype),
            {"text": text, **refiner_temb, **bias}, {"text_out": text},
            "context_embedder.token_refiner.refiner_blocks.{block}.", precision,
        ),
        Segment(
            "double", "block", double, block_inputs, tapped, prefix, precision,
            dropped=("attention_output",),
        ),
        Segment("double_tapped", "block", double, block_inputs, tapped, prefix, precision),
        Segment(
            "single", "block", SingleBlock(model.single_transformer_blocks[0], dtype), block_inputs,
            streams, "single_transformer_blocks.{block}.", precision,
        ),
        Segment(
            "finish", "step", Finish(model), {"hidden_out": hidden, **temb, "latents": latents},
            {"model_output": f32(
                "batch", full.out_channels or full.in_channels, "frames", "height", "width"
            )},
        ),
    )  # fmt: skip
    stages = (
        Stage("refiner", None, None, refiner_layers),
        Stage("double", None, "double_tapped", layers),
        Stage("single", None, None, single_layers),
    )
    return Cut(
        segments=segments,
        stages=tuple(s for s in stages if s.count),
        inputs=inputs,
        signals={"modulated_input": ("modulated_input", "step")},
        feature_block=layers // 2,
        dims={
            "tokens": (("frames", p_t), ("height", p), ("width", p)),
            "tokens_per_frame": (("height", p), ("width", p)),
        },
        history_dtype="bfloat16" if precision == "bfloat16" else "float32",
        example_dims={"frames": 3 * p_t, "height": 5 * p, "width": 7 * p, "tokens": 3 * 5 * 7},
    )


HUNYUAN = Family(
    "hunyuan", "HunyuanVideoTransformer3DModel", ("HunyuanVideoPipeline",), cut_hunyuan
)
