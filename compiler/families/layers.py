# SPDX-License-Identifier: Apache-2.0
"""Layers as every family writes them: weights of any stored dtype, statistics in float32.

They take diffusers' own submodules for their parameters, whose names match the checkpoint, and
restate what those compute so that it exports cleanly and says its dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.dtypes import Precision
from ..cut.declared import StoredDtype

__all__ = [
    "Sinusoid",
    "embed",
    "feed_forward",
    "gelu_tanh",
    "layer_norm",
    "linear",
    "merge_heads",
    "modulate",
    "modulation",
    "rms_norm",
    "rotate",
    "set_weight_dtypes",
    "split_heads",
]


def linear(layer: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Apply ``layer`` in ``dtype``, whatever dtype its weights are stored in."""
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(x.to(dtype), layer.weight.to(dtype), bias)


def layer_norm(norm: Any, x: Tensor) -> Tensor:
    """Normalise the last axis in float32; ``norm`` may be an `nn.Identity`."""
    if isinstance(norm, nn.Identity):
        return x
    weight = None if norm.weight is None else norm.weight.float()
    bias = None if norm.bias is None else norm.bias.float()
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """Normalise the last axis by its root mean square, in float32; torch's or diffusers' norm."""
    shape = getattr(norm, "normalized_shape", None) or norm.dim
    weight = None if norm.weight is None else norm.weight.float()
    return F.rms_norm(x.float(), tuple(shape), weight, norm.eps)


class Sinusoid(nn.Module):
    """Numbers → cosines and sines at frequencies 1 … 1/10,000, as diffusers' `Timesteps`.

    The frequencies are a constant of the graph: computed there, another library's `exp` would turn
    the angles of large numbers (timesteps, guidance · 1,000) by 1e-4.
    """

    frequencies: Tensor

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        with torch.device("cpu"):
            exponent = -math.log(10000) * torch.arange(width // 2, dtype=torch.float32)
            self.register_buffer(
                "frequencies", torch.exp(exponent / (width // 2)), persistent=False
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return [numbers, width], float32."""
        angles = x.unsqueeze(1) * self.frequencies.to(x.device)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def embed(layers: Any, x: Tensor, activation: Callable[[Tensor], Tensor] = F.silu) -> Tensor:
    """Apply an embedder's two linear layers in float32."""
    hidden = activation(linear(layers.linear_1, x, torch.float32))
    return linear(layers.linear_2, hidden, torch.float32)


def gelu_tanh(x: Tensor) -> Tensor:
    """Return GELU by its tanh approximation."""
    return F.gelu(x, approximate="tanh")


def feed_forward(
    layers: Any, x: Tensor, dtype: torch.dtype, activation: Callable[[Tensor], Tensor] = gelu_tanh
) -> Tensor:
    """Apply a diffusers `FeedForward` in ``dtype``; the result is float32."""
    hidden = activation(linear(layers.net[0].proj, x, dtype))
    return linear(layers.net[2], hidden, dtype).float()


def modulation(layer: Any, temb: Tensor, parts: int, used: int | None = None) -> list[Tensor]:
    """Make shifts, scales and gates of a conditioning vector, in float32.

    Args:
        layer: Linear, conditioning → ``parts`` · channels.
        temb: [batch, channels].
        parts: Vectors that the layer makes.
        used: How many of them are wanted, from the first; the others' weights are not read.

    Returns:
        Vectors [batch, 1, channels].
    """
    rows = layer.out_features // parts * (used or parts)
    bias = None if layer.bias is None else layer.bias[:rows].float()
    made = F.linear(F.silu(temb), layer.weight[:rows].float(), bias).unsqueeze(1)
    return list(made.chunk(used or parts, dim=2))


def modulate(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise, scale and shift in float32."""
    return layer_norm(norm, x) * (1 + scale) + shift


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, tokens, heads * size] → [batch, heads, tokens, size]."""
    split: Tensor = x.unflatten(2, (heads, -1))
    return split.transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[batch, heads, tokens, size] → [batch, tokens, heads * size]."""
    return x.transpose(1, 2).flatten(2)


def rotate(x: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels of each head; x: [batch, heads, tokens, size]."""
    batch = x.shape[0]
    cos, sin = rope_cos.expand(batch, -1, -1), rope_sin.expand(batch, -1, -1)
    return torch.onnx.ops.rotary_embedding(x, cos, sin, interleaved=True)


def set_weight_dtypes(
    model: nn.Module,
    precision: Precision,
    stored: StoredDtype,
    *,
    blocks: Collection[str],
    matmuls: Collection[str],
) -> None:
    """Give each parameter the dtype in which its graph takes it.

    What the block loop multiplies by is converted to ``precision`` once, at build. Everything else
    stays as stored and is cast inside its graph, so that nothing is rewritten for its sake.

    Args:
        model: On ``meta``.
        precision: Precision of ``body``.
        stored: Checkpoint tensor name → stored dtype.
        blocks: What the names of the block loop's parameters begin with.
        matmuls: Parts of a name that mark a matrix product there.
    """
    for name, parameter in model.named_parameters():
        is_body_matmul = name.startswith(tuple(blocks)) and bool(
            set(name.split(".")) & set(matmuls)
        )
        wanted = precision if is_body_matmul else stored(name)
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(getattr(torch, wanted))
