# SPDX-License-Identifier: Apache-2.0
"""Throughput and latency of a served bundle against the number of clients, as ratios.

    make triton .venv-triton/bin/.installed
    pip install '.[serve]'
    python benchmarks/serving.py out/bundle

Starts a server per way of dividing the cores (instances × threads), sends requests from 1, 2 and 4
clients in turn, several rounds interleaved, and takes medians over one client of the first way.
A bundle with its text encoder; frames are not asked for, so that the denoise loop is what is measured.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import tritonclient.grpc as triton
import typer
from page import OUT, Out, Table, write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from triton_client import stream

CLIENTS = (1, 2, 4)
HEALTH = "http://127.0.0.1:8000/v2/health/ready"


def start(bundle: Path, folder: Path, instances: int) -> subprocess.Popen:
    """Serve a bundle on the usual ports; return the server once it is ready."""
    written = subprocess.run(
        [sys.executable, "-m", "freewheel", "serve", bundle, "--out", folder, "--name", "bench", "--json",
         "--instances", str(instances)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    command = json.loads(written.stdout)["commands"]["server"]
    log = (folder / "server.log").open("w")
    server = subprocess.Popen(["bash", "-c", f"exec env {command}"], stdout=log, stderr=log)
    while True:
        try:
            urllib.request.urlopen(HEALTH, timeout=5)
            return server
        except OSError:
            if server.poll() is not None:
                sys.exit((folder / "server.log").read_text()[-2000:])
            time.sleep(0.1)


def measure(clients: int, requests: int, parameters: dict[str, str]) -> tuple[float, list[float]]:
    """Send ``requests`` from that many clients at once; return seconds, and each one's."""
    ids = {"token_ids": np.array([5, 17, 1]), "negative_token_ids": np.array([1])}

    def one(_: int) -> float:
        began = time.perf_counter()
        client = triton.InferenceServerClient("127.0.0.1:8001")
        for _ in stream(client, "bench", ids, parameters):
            pass
        client.close()
        return time.perf_counter() - began

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        latencies = list(pool.map(one, range(requests)))
    return time.perf_counter() - began, latencies


def main(
    bundle: Annotated[Path, typer.Argument(help="Folder, built --with-text-encoder.")],
    out: Out = OUT,
    policy: Annotated[str, typer.Option(help="Config or policy of the bundle.")] = "off",
    steps: Annotated[int, typer.Option(help="Denoise steps of a request.")] = 10,
    requests: Annotated[int, typer.Option(help="Per round and number of clients.")] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds counted.")] = 3,
    instances: Annotated[str, typer.Option(help="Comma-separated.")] = "1,2",
) -> None:
    """Measure throughput and latency of every way of dividing the cores."""
    parameters = {"policy": policy, "steps": str(steps), "outputs": "latents"}
    measured: list[dict[str, float]] = []
    for count in (int(n) for n in instances.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            server = start(bundle, Path(folder), count)
            try:
                measure(1, 2, parameters)
                found: dict[int, list[tuple[float, float]]] = {c: [] for c in CLIENTS}
                for _ in range(rounds):
                    for clients in CLIENTS:
                        seconds, each = measure(clients, requests, parameters)
                        found[clients].append((seconds, statistics.median(each)))
            finally:
                server.terminate()
                server.wait()
        for clients, samples in found.items():
            seconds, latency = (statistics.median(values) for values in zip(*samples, strict=True))
            measured.append(
                {
                    "instances": count,
                    "clients": clients,
                    "requests_per_second": requests / seconds,
                    "latency_seconds": latency,
                }
            )
    base = measured[0]
    rows = [
        [
            row["instances"],
            row["clients"],
            f"{row['requests_per_second'] / base['requests_per_second']:.2f}",
            f"{row['latency_seconds'] / base['latency_seconds']:.2f}",
        ]
        for row in measured
    ]
    text = f"Ratios to one client of the first way; {policy}, {steps} steps:"
    table = Table(["instances", "clients", "throughput", "latency"], rows, text, texts=0)
    typer.echo(write(out, "serving", "Served by Triton", {"rows": measured}, table))


if __name__ == "__main__":
    typer.run(main)
