# SPDX-License-Identifier: Apache-2.0
"""The config.pbtxt of a served bundle: which tensors a request has, and how the backend runs it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..bundle.manifest import IoEntry, Manifest
from ..bundle.streams import LATENTS, MODEL_OUTPUT, beside
from ..core.errors import RequestError

__all__ = ["ServedModel", "config_text", "served_backend"]

BACKENDS = ("tensorrt", "tensorrt-rtx", "openvino")
"""What libfreewheel runs, in its order of preference."""

MAX_PIXELS = 81 * 720 * 1280
DECODER, ENCODER = "vae_decode", "text_encoder"


@dataclass(frozen=True)
class ServedModel:
    """How one model of the repository is served; see `ServeRequest`."""

    name: str
    backend: str
    instances: int
    threads: int
    lora_folder: str | None = None
    offload: bool = False
    cuda_graphs: bool = False
    device: int | None = None


def served_backend(manifest: Manifest, wanted: str | None) -> str:
    """Choose the backend that serves a bundle.

    Raises:
        RequestError: the bundle has no engines that C++ runs, or not the wanted ones.
    """
    built = [e.backend for e in manifest.engines]
    usable = [name for name in BACKENDS if name in built]
    if wanted is None and usable:
        return usable[0]
    if wanted in usable:
        return wanted
    raise RequestError(
        "bundle" if wanted is None else f"--backend {wanted}",
        f"has engines for {', '.join(built)}; the server runs {', '.join(BACKENDS)}",
        f"use {usable[0]}" if usable else "build it with --backend openvino",
    )


def config_text(manifest: Manifest, served: ServedModel) -> str:
    """Return the text of config.pbtxt."""
    runs = [config.generation for config in manifest.configs.values()]
    parameters: dict[str, object] = {
        "backend": served.backend,
        "threads": served.threads,
        "max_pixels": max(MAX_PIXELS, *(r.frames * r.height * r.width for r in runs)),
    }
    if served.lora_folder is not None:
        parameters["lora_folder"] = _escaped(served.lora_folder)
    parameters |= {n: "true" for n in ("offload", "cuda_graphs") if getattr(served, n)}
    if served.device is not None:
        parameters["device"] = served.device
    kind = "KIND_CPU" if served.backend == "openvino" else "KIND_MODEL"
    lines = [
        f'name: "{served.name}"',
        'backend: "freewheel"',
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        "version_policy { latest { num_versions: 1 } }",
        f"instance_group [ {{ kind: {kind} count: {served.instances} }} ]",
        *(f"input [ {_tensor(*t)} optional: true }} ]" for t in _inputs(manifest)),
        *(f"output [ {_tensor(*t)} }} ]" for t in _outputs(manifest)),
        *(
            f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}'
            for name, value in parameters.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Return a text as it stands between the quotes of a config.pbtxt."""
    return text.replace("\\", "\\\\").replace('"', '\\"')


Declared = tuple[str, str, list[int]]
"""Name, type as config.pbtxt spells it, sizes (-1 for any)."""


def _tensor(name: str, dtype: str, dims: list[int]) -> str:
    return f'{{ name: "{name}" data_type: TYPE_{dtype} dims: {dims}'


def _inputs(manifest: Manifest) -> Iterator[Declared]:
    """Declare what a request may bring; the backend says which are missing."""
    prompts = {n: e for n, e in manifest.inputs.items() if e.runs == "prompt"}
    for prefix in ("", "negative_"):
        if manifest.tokenizer is not None:
            yield f"{prefix}text_input", "STRING", [1]
        if ENCODER in manifest.graphs:
            yield f"{prefix}token_ids", "INT64", [-1]
        for name, entry in prompts.items():
            yield prefix + name, "FP32", _without_batch(entry)
    yield "seed", "INT64", [1]
    yield from _sampled(manifest)
    taken, given = manifest.inputs[LATENTS].shape[1], _output(manifest, LATENTS).shape[1]
    if isinstance(taken, int) and isinstance(given, int) and taken > given:
        yield "condition", "FP32", [taken - given, *_without_batch(_output(manifest, LATENTS))[1:]]


def _outputs(manifest: Manifest) -> Iterator[Declared]:
    yield "progress", "STRING", [1]
    yield from _sampled(manifest)
    if DECODER in manifest.graphs:
        yield "frames", "UINT8", [-1, -1, -1, 3]
        yield "preview", "UINT8", [-1, -1, -1, 3]
    else:
        yield "preview", "FP32", _without_batch(_output(manifest, LATENTS))


def _sampled(manifest: Manifest) -> Iterator[Declared]:
    """Declare each of the latents, which a request may bring and a response may hold."""
    for latents in manifest.latents:
        yield latents, "FP32", _without_batch(_output(manifest, latents))


def _output(manifest: Manifest, latents: str) -> IoEntry:
    return manifest.graphs["finish"].outputs[beside(latents, LATENTS, MODEL_OUTPUT)]


def _without_batch(entry: IoEntry) -> list[int]:
    """Return the sizes that one request's tensor has; what is the same for a batch has no such axis."""
    sizes = entry.shape[1:] if entry.shape[0] in ("batch", 1) else entry.shape
    return [size if isinstance(size, int) else -1 for size in sizes]
