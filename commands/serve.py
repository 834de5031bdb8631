# SPDX-License-Identifier: Apache-2.0
"""`freewheel serve`: write a model repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import BundleArgument, CudaGraphsOption, DebugOption, JsonOption, QuietOption
from .screen import reporting

__all__ = ["serve"]


def serve(
    bundle: BundleArgument,
    out: Annotated[Path, typer.Option(help="Model repository of the server; made where missing.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the model; default: the bundle folder's.")
    ] = None,
    version: Annotated[
        int | None, typer.Option(help="Version to write; default: the one after the newest.")
    ] = None,
    instances: Annotated[int, typer.Option(help="Requests that run at once.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads of a run; default: the cores divided by the instances."),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Backend; default: the first that C++ runs.")
    ] = None,
    lora_folder: Annotated[
        Path | None,
        typer.Option(help="Folder of LoRAs that requests may name; `freewheel lora` writes them."),
    ] = None,
    offload: Annotated[
        bool, typer.Option(help="Leave the blocks' weights in host memory, two on the GPU.")
    ] = False,
    cuda_graphs: CudaGraphsOption = False,
    device: Annotated[
        int | None, typer.Option(min=0, help="Index of the GPU; default: the first.")
    ] = None,
    backend_directory: Annotated[
        Path, typer.Option(help="Folder with freewheel/libtriton_freewheel.so, for the command.")
    ] = Path("build/cpp/backends"),
    replicas: Annotated[
        int | None,
        typer.Option(help="Write a Kubernetes manifest for so many servers beside the repository."),
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Container image of the server, for --replicas.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a model repository for Triton Inference Server, or the next version of a model in one.

    Example: freewheel serve out/bundle --out out/models --name wan
    """
    with reporting("serve", as_json, quiet, debug) as screen:
        from ..bundle.reader import Bundle
        from ..core.errors import RequestError
        from ..serving.commands import example_request, start_server
        from ..serving.kubernetes import IMAGE, write_replicas
        from ..serving.model_config import served_backend
        from ..serving.repository import ServeRequest, write_repository

        if replicas is not None and replicas < 1:
            raise RequestError(f"--replicas {replicas}", "is below 1", "give --replicas 2")
        if image is not None and replicas is None:
            raise RequestError(f"--image {image}", "is for --replicas", "give --replicas 2 as well")
        if replicas is not None and lora_folder is not None:
            raise RequestError(
                f"--lora-folder '{lora_folder}'",
                "is a folder of this machine, which no replica sees",
                "leave it out, and name one of the volume as 'lora_folder' in config.pbtxt",
            )
        opened = Bundle(bundle)
        request = ServeRequest(
            bundle=opened,
            out=out,
            name=name,
            version=version,
            instances=instances,
            backend=backend,
            threads=threads,
            lora_folder=lora_folder,
            offload=offload,
            cuda_graphs=cuda_graphs,
            device=device,
        )
        written = write_repository(request)
        library = backend_directory / "freewheel" / "libtriton_freewheel.so"
        if not library.is_file():
            screen.warn(f"{library} is not there yet; docs/how-to/serve.md says how to build it")
        commands = {
            "server": start_server(out, backend_directory),
            "request": example_request(opened, written),
        }
        screen.note(
            f"{written.folder}, version {written.version}: {written.bytes / 1e6:.1f} MB, "
            f"{written.copied_bytes / 1e6:.1f} MB of them copied"
        )
        manifest = None
        if replicas is not None:
            manifest = write_replicas(
                out.absolute(),
                written.name,
                replicas=replicas,
                image=image or IMAGE,
                backend=served_backend(opened.manifest, backend),
                size_bytes=written.bytes,
            )
            commands["replicas"] = f"kubectl apply -f {manifest}"
        data = {
            "kubernetes": None if manifest is None else str(manifest),
            "model": written.name,
            "version": written.version,
            "folder": str(written.folder),
            "bytes": written.bytes,
            "copied_bytes": written.copied_bytes,
            "commands": commands,
        }
        screen.result(data, list(commands.values()))
