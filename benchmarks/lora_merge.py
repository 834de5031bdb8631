# SPDX-License-Identifier: Apache-2.0
"""Measure how long a LoRA takes to be merged into one block of Wan 14B, in C++ and in Python.

A random block in bfloat16 and a LoRA of every linear layer of it. C++ merges what `freewheel lora`
wrote, by `build/cpp/merge_loras`; Python merges through PEFT, as `attach` does.

    python benchmarks/lora_merge.py --out out/lora_merge
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from weights_form import machine

from freewheel.bundle.reader import Bundle
from freewheel.compiler.build import build
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.engines import backend
from freewheel.runtime.lora import parse_lora
from freewheel.runtime.pipeline.adapters import Adapters
from freewheel.runtime.pipeline.write_lora import write_lora
from freewheel.runtime.settings import config_entries

BLOCKS = 40  # of the whole model
REPOSITORY = Path(__file__).parent.parent
ROUNDS = 5


def prepare(folder: Path, precision: Any, rank: int) -> tuple[Path, Path]:
    """Build a bundle of one block; return it, and a LoRA in diffusers' layout."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=1
    )
    checkpoint = folder / "checkpoint"
    model.to(getattr(torch, precision)).save_pretrained(checkpoint)  # type: ignore[attr-defined]  # diffusers hides it
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    build(
        plan(BuildRequest(
            model=str(checkpoint), out=folder / "bundle", backends=[backend("openvino")],
            configs=config_entries(["off"], lambda text: None), precision=precision, policies=[],
        ))
    )  # fmt: skip
    state = {}
    for name, module in model.blocks.named_modules():
        if isinstance(module, torch.nn.Linear):
            place = f"transformer.blocks.{name}"
            state[f"{place}.lora_A.weight"] = torch.randn(rank, module.in_features)
            state[f"{place}.lora_B.weight"] = 0.01 * torch.randn(module.out_features, rank)
    save_file(state, folder / "shared.safetensors")
    return folder / "bundle", folder / "shared.safetensors"


def in_cpp(tool: Path, bundle: Path, lora: Path, threads: int) -> dict[str, float]:
    """Return what `merge_loras` prints."""
    command = [tool, bundle, lora, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def in_python(bundle: Path, lora: Path) -> dict[str, float]:
    """Return the seconds of loading the file, and of merging it."""
    adapters = Adapters(Bundle(bundle), "", None)
    began = time.perf_counter()
    adapters.module.load_lora_adapter(load_file(lora), adapter_name="style")
    loaded = time.perf_counter() - began
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        adapters.merged()
        seconds.append(time.perf_counter() - began)
    return {"open_seconds": loaded, "merge_seconds": statistics.median(seconds)}


def main() -> None:
    """Measure, print the table, write it and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out/lora_merge"), help="folder")
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--build", type=Path, default=REPOSITORY / "build" / "cpp", help="of C++")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.out) as scratch:
        folder = Path(scratch)
        bundle, shared = prepare(folder, arguments.precision, arguments.rank)
        written = folder / "style.safetensors"
        write_lora(Bundle(bundle), parse_lora(str(shared)), written, folder)
        tool, threads = arguments.build / "merge_loras", torch.get_num_threads()
        rows = {"C++": in_cpp(tool, bundle, written, threads), "Python": in_python(bundle, shared)}
    lines = ["| merged by | file, s | merge of a block, s | of 40 blocks, s |", "|---|---|---|---|"]
    for name, row in rows.items():
        merge = row["merge_seconds"]
        lines.append(f"| {name} | {row['open_seconds']:.3f} | {merge:.3f} | {BLOCKS * merge:.1f} |")
    context = {**machine(), "precision": arguments.precision, "rank": arguments.rank}
    lines += ["", ", ".join(f"{k} {v}" for k, v in context.items()) + "."]
    figures = {"schema_version": 1, "machine": context, "rows": rows}
    (arguments.out / "lora_merge.json").write_text(json.dumps(figures, indent=1) + "\n")
    (arguments.out / "lora_merge.md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
