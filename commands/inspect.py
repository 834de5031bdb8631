# SPDX-License-Identifier: Apache-2.0
"""`freewheel inspect`: show what a bundle holds, or what building one will need."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import BackendUnavailable, RequestError
from .options import DebugOption, JsonOption, OffloadOption, backend_of, precision_of
from .screen import Screen, reporting

__all__ = ["inspect"]


def inspect(
    target: Annotated[
        Path, typer.Argument(help="Bundle, or the folder or file that one is to be built from.")
    ],
    height: Annotated[int | None, typer.Option(help="Pixels to forecast for.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels to forecast for.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames to forecast for.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps to forecast for.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="Graph whose layers to list, as TensorRT built them.")
    ] = None,
    config: Annotated[
        str, typer.Option("--config", "--config_json", help="Before building: caching config.")
    ] = "off",
    backend: Annotated[str, typer.Option(help="Before building: backend.")] = "auto",
    precision: Annotated[str, typer.Option(help="Before building: of the body.")] = "float32",
    offload: OffloadOption = False,
    cut: Annotated[
        bool, typer.Option("--cut", help="Show how the transformer is cut, from its config alone.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show graphs, engines, memory, FLOPs and the speedup each policy can give.

    Of a checkpoint, before building, what a build and a run of it will need; with --cut, of
    either, the segments that the cutter finds.

    Example: freewheel inspect out/bundle --frames 81
    """
    with reporting("inspect", as_json, False, debug) as screen:
        from ..bundle.reader import MANIFEST, Bundle
        from ..compiler.inspect import inspect_bundle, render

        if cut:
            from ..compiler.draw_cut import render_cut

            data = _cut(target, height, width, frames, steps, engine)
            screen.result(data, render_cut(data))
            return
        if target.exists() and not (target / MANIFEST).is_file():
            from ..compiler.forecast.build import render_plan

            sizes = (height, width, frames, steps)
            data = _plan(target, config, backend, precision, screen, sizes, offload=offload)
            screen.result(data, render_plan(data))
            return
        data = inspect_bundle(
            Bundle(target),
            height=height,
            width=width,
            frames=frames,
            steps=steps,
            engine=engine,
            offload=offload,
        )
        screen.result(data, render(data))


def _cut(target: Path, *forecast: object) -> dict[str, Any]:
    """Describe the cut of a bundle's transformer, or of a checkpoint's."""
    from ..bundle.reader import MANIFEST, Bundle
    from ..compiler.checkpoints.authors_folder import find_authors_folder
    from ..compiler.checkpoints.checkpoint import open_checkpoint
    from ..compiler.checkpoints.folders import read_config
    from ..compiler.cut.describe import describe_model
    from ..compiler.draw_cut import mermaid

    if any(option is not None for option in forecast):
        raise RequestError(
            "inspect --cut", "takes no size and no engine", "leave out the options of a forecast"
        )
    where = target / MANIFEST
    authors = find_authors_folder(target) if target.is_dir() else None
    if where.is_file():
        origin = Bundle(target).manifest.checkpoint
        model, config = origin.transformer_class, dict(origin.config)
    elif target.is_file() or authors is not None:
        where = target if authors is None else authors.transformer
        config = dict(open_checkpoint(str(where)).config)
        model = str(config.get("_class_name"))
    else:
        folder = target if (target / "config.json").is_file() else target / "transformer"
        where, config = folder / "config.json", read_config(folder / "config.json")
        model = str(config.get("_class_name"))
    data = describe_model(model, config, where=str(where))
    return {**data, "mermaid": mermaid(data)}


def _plan(
    model: Path,
    config: str,
    backend: str,
    precision: str,
    screen: Screen,
    size: tuple[int | None, ...],
    *,
    offload: bool,
) -> dict[str, Any]:
    """Forecast a build of ``model`` into a bundle beside it, and a run at ``size``."""
    from ..compiler.checkpoints.authors_folder import find_authors_folder
    from ..compiler.forecast.build import describe_plan
    from ..compiler.lightx2v import hollow_pipeline
    from ..compiler.plan import plan
    from ..compiler.request import BuildRequest
    from ..compiler.sizes import size_of
    from ..runtime.settings import config_entries

    precision = precision_of(precision)
    configs = config_entries([config], screen.warn)
    height, width, frames, steps = size
    found = find_authors_folder(model) if model.is_dir() else None
    with nullcontext() if found is None else hollow_pipeline(found) as parts:
        second = None if found is None else found.low_noise
        request = BuildRequest(
            model=str(model if found is None else found.transformer),
            out=model.absolute().with_name(f"{model.name}-bundle"),
            backends=[_backend(backend, precision, screen)],
            configs=configs,
            precision=precision,  # type: ignore[arg-type]  # one of the three
            pipeline=None if parts is None else str(parts),
            low_noise=None if second is None else str(second),
            replace=True,
        )
        planned = plan(request)
        generation = planned.manifest.configs[planned.manifest.default_config].generation
        return describe_plan(
            planned,
            size_of(generation, height=height, width=width, frames=frames, steps=steps),
            offload=offload,
        )


def _backend(name: str, precision: str, screen: Screen) -> Any:
    """Return a backend to forecast for, which need not be here."""
    from ..compiler.forecast.build import AbsentBackend

    try:
        return backend_of(name, precision, screen, to_build=True)
    except BackendUnavailable as error:
        if name == "auto":
            raise
        screen.note(f"{error} (to build or run; the forecast is made without it)")
        return AbsentBackend(name)
