# SPDX-License-Identifier: Apache-2.0
"""Packages that only some commands want: which extra brings them, and what to do without one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from .errors import DependencyError

__all__ = ["EXTRAS", "install_line", "missing", "require_extra"]

VIDEO = {"imageio": "imageio", "imageio_ffmpeg": "imageio-ffmpeg"}
METRICS = {"skimage": "scikit-image", "scipy": "scipy"}

EXTRAS: Mapping[str, Mapping[str, str]] = {
    "openvino": {"openvino": "openvino", "openvino_tokenizers": "openvino-tokenizers"},
    "onnxruntime": {"onnxruntime": "onnxruntime"},
    "tensorrt": {"tensorrt": "tensorrt"},
    "tensorrt-rtx": {"tensorrt_rtx": "tensorrt-rtx-cu12"},
    "video": VIDEO,
    "metrics": METRICS,
    "report": METRICS,
    "verify": {"onnxruntime": "onnxruntime", "polygraphy": "polygraphy"},
    "gguf": {"gguf": "gguf"},
    "serve": {"tokenizers": "tokenizers", "tritonclient": "tritonclient"},
    "videos": {
        "starlette": "starlette",
        "uvicorn": "uvicorn",
        "python_multipart": "python-multipart",
        **VIDEO,
    },
}
"""Extra → module to import → package that brings it. `pyproject.toml` has their versions."""


def install_line(extra: str) -> str:
    """Return the command that installs an extra beside this package."""
    return f"pip install 'freewheel[{extra}]'"


def missing(extra: str) -> list[str]:
    """Return the packages of an extra that are not installed; imports none."""
    return [package for module, package in EXTRAS[extra].items() if find_spec(module) is None]


def require_extra(extra: str, wanting: str) -> None:
    """Make sure that an extra's packages are installed, before anything is computed.

    Args:
        extra: A name in `EXTRAS`.
        wanting: Command and option that want it, for the message.

    Raises:
        DependencyError: one is not.
    """
    absent = missing(extra)
    if absent:
        are = "is" if len(absent) == 1 else "are"
        what = f"needs {', '.join(absent)}, which {are} not installed"
        raise DependencyError(wanting, what, install_line(extra))
