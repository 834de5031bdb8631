# SPDX-License-Identifier: Apache-2.0
"""Where Triton Inference Server is on this machine, and the command that starts it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Server", "find_server", "server_command"]

VENV = Path(".venv-triton")
CONTAINER = Path("/opt/tritonserver/bin/tritonserver")


@dataclass(frozen=True)
class Server:
    """A server program.

    Attributes:
        binary: ``tritonserver``.
        environment: Variables it needs; the wheel's needs ``LD_LIBRARY_PATH``.
    """

    binary: Path
    environment: dict[str, str] = field(default_factory=dict)


def find_server(venv: Path = VENV) -> Server | None:
    """Find ``tritonserver`` on the PATH, in NVIDIA's container, or in ``nvidia-pytriton``.

    Args:
        venv: Virtual environment with ``nvidia-pytriton``.
    """
    return next(_candidates(venv), None)


def _candidates(venv: Path) -> Iterator[Server]:
    found = shutil.which("tritonserver")
    if found is not None:
        yield Server(Path(found))
    if CONTAINER.is_file():
        yield Server(CONTAINER)
    for site in sorted(venv.glob("lib/python*/site-packages")):
        binary = site / "pytriton" / "tritonserver" / "bin" / "tritonserver"
        if binary.is_file():
            libraries = site / "nvidia_pytriton.libs"
            yield Server(binary, {"LD_LIBRARY_PATH": str(libraries.absolute())})


def server_command(
    server: Server, repository: Path, backends: Path, *, host: str = "127.0.0.1", port: int = 8000
) -> list[str]:
    """Return the arguments that start a server on three ports: HTTP, gRPC, metrics.

    Args:
        server: From `find_server`.
        repository: The model repository.
        backends: Folder that holds ``freewheel/libtriton_freewheel.so``.
        host: Address to listen on.
        port: Of HTTP; gRPC and metrics take the two after it.
    """
    ports = {"http": port, "grpc": port + 1, "metrics": port + 2}
    return [
        str(server.binary),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        "--model-control-mode=explicit",
        "--load-model=*",
        *(
            f"--{kind}-{what}={value}"
            for kind, number in ports.items()
            for what, value in (("address", host), ("port", number))
        ),
    ]
