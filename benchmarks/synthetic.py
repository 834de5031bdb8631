# SPDX-License-Identifier: Apache-2.0
"""Write a Wan checkpoint of real geometry with random weights, in shards, one tensor at a time.

    python benchmarks/synthetic.py wan2.1-t2v-1.3b --layers 2 --out out/wan-1.3b-2

The weights are seeded and of a trained model's scale (projections 1/sqrt(fan-in), norms near 1), so
that activations stay finite through any number of layers. No tensor but the one being written is
ever held.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import WanTransformer3DModel

from freewheel.bundle.safetensors_header import encode_header
from freewheel.configs.dtypes import ITEM_BYTES

SHARD_BYTES = 4 << 30

T2V = {
    "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
    "freq_dim": 256, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024, "patch_size": [1, 2, 2],
}  # fmt: skip
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
    """Write a checkpoint; return its bytes.

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
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    out.mkdir(parents=True, exist_ok=True)
    config["_class_name"] = "WanTransformer3DModel"
    (out / "config.json").write_text(json.dumps(config, indent=2))
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
) -> None:
    """Write a Wan checkpoint of real geometry with random weights."""
    total = write_checkpoint(geometry, out, layers, dtype, seed)
    typer.echo(f"{out}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    typer.run(main)
