# SPDX-License-Identifier: Apache-2.0
"""The backends, in the order in which `auto` tries them.

Importing this package needs none of them installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import torch

from ..core.errors import BackendUnavailable, ConfigError, RequestError, nearest
from .base import (
    Availability,
    Backend,
    BoundCall,
    Engine,
    ProfiledBackend,
    StreamedBackend,
    Target,
    TensorSpec,
)

__all__ = [
    "BACKENDS",
    "Availability",
    "Backend",
    "BoundCall",
    "Engine",
    "ProfiledBackend",
    "Target",
    "TensorSpec",
    "auto_backend",
    "backend",
    "backend_class",
    "choose_gpu",
]

BACKENDS: Mapping[str, str] = {
    "tensorrt": "freewheel.engines.tensorrt:TensorRT",
    "tensorrt-rtx": "freewheel.engines.tensorrt:TensorRTRTX",
    "openvino": "freewheel.engines.openvino:OpenVino",
    "onnxruntime": "freewheel.engines.onnxruntime:OnnxRuntime",
}


def backend_class(name: str) -> type[Backend]:
    """Import the class of a backend, installed or not.

    Raises:
        ConfigError: there is no such backend.
    """
    if name not in BACKENDS:
        raise ConfigError(f"backend '{name}'", "no such backend", nearest(name, list(BACKENDS)))
    module, _, attribute = BACKENDS[name].partition(":")
    found: type[Backend] = getattr(import_module(module), attribute)
    return found


def backend(name: str, *, to_build: bool = False) -> Backend:
    """Make a backend by name.

    Args:
        name: A name in `BACKENDS`.
        to_build: Accept a backend that can compile here but not run.

    Raises:
        ConfigError: there is no such backend.
        BackendUnavailable: it is not installed, or lacks its device.
    """
    found = backend_class(name)
    state = found.probe()
    if not (state.available or (to_build and state.can_build)):
        raise BackendUnavailable(f"backend '{name}'", state.reason, state.install)
    return found()


def choose_gpu(backend: Backend, index: int) -> None:
    """Have a backend compile and run on another GPU than the process's current one.

    Args:
        backend: One that has loaded nothing yet.
        index: Of the GPU.

    Raises:
        RequestError: the backend uses no GPU, or there is none of that index.
    """
    if not isinstance(backend, StreamedBackend):
        raise RequestError("--device", f"means nothing to {backend.name}", "leave it out")
    count = torch.cuda.device_count()
    if not 0 <= index < count:
        hint = f"give 0 to {count - 1}; nvidia-smi lists them" if count else "leave it out"
        raise RequestError("--device", f"is {index}, and there are {count} GPUs", hint)
    backend.device = torch.device("cuda", index)


def auto_backend(precision: str = "float32") -> tuple[Backend, Mapping[str, str]]:
    """Take the first backend that can compile and run ``precision`` graphs here.

    One that says it yields to another is taken only where the other can't.

    Returns:
        The backend, and per backend name, in order, why it was taken or passed over.

    Raises:
        BackendUnavailable: none can; says why for each.
    """
    reasons: dict[str, str] = {}
    passed_over: dict[str, str] = {}  # backend that yields → the one it yields to
    for name in BACKENDS:
        found = backend_class(name)
        state = found.probe()
        reasons[name] = state.reason
        if not state.available:
            continue
        if precision not in found.precisions:
            reasons[name] = f"has no {precision} kernels ({state.reason})"
        elif state.yields_to:
            passed_over[name] = state.yields_to
        else:
            for slower in [n for n, faster in passed_over.items() if faster == name]:
                reasons[slower] = f"slower than {name} on this machine ({reasons[slower]})"
            return found(), reasons
    for name in passed_over:
        return backend_class(name)(), reasons
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise BackendUnavailable("backend 'auto'", f"none runs here ({why})", "pip install openvino")
