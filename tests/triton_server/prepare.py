"""Build what the tests of this folder serve; runs in the project's own virtual environment.

    .venv/bin/python tests/triton_server/prepare.py out/triton-tests out/tests/freewheel-cache

The tests run in another one, with the server's wheel, which has neither torch nor Freewheel.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "cpp")]

from conftest import random_transformer
from doors import CONFIGS, LORA_REQUESTS, REQUESTS, Doors

from freewheel.bundle.manifest import ConfigEntry
from freewheel.bundle.reader import Bundle
from freewheel.compiler.build import build
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.engines import backend
from freewheel.runtime.settings import config_entries
from freewheel.serving.repository import ServeRequest, write_repository


def build_bundle(
    checkpoint: Path, out: Path, cache: Path, configs: dict[str, ConfigEntry], *, whole: bool
) -> Bundle:
    request = BuildRequest(
        model=str(checkpoint), out=out, backends=[backend("openvino")], replace=True, cache=cache,
        configs=configs, with_text_encoder=whole, with_vae=whole,
    )  # fmt: skip
    build(plan(request))
    return Bundle(out)


def write_doors(bundle: Bundle, out: Path) -> Path:
    """Write what Python, freewheel-run and the C ABI make of each request, on one thread.

    Returns:
        The folder of the LoRAs that requests name.
    """
    out.mkdir()
    torch.set_num_threads(1)
    doors = Doors(bundle, TESTS.parent / "build" / "cpp", out)
    found = {}
    requests = {**{n: (*r, "") for n, r in REQUESTS.items()}, **LORA_REQUESTS}
    for name, (cache, overrides, lora) in requests.items():
        noise, in_c = doors.in_c(cache, overrides, lora)
        in_python, _ = doors.in_python(cache, overrides, noise, lora)
        found[f"{name}/C ABI"] = in_c.reshape(in_python.shape)
        found[f"{name}/Python"] = in_python
        found[f"{name}/freewheel-run"] = doors.in_shell(cache, overrides, lora)
    np.savez(out / "latents.npz", **found)
    (out / "requests.json").write_text(json.dumps(requests))
    return doors.loras


def main(out: Path, cache: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for seed, name in enumerate(("tiny", "rebuilt")):
        random_transformer(seed).save_pretrained(out / "checkpoints" / name)
        entries = config_entries(["off", "teacache+spectrum"], lambda text: None)
        bundle = build_bundle(out / "checkpoints" / name, out / name, cache, entries, whole=False)
        if name == "tiny":
            write_repository(
                ServeRequest(bundle, out / "models", name="tiny", instances=2, threads=1)
            )
    doors = build_bundle(out / "checkpoints" / "tiny", out / "doors", cache, CONFIGS, whole=False)
    loras = write_doors(doors, out / "expected")
    for name, instances in (("doors", 1), ("pair", 2)):
        write_repository(
            ServeRequest(
                doors, out / "models", name=name, instances=instances, threads=1, lora_folder=loras
            )
        )
    names = [f"shapes_wan_{p}" for p in ("teacache", "off", "custom")]
    configs = config_entries(names, lambda text: None)
    demo = build_bundle(
        TESTS.parent / "models" / "shapes_wan", out / "demo", cache, configs, whole=True
    )
    write_repository(ServeRequest(demo, out / "models", name="demo", threads=1))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
