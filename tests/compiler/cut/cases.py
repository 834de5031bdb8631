# SPDX-License-Identifier: Apache-2.0
"""Small configs of diffusers transformers, and one proof of each, shared by all tests of the cutter.

Blocks are more than are traced, so that a proof covers those that were left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
from held_out import HELD_OUT
from torch import Tensor, fx, nn

from freewheel.compiler.cut.cut import cut_model
from freewheel.compiler.cut.models import MODELS, row_of
from freewheel.compiler.cut.prove import random_weights
from freewheel.compiler.cut.row import Row
from freewheel.compiler.cut.trace import Trace, trace
from freewheel.compiler.cut.words import Cut

WAN = {
    "attention_head_dim": 12, "cross_attn_norm": True, "ffn_dim": 32, "freq_dim": 32,
    "in_channels": 4, "num_attention_heads": 2, "num_layers": 4, "out_channels": 4,
    "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
    "text_dim": 16,
}  # fmt: skip
SD3 = {
    "attention_head_dim": 8, "caption_projection_dim": 32, "in_channels": 4,
    "joint_attention_dim": 32, "num_attention_heads": 4, "num_layers": 5, "out_channels": 4,
    "patch_size": 1, "pooled_projection_dim": 64, "pos_embed_max_size": 96, "sample_size": 32,
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "wan": ("WanTransformer3DModel", WAN),
    "wan_i2v": ("WanTransformer3DModel", {**WAN, "image_dim": 16, "added_kv_proj_dim": 24}),
    "flux": (
        "FluxTransformer2DModel",
        {
            "attention_head_dim": 16, "axes_dims_rope": [4, 4, 8], "in_channels": 4,
            "joint_attention_dim": 32, "num_attention_heads": 2, "num_layers": 4,
            "num_single_layers": 4, "patch_size": 1, "pooled_projection_dim": 32,
            "guidance_embeds": True,
        },
    ),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        {
            "attention_head_dim": 10, "guidance_embeds": True, "in_channels": 4,
            "num_attention_heads": 2, "num_layers": 3, "num_refiner_layers": 3,
            "num_single_layers": 3, "out_channels": 4, "patch_size": 1, "patch_size_t": 1,
            "pooled_projection_dim": 8, "rope_axes_dim": [2, 4, 4], "text_embed_dim": 16,
        },
    ),
    "hunyuan_one_refiner": (
        "HunyuanVideoTransformer3DModel",
        {
            "attention_head_dim": 10, "guidance_embeds": False, "in_channels": 4,
            "num_attention_heads": 2, "num_layers": 2, "num_refiner_layers": 1,
            "num_single_layers": 2, "out_channels": 4, "patch_size": 1, "patch_size_t": 1,
            "pooled_projection_dim": 8, "rope_axes_dim": [2, 4, 4], "text_embed_dim": 16,
        },
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {
            "attention_head_dim": 8, "caption_channels": 16, "cross_attention_dim": 16,
            "in_channels": 4, "num_attention_heads": 2, "num_layers": 4, "out_channels": 4,
            "qk_norm": "rms_norm_across_heads",
        },
    ),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        {
            "attention_head_dim": 16, "axes_dims_rope": [8, 4, 4], "in_channels": 16,
            "joint_attention_dim": 16, "num_attention_heads": 4, "num_layers": 4,
            "out_channels": 4, "patch_size": 2,
        },
    ),
    "sd3": ("SD3Transformer2DModel", SD3),
    "sd35": (
        "SD3Transformer2DModel",
        {**SD3, "dual_attention_layers": [0, 1, 2], "qk_norm": "rms_norm"},
    ),
    "bria": (
        "BriaTransformer2DModel",
        {
            "attention_head_dim": 8, "axes_dims_rope": [0, 4, 4], "in_channels": 4,
            "joint_attention_dim": 32, "num_attention_heads": 2, "num_layers": 4,
            "num_single_layers": 4, "patch_size": 1, "pooled_projection_dim": None,
        },
    ),
    "ovis_image": (
        "OvisImageTransformer2DModel",
        {
            "attention_head_dim": 16, "axes_dims_rope": [4, 4, 8], "in_channels": 4,
            "joint_attention_dim": 32, "num_attention_heads": 2, "num_layers": 4,
            "num_single_layers": 4, "out_channels": 4, "patch_size": 1,
        },
    ),
    "chrono_edit": (
        "ChronoEditTransformer3DModel",
        {
            "attention_head_dim": 8, "cross_attn_norm": True, "ffn_dim": 32, "freq_dim": 16,
            "in_channels": 16, "num_attention_heads": 2, "num_layers": 4, "out_channels": 16,
            "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 64,
            "rope_temporal_skip_len": 8, "text_dim": 32,
        },
    ),
    "sana_video": (
        "SanaVideoTransformer3DModel",
        {
            "attention_head_dim": 12, "caption_channels": 16, "cross_attention_dim": 24,
            "cross_attention_head_dim": 12, "in_channels": 16, "mlp_ratio": 2.5,
            "num_attention_heads": 2, "num_cross_attention_heads": 2, "num_layers": 4,
            "out_channels": 16, "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32, "sample_size": 8,
        },
    ),
    "krea_2": (
        "Krea2Transformer2DModel",
        {
            "attention_head_dim": 8, "axes_dims_rope": [4, 2, 2], "in_channels": 16,
            "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
            "num_layers": 4, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
            "num_text_layers": 3, "text_hidden_dim": 16, "text_intermediate_size": 16,
            "text_num_attention_heads": 2, "text_num_key_value_heads": 1, "timestep_embed_dim": 8,
        },
    ),
    "prx": (
        "PRXTransformer2DModel",
        {
            "axes_dim": [8, 8], "context_in_dim": 16, "depth": 4, "hidden_size": 32,
            "in_channels": 16, "num_heads": 2, "patch_size": 2,
        },
    ),
    "joy_image_edit": (
        "JoyImageEditTransformer3DModel",
        {
            "hidden_size": 32, "in_channels": 16, "num_attention_heads": 2, "num_layers": 4,
            "patch_size": [1, 2, 2], "rope_dim_list": [4, 6, 6], "text_dim": 16, "theta": 256,
        },
    ),
    "z_image": (
        "ZImageTransformer2DModel",
        {
            "all_f_patch_size": [1], "all_patch_size": [2], "axes_dims": [8, 4, 4],
            "axes_lens": [256, 32, 32], "cap_feat_dim": 16, "dim": 16, "in_channels": 16,
            "n_heads": 1, "n_kv_heads": 2, "n_layers": 4, "n_refiner_layers": 2, "qk_norm": True,
            "rope_theta": 256.0, "t_scale": 1000.0,
        },
    ),
}  # fmt: skip
"""Name → class and config."""

EVERY_RUN = ("wan", "flux", "qwen_image")
"""Cases of `make test`: one stream with cross-attention, two kinds of blocks, complex numbers."""


@dataclass(frozen=True)
class Case:
    """A cut, and the transformer that it was made of, with random weights."""

    row: Row
    model: nn.Module
    weights: Mapping[str, Tensor]
    cut: Cut


@cache
def case(name: str) -> Case:
    """Cut a case once."""
    if name in HELD_OUT:
        row, config = HELD_OUT[name]
        assert row_of(row.model) is None, "it has a row now: hold another class out"
    else:
        class_name, config = CASES[name]
        (row,) = (row for row in MODELS if row.model == class_name)
    model_class = getattr(diffusers, row.model)
    model = random_weights(model_class.from_config(config).eval())
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return Case(row, model, weights, cut_model(row, model_class, config))


def traced(forward: Callable[..., Any], **inputs: Any) -> Trace:
    """Trace a function of tensors as if it were a transformer."""

    class Model(nn.Module):
        @classmethod
        def from_config(cls, config: Mapping[str, Any]) -> nn.Module:
            return cls()

        def forward(self, *, return_dict: bool, **given: Tensor) -> Any:
            return forward(**given)

    return trace(Row("Model", inputs), Model, {})


def run(found: Trace, **inputs: Tensor) -> Tensor:
    """Run a traced function's graph."""
    output = next(node for node in found.graph.nodes if node.op == "output")
    output.args = (found.results,)
    module = fx.GraphModule(nn.Module(), found.graph)
    values = {name: inputs.get(name) for name in found.inputs.values()}
    constants = {node.name: value for node, value in found.constants.items()}
    named = {node: values[name] for node, name in found.inputs.items()}
    given = [
        named[node] if node in named else constants[node.name]
        for node in found.graph.nodes
        if node.op == "placeholder"
    ]
    return module(*given)[0]
