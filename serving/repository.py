# SPDX-License-Identifier: Apache-2.0
"""Write a bundle into a Triton model repository: versioned folder, hard links, config.pbtxt.

A model or version appears whole or not at all, so that a running server may load it at any time.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..bundle.files import link_or_none, safe_path
from ..bundle.manifest import MANIFEST, Manifest
from ..bundle.reader import Bundle
from ..core.errors import OutputError, RequestError
from ..core.output import check_folder, staged
from .model_config import ServedModel, config_text, served_backend

__all__ = ["CONFIG", "ServeRequest", "Written", "write_repository"]

CONFIG = "config.pbtxt"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class ServeRequest:
    """What to serve, and how.

    Attributes:
        bundle: An open bundle.
        out: The model repository; other models in it stay as they are.
        name: Of the model; None takes the bundle folder's.
        version: Folder of this bundle below the model; None takes the one after the newest.
        instances: Requests that run at once; they share engines and weights.
        backend: One that the bundle has engines for and C++ runs; None takes the first.
        threads: CPU threads of one engine call; None divides the cores among the instances.
        lora_folder: The only folder that requests may name LoRAs of; None lets them name none. Read
            where it is: what `freewheel lora` writes there later is served too.
        offload: Keep the blocks' weights in host memory, two blocks on the device.
        cuda_graphs: Replay each engine call as one CUDA graph.
        device: Index of the GPU; None takes the first.
    """

    bundle: Bundle
    out: Path
    name: str | None = None
    version: int | None = None
    instances: int = 1
    backend: str | None = None
    threads: int | None = None
    lora_folder: Path | None = None
    offload: bool = False
    cuda_graphs: bool = False
    device: int | None = None


@dataclass(frozen=True)
class Written:
    """What stands in the repository now.

    Attributes:
        name: Of the model.
        version: That was written.
        folder: Of the model.
        bytes: Bytes of the bundle.
        copied_bytes: Bytes that could not be linked.
    """

    name: str
    version: int
    folder: Path
    bytes: int
    copied_bytes: int


def write_repository(request: ServeRequest) -> Written:
    """Add a bundle to a model repository, as a new model or as the next version of one.

    A server that polls, or is told to load the model again, serves the new version and lets requests
    of the old one end. Old versions stay on disk until somebody removes them.

    Raises:
        RequestError: a name, count, version or option that can't be served, or no engine that C++ runs.
        OutputError: the version is there already, or the repository can't be written.
    """
    name = request.name or request.bundle.folder.resolve().name
    if not NAME.fullmatch(name):
        raise RequestError(f"model name '{name}'", "is no plain name", "give --name wan")
    for option, value in (("instances", request.instances), ("threads", request.threads)):
        if value is not None and value < 1:
            raise RequestError(f"--{option} {value}", "is below 1", f"give --{option} 1")
    check_folder(request.out, "--out")
    _check_lora_folder(request.bundle, request.lora_folder)
    model = request.out.absolute() / name
    version = _version(model, request.version)
    served = ServedModel(
        name=name,
        backend=served_backend(request.bundle.manifest, request.backend),
        instances=request.instances,
        threads=request.threads or max(1, (os.cpu_count() or 1) // request.instances),
        lora_folder=None if request.lora_folder is None else str(request.lora_folder.absolute()),
        offload=request.offload,
        cuda_graphs=request.cuda_graphs,
        device=request.device,
    )
    _check_device_options(request.bundle.manifest, served)
    text = config_text(request.bundle.manifest, served)
    try:
        total, copied = _write(request.bundle, model, version, text)
    except OSError as error:
        raise OutputError(
            str(model), f"can't be written: {error.strerror}", "choose another --out"
        ) from error
    return Written(name, version, model, total, copied)


def _check_device_options(manifest: Manifest, served: ServedModel) -> None:
    given = {"--cuda-graphs": served.cuda_graphs, "--device": served.device is not None}
    stray = [flag for flag, is_given in given.items() if is_given]
    if stray and served.backend == "openvino":
        raise RequestError(stray[0], "means nothing to openvino", "leave it out")
    if served.offload and manifest.weights == "baked":
        raise RequestError(
            "--offload",
            "can't be had: this bundle's weights are inside its engines",
            "build the bundle with --weights inputs",
        )


def _check_lora_folder(bundle: Bundle, folder: Path | None) -> None:
    if folder is None:
        return
    if not folder.is_dir():
        raise RequestError(f"--lora-folder '{folder}'", "is no folder", "make it first")
    if bundle.manifest.weights == "baked":
        raise RequestError(
            "--lora-folder",
            "can't be used: this bundle's weights are inside its engines",
            "build the bundle with --weights inputs",
        )


def _version(model: Path, wanted: int | None) -> int:
    present = {int(p.name) for p in model.glob("*") if p.name.isdecimal()}
    if wanted is None:
        return max(present, default=0) + 1
    if wanted < 1:
        raise RequestError(f"--version {wanted}", "is below 1", "count versions from 1")
    if wanted in present:
        raise OutputError(
            str(model / str(wanted)),
            "is there already",
            f"leave --version out for {max(present) + 1}, or remove the folder",
        )
    return wanted


def _write(bundle: Bundle, model: Path, version: int, text: str) -> tuple[int, int]:
    """Stage beside the repository, then move into place: first the version, then its config."""
    beside = model.parent.parent
    if model.exists():
        with staged(model / str(version), beside) as folder:
            sizes = _link_bundle(bundle, folder / "bundle")
        with staged(model / CONFIG, beside) as config:
            config.write_text(text, encoding="utf-8")
        return sizes
    with staged(model, beside) as folder:
        sizes = _link_bundle(bundle, folder / str(version) / "bundle")
        (folder / CONFIG).write_text(text, encoding="utf-8")
    return sizes


def _link_bundle(bundle: Bundle, target: Path) -> tuple[int, int]:
    """Hard-link every file of the bundle, or copy it; return the bytes of all and of copies."""
    total = copied = 0
    for name in (*bundle.manifest.files, MANIFEST):
        source, place = safe_path(bundle.folder, name), target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        size = source.stat().st_size
        total += size
        if link_or_none(source, place) is None:
            shutil.copyfile(source, place)
            copied += size
    return total, copied
