# SPDX-License-Identifier: Apache-2.0
"""`freewheel videos`: answer OpenAI's /v1/videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    BackendOption,
    BundleArgument,
    CacheOption,
    CudaGraphsOption,
    DebugOption,
    DeviceOption,
    OffloadOption,
    quiet_libraries,
)
from .screen import reporting

__all__ = ["videos"]


def videos(
    bundle: BundleArgument,
    out: Annotated[Path, typer.Option(help="Folder of the videos, until they are deleted.")],
    cache: CacheOption = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at.")] = 8000,
    fps: Annotated[int, typer.Option(min=1, max=1000, help="Frames per second.")] = 8,
    backend: BackendOption = None,
    offload: OffloadOption = False,
    cuda_graphs: CudaGraphsOption = False,
    device: DeviceOption = None,
    debug: DebugOption = False,
) -> None:
    """Answer OpenAI's /v1/videos: create, poll, fetch, cancel.

    Example: freewheel videos out/bundle --out out/videos --cache shapes_wan_custom
    """
    with reporting("videos", False, False, debug) as screen:
        from ..core.extras import require_extra

        require_extra("videos", "videos")
        import uvicorn

        from ..bundle.manifest import ResolvedConfig
        from ..bundle.reader import Bundle
        from ..compiler.forecast.memory_check import check_fit
        from ..compiler.sizes import size_of
        from ..core.output import check_folder
        from ..runtime.model import DeviceOptions
        from ..runtime.pipeline.generate import Generator
        from ..runtime.pipeline.request import GenerationRequest
        from ..runtime.settings import choose_setting
        from ..serving.videos import VideoJobs, videos_app

        check_folder(out, "--out")
        quiet_libraries()
        opened = Bundle(bundle)
        choose_setting(opened, cache, {}, screen.warn)

        def check(request: GenerationRequest) -> None:
            check_fit(
                opened,
                ResolvedConfig(cache=request.cache, generation=request.defaults),
                size_of(
                    request.defaults,
                    height=request.height,
                    width=request.width,
                    frames=request.frames,
                    steps=request.steps,
                    guidance=request.guidance_scale,
                ),
                backend=backend,
                model=None,
                gpu=device,
                offload=offload,
            )

        options = DeviceOptions(offload=offload, cuda_graphs=cuda_graphs, device=device)
        jobs = VideoJobs(
            Generator(opened, backend=backend, options=options),
            out,
            cache=cache,
            fps=fps,
            check=check,
        )
        screen.note(f"model '{jobs.model}' at http://{host}:{port}/v1")
        uvicorn.run(videos_app(jobs), host=host, port=port, log_level="warning")
