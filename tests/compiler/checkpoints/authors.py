"""Wan models in their authors' folder, tiny and random, beside the same in diffusers layout."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import originals
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from synthetic import write_pipeline
from torch import Tensor

State = dict[str, Tensor]

GEOMETRY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "t2v": GEOMETRY,
    "i2v": {**GEOMETRY, "in_channels": 36, "image_dim": 160, "added_kv_proj_dim": 32},
    "moe_t2v": GEOMETRY,
    "moe_i2v": {**GEOMETRY, "in_channels": 36},
}
"""Wan 2.1 and 2.2, text-to-video and image-to-video; of the latter, 2.1 sees the picture by CLIP too."""


def write_both(kind: str, diffusers: Path, authors: Path, suffix: str = ".pth") -> None:
    """Write one model twice.

    Args:
        kind: Of `KINDS`.
        diffusers: Folder in diffusers layout.
        authors: Folder in the authors'.
        suffix: Of the files of T5, VAE and CLIP.
    """
    write_pipeline(KINDS[kind], diffusers)
    shutil.rmtree(diffusers / "vae")
    torch.manual_seed(3)
    AutoencoderKLWan(base_dim=8).save_pretrained(diffusers / "vae")
    if kind == "i2v":
        config = diffusers / "image_encoder" / "config.json"
        config.write_text(config.read_text().replace("quick_gelu", "gelu"))  # as published
    index = json.loads((diffusers / "model_index.json").read_text())
    if "moe" in kind:
        index |= {"boundary_ratio": 0.9 if "i2v" in kind else 0.875}
        index["transformer_2"] = index["transformer"]
        if "i2v" in kind:
            index |= {"_class_name": "WanImageToVideoPipeline", "image_encoder": [None, None]}
            index["image_processor"] = [None, None]
        torch.manual_seed(4)
        second = WanTransformer3DModel(**KINDS[kind])
        for parameter in second.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.1
        second.save_pretrained(diffusers / "transformer_2")
    (diffusers / "model_index.json").write_text(json.dumps(index))
    authors.mkdir()
    places = {"transformer": authors}
    if "moe" in kind:
        places = {
            "transformer": authors / "high_noise_model",
            "transformer_2": authors / "low_noise_model",
        }
    for part, place in places.items():
        place.mkdir(exist_ok=True)
        state = WanTransformer3DModel.from_pretrained(diffusers / part).state_dict()
        save_file(originals.wan(state), place / "diffusion_pytorch_model.safetensors")
        (place / "config.json").write_text(json.dumps(authors_config(kind)))
    shutil.copytree(diffusers / "tokenizer", authors / "google" / "umt5-xxl")
    encoder = load_file(diffusers / "text_encoder" / "model.safetensors")
    _save(t5(encoder), authors / f"models_t5_umt5-xxl-enc-bf16{suffix}")
    vae = load_file(diffusers / "vae" / "diffusion_pytorch_model.safetensors")
    _save(wan_vae(vae), authors / f"Wan2.1_VAE{suffix}")
    if kind == "i2v":
        name = f"models_clip_open-clip-xlm-roberta-large-vit-huge-14{suffix}"
        _save(clip(load_file(diffusers / "image_encoder" / "model.safetensors")), authors / name)


def authors_config(kind: str) -> dict[str, Any]:
    """Return a transformer's config as Wan's authors write it."""
    given = KINDS[kind]
    return {
        "_class_name": "WanModel",
        "dim": 32,
        "eps": 1e-6,
        "ffn_dim": given["ffn_dim"],
        "freq_dim": given["freq_dim"],
        "in_dim": given["in_channels"],
        "model_type": kind[-3:],
        "num_heads": 2,
        "num_layers": given["num_layers"],
        "out_dim": 16,
        "text_len": 512,
    }


def t5(state: State) -> State:
    """Name the tensors of transformers' UMT5 encoder as Wan's authors do."""
    renames = (
        (r"^shared", "token_embedding"),
        (r"^encoder\.final_layer_norm", "norm"),
        (r"^encoder\.block", "blocks"),
        (r"layer\.0\.layer_norm", "norm1"),
        (r"layer\.1\.layer_norm", "norm2"),
        (r"layer\.0\.SelfAttention\.relative_attention_bias", "pos_embedding.embedding"),
        (r"layer\.0\.SelfAttention", "attn"),
        (r"layer\.1\.DenseReluDense\.wi_0", "ffn.gate.0"),
        (r"layer\.1\.DenseReluDense\.wi_1", "ffn.fc1"),
        (r"layer\.1\.DenseReluDense\.wo", "ffn.fc2"),
    )
    return {_renamed(n, renames): t for n, t in state.items() if "embed_tokens" not in n}


def wan_vae(state: State) -> State:
    """Name the tensors of diffusers' Wan VAE as its authors do."""

    def up(match: re.Match[str]) -> str:
        return f"upsamples.{4 * int(match[1]) + int(match[2])}"

    found = {}
    for given, tensor in state.items():
        name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", up, given)
        name = re.sub(
            r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", name
        )
        renames = (
            (r"^quant_conv", "conv1"),
            (r"^post_quant_conv", "conv2"),
            (r"conv_in", "conv1"),
            (r"norm_out", "head.0"),
            (r"conv_out", "head.2"),
            (r"down_blocks", "downsamples"),
            (r"mid_block\.resnets\.0", "middle.0"),
            (r"mid_block\.attentions\.0", "middle.1"),
            (r"mid_block\.resnets\.1", "middle.2"),
            (r"conv_shortcut", "shortcut"),
            (r"((?:samples|middle)\.\d+)\.norm1\.", r"\1.residual.0."),
            (r"((?:samples|middle)\.\d+)\.conv1\.", r"\1.residual.2."),
            (r"((?:samples|middle)\.\d+)\.norm2\.", r"\1.residual.3."),
            (r"((?:samples|middle)\.\d+)\.conv2\.", r"\1.residual.6."),
        )
        found[_renamed(name, renames)] = tensor
    return found


def clip(state: State) -> State:
    """Name the tensors of transformers' CLIP vision model as Wan's authors do, in half precision."""
    renames = (
        (r"embeddings\.patch_embedding", "patch_embedding"),
        (r"pre_layrnorm", "pre_norm"),
        (r"post_layernorm", "post_norm"),
        (r"encoder\.layers", "transformer"),
        (r"layer_norm(\d)", r"norm\1"),
        (r"self_attn\.out_proj", "attn.proj"),
        (r"mlp\.fc1", "mlp.0"),
        (r"mlp\.fc2", "mlp.2"),
    )
    state = {n.removeprefix("vision_model."): t for n, t in state.items()}
    found = {
        "cls_embedding": state.pop("embeddings.class_embedding").view(1, 1, -1),
        "pos_embedding": state.pop("embeddings.position_embedding.weight")[None],
        "head": torch.zeros(2, 2),
    }
    for name in [n for n in state if ".q_proj." in n]:
        parts = [state.pop(name.replace(".q_proj.", f".{x}_proj.")) for x in "qkv"]
        place = _renamed(name, renames).replace("self_attn.q_proj", "attn.to_qkv")
        found[place] = torch.cat(parts)
    found |= {_renamed(n, renames): t for n, t in state.items()}
    return {f"visual.{n}": t for n, t in found.items()} | {"textual.norm": torch.zeros(2)}


def _save(state: State, path: Path) -> None:
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        save_file({n: t.contiguous() for n, t in state.items()}, path)


def _renamed(name: str, renames: Any) -> str:
    for old, new in renames:
        name = re.sub(old, new, name)
    return name
