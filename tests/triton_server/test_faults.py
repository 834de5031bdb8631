"""Bad requests, clients that go away, and cancellation: the server stays healthy."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("tritonclient.grpc", reason="run by 'make test-triton'")

from client import COND, SLOW_SIZE, UNCOND, Stream, ask, progress_of, until

pytestmark = pytest.mark.triton

PROMPTS = {"text_states": COND, "negative_text_states": UNCOND}
SLOW = {**SLOW_SIZE, "steps": 40, "flow_shift": 1.0, "guidance_scale": 3.0, "stream": 1}


def with_nan(array: np.ndarray) -> np.ndarray:
    damaged = array.copy()
    damaged[0, 0] = np.nan
    return damaged


BAD = {
    "unknown policy": ({}, {"policy": "teecache"}, "did you mean 'teacache'"),
    "unknown parameter": ({}, {"guidence_scale": 3.0}, "did you mean 'guidance_scale'"),
    "parameter of another policy": ({}, {"policy": "off", "threshold": 0.1}, "policy 'off'"),
    "value out of range": ({}, {"policy": "teacache", "threshold": -1.0}, "threshold"),
    "value of another kind": ({}, {"steps": "many"}, "give a whole number"),
    "absurd step count": ({}, {"steps": 100_000}, "has no table for 100000 steps"),
    "no steps": ({}, {"steps": 0}, "has no table for 0 steps"),
    "absurd size": ({}, {"height": 1 << 30, "width": 1 << 30}, "expected 32768 pixels at most"),
    "more pixels than are served": (
        {},
        {"frames": 253, "height": 1024, "width": 1024},
        "max_pixels",
    ),
    "beyond the model's positions": ({}, {"height": 1 << 15}, "the model has positions for 128"),
    "a scale of no second expert": ({}, {"guidance_scale_2": 2.0}, "the bundle has one expert"),
    "uneven size": ({}, {"height": 33}, "a multiple of 16 pixels"),
    "size that the model can't cut": ({}, {"height": 40, "width": 40}, ""),
    "unknown sampler": ({}, {"sampler": "ddim"}, "is not in the bundle"),
    "unknown output": ({}, {"outputs": "frames"}, "--with-vae"),
    "preview of nothing": ({}, {"preview": True}, "stream=1"),
    "seed beside latents": (
        {"latents": np.zeros((4, 2, 4, 4), np.float32)},
        {"seed": 3},
        "comes with a seed",
    ),
    "NaN embeddings": ({"text_states": with_nan(COND)}, {}, "not finite"),
    "infinite latents": (
        {"latents": np.full((4, 2, 4, 4), np.inf, np.float32)},
        {},
        "not finite",
    ),
    "wrong width": ({"text_states": COND[:, :-1].copy()}, {}, "unexpected shape"),
    "wrong rank": ({"text_states": COND[None]}, {}, "unexpected shape"),
    "wrong dtype": ({"text_states": COND.astype(np.float64)}, {}, "data-type"),
    "no prompt": ({"text_states": None}, {}, "has no prompt"),
    "no negative prompt": ({"negative_text_states": None}, {}, "give both prompts"),
    "token ids without an encoder": ({"token_ids": np.array([1])}, {}, "token_ids"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_refused_and_the_server_stays_healthy(server, case) -> None:
    tensors, parameters, expected = BAD[case]
    given = {n: t for n, t in {**PROMPTS, **tensors}.items() if t is not None}
    size = {} if "latents" in given else {"frames": 5, "height": 32, "width": 32}
    usual = {**size, "steps": 6, "flow_shift": 1.0, "guidance_scale": 3.0}
    with pytest.raises(triton.InferenceServerException) as fault:
        ask(server.grpc, tensors=given, **{**usual, **parameters})
    assert expected in fault.value.message()
    assert server.is_ready()
    assert ask(server.grpc).latents is not None


@pytest.mark.parametrize("name", ["token_ids", "negative_token_ids"])
@pytest.mark.parametrize("stray", [-5, 128, 99999])
def test_a_token_id_that_the_encoder_does_not_know_is_refused(server, name, stray) -> None:
    ids = {"token_ids": np.array([5, 1]), "negative_token_ids": np.array([1])}
    ids[name] = np.array([5, stray, 1])
    with pytest.raises(triton.InferenceServerException) as fault:
        ask(server.grpc, "demo", tensors=ids, steps=2)
    assert f"token ids: hold {stray}, expected 0 to 127" in fault.value.message()


def counted(server, policy: str) -> tuple[float, float]:
    steps = server.metric("freewheel_steps_total", model="tiny", policy=policy)
    runs = server.metric("freewheel_runs_total", model="tiny", policy=policy, outcome="cancelled")
    return steps, runs


def test_cancelling_stops_the_run(server) -> None:
    """How soon after the cancel, C++ tests of a session count; here the client's pace decides."""
    steps_before, runs_before = counted(server, "off")
    stream = Stream(server.grpc, "tiny", PROMPTS, {**SLOW, "policy": "off"})
    while progress_of(stream.next())["step_index"] < 3:
        pass
    stream.close(cancel=True)
    until(lambda: counted(server, "off")[1] == runs_before + 1)
    assert 8 <= counted(server, "off")[0] - steps_before < 2 * SLOW["steps"]
    assert ask(server.grpc).latents is not None


@pytest.mark.nightly  # the server tells nobody that a cancel reached its queue: a wait is left
def test_a_request_that_is_cancelled_in_the_queue_never_runs(server) -> None:
    streams = [Stream(server.grpc, "tiny", PROMPTS, {**SLOW, "policy": "off"}) for _ in range(2)]
    for stream in streams:
        stream.next()  # both instances are busy
    before = server.metric("freewheel_steps_total", policy="teacache")
    queued = Stream(server.grpc, "tiny", PROMPTS, {**SLOW, "policy": "teacache"})
    time.sleep(0.2)
    queued.close(cancel=True)
    time.sleep(0.2)
    for stream in streams:
        stream.close(cancel=True)
    assert ask(server.grpc).latents is not None
    assert server.metric("freewheel_steps_total", policy="teacache") == before


@pytest.mark.nightly
def test_a_client_that_is_killed_ends_its_run(server, tmp_path: Path) -> None:
    program = tmp_path / "client.py"
    program.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from client import Stream, progress_of\n"
        "from test_faults import PROMPTS, SLOW\n"
        "stream = Stream(sys.argv[1], 'tiny', PROMPTS, {**SLOW, 'policy': 'custom'})\n"
        "while True:\n"
        "    print(progress_of(stream.next())['step_index'], flush=True)\n"
    )
    steps_before, runs_before = counted(server, "custom")
    with subprocess.Popen(
        [sys.executable, program, server.grpc], stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdout.readline().strip() == "0"
        client.send_signal(signal.SIGKILL)
    until(lambda: counted(server, "custom")[1] == runs_before + 1)
    assert counted(server, "custom")[0] - steps_before < 2 * 40
    assert server.is_ready()
    assert ask(server.grpc).latents is not None
