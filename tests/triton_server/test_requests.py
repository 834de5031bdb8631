"""What requests may ask for, and that the answers are those of the same runs without a server."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc", reason="run by 'make test-triton'")

import tritonclient.grpc as triton
from client import COND, ROOT, UNCOND, ask, run_alone
from conftest import HANG_SECONDS

pytestmark = pytest.mark.triton

POLICIES = {
    "off": {},
    "teacache": {"threshold": 0.3},
    "taylorseer": {"interval": 3},
    "adacache": {"codebook_thresholds": "[0.08, 0.16, 1.0]", "codebook_skips": "[3, 2, 1]"},
    "custom": {"threshold": 0.3},
    "magcache": {"threshold": 0.5},
    "easycache": {"threshold": 2.0},
    "firstblock": {"threshold": 0.5},
    "solved": {},
    "spectrum": {"warmup": 2},
    "hermite": {"interval": 3},
    "foca": {"interval": 3},
    "sencache": {"threshold": 100.0, "early": 0.0},
    "dmd": {"interval": 3},
    "seacache": {"threshold": 2.0},
    "dicache": {"threshold": 5.0},
    "dbcache": {"threshold": 5.0, "first_blocks": 1, "last_blocks": 1, "first_exact": 1},
    "dualblock": {"threshold": 5.0, "first_blocks": 1, "last_blocks": 0, "channel_stride": 2},
    "teacache+spectrum": {"threshold": 0.3, "degree": 2},
}


def settings(parameters: dict[str, object]) -> list[str]:
    return [part for n, v in parameters.items() for part in ("--set", f"{n}={v}")]


def test_every_policy_of_the_bundle_is_listed_here(prepared: Path) -> None:
    manifest = json.loads((prepared / "tiny" / "manifest.json").read_text())
    assert set(manifest["policies"]) == set(POLICIES)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_gives_the_latents_that_it_gives_alone(server, prepared, tmp_path, policy) -> None:
    alone = run_alone(
        prepared / "tiny", tmp_path, "--cache", policy, "--seed", 7, *settings(POLICIES[policy])
    )
    answer = ask(server.grpc, seed=7, policy=policy, **POLICIES[policy])
    np.testing.assert_array_equal(answer.latents, alone)
    assert answer.summary["policy"] == policy
    assert len(answer.progress) == 1
    branches = answer.summary["branches"]
    assert {b["computed_steps"] + b["reused_steps"] for b in branches.values()} == {6}
    assert branches["cond"]["computed_steps"] == 6 or policy != "off"


def test_steps_are_streamed_with_their_decisions(server) -> None:
    answer = ask(server.grpc, policy="taylorseer", interval=3, stream=1)
    steps = answer.progress[:-1]
    assert [s["step_index"] for s in steps] == list(range(6))
    decided = [s["branches"]["cond"]["decision"] == "compute" for s in steps]
    assert decided == answer.summary["branches"]["cond"]["computed"]
    assert not all(decided)
    assert {s["steps"] for s in steps} == {6}
    elapsed = [s["elapsed_seconds"] for s in steps]
    assert elapsed == sorted(elapsed)


def test_every_second_step_and_the_last_are_streamed(server) -> None:
    answer = ask(server.grpc, stream=2, steps=5)
    assert [s.get("step_index") for s in answer.progress] == [1, 3, 4, None]


def test_previews_come_near_the_result(server) -> None:
    answer = ask(server.grpc, stream=1, preview=True)
    assert len(answer.previews) == 6
    assert {p.shape for p in answer.previews} == {answer.latents.shape}
    errors = [float(np.abs(p - answer.latents).mean()) for p in answer.previews]
    assert errors[-1] < errors[0]


def test_parameters_may_be_numbers_or_text(server) -> None:
    as_numbers = ask(server.grpc, policy="teacache", threshold=0.3, seed=3)
    as_text = ask(server.grpc, policy="teacache", threshold="0.3", seed="3", steps="6")
    np.testing.assert_array_equal(as_numbers.latents, as_text.latents)


def test_the_seed_may_be_an_input(server) -> None:
    tensors = {"text_states": COND, "negative_text_states": UNCOND, "seed": np.array([7])}
    answer = ask(server.grpc, tensors=tensors)
    assert answer.summary["seed"] == 7
    np.testing.assert_array_equal(answer.latents, ask(server.grpc, seed=7).latents)
    assert np.abs(answer.latents - ask(server.grpc, seed=8).latents).max() > 0.1


def test_latents_may_be_given(server) -> None:
    noise = np.random.default_rng(0).standard_normal((4, 2, 4, 4), dtype=np.float32)
    tensors = {"text_states": COND, "negative_text_states": UNCOND, "latents": noise}
    asked = {"steps": 6, "flow_shift": 1.0, "guidance_scale": 3.0}
    first = ask(server.grpc, tensors=tensors, **asked)
    second = ask(server.grpc, tensors=tensors, **asked)
    assert first.summary["seed"] is None
    assert first.latents.shape == noise.shape
    np.testing.assert_array_equal(first.latents, second.latents)


def test_one_branch_runs_without_guidance(server) -> None:
    answer = ask(server.grpc, tensors={"text_states": COND}, guidance_scale=1.0)
    assert list(answer.summary["branches"]) == ["cond"]


def test_guards_and_samplers_are_chosen(server) -> None:
    answer = ask(server.grpc, policy="taylorseer", interval=6, sampler="euler", last_exact=2)
    assert answer.summary["branches"]["cond"]["computed"][-2:] == [True, True]


def test_outputs_that_are_not_asked_for_are_not_sent(server) -> None:
    assert ask(server.grpc, asked=("progress",)).latents is None
    assert ask(server.grpc, outputs="progress").latents is None
    assert ask(server.grpc).latents is not None


def test_a_policy_s_parameter_of_a_request_s_name_is_told_apart(server) -> None:
    answer = ask(server.grpc, policy="solved", **{"policy.steps": 1, "steps": 7})
    assert answer.summary["steps"] == 7


def test_a_whole_pipeline_goes_from_token_ids_to_frames(server) -> None:
    ids = {"token_ids": np.array([5, 17, 1]), "negative_token_ids": np.array([1])}
    answer = ask(
        server.grpc,
        "demo",
        tensors=ids,
        policy="shapes_wan_custom",
        steps=10,
        stream=5,
        preview=True,
    )
    assert answer.frames.shape == (17, 96, 96, 3)
    assert answer.frames.dtype == np.uint8
    assert answer.latents.shape == (16, 5, 12, 12)
    assert {p.shape for p in answer.previews} == {(17, 12, 12, 3)}
    assert {p.dtype for p in answer.previews} == {np.dtype(np.uint8)}
    small = answer.frames.reshape(17, 12, 8, 12, 8, 3).mean((2, 4))
    # One step before its end the prediction is the result, up to what the last step changes.
    assert np.abs(answer.previews[-1] - small).mean() < 5
    assert answer.frames.std() > 10


PROMPT = "a red circle moving right on a gray background"


def text(*prompts: str) -> np.ndarray:
    return np.array([p.encode() for p in prompts], object)


def test_a_prompt_is_sent_as_text(server) -> None:
    """What the pipeline's tokenizer makes of it, and an empty negative prompt."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ROOT / "models/shapes_wan/tokenizer/tokenizer.json"))
    ids = {
        "token_ids": np.array(tokenizer.encode(PROMPT).ids),
        "negative_token_ids": np.array(tokenizer.encode("").ids),
    }
    asked = {"policy": "off", "steps": 2, "outputs": "latents"}
    by_ids = ask(server.grpc, "demo", tensors=ids, **asked)
    by_text = ask(server.grpc, "demo", tensors={"text_input": text(f" {PROMPT} ")}, **asked)
    np.testing.assert_array_equal(by_text.latents, by_ids.latents)
    other = {"text_input": text(PROMPT), "negative_text_input": text("a blue square")}
    assert (
        np.abs(ask(server.grpc, "demo", tensors=other, **asked).latents - by_ids.latents).max() > 0
    )
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.http}/v2/models/demo/generate_stream",
        json.dumps(
            {"text_input": PROMPT, "policy": "off", "steps": 2, "outputs": "latents"}
        ).encode(),
        {"Content-Type": "application/json"},
    )
    events = urllib.request.urlopen(request).read().decode()
    found = json.loads(events.split("data: ")[-1])["latents"]
    np.testing.assert_allclose(np.array(found), by_ids.latents.ravel(), rtol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"text_input": text("red " * 30)}, "are 31, expected 1 to 16"),
        ({"text_input": text("red", "blue")}, "unexpected shape for input 'text_input'"),
        ({"text_input": np.array([b"red \xff"], object)}, "is no UTF-8 text"),
        ({"text_input": text("red"), "token_ids": np.array([5, 1])}, "as text and as token ids"),
    ],
    ids=["too long", "two texts", "not UTF-8", "ids too"],
)
def test_a_text_that_can_not_be_taken_is_refused(server, tensors, message) -> None:
    with pytest.raises(triton.InferenceServerException, match=re.escape(message)):
        ask(server.grpc, "demo", tensors=tensors, steps=2)


def test_http_streams_events(server) -> None:
    body = {
        "text_states": COND.ravel().tolist(), "negative_text_states": UNCOND.ravel().tolist(),
        "seed": 7, "frames": 5, "height": 32, "width": 32, "steps": 6, "flow_shift": 1.0,
        "guidance_scale": 3.0, "policy": "teacache", "threshold": 0.3, "stream": 3,
    }  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.http}/v2/models/tiny/generate_stream",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=HANG_SECONDS) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        lines = answer.read().decode().splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data")]
    progress = [json.loads(e["progress"]) for e in events]
    assert [p.get("step_index") for p in progress] == [2, 5, None]
    over_grpc = ask(server.grpc, seed=7, policy="teacache", threshold=0.3)
    latents = np.array(events[-1]["latents"], np.float32).reshape(over_grpc.latents.shape)
    np.testing.assert_array_equal(latents, over_grpc.latents)
