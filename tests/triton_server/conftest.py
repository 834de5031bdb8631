"""A real server over the bundles that `prepare.py` built.

Runs in the virtual environment of the server's wheel (`make test-triton`), apart from the other
tests: nothing here imports Freewheel.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).resolve().parent.parent.parent
PREPARED = ROOT / "out" / "triton-tests"
HANG_SECONDS = 300
"""Ends a wait that hangs; nothing else depends on it."""


class RunningServer:
    """A `tritonserver` process with the addresses it listens on."""

    def __init__(self, command: str, log: Path) -> None:
        self.http, self.grpc, self.metrics = (
            command.split(f"--{kind}-port=")[1].split()[0] for kind in ("http", "grpc", "metrics")
        )
        self.log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                ["bash", "-c", f"exec env {command}"], stdout=stream, stderr=stream, cwd=ROOT
            )

    def get(self, path: str) -> str:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.http}{path}", timeout=HANG_SECONDS
        ) as answer:
            return answer.read().decode()

    def is_ready(self, what: str = "ready") -> bool:
        try:
            self.get(f"/v2/health/{what}")
        except OSError:
            return False
        return True

    def wait(self, what: str = "ready", seconds: float = HANG_SECONDS) -> None:
        ends = time.monotonic() + seconds
        while not self.is_ready(what):
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < ends, self.log.read_text()[-4000:]
            time.sleep(0.05)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(HANG_SECONDS)

    def metrics_text(self) -> str:
        url = f"http://127.0.0.1:{self.metrics}/metrics"
        with urllib.request.urlopen(url, timeout=HANG_SECONDS) as answer:
            return answer.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over all label sets that hold these labels."""
        lines = self.metrics_text().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith(name + "{") and all(w in line for w in wanted)
        )


def free_ports() -> int:
    """Return the first of three ports in a row that nobody listens on."""
    for _ in range(100):
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
        try:
            for offset in (1, 2):
                with socket.socket() as other:
                    other.bind(("127.0.0.1", port + offset))
        except (OSError, OverflowError):
            continue
        return port
    raise AssertionError("no three free ports in a row")


def server_command(repository: Path) -> str:
    """Return the command that `freewheel serve` prints, on free ports."""
    program = "from freewheel.serving.commands import start_server; import sys, pathlib;"
    program += "print(start_server(*map(pathlib.Path, sys.argv[1:])))"
    python = ROOT / os.environ.get("FREEWHEEL_PYTHON", ".venv/bin/python")
    done = subprocess.run(
        [str(python), "-c", program, str(repository), str(ROOT / "build" / "cpp" / "backends")],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    port, command = free_ports(), done.stdout.strip()
    for offset in range(3):
        command = command.replace(f"-port={8000 + offset}", f"-port={port + offset}")
    return command


@pytest.fixture(scope="session")
def prepared() -> Path:
    if not (PREPARED / "models").is_dir():
        pytest.skip("nothing is prepared: run 'make test-triton'")
    return PREPARED


@pytest.fixture(scope="session")
def server(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    running = RunningServer(server_command(prepared / "models"), log)
    try:
        running.wait()
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()
