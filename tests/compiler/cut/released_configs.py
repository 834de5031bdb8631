# SPDX-License-Identifier: Apache-2.0
"""Configs as wide as released models: weights are inputs of graphs, so that width costs no memory.

The defaults of diffusers' classes are those of a released model, but for what stands here. Blocks are
few where all of them are traced (`Row.whole`, or blocks that differ): depth changes no graph.
"""

from __future__ import annotations

from typing import Any

RELEASED: dict[str, dict[str, Any]] = {
    "BriaFiboTransformer2DModel": {"num_layers": 3, "num_single_layers": 3},
    "CogVideoXTransformer3DModel": {
        "num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True,
    },
    "ConsisIDTransformer3DModel": {
        "in_channels": 32, "is_train_face": True, "num_attention_heads": 48, "num_layers": 4,
        "use_rotary_positional_embeddings": True,
    },
    "DiTTransformer2DModel": {"out_channels": 8},
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HunyuanDiT2DModel": {
        "hidden_size": 1408, "in_channels": 4, "num_layers": 6, "patch_size": 2, "sample_size": 128,
    },
    "LatteTransformer3DModel": {
        "activation_fn": "gelu-approximate", "attention_bias": True, "attention_head_dim": 72,
        "caption_channels": 4096, "cross_attention_dim": 1152, "in_channels": 4,
        "norm_elementwise_affine": False, "norm_type": "ada_norm_single", "num_layers": 28,
        "out_channels": 8, "patch_size": 2,
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 8},
    "PRXTransformer2DModel": {"axes_dim": [32, 32]},
    "PixArtTransformer2DModel": {"caption_channels": 4096, "use_additional_conditions": False},
    "WanAnimateTransformer3DModel": {"num_layers": 10},
    "WanVACETransformer3DModel": {"num_layers": 6, "vace_layers": [0, 2, 4]},
}  # fmt: skip
"""Class → what its defaults leave open, or have of another model."""
