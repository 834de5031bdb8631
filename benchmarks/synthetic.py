# SPDX-License-Identifier: Apache-2.0
"""Write a Wan checkpoint of real geometry with random weights, in shards, one tensor at a time.

    python benchmarks/synthetic.py wan2.1-t2v-1.3b --layers 2 --out out/wan-1.3b-2
    python benchmarks/synthetic.py wan2.1-i2v-14b-480p --dtype bfloat16 --pipeline --out out/i2v

The weights are seeded and of a trained model's scale (projections 1/sqrt(fan-in), norms near 1), so
that activations stay finite through any number of layers. No tensor but the one being written is
ever held. With ``--pipeline`` the folder is a whole diffusers pipeline: its text encoder, VAE and
image encoder are tiny, but as wide at their ends as the transformer needs, so that `freewheel run`
goes from a prompt to a video.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from freewheel.bundle.safetensors_header import encode_header
from freewheel.core.dtypes import ITEM_BYTES

SHARD_BYTES = 4 << 30
TOKENIZER = Path(__file__).resolve().parent.parent / "models" / "shapes_wan" / "tokenizer"

T2V = {
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "patch_size": [1, 2, 2],
}
LARGE = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "wan2.1-t2v-1.3b": {**T2V, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "wan2.1-t2v-14b": {**T2V, **LARGE},
    "wan2.1-i2v-14b-480p": {**T2V, **LARGE, **I2V},
}


def write_checkpoint(
    geometry: str, out: Path, layers: int | None = None, dtype: str = "float32", seed: int = 0
) -> int:
    """Write a transformer of a named geometry; return its bytes.

    Args:
        geometry: Key of `GEOMETRIES`.
        out: Folder to make, in diffusers layout (the transformer alone).
        layers: Blocks; None takes all of the geometry's.
        dtype: Stored dtype.
        seed: Equal seeds give equal bytes.
    """
    config = dict(GEOMETRIES[geometry])
    if layers is not None:
        config["num_layers"] = layers
    return write_transformer(config, out, dtype, seed)


def write_transformer(
    config: Mapping[str, Any], out: Path, dtype: str = "float32", seed: int = 0
) -> int:
    """Write a transformer of any geometry; return its bytes.

    Args:
        config: Arguments of `WanTransformer3DModel`.
        out: Folder to make.
        dtype: Stored dtype.
        seed: Equal seeds give equal bytes.
    """
    with torch.device("meta"):
        model: Any = WanTransformer3DModel(**config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    out.mkdir(parents=True, exist_ok=True)
    whole = {**model.config, "_class_name": "WanTransformer3DModel"}
    (out / "config.json").write_text(json.dumps(whole, indent=2))
    shards = list(_shards(shapes, dtype))
    weight_map, total = {}, 0
    for index, names in enumerate(shards):
        file = f"diffusion_pytorch_model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        header, _ = encode_header({n: (dtype, shapes[n]) for n in names})
        with (out / file).open("wb") as stream:
            stream.write(header)
            for name in names:
                tensor = random_tensor(name, shapes[name], seed).to(getattr(torch, dtype))
                stream.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
                weight_map[name] = file
                total += prod(shapes[name]) * ITEM_BYTES[dtype]
    index_file = out / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
    )
    return total


def write_pipeline(
    config: Mapping[str, Any], out: Path, dtype: str = "float32", seed: int = 0
) -> int:
    """Write a transformer and the pipeline around it; return the transformer's bytes.

    Args:
        config: Arguments of `WanTransformer3DModel`; one with ``image_dim`` makes an
            image-to-video pipeline.
        out: Folder to make, in diffusers layout.
        dtype: Stored dtype of the transformer; the rest is float32.
        seed: Equal seeds give equal bytes.
    """
    total = write_transformer(config, out / "transformer", dtype, seed)
    shutil.copytree(TOKENIZER, out / "tokenizer", dirs_exist_ok=True)
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ).save_pretrained(out / "scheduler")
    text = UMT5Config(
        vocab_size=128, d_model=config["text_dim"], d_kv=16, d_ff=64, num_layers=1, num_heads=2
    )
    # Wan's VAE, narrow: 8 x 8 pixels and 4 frames to a latent.
    vae: Any = AutoencoderKLWan(base_dim=8, z_dim=config["out_channels"], num_res_blocks=1)
    parts: dict[str, Any] = {"text_encoder": UMT5EncoderModel(text), "vae": vae}
    index: dict[str, Any] = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "TokenizersBackend"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if config.get("image_dim"):
        vision = CLIPVisionConfig(
            hidden_size=config["image_dim"],
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=224,
            patch_size=14,
        )
        parts["image_encoder"] = CLIPVisionModel(vision)
        CLIPImageProcessorPil().save_pretrained(out / "image_processor")
        index |= {
            "_class_name": "WanImageToVideoPipeline",
            "image_encoder": ["transformers", "CLIPVisionModel"],
            "image_processor": ["transformers", "CLIPImageProcessor"],
        }
    for name, part in parts.items():
        for key, parameter in part.named_parameters():
            parameter.data = random_tensor(key, tuple(parameter.shape), seed)
        part.save_pretrained(out / name)
    (out / "model_index.json").write_text(json.dumps(index, indent=2))
    return total


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return one parameter, float32, the same for the same name, shape and seed."""
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
        return values.mul_(0.05).add_(1.0)
    if name.endswith("scale_shift_table"):
        return values.mul_(shape[-1] ** -0.5)
    if len(shape) == 1:
        return values.mul_(0.02)
    return values.mul_(prod(shape[1:]) ** -0.5)


def _shards(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        bytes_ = prod(shape) * ITEM_BYTES[dtype]
        if names and size + bytes_ > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += bytes_
    yield names


def main(
    geometry: Annotated[str, typer.Argument(help=f"One of {', '.join(GEOMETRIES)}.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    layers: Annotated[int | None, typer.Option(help="Blocks; default: all.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    pipeline: Annotated[
        bool, typer.Option(help="Also tiny text encoder, VAE and image encoder.")
    ] = False,
) -> None:
    """Write a Wan checkpoint of real geometry with random weights."""
    if pipeline:
        config = {**GEOMETRIES[geometry], **({"num_layers": layers} if layers else {})}
        total = write_pipeline(config, out, dtype, seed)
    else:
        total = write_checkpoint(geometry, out, layers, dtype, seed)
    typer.echo(f"{out}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    typer.run(main)
