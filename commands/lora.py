# SPDX-License-Identifier: Apache-2.0
"""`freewheel lora`: write a LoRA so that C++ and a server apply it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import BundleArgument, DebugOption, JsonOption, QuietOption, quiet_libraries
from .screen import reporting

__all__ = ["lora"]


def lora(
    bundle: BundleArgument,
    file: Annotated[
        str,
        typer.Argument(
            help="LoRA of any layout that `run --lora` takes: [transformer_2=]FILE[:scale]."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="File to write, NAME.safetensors; requests say its NAME.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(help="Folder with the rest of the pipeline, if not in the bundle."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a LoRA for one bundle, so that freewheel-run, the C ABI and Triton apply it per request.

    Example: freewheel lora out/bundle style.safetensors --out out/loras/style.safetensors
    """
    with reporting("lora", as_json, quiet, debug) as screen:
        from ..bundle.reader import Bundle
        from ..runtime.lora import parse_lora
        from ..runtime.pipeline.write_lora import write_lora

        quiet_libraries()
        written = write_lora(Bundle(bundle), parse_lora(file), out, model)
        screen.note(
            f"{written.path}: changes {written.weights} weights, {written.bytes / 1e6:.1f} MB; "
            f"requests say lora={written.name} or lora={written.name}:0.8"
        )
        data = {
            "file": str(written.path),
            "name": written.name,
            "weights": written.weights,
            "bytes": written.bytes,
        }
        screen.result(data, [str(written.path)])
