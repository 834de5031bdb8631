# SPDX-License-Identifier: Apache-2.0
"""Options that several verbs take, and what reads their values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError
from .screen import Screen

__all__ = [
    "BackendOption",
    "BundleArgument",
    "CacheOption",
    "CudaGraphsOption",
    "DebugOption",
    "DeviceOption",
    "GuidanceOption",
    "ImageOption",
    "JsonOption",
    "OffloadOption",
    "QuietOption",
    "SetOption",
    "StepsOption",
    "backend_of",
    "choice_of",
    "pairs_of",
    "precision_of",
    "quiet_libraries",
    "value_of",
]

BundleArgument = Annotated[Path, typer.Argument(help="Folder that `build` wrote.")]
BackendOption = Annotated[str | None, typer.Option(help="Backend; default: the bundle's first.")]
CacheOption = Annotated[
    str | None,
    typer.Option("--cache", "--config_json", help="Config name or file, policy name, or off."),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a parameter: key=value; repeatable.")
]
StepsOption = Annotated[int | None, typer.Option(help="Denoise steps.")]
GuidanceOption = Annotated[float | None, typer.Option(help="Guidance scale; 1 turns it off.")]
ImageOption = Annotated[
    Path | None,
    typer.Option(
        "--image", "--image_path", help="First frame of a video, or the picture to begin with."
    ),
]
OffloadOption = Annotated[
    bool,
    typer.Option(
        help="Leave weights in host memory: two blocks and one other part of the pipeline on the GPU."
    ),
]
CudaGraphsOption = Annotated[bool, typer.Option(help="Replay steps as CUDA graphs (TensorRT).")]
DeviceOption = Annotated[
    int | None, typer.Option(help="Index of the GPU; default: the current one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no tables.")]
DebugOption = Annotated[bool, typer.Option(help="Show tracebacks of expected errors.")]


def backend_of(name: str, precision: str, screen: Screen, *, to_build: bool = False) -> Any:
    """Return the backend of a name; of ``auto`` the fastest that is here, and say why it is."""
    from ..engines import auto_backend, backend

    if name != "auto":
        return backend(name, to_build=to_build)
    chosen, reasons = auto_backend(precision)
    screen.note(f"backend {chosen.name}: {reasons[chosen.name]}")
    return chosen


def choice_of(flag: str, value: str, known: tuple[str, ...]) -> str:
    """Return a value that is among the known ones.

    Raises:
        ConfigError: it is not.
    """
    if value not in known:
        raise ConfigError(flag, f"'{value}' is not known", f"use one of {', '.join(known)}")
    return value


def precision_of(value: str) -> str:
    """Return a body's precision.

    Raises:
        ConfigError: none of that name is built; the message names the right one.
    """
    known = ("float32", "bfloat16", "float16")
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
    if value in short:
        raise ConfigError("--precision", f"'{value}' is not known", f"use {short[value]}")
    if re.fullmatch(r"(fp|nf|mxfp|u?int|float)[48](_\w+)?", value):
        raise ConfigError(
            "--precision",
            f"'{value}': a body of 8 bits or fewer is not built",
            "use bfloat16 or float16, which halve float32's memory",
        )
    return choice_of("--precision", value, known)


def pairs_of(
    texts: list[str] | None, flag: str = "--set", example: str = "threshold=0.2"
) -> dict[str, str]:
    """Divide ``key=value`` of each ``--set``.

    Args:
        texts: As given.
        flag: Option that gives them, for the message.
        example: A pair, for the message.

    Raises:
        ConfigError: a text is no such pair.
    """
    pairs = {}
    for text in texts or ():
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"{flag} '{text}'", "is not key=value", f"write {flag} {example}")
        pairs[key] = value
    return pairs


def value_of(text: str) -> Any:
    """Return a text as the JSON value that it is, else as itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def quiet_libraries() -> None:
    """Keep other libraries' progress bars out of ours."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
