# SPDX-License-Identifier: Apache-2.0
"""Name everything that graphs and engines of a build depend on, so that only equal builds share."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from .checkpoint import Checkpoint

__all__ = ["build_key", "source_digest"]

LIBRARIES = (
    "diffusers", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "openvino", "polygraphy",
    "tensorrt", "tensorrt-rtx-cu12", "torch", "transformers",
)  # fmt: skip
PACKAGES = ("bundle", "compiler", "configs", "engines", "passes", "policies")


def build_key(request: Any, checkpoint: Checkpoint) -> str:
    """Digest what is asked for, of which checkpoint, by which code, on which machine.

    Args:
        request: A `BuildRequest`.
        checkpoint: What its model was found to be.
    """
    stored = {
        name: [t.dtype, t.shape, t.offset, t.file.name, t.file.stat().st_size, t.file.stat().st_mtime_ns]
        for name, t in checkpoint.tensors.items()
    }  # fmt: skip
    asked = {n: repr(v) for n, v in vars(request).items() if n not in ("backends", "configs")}
    about = [
        __version__, source_digest(), sys.version, platform.node(), platform.machine(),
        {name: _version(name) for name in LIBRARIES},
        asked, [backend.name for backend in request.backends],
        {name: config.model_dump(mode="json") for name, config in request.configs.items()},
        str(checkpoint.transformer), dict(checkpoint.config), stored,
    ]  # fmt: skip
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def source_digest() -> str:
    """Digest our own code: what other code traced or compiled is something else."""
    root, digest = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for path in sorted(p for name in PACKAGES for p in (root / name).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
