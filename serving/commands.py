# SPDX-License-Identifier: Apache-2.0
"""The two commands that `freewheel serve` prints: start a server, send a request."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..bundle.reader import Bundle
from .model_config import ENCODER
from .repository import Written
from .server import Server, find_server, server_command

__all__ = ["example_request", "start_server"]


def start_server(repository: Path, backends: Path) -> str:
    """Return a shell command that starts the server found here, or `tritonserver` by name."""
    server = find_server() or Server(Path("tritonserver"))
    variables = [f"{n}={shlex.quote(v)}" for n, v in server.environment.items()]
    return " ".join([*variables, shlex.join(server_command(server, repository, backends))])


def example_request(bundle: Bundle, written: Written) -> str:
    """Return a shell command that sends one request with a policy and shows its progress."""
    policy = next((p for p in bundle.manifest.policies if p != "off"), "off")
    prompt = ["--embeddings", "prompt.npy", "--negative-embeddings", "negative.npy"]
    if ENCODER in bundle.manifest.graphs:
        prompt = ["--prompt", "a red circle moving right"]
        if bundle.manifest.tokenizer is None:
            prompt += ["--tokenizer", str(bundle.folder / "pipeline" / "tokenizer")]
    return shlex.join(
        [
            "python", "examples/triton_client.py", "--model", written.name, *prompt,
            "--set", f"policy={policy}", "--set", "stream=1", "--out", "result.npy",
        ]
    )  # fmt: skip
