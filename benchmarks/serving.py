# SPDX-License-Identifier: Apache-2.0
"""Throughput and latency of a served bundle against the number of clients, as ratios.

    .venv-triton/bin/python benchmarks/serving.py out/bundle --freewheel .venv/bin/freewheel

Starts a server per way of dividing the cores (instances × threads), sends requests from 1, 2 and 4
clients in turn, several rounds interleaved, and prints medians over one client of the first way.
Needs `tritonclient[grpc]`, the server, and the library in build/cpp/backends. A bundle with its
text encoder; frames are not asked for, so that the denoise loop is what is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from triton_client import stream

CLIENTS = (1, 2, 4)
HEALTH = "http://127.0.0.1:8000/v2/health/ready"


def start(freewheel: Path, bundle: Path, folder: Path, instances: int) -> subprocess.Popen:
    """Serve a bundle on the usual ports; return the server once it is ready."""
    written = subprocess.run(
        [freewheel, "serve", bundle, "--out", folder, "--name", "bench", "--json",
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


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--freewheel", type=Path, default=Path("freewheel"))
    parser.add_argument("--policy", default="off")
    parser.add_argument("--steps", default="10")
    parser.add_argument("--requests", type=int, default=4, help="per round and number of clients")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--instances", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    parameters = {"policy": options.policy, "steps": options.steps, "outputs": "latents"}
    rows = {}
    for instances in options.instances:
        with tempfile.TemporaryDirectory() as folder:
            server = start(options.freewheel, options.bundle, Path(folder), instances)
            try:
                measure(1, 2, parameters)
                found: dict[int, list[tuple[float, float]]] = {c: [] for c in CLIENTS}
                for _ in range(options.rounds):
                    for clients in CLIENTS:
                        seconds, each = measure(clients, options.requests, parameters)
                        found[clients].append((seconds, statistics.median(each)))
            finally:
                server.terminate()
                server.wait()
        for clients, samples in found.items():
            seconds, latency = (statistics.median(values) for values in zip(*samples, strict=True))
            rows[instances, clients] = (options.requests / seconds, latency)
    base = rows[options.instances[0], 1]
    print("| instances | clients | throughput | latency |\n|--:|--:|--:|--:|")
    for (instances, clients), (throughput, latency) in rows.items():
        print(f"| {instances} | {clients} | {throughput / base[0]:.2f} | {latency / base[1]:.2f} |")


if __name__ == "__main__":
    main()
