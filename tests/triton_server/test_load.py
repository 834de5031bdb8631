"""Many requests at once, and a model that is replaced while they run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc", reason="run by 'make test-triton'")

from client import PYTHON, ask, run_alone, states
from conftest import HANG_SECONDS, RunningServer, server_command

pytestmark = [pytest.mark.triton, pytest.mark.nightly]


def mixed(index: int) -> dict[str, object]:
    """The index-th of 50 requests that differ in policy, size, steps, guidance, prompt and seed."""
    policy = ("off", "teacache", "taylorseer", "adacache", "custom")[index % 5]
    guided = index % 3 > 0
    tensors = {"text_states": states(index, tokens=4 + index % 4)}
    if guided:
        tensors["negative_text_states"] = states(100 + index)
    return {
        "tensors": tensors,
        "policy": policy,
        "seed": index,
        "steps": 4 + index % 7,
        "guidance_scale": 3.0 if guided else 1.0,
        "height": 32 + 16 * (index % 2),
        "frames": 1 + 4 * (index % 3),
        "stream": index % 2,
        **({"threshold": 0.3} if policy == "teacache" else {}),
    }


def test_fifty_at_once_give_what_each_gives_alone(server) -> None:
    alone = [ask(server.grpc, **mixed(i)) for i in range(50)]
    before = server.metric("freewheel_runs_total", model="tiny", outcome="ok")
    with ThreadPoolExecutor(50) as pool:
        together = list(pool.map(lambda i: ask(server.grpc, **mixed(i)), range(50)))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.latents, other.latents)
        assert one.summary["branches"].keys() == other.summary["branches"].keys()
        for name, branch in one.summary["branches"].items():
            assert branch["computed"] == other.summary["branches"][name]["computed"]
    assert server.metric("freewheel_runs_total", model="tiny", outcome="ok") == before + 50


@pytest.fixture
def own_server(prepared: Path, tmp_path: Path) -> Iterator[tuple[RunningServer, Path]]:
    """A server over a repository of its own that holds version 1 of 'tiny'."""
    repository = tmp_path / "models"
    shutil.copytree(prepared / "models" / "tiny", repository / "tiny", copy_function=os.link)
    running = RunningServer(server_command(repository), tmp_path / "log.txt")
    try:
        running.wait()
        yield running, repository
    finally:
        assert running.stop() == 0


def test_a_rebuilt_bundle_is_loaded_while_serving(own_server, prepared, tmp_path) -> None:
    server, repository = own_server
    old = run_alone(prepared / "tiny", tmp_path, "--seed", 5)
    new = run_alone(prepared / "rebuilt", tmp_path, "--seed", 5)
    assert np.abs(old - new).max() > 1e-3
    results: list[np.ndarray] = []
    done = threading.Event()

    def keep_asking() -> None:
        while not done.is_set():
            results.append(ask(server.grpc, seed=5).latents)

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(keep_asking) for _ in range(3)]
        try:
            served = subprocess.run(
                [PYTHON.parent / "freewheel", "serve", prepared / "rebuilt", "--out",
                 repository, "--name", "tiny", "--threads", "1", "--instances", "2", "--json"],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            assert json.loads(served.stdout)["version"] == 2
            url = f"http://127.0.0.1:{server.http}/v2/repository/models/tiny/load"
            with urllib.request.urlopen(
                urllib.request.Request(url, b"{}"), timeout=HANG_SECONDS
            ) as answer:
                assert answer.status == 200
            after = [ask(server.grpc, seed=5).latents for _ in range(3)]
        finally:
            done.set()
        for task in asking:
            task.result(HANG_SECONDS)  # no request failed
    for latents in after:
        np.testing.assert_array_equal(latents, new)
    is_old = [np.array_equal(r, old) for r in results]
    assert all(o or np.array_equal(r, new) for o, r in zip(is_old, results, strict=True))
    assert is_old[0]
    assert not is_old[-1]
