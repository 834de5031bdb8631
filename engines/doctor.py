# SPDX-License-Identifier: Apache-2.0
"""Examine this machine: what of Freewheel works here, what doesn't, and what would make it work."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..core.cells import counted
from ..core.errors import BackendUnavailable
from ..core.extras import EXTRAS, install_line, missing
from . import BACKENDS, auto_backend, backend_class
from .host import disk_free_bytes, gpu_free_bytes, memory_available_bytes

__all__ = ["examine", "render"]

CPUINFO = Path("/proc/cpuinfo")

CPU_FEATURES = {
    "avx2": "8 float32 at once",
    "avx512f": "16 float32 at once; openvino is then faster than onnxruntime",
    "avx512_bf16": "bfloat16 is computed in bfloat16",
    "amx_bf16": "bfloat16 products on tiles",
    "avx512_fp16": "float16 is computed in float16",
    "amx_fp16": "float16 products on tiles",
}
"""Flag of an x86 CPU → what is faster with it."""

BASE = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors", "peft")

TOOLS = {
    "freewheel-run": "make cpp",
    "cmake": "apt-get install cmake",
    "ninja": "apt-get install ninja-build",
    "g++": "apt-get install g++",
    "ffmpeg": install_line("video"),
}
"""Program → how to get it."""

OUR_BUILD = Path("build/cpp")
GIB = 1 << 30


def examine(folder: Path) -> dict[str, Any]:
    """Look at everything that decides what works here; allocates and downloads nothing.

    Args:
        folder: On the disk whose free space is asked for; need not exist.
    """
    return {
        "versions": {
            "freewheel": version("freewheel"),
            "python": platform.python_version(),
            **{name: _version(name) for name in BASE},
        },
        "platform": platform.platform(),
        "backends": [_backend(name) for name in BACKENDS],
        "auto": _auto(),
        "extras": [_extra(name) for name in EXTRAS if name not in BACKENDS],
        "cpu": _cpu(),
        "gpus": _gpus(),
        "memory_available_bytes": memory_available_bytes(),
        "disk": {"folder": str(folder.absolute()), "free_bytes": disk_free_bytes(folder)},
        "tools": [_tool(name) for name in TOOLS],
    }


def render(found: Mapping[str, Any]) -> list[str]:
    """Write what `examine` returned as lines."""
    versions = (f"{name} {number or '-'}" for name, number in found["versions"].items())
    cpu = found["cpu"]
    lines = [", ".join(versions), found["platform"], "", "backends"]
    lines += [_mark(b["runs"], b["name"], b["reason"], b["install"]) for b in found["backends"]]
    lines += [
        f"  --backend auto takes {found['auto'] or 'none: no backend runs here'}",
        "",
        "extras",
    ]
    lines += [
        _mark(e["installed"], e["name"], ", ".join(e["packages"]), e["install"])
        for e in found["extras"]
    ]
    lines += [
        "",
        f"cpu: {cpu['model']}, {counted(cpu['cores'], 'core')}, {counted(cpu['threads'], 'thread')}",
    ]
    lines += [_mark(here, name, CPU_FEATURES[name], "") for name, here in cpu["features"].items()]
    lines += ["", *(_gpu_line(gpu) for gpu in found["gpus"])]
    lines += [] if found["gpus"] else ["gpu: none that this PyTorch can use"]
    lines += [f"memory: {_gib(found['memory_available_bytes'])} available"]
    lines += [f"disk: {_gib(found['disk']['free_bytes'])} free at {found['disk']['folder']}"]
    lines += ["", "programs"]
    lines += [_mark(bool(t["path"]), t["name"], t["path"], t["install"]) for t in found["tools"]]
    return lines


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _backend(name: str) -> dict[str, Any]:
    state = backend_class(name).probe()
    return {
        "name": name,
        "runs": state.available,
        "builds": state.can_build,
        "reason": state.reason,
        "install": state.install,
    }


def _auto() -> str | None:
    try:
        return auto_backend()[0].name
    except BackendUnavailable:
        return None


def _extra(name: str) -> dict[str, Any]:
    absent = missing(name)
    packages = {package: _version(package) for package in EXTRAS[name].values()}
    return {
        "name": name,
        "installed": not absent,
        "packages": [
            f"{package} {number}" if number else package for package, number in packages.items()
        ],
        "install": install_line(name) if absent else "",
    }


def _cpu() -> dict[str, Any]:
    try:
        text = CPUINFO.read_text(encoding="utf-8")
    except OSError:
        text = ""
    fields = [line.partition(":") for line in text.splitlines()]
    named = {key.strip(): value.strip() for key, _, value in reversed(fields)}
    flags = named.get("flags", "").split()
    return {
        "model": named.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "features": {name: name in flags for name in CPU_FEATURES} if flags else {},
    }


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(index)
        is_current = index == torch.cuda.current_device()
        found.append(
            {
                "index": index,
                "name": known.name,
                "compute_capability": f"{known.major}.{known.minor}",
                "memory_bytes": known.total_memory,
                "free_bytes": gpu_free_bytes() if is_current else None,
                "cuda": torch.version.cuda,
            }
        )
    return found


def _tool(name: str) -> dict[str, Any]:
    place = _ffmpeg() if name == "ffmpeg" else shutil.which(name)
    built = OUR_BUILD / name
    if place is None and built.is_file():
        place = str(built)
    return {"name": name, "path": place, "install": "" if place else TOOLS[name]}


def _ffmpeg() -> str | None:
    """Return the ffmpeg that videos are written with."""
    if find_spec("imageio_ffmpeg") is None:
        return None
    from imageio_ffmpeg import get_ffmpeg_exe

    try:
        return str(get_ffmpeg_exe())
    except RuntimeError:  # the package is there without its binary
        return None


def _mark(is_here: bool, name: str, text: str | None, install: str) -> str:
    return f"  {'yes' if is_here else 'no '}  {name:14}{text or ''}{'; ' if text and install else ''}{install}".rstrip()


def _gpu_line(gpu: Mapping[str, Any]) -> str:
    free = f", {_gib(gpu['free_bytes'])} free" if gpu["free_bytes"] is not None else ""
    return (
        f"gpu {gpu['index']}: {gpu['name']}, compute capability {gpu['compute_capability']}, "
        f"{_gib(gpu['memory_bytes'])}{free}, CUDA {gpu['cuda']}"
    )


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / GIB:.1f} GiB"
