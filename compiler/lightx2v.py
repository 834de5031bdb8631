# SPDX-License-Identifier: Apache-2.0
"""Build what one of LightX2V's run commands means: its model's folder and config, as a bundle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ..bundle.manifest import MANIFEST
from ..configs.lightx2v import LightX2VConfig, read_lightx2v
from ..core.dtypes import Precision
from ..core.errors import CheckpointError, ConfigError
from ..core.progress import Progress
from ..engines.base import Backend
from ..runtime.settings import Warn, config_entry, warn_of_ignored
from .build import build
from .checkpoints.authors_folder import (
    AuthorsFolder,
    PartFiles,
    find_authors_folder,
    write_pipeline,
)
from .checkpoints.checkpoint import Float8
from .plan import plan
from .request import BuildRequest

__all__ = ["LightX2VRequest", "hollow_pipeline", "ready_bundle", "written_pipeline"]

DIGITS = 12


@dataclass(frozen=True)
class LightX2VRequest:
    """What LightX2V's command says of model and config.

    Attributes:
        model_path: Folder of the model, as its authors or LightX2V lay it out.
        config_json: Its config.
        model_cls: Such as ``wan2.1_distill``.
        task: ``t2v`` or ``i2v``.
        bundle: Folder of the bundle; None names one in ``cache`` by what goes into it.
        cache: Folder of what may be deleted: bundles, pipelines, graphs and engines.
        has_loras: Whether the command adds LoRAs to those of the config.
    """

    model_path: Path
    config_json: Path
    model_cls: str
    task: str
    bundle: Path | None
    cache: Path
    has_loras: bool = False


def ready_bundle(
    request: LightX2VRequest, backend: Backend, progress: Progress, warn: Warn, note: Warn
) -> tuple[Path, LightX2VConfig]:
    """Return the bundle of a command, built unless it stands there, and what its config says.

    Raises:
        ConfigError: the config can't be followed.
        CheckpointError: no such model, or one of another task.
    """
    told = read_lightx2v(request.config_json, request.model_cls, request.task)
    warn_of_ignored(told.config, request.config_json.name, warn)
    for text in told.unread:
        warn(text)
    entry = config_entry(told.config)
    for part, path in told.files.items():
        if not path.exists():
            raise CheckpointError(
                str(path),
                f"is not there, and '{request.config_json}' names it for '{part}'",
                "fetch it, or correct the config; relative paths are of the working folder",
            )
    found = find_authors_folder(
        request.model_path,
        PartFiles(**told.files, takes_image_encoder=told.takes_image_encoder),
    )
    _check(request, found)
    assert found is not None
    parts = written_pipeline(request.model_path, found, request.cache, told.boundary)
    precision: Precision = "float32" if backend.device.type == "cpu" else "bfloat16"
    float8: Float8 = "convert" if told.loras or request.has_loras else "keep"
    about = (
        _stamp(found),
        told.boundary,
        entry.model_dump_json(),
        backend.name,
        precision,
        float8,
        str(parts),
    )
    bundle = request.bundle or request.cache / "bundles" / _name(request.model_path, *about)
    if not (bundle / MANIFEST).is_file():
        report = build(
            plan(
                BuildRequest(
                    model=str(found.transformer),
                    out=bundle,
                    backends=[backend],
                    configs={told.config.name: entry},
                    precision=precision,
                    cache=request.cache,
                    float8=float8,
                    pipeline=str(parts),
                    low_noise=None if found.low_noise is None else str(found.low_noise),
                )
            ),
            progress,
        )
        for text in report.notes:
            note(text)
    return bundle, told


def written_pipeline(
    folder: Path, found: AuthorsFolder, cache: Path, boundary: float | None = None
) -> Path:
    """Return the folder with a model's other parts in diffusers layout, written unless it is there.

    Args:
        folder: The model's own.
        found: Where its parts lie.
        cache: Holds such folders by what went into them.
        boundary: As `write_pipeline` takes it.

    Raises:
        CheckpointError, OutputError: as `write_pipeline` does.
    """
    parts = cache / "pipelines" / _name(folder, _stamp(found), boundary)
    if not (parts / "model_index.json").is_file():
        write_pipeline(found, parts, boundary)
    return parts


@contextmanager
def hollow_pipeline(found: AuthorsFolder) -> Iterator[Path]:
    """Yield a folder for forecasts: what `written_pipeline` writes, without the weights' values.

    Raises:
        CheckpointError, OutputError: as `write_pipeline` does.
    """
    with TemporaryDirectory(prefix="freewheel-") as place:
        parts = Path(place) / "pipeline"
        write_pipeline(found, parts, hollow=True)
        yield parts


def _check(request: LightX2VRequest, found: AuthorsFolder | None) -> None:
    if found is None:
        raise CheckpointError(
            f"--model_path {request.model_path}",
            "has neither the T5 encoder nor the VAE of Wan's authors",
            "give such a folder; a diffusers folder is built with `freewheel build`",
        )
    if ("moe" in request.model_cls) != (found.low_noise is not None):
        has = "two experts" if found.low_noise is not None else "one transformer"
        raise ConfigError(
            f"--model_cls {request.model_cls}",
            f"and '{request.model_path}' has {has}",
            "name the class of this model",
        )
    if found.task != request.task:
        raise ConfigError(
            f"--task {request.task}",
            f"and the transformer is of '{found.task}'",
            f"use --task {found.task}",
        )


def _stamp(found: AuthorsFolder) -> list[list[object]]:
    """Return what tells the model's files from others: names, sizes and times."""
    return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in found.files]


def _name(folder: Path, *about: object) -> str:
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    return f"{folder.resolve().name}-{digest[:DIGITS]}"
