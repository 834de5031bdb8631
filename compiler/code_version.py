# SPDX-License-Identifier: Apache-2.0
"""Name the code that makes graphs and engines: other code makes others."""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["code_version"]

LIBRARIES = (
    "diffusers", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "openvino", "polygraphy",
    "tensorrt", "tensorrt-rtx-cu12", "torch", "transformers",
)  # fmt: skip
PACKAGES = ("bundle", "compiler", "configs", "core", "engines", "passes", "policies")
ROOT = Path(__file__).resolve().parent.parent


@cache
def code_version() -> str:
    """Digest our own source files, and the versions of Python and of the libraries they call."""
    digest = hashlib.sha256()
    for path in sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py")):
        digest.update(path.read_bytes())
    libraries = {name: _version(name) for name in LIBRARIES}
    digest.update(json.dumps([sys.version, libraries]).encode())
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
