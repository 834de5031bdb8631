# SPDX-License-Identifier: Apache-2.0
"""Where FLUX.1 is cut: `FluxTransformer2DModel` of diffusers, dev and schnell.

Two block templates: double-stream blocks, which keep a text stream beside the image's ``hidden``,
and single-stream blocks over both. The conditioning vector adds a timestep's part, known for the
whole run, and a prompt's (pooled text, guidance); modulation is made of their sum in each block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
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
    linear,
    merge_heads,
    modulate,
    modulation,
    rms_norm,
    rotate,
    set_weight_dtypes,
    split_heads,
)

__all__ = ["FLUX"]

MATMUL_NAMES = (
    "to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net",
    "proj_mlp", "proj_out",
)  # fmt: skip

ROTARY_THETA = 10000.0


class Prompt(nn.Module):
    """Text → the text stream and its part of the conditioning; positions → rotary tables."""

    context_embedder: Any
    time_text_embed: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.context_embedder = model.context_embedder
        self.time_text_embed = nn.Module()
        self.time_text_embed.text_embedder = model.time_text_embed.text_embedder
        if model.config.guidance_embeds:
            self.time_text_embed.guidance_embedder = model.time_text_embed.guidance_embedder
        self.sinusoid = Sinusoid()
        self.axes = model.config.axes_dims_rope

    def forward(
        self,
        text_states: Tensor,
        pooled_states: Tensor,
        text_ids: Tensor,
        image_ids: Tensor,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the text stream, conditioning and rotary tables, float32.

        ``text`` is [batch, text_tokens, channels]; ``prompt_temb`` [batch, channels]; tables of
        text and image [1, tokens of either, head size / 2].
        """
        embedders = self.time_text_embed
        temb = embed(embedders.text_embedder, pooled_states)
        if guidance is not None:
            temb = temb + embed(embedders.guidance_embedder, self.sinusoid(guidance * 1000))
        text = linear(self.context_embedder, text_states, torch.float32)
        angles = [self._angles(ids) for ids in (text_ids, image_ids)]
        tables = [f(a).unsqueeze(0) for a in angles for f in (torch.cos, torch.sin)]
        return (text, temb, *tables)

    def _angles(self, ids: Tensor) -> Tensor:
        """Return [tokens, head size / 2]: each axis of the positions times its frequencies."""
        parts = []
        for axis, size in enumerate(self.axes):
            powers = torch.arange(0, size, 2, dtype=torch.float32, device=ids.device) / size
            parts.append(ids[:, axis : axis + 1] * (1.0 / ROTARY_THETA**powers))
        return torch.cat(parts, dim=1)


class Timestep(nn.Module):
    """Timesteps → their part of the conditioning, all steps of a run in one batch."""

    time_text_embed: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.time_text_embed = nn.Module()
        self.time_text_embed.timestep_embedder = model.time_text_embed.timestep_embedder
        self.sinusoid = Sinusoid()

    def forward(self, timesteps: Tensor) -> Tensor:
        """Return ``step_temb`` [steps, channels]."""
        return embed(self.time_text_embed.timestep_embedder, self.sinusoid(timesteps))


class Head(nn.Module):
    """Latents → hidden states of the image stream."""

    x_embedder: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.x_embedder = model.x_embedder

    def forward(self, latents: Tensor) -> Tensor:
        """Return ``hidden`` [batch, tokens, channels], float32."""
        return linear(self.x_embedder, latents, torch.float32)


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


