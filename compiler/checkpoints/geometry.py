# SPDX-License-Identifier: Apache-2.0
"""Work a transformer's config out from the shapes of its tensors, where no file has it.

What shapes don't tell (rotary bases, epsilons, the width of a head where norms span all heads) is
that of the published models: diffusers' own defaults, and a few numbers below. Every shape is held
to the config afterwards (`check_tensors`), so that a wrong guess of one that shows is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from math import isqrt, prod
from types import MappingProxyType
from typing import Any

import diffusers

from ...core.errors import CheckpointError

__all__ = ["CLASSES", "class_by_names", "config_from_shapes"]

Shapes = Mapping[str, tuple[int, ...]]

WAN_HEAD = 128
LTX_HEADS = 32
SD3_HEAD = 64
Z_IMAGE_HEAD = 128


def config_from_shapes(
    name: str, shapes: Shapes, where: str, *, heads: int | None = None
) -> dict[str, Any]:
    """Return the config of a diffusers class.

    Args:
        name: A key of `CLASSES`.
        shapes: Shape of each tensor by diffusers' names.
        where: What to call the weights in messages.
        heads: Number of attention heads, where something tells it.

    Raises:
        CheckpointError: the class has no rule, or a tensor that its rule looks at is not there.
    """
    if name not in CLASSES:
        raise CheckpointError(
            where,
            f"is of '{name}', whose config can't be told from shapes",
            "lay the transformer's 'config.json' beside it, or give --pipeline",
        )
    try:
        told = CLASSES[name][1](shapes)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            where,
            f"looks like '{name}', and has no usable tensor {error}",
            "fetch the file again; if it is another model, lay its 'config.json' beside it",
        ) from error
    width = told.pop("width")
    if heads is not None:
        told |= {"num_attention_heads": heads, "attention_head_dim": width // heads}
    head = told.get("attention_head_dim", Z_IMAGE_HEAD)
    if told.get("num_attention_heads", told.get("n_heads")) * head != width:
        raise CheckpointError(
            where,
            f"is {width} wide, which is no published '{name}': its heads can't be told",
            "lay the transformer's 'config.json' beside it, or give --pipeline",
        )
    taken = inspect.signature(getattr(diffusers, name).__init__).parameters
    usual = {n: p.default for n, p in taken.items() if p.default is not p.empty}
    usual = {n: list(v) if isinstance(v, tuple) else v for n, v in usual.items()}
    return {"_class_name": name, **usual, **told}


def class_by_names(names: Mapping[str, Any]) -> str | None:
    """Return the class whose marks are among diffusers' names of tensors; None where none's are."""
    return next((n for n, (marks, _) in CLASSES.items() if all(m in names for m in marks)), None)


def _count(shapes: Shapes, blocks: str) -> int:
    """Count the blocks of a list: one more than the highest index."""
    indices = {n.removeprefix(blocks).split(".")[0] for n in shapes if n.startswith(blocks)}
    return 1 + max((int(i) for i in indices), default=-1)


def _wan(shapes: Shapes) -> dict[str, Any]:
    width, in_channels, *patch = shapes["patch_embedding.weight"]
    has_image = "blocks.0.attn2.add_k_proj.weight" in shapes
    image = shapes.get("condition_embedder.image_embedder.norm1.weight")
    positions = shapes.get("condition_embedder.image_embedder.pos_embed")
    return {
        "width": width,
        "patch_size": patch,
        "num_attention_heads": width // WAN_HEAD,
        "attention_head_dim": WAN_HEAD,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // prod(patch),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": _count(shapes, "blocks."),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "image_dim": image[0] if image else None,
        "added_kv_proj_dim": width if has_image else None,
        "pos_embed_seq_len": positions[1] if positions else None,
    }


def _flux(shapes: Shapes) -> dict[str, Any]:
    width, in_channels = shapes["x_embedder.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    out_channels = shapes["proj_out.weight"][0]
    return {
        "width": width,
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "num_layers": _count(shapes, "transformer_blocks."),
        "num_single_layers": _count(shapes, "single_transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
    }


def _hunyuan(shapes: Shapes) -> dict[str, Any]:
    width, in_channels, frames, height, _ = shapes["x_embedder.proj.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    return {
        "width": width,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // (frames * height * height),
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": _count(shapes, "transformer_blocks."),
        "num_single_layers": _count(shapes, "single_transformer_blocks."),
        "num_refiner_layers": _count(shapes, "context_embedder.token_refiner.refiner_blocks."),
        "mlp_ratio": shapes["transformer_blocks.0.ff.net.0.proj.weight"][0] / width,
        "patch_size": height,
        "patch_size_t": frames,
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "text_embed_dim": shapes["context_embedder.proj_in.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        # 33 channels: 16 noisy, 16 of the first frame, one of its mask. With 16, image-to-video has
        # the shapes of text-to-video: only its config tells.
        "image_condition_type": "latent_concat" if in_channels == 33 else None,
    }


def _ltx(shapes: Shapes) -> dict[str, Any]:
    width, in_channels = shapes["proj_in.weight"]
    return {
        "width": width,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0],
        "num_attention_heads": LTX_HEADS,
        "attention_head_dim": width // LTX_HEADS,
        "cross_attention_dim": shapes["transformer_blocks.0.attn2.to_k.weight"][1],
        "num_layers": _count(shapes, "transformer_blocks."),
        "caption_channels": shapes["caption_projection.linear_1.weight"][1],
    }


def _qwen_image(shapes: Shapes) -> dict[str, Any]:
    width, in_channels = shapes["img_in.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    return {
        "width": width,
        "patch_size": 2,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "num_layers": _count(shapes, "transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_norm.weight"][0],
    }


def _sd3(shapes: Shapes) -> dict[str, Any]:
    width, in_channels, patch, _ = shapes["pos_embed.proj.weight"]
    layers = _count(shapes, "transformer_blocks.")
    norm = shapes.get("transformer_blocks.0.attn.norm_q.weight")
    head = norm[0] if norm else SD3_HEAD
    dual = [i for i in range(layers) if f"transformer_blocks.{i}.attn2.to_q.weight" in shapes]
    return {
        "width": width,
        "patch_size": patch,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "num_layers": layers,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": isqrt(shapes["pos_embed.pos_embed"][1]),
        "dual_attention_layers": dual,
        "qk_norm": "rms_norm" if norm else None,
    }


def _z_image(shapes: Shapes) -> dict[str, Any]:
    width, channels = shapes["all_x_embedder.2-1.weight"]
    heads = width // Z_IMAGE_HEAD
    return {
        "width": width,
        "dim": width,
        "in_channels": channels // 4,
        "n_layers": _count(shapes, "layers."),
        "n_refiner_layers": _count(shapes, "noise_refiner."),
        "n_heads": heads,
        "n_kv_heads": heads,
        "qk_norm": "layers.0.attention.norm_q.weight" in shapes,
        "cap_feat_dim": shapes["cap_embedder.0.weight"][0],
    }


CLASSES: Mapping[str, tuple[tuple[str, ...], Callable[[Shapes], dict[str, Any]]]] = (
    MappingProxyType(
        {
            "WanTransformer3DModel": (("condition_embedder.time_proj.weight",), _wan),
            "HunyuanVideoTransformer3DModel": (("context_embedder.proj_in.weight",), _hunyuan),
            "LTXVideoTransformer3DModel": (("proj_in.weight", "scale_shift_table"), _ltx),
            "QwenImageTransformer2DModel": (("txt_norm.weight", "img_in.weight"), _qwen_image),
            "ZImageTransformer2DModel": (("all_x_embedder.2-1.weight",), _z_image),
            "SD3Transformer2DModel": (("pos_embed.pos_embed", "context_embedder.weight"), _sd3),
            "FluxTransformer2DModel": (
                (
                    "time_text_embed.text_embedder.linear_1.weight",
                    "single_transformer_blocks.0.proj_mlp.weight",
                ),
                _flux,
            ),
        }
    )
)
"""diffusers class → tensors that tell it from those after it, and its config from shapes."""
