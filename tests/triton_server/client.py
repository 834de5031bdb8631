"""Requests of these tests, over gRPC: send one, collect every response."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from conftest import HANG_SECONDS

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = ROOT / os.environ.get("FREEWHEEL_PYTHON", ".venv/bin/python")
"""Of the project's own virtual environment, which has Freewheel."""

DTYPES = {
    np.dtype(np.float32): "FP32",
    np.dtype(np.int64): "INT64",
    np.dtype(np.float64): "FP64",
    np.dtype(object): "BYTES",
}

TINY_SIZE = {"frames": 5, "height": 32, "width": 32}
SLOW_SIZE = {"frames": 49, "height": 256, "width": 256}


def states(seed: int, tokens: int = 8, width: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, width), dtype=np.float32)


COND, UNCOND = states(1), states(2)


@dataclass
class Answer:
    """Responses of one request in order: progress objects, and the tensors of the last."""

    progress: list[dict[str, Any]] = field(default_factory=list)
    previews: list[np.ndarray] = field(default_factory=list)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def latents(self) -> np.ndarray | None:
        return self.tensors.get("latents")

    @property
    def frames(self) -> np.ndarray | None:
        return self.tensors.get("frames")

    @property
    def summary(self) -> dict[str, Any]:
        assert self.progress[-1]["event"] == "done"
        return self.progress[-1]


class Stream:
    """One request in flight."""

    def __init__(
        self,
        address: str,
        model: str,
        tensors: dict[str, np.ndarray],
        parameters: dict[str, Any],
        outputs: tuple[str, ...] = (),
    ) -> None:
        self.client = triton.InferenceServerClient(f"127.0.0.1:{address}")
        self.answers: queue.Queue = queue.Queue()
        inputs = []
        for name, array in tensors.items():
            inputs.append(triton.InferInput(name, list(array.shape), DTYPES[array.dtype]))
            inputs[-1].set_data_from_numpy(array)
        self.client.start_stream(lambda result, error: self.answers.put(error or result))
        self.client.async_stream_infer(
            model,
            inputs,
            parameters=parameters,
            outputs=[triton.InferRequestedOutput(name) for name in outputs] or None,
        )

    def next(self, timeout: float = HANG_SECONDS) -> triton.InferResult:
        answer = self.answers.get(timeout=timeout)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self, *, cancel: bool) -> None:
        self.client.stop_stream(cancel_requests=cancel)
        self.client.close()


def until(condition: Callable[[], bool], seconds: float = HANG_SECONDS) -> None:
    """Wait for what the server does in its own time."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def progress_of(result: triton.InferResult) -> dict[str, Any]:
    return json.loads(result.as_numpy("progress")[0])


def ask(
    address: str,
    model: str = "tiny",
    *,
    tensors: dict[str, np.ndarray] | None = None,
    asked: tuple[str, ...] = (),
    **parameters: Any,
) -> Answer:
    """Send a request and wait for its last response; prompts and size have defaults."""
    if tensors is None:
        tensors = {"text_states": COND, "negative_text_states": UNCOND}
    if model == "tiny" and "latents" not in tensors:
        parameters = {
            **TINY_SIZE,
            "steps": 6,
            "flow_shift": 1.0,
            "guidance_scale": 3.0,
            **parameters,
        }
    stream = Stream(address, model, tensors, parameters, asked)
    answer = Answer()
    is_done = False
    try:
        while not is_done:
            result = stream.next()
            answer.progress.append(progress_of(result))
            is_done = answer.progress[-1]["event"] == "done"
            named = [output.name for output in result.get_response().outputs]
            tensors = {name: result.as_numpy(name) for name in named if name != "progress"}
            if "preview" in tensors:
                answer.previews.append(tensors.pop("preview"))
            answer.tensors = tensors
    finally:
        # NOTE: cancelling what has just ended makes this server (2.51) keep the request for ever,
        # and with it the model: https://github.com/triton-inference-server/server/pull/8078.
        stream.close(cancel=False)
    return answer


def run_alone(bundle: Path, folder: Path, *arguments: object, threads: int = 1) -> np.ndarray:
    """Run a tiny request with `freewheel-run`, without any server; return the latents."""
    np.save(folder / "cond.npy", COND)
    np.save(folder / "uncond.npy", UNCOND)
    command = [
        ROOT / "build" / "cpp" / "freewheel-run", bundle, "--out", folder / "latents.npy",
        "--embeddings", folder / "cond.npy", "--negative", folder / "uncond.npy",
        "--frames", 5, "--height", 32, "--width", 32, "--steps", 6, "--guidance", 3, "--shift", 1,
        "--threads", threads, "--quiet", *arguments,
    ]  # fmt: skip
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "latents.npy")[0]
