"""Build what the tests of this folder serve; runs in the project's own virtual environment.

    .venv/bin/python tests/triton_server/prepare.py out/triton-tests out/tests/freewheel-cache

The tests run in another one, with the server's wheel, which has neither torch nor Freewheel.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

TESTS = Path(__file__).resolve().parent.parent
FOLDERS = (".", "cpp", "compiler", "compiler/models", "compiler/cut")
sys.path[:0] = [str(TESTS / folder) for folder in FOLDERS]

from cases import case
from conftest import random_transformer
from doors import CONFIGS, LORA_REQUESTS, REQUESTS, Doors
from loop import BY_CONTENT, Loop, overrides_of
from several import loop_of, save

from freewheel.bundle.manifest import ConfigEntry
from freewheel.bundle.reader import Bundle
from freewheel.compiler.build import build
from freewheel.compiler.cut.row import SIZES
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.engines import backend
from freewheel.policies.setting import CacheSetting, GuardSetting
from freewheel.runtime.settings import config_entries
from freewheel.serving.repository import ServeRequest, write_repository

SEVERAL = ("ltx_2", "any_flow")
"""Models that sample a video and its sound, and that are told the next step's timestep."""

SETTINGS = {
    "by content": BY_CONTENT,
    "by count": CacheSetting(
        policy="taylorseer",
        guard=GuardSetting(first_exact=1, last_exact=1),
        parameters={"interval": 3},
    ),
}
"""What is asked of them."""

SLOW = {**SIZES, "batch": 1, "frames": 8, "height": 16, "width": 16}
"""Sizes whose steps take long enough to be cancelled among them."""


def build_bundle(
    checkpoint: Path,
    out: Path,
    cache: Path,
    configs: dict[str, ConfigEntry],
    *,
    whole: bool = False,
    policies: list[str] | None = None,
) -> Bundle:
    request = BuildRequest(
        model=str(checkpoint),
        out=out,
        backends=[backend("openvino")],
        replace=True,
        cache=cache,
        configs=configs,
        policies=policies,
        with_text_encoder=whole,
        with_vae=whole,
    )
    build(plan(request))
    return Bundle(out)


def write_doors(bundle: Bundle, out: Path) -> Path:
    """Write what Python, freewheel-run and the C ABI make of each request.

    Returns:
        The folder of the LoRAs that requests name.
    """
    out.mkdir()
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


def inputs_of(loop: Loop) -> dict[str, Any]:
    """Return a loop's noise and prompts by the names that a request has for them, without a batch."""
    declared = loop.bundle.manifest.inputs
    found = {"latents": loop.latents, **loop.beside}
    for prefix, branch in (("", "cond"), ("negative_", "uncond")):
        found |= {f"{prefix}{name}": value for name, value in loop.prompts[branch].items()}
    return {
        name: value[0] if declared[name.removeprefix("negative_")].shape[0] == "batch" else value
        for name, value in found.items()
    }


def write_several(name: str, out: Path, cache: Path) -> None:
    """Write a repository's model, requests of it, and what Python samples for each of them."""
    one = case(name)
    save(one, out / "checkpoints" / name)
    policies = ["off", *(setting.policy for setting in SETTINGS.values())]
    entries = config_entries(["off"], lambda text: None)
    bundle = build_bundle(out / "checkpoints" / name, out / name, cache, entries, policies=policies)
    write_repository(ServeRequest(bundle, out / "models", name=name, threads=1))
    folder = out / "several" / name
    folder.mkdir(parents=True)
    loop = loop_of(one, bundle, {**SIZES, "batch": 1})
    np.savez(folder / "inputs.npz", **inputs_of(loop))
    np.savez(folder / "slow.npz", **inputs_of(loop_of(one, bundle, SLOW)))
    usual: dict[str, Any] = {
        "steps": loop.steps,
        "sampler": loop.sampler,
        "flow_shift": loop.shift,
        "guidance_scale": loop.guidance[0],
    }
    for latents, scale in loop.guidance_of.items():
        usual[f"{latents.removesuffix('latents')}guidance_scale"] = scale
    requests, expected = {}, {}
    for request, setting in SETTINGS.items():
        samples, branches = loop.in_python(setting)
        overrides = {
            n: v if isinstance(v, str) else json.dumps(v) for n, v in overrides_of(setting).items()
        }
        requests[request] = {
            "parameters": {**usual, "policy": setting.policy, **overrides},
            "computed": {branch: found["computed"] for branch, found in branches.items()},
        }
        expected |= {f"{request}/{latents}": value[0] for latents, value in samples.items()}
    np.savez(folder / "expected.npz", **expected)
    (folder / "requests.json").write_text(json.dumps(requests))


def main(out: Path, cache: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    torch.set_num_threads(1)
    for name in SEVERAL:
        write_several(name, out, cache)
    for seed, name in enumerate(("tiny", "rebuilt")):
        random_transformer(seed).save_pretrained(out / "checkpoints" / name)
        entries = config_entries(["off", "teacache+spectrum"], lambda text: None)
        bundle = build_bundle(out / "checkpoints" / name, out / name, cache, entries)
        if name == "tiny":
            write_repository(
                ServeRequest(bundle, out / "models", name="tiny", instances=2, threads=1)
            )
    doors = build_bundle(out / "checkpoints" / "tiny", out / "doors", cache, CONFIGS)
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
