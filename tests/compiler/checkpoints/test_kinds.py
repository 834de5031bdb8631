# SPDX-License-Identifier: Apache-2.0
"""Files that hold no transformer are refused by what they are; those that do are not mistaken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import originals
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from test_original import COMFY, TINY, tiny
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from freewheel.compiler.checkpoints.checkpoint import open_checkpoint
from freewheel.compiler.checkpoints.kinds import refuse_other_kinds
from freewheel.core.errors import CheckpointError


def lora() -> Any:
    model = tiny("wan")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    state = get_peft_model_state_dict(model)
    return {f"diffusion_model.{n}": t for n, t in state.items()}


def module(model: Any) -> Any:
    return dict(model.state_dict())


def small_clip(kind: Any, config: Any) -> Any:
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return kind(config(**sizes))


FILES: dict[str, tuple[Any, str]] = {
    "LoRA": (lora, "an adapter"),
    "kohya's LoRA": (
        lambda: {"lora_unet_blocks_0_self_attn_q.lora_down.weight": torch.zeros(2, 2)}, "an adapter",
    ),
    "LoHa": (lambda: {"blocks.0.q.hada_w1_a": torch.zeros(2, 2)}, "an adapter"),
    "Wan's VAE": (
        lambda: module(AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1,
                                        temperal_downsample=[True])), "a VAE",
    ),
    "Wan's VAE by its authors": (
        lambda: {"decoder.middle.0.residual.0.gamma": torch.zeros(4, 1, 1, 1)}, "a VAE",
    ),
    "a VAE as ComfyUI keeps it": (lambda: {"vae.decoder.conv_in.weight": torch.zeros(2, 2)}, "a VAE"),
    "FLUX.1's VAE": (
        lambda: module(AutoencoderKL(block_out_channels=[4], norm_num_groups=1)), "a VAE",
    ),
    "UMT5": (
        lambda: module(UMT5EncoderModel(UMT5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
                                                   vocab_size=10))), "a T5 text encoder",
    ),
    "CLIP": (lambda: module(small_clip(CLIPTextModel, CLIPTextConfig)), "a text encoder"),
    "Llama": (lambda: {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, "a text encoder"),
    "CLIP of images": (lambda: module(small_clip(CLIPVisionModel, CLIPVisionConfig)), "an image encoder"),
    "ControlNet": (lambda: {"controlnet_blocks.0.weight": torch.zeros(2, 2)}, "a ControlNet"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_refused_by_what_it_is(tmp_path: Path, name: str) -> None:
    make, kind = FILES[name]
    state = {n: t.clone().contiguous() for n, t in make().items()}
    if kind == "a text encoder" and "CLIP" in name:
        state = {
            n if n.startswith("text_model.") else f"text_model.{n}": t for n, t in state.items()
        }
    if kind == "an image encoder":
        state = {n if n.startswith("vision") else f"vision_model.{n}": t for n, t in state.items()}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(tmp_path / "x.safetensors"))
    assert caught.value.where == str(tmp_path / "x.safetensors")
    assert caught.value.what.startswith(f"is {kind}, by its tensor '"), caught.value.what
    assert {"an adapter": "--lora", "a ControlNet": "plain"}.get(
        kind, "--pipeline"
    ) in caught.value.hint


def test_no_transformer_is_mistaken() -> None:
    for name, (_, layout) in TINY.items():
        state = dict(tiny(name).state_dict())
        refuse_other_kinds(layout(state), Path(name))
    small = {"num_layers": 1, "num_single_layers": 1}
    for kind, layout in (
        (FluxTransformer2DModel, originals.flux),
        (HunyuanVideoTransformer3DModel, originals.hunyuan),
    ):
        with torch.device("meta"):
            refuse_other_kinds(layout(dict(kind(**small).state_dict())), Path(kind.__name__))


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (
            ("transformer_blocks.0.qkv_proj.qweight", "transformer_blocks.0.qkv_proj.wscales"),
            "SVDQuant",
        ),
        (
            (
                "double_blocks.0.img_attn.norm.key_norm.scale",
                "double_blocks.0.img_attn.qkv.weight.absmax",
            ),
            "4-bit of bitsandbytes",
        ),
    ],
)
def test_a_quantised_file_of_no_known_layout_names_its_quantisation(
    tmp_path: Path, names: tuple[str, ...], kind: str
) -> None:
    save_file({COMFY + n: torch.zeros(2, 2) for n in names}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="the checkpoint is quantised") as caught:
        open_checkpoint(str(tmp_path / "x.safetensors"))
    assert kind in caught.value.what
