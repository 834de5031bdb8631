# SPDX-License-Identifier: Apache-2.0
"""Measure memory and written bytes of a build from a single file, and of LoRAs swapped on a live session.

    python benchmarks/single_file.py --out out/single

The file is of Wan 2.1's 1.3 B geometry with random weights in bfloat16. The LoRA updates the queries
and keys of self-attention in every block.
"""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from memory import MemorySampler, read_bytes, resident_now
from safetensors.torch import save_file
from synthetic import GEOMETRIES, random_tensor

from freewheel.bundle.reader import Bundle
from freewheel.compiler.build import build
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.engines import backend
from freewheel.runtime.pipeline.attach import attach
from freewheel.runtime.settings import config_entries

RANK = 32


def main(
    out: Annotated[Path, typer.Option(help="Folder to make; 3 GB.")],
    geometry: Annotated[str, typer.Option(help="Of benchmarks/synthetic.py.")] = "wan2.1-t2v-1.3b",
) -> None:
    """Build from a single file, then load, swap and unload LoRAs."""
    out.mkdir(parents=True)
    single = out / "model.safetensors"
    child = os.fork()  # what it holds while it writes is no part of the measurement
    if child == 0:
        write_model(GEOMETRIES[geometry], single)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    sampler = MemorySampler()
    sampler.start()
    report = build(
        plan(BuildRequest(
            model=str(single), out=out / "bundle", backends=[backend("openvino")],
            configs=config_entries(["off"], lambda text: None), precision="bfloat16", cache=None,
        ))
    )  # fmt: skip
    sampler.stop()
    found: dict[str, Any] = {
        "file_bytes": single.stat().st_size, "bundle_bytes": report.bytes,
        "written_bytes": report.written_bytes, "build_peak_bytes": sampler.peak().copied,
    }  # fmt: skip
    found["lora"] = swaps(Bundle(out / "bundle"), out)
    typer.echo(json.dumps(found, indent=1))


def swaps(bundle: Bundle, out: Path) -> dict[str, Any]:
    """Return what resident memory grows by as adapters come and go, in bytes."""
    pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), None)  # type: ignore[arg-type]  # parts not needed
    transformer = attach(pipe, bundle, "off")
    files = [write_lora(bundle, out / f"lora_{seed}.safetensors", seed) for seed in (1, 2)]
    touched = sum(
        t.bytes for n, t in bundle.manifest.tensors.items()
        if n.startswith("blocks.") and n.endswith(("attn1.to_q.weight", "attn1.to_k.weight"))
    )  # fmt: skip
    before = resident_now().copied
    found: dict[str, Any] = {"touched_bytes": touched, "file_bytes": files[0].stat().st_size}
    for index, file in enumerate(files):
        sampler, read = MemorySampler(), read_bytes()
        sampler.start()
        pipe.load_lora_weights(str(file), adapter_name=str(index))
        pipe.set_adapters([str(index)])
        transformer._settle_adapters()
        sampler.stop()
        found[f"swap_{index + 1}"] = {
            "peak_growth_bytes": sampler.peak().copied - before,
            "growth_bytes": resident_now().copied - before, "disk_read_bytes": read_bytes() - read,
            "held_bytes": held(before),
        }  # fmt: skip
        pipe.delete_adapters([str(index)])
    transformer._settle_adapters()
    found["unloaded"] = {"held_bytes": held(before)}
    return found


def held(before: int) -> int:
    """Return the growth once the allocator has given free pages back: what is really held."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident_now().copied - before


def write_model(config: dict[str, Any], file: Path) -> None:
    """Write a transformer in one file, its config beside it."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model: Any = WanTransformer3DModel(**config)
    model.save_config(file.parent)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    save_file({n: random_tensor(n, s, 0).bfloat16() for n, s in shapes.items()}, file)


def write_lora(bundle: Bundle, file: Path, seed: int) -> Path:
    """Write a LoRA in diffusers' layout."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, entry in bundle.manifest.tensors.items():
        if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
            place = f"transformer.{name.removesuffix('.weight')}"
            rows, columns = entry.shape
            state[f"{place}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
            state[f"{place}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.01
    save_file({n: t.bfloat16() for n, t in state.items()}, file)
    return file


if __name__ == "__main__":
    typer.run(main)