class DoubleBlock(nn.Module):
    """One double-stream block, with the image's gated attention output tapped."""

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
        text_rope_cos: Tensor,
        text_rope_sin: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``hidden_out``, ``text_out`` and ``attention_output``, float32."""
        temb = step_temb + prompt_temb
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation(self.norm1.linear, temb, 6)
        t_shift, t_scale, t_gate, t_ff_shift, t_ff_scale, t_ff_gate = modulation(
            self.norm1_context.linear, temb, 6
        )
        image_attention, text_attention = self._attention(
            modulate(self.norm1.norm, hidden, shift, scale),
            modulate(self.norm1_context.norm, text, t_shift, t_scale),
            (rope_cos, rope_sin),
            (text_rope_cos, text_rope_sin),
        )
        attention_output = image_attention * gate
        hidden = hidden + attention_output
        text = text + text_attention * t_gate

        x = modulate(self.norm2, hidden, ff_shift, ff_scale)
        hidden = hidden + feed_forward(self.ff, x, self.dtype) * ff_gate
        x = modulate(self.norm2_context, text, t_ff_shift, t_ff_scale)
        text = text + feed_forward(self.ff_context, x, self.dtype) * t_ff_gate
        return hidden, text, attention_output

    def _attention(
        self,
        hidden: Tensor,
        text: Tensor,
        rope: tuple[Tensor, Tensor],
        text_rope: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Attend over text and image together; return both streams' projected outputs."""
        attn = self.attn
        query, key, value = (
            torch.cat(pair, dim=2)
            for pair in zip(
                self._heads(text, text_rope, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
                            (attn.norm_added_q, attn.norm_added_k)),
                self._heads(hidden, rope, (attn.to_q, attn.to_k, attn.to_v),
                            (attn.norm_q, attn.norm_k)),
                strict=True,
            )
        )  # fmt: skip
        x = merge_heads(F.scaled_dot_product_attention(query, key, value))
        text_tokens = text.shape[1]
        return (
            linear(attn.to_out[0], x[:, text_tokens:], self.dtype).float(),
            linear(attn.to_add_out, x[:, :text_tokens], self.dtype).float(),
        )

    def _heads(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        layers: tuple[Any, ...],
        norms: tuple[Any, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return a stream's rotated query and key, and its value, by heads."""
        query, key, value = (split_heads(linear(la, x, self.dtype), self.heads) for la in layers)
        query, key = (
            rotate(rms_norm(norm, part), *rope).to(self.dtype)
            for norm, part in zip(norms, (query, key), strict=True)
        )
        return query, key, value


class SingleBlock(nn.Module):
    """One single-stream block: attention and feed-forward side by side over text and image."""

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
        text_rope_cos: Tensor,
        text_rope_sin: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return ``hidden_out`` and ``text_out``, float32."""
        shift, scale, gate = modulation(self.norm.linear, step_temb + prompt_temb, 3)
        joint = torch.cat([text, hidden], dim=1)
        x = modulate(self.norm.norm, joint, shift, scale)
        rope = (torch.cat([text_rope_cos, rope_cos], 1), torch.cat([text_rope_sin, rope_sin], 1))
        attn = self.attn
        query, key = (
            rotate(rms_norm(norm, split_heads(linear(layer, x, self.dtype), self.heads)), *rope).to(
                self.dtype
            )
            for norm, layer in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k))
        )
        value = split_heads(linear(attn.to_v, x, self.dtype), self.heads)
        attended = merge_heads(F.scaled_dot_product_attention(query, key, value))
        expanded = gelu_tanh(linear(self.proj_mlp, x, self.dtype))
        both = torch.cat([attended, expanded], dim=2)
        joint = joint + linear(self.proj_out, both, self.dtype).float() * gate
        text_tokens = text.shape[1]
        return joint[:, text_tokens:], joint[:, :text_tokens]


class Finish(nn.Module):
    """Hidden states of the image stream → model output."""

    norm_out: Any
    proj_out: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm_out, self.proj_out = model.norm_out, model.proj_out

    def forward(self, hidden_out: Tensor, step_temb: Tensor, prompt_temb: Tensor) -> Tensor:
        """Return ``model_output`` [batch, tokens, out channels], float32."""
        scale, shift = modulation(self.norm_out.linear, step_temb + prompt_temb, 2)
        x = modulate(self.norm_out.norm, hidden_out, shift, scale)
        return linear(self.proj_out, x, torch.float32)


def cut_flux(config: Mapping[str, Any], precision: Precision, stored: StoredDtype) -> Cut:
    """Cut a FLUX.1 transformer of any size.

    Args:
        config: The transformer's diffusers config.
        precision: Precision of ``body``: the block templates.
        stored: Checkpoint tensor name → stored dtype.

    Raises:
        CheckpointError: a stack without one of the two kinds of blocks.
    """
    short = {"num_layers": 1, "num_single_layers": 1}
    model = on_meta(FluxTransformer2DModel, {**config, **short})
    layers, single_layers = config.get("num_layers", 19), config.get("num_single_layers", 38)
    if not layers or not single_layers:
        raise CheckpointError(
            "transformer/config.json, 'num_layers' and 'num_single_layers'",
            f"are {layers} and {single_layers}; a stack without either can't be cut",
            "use a checkpoint of FLUX.1",
        )
    full: Any = model.config  # with diffusers' defaults
    set_weight_dtypes(
        model, precision, stored,
        blocks=["transformer_blocks.", "single_transformer_blocks."], matmuls=MATMUL_NAMES,
    )  # fmt: skip
    dtype = getattr(torch, precision)
    channels = full.num_attention_heads * full.attention_head_dim

    def f32(*shape: int | str) -> TensorSpec:
        return TensorSpec("float32", shape)

    latents = f32("batch", "tokens", full.in_channels)
    hidden, text = f32("batch", "tokens", channels), f32("batch", "text_tokens", channels)
    rope = f32(1, "tokens", full.attention_head_dim // 2)
    text_rope = f32(1, "text_tokens", full.attention_head_dim // 2)
    inputs = {
        "latents": ModelInput("hidden_states", "step", latents),
        "timesteps": ModelInput("timestep", "run", f32("steps"), scale=1000.0),
        "text_states": ModelInput(
            "encoder_hidden_states", "prompt", f32("batch", "text_tokens", full.joint_attention_dim)
        ),
        "pooled_states": ModelInput(
            "pooled_projections", "prompt", f32("batch", full.pooled_projection_dim)
        ),
        "text_ids": ModelInput("txt_ids", "prompt", f32("text_tokens", 3)),
        "image_ids": ModelInput("img_ids", "prompt", f32("tokens", 3)),
    }  # fmt: skip
    if full.guidance_embeds:
        inputs["guidance"] = ModelInput("guidance", "prompt", f32("batch"))
    temb = {"step_temb": f32(1, channels), "prompt_temb": f32("batch", channels)}
    tables = {
        "text_rope_cos": text_rope, "text_rope_sin": text_rope, "rope_cos": rope, "rope_sin": rope,
    }  # fmt: skip
    streams = {"hidden_out": hidden, "text_out": text}
    block_inputs = {"hidden": hidden, "text": text, **temb, **tables}
    double = DoubleBlock(model.transformer_blocks[0], dtype)
    single = SingleBlock(model.single_transformer_blocks[0], dtype)
    tapped = {**streams, "attention_output": hidden}
    double_prefix = "transformer_blocks.{block}."
    out_channels = full.patch_size**2 * (full.out_channels or full.in_channels)
    segments = (
        Segment(
            "prompt", "prompt", Prompt(model),
            {n: i.spec for n, i in inputs.items() if i.runs == "prompt"},
            {"text": text, "prompt_temb": temb["prompt_temb"], **tables},
        ),
        Segment(
            "timestep", "run", Timestep(model), {"timesteps": f32("steps")},
            {"step_temb": f32("steps", channels)},
        ),
        Segment("head", "step", Head(model), {"latents": latents}, {"hidden": hidden}),
        Segment(
            "modulate", "signal", Modulate(model.transformer_blocks[0]), {"hidden": hidden, **temb},
            {"modulated_input": hidden}, "transformer_blocks.0.",
        ),
        Segment(
            "double", "block", double, block_inputs, tapped, double_prefix, precision,
            dropped=("attention_output",),
        ),
        Segment(
            "double_tapped", "block", double, block_inputs, tapped, double_prefix, precision
        ),
        Segment(
            "single", "block", single, block_inputs, streams, "single_transformer_blocks.{block}.",
            precision,
        ),
        Segment(
            "finish", "step", Finish(model), {"hidden_out": hidden, **temb},
            {"model_output": f32("batch", "tokens", out_channels)},
        ),
    )  # fmt: skip
    return Cut(
        segments=segments,
        stages=(
            Stage("double", None, "double_tapped", layers),
            Stage("single", None, None, single_layers),
        ),
        inputs=inputs,
        signals={"modulated_input": ("modulated_input", "step")},
        feature_block=layers // 2,
        dims={"tokens": (("height", 2), ("width", 2)), "tokens_per_frame": (("tokens", 1),)},
        history_dtype="bfloat16" if precision == "bfloat16" else "float32",
        example_dims={"tokens": 35},
        latent_scale=(1, 8),
    )


FLUX = Family("flux", "FluxTransformer2DModel", ("FluxPipeline",), cut_flux)
