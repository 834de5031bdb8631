"""One bundle, one video: the same request through Python, freewheel-run, the C ABI and Triton."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc", reason="run by 'make test-triton'")

import tritonclient.grpc as triton
from client import ask

pytestmark = pytest.mark.triton

DOORS = ("Python", "freewheel-run", "C ABI")


class Prepared:
    """Requests with what the other doors make of them, and the prompt that all of them have."""

    def __init__(self, folder: Path) -> None:
        self.latents = np.load(folder / "latents.npz")
        self.requests = json.loads((folder / "requests.json").read_text())
        self.states = {
            name: np.load(folder / f"{branch}.npy")
            for name, branch in {"text_states": "cond", "negative_text_states": "uncond"}.items()
        }

    def ask(self, address: str, name: str, model: str = "doors"):
        """Send a request, and compare its latents with those of every other door."""
        cache, overrides, lora = self.requests[name]
        parameters = {
            **overrides,
            **({"policy": cache} if cache else {}),
            **({"lora": lora} if lora else {}),
        }
        answer = ask(address, model, tensors=self.states, **parameters)
        for door in DOORS:
            np.testing.assert_array_equal(
                answer.latents[None], self.latents[f"{name}/{door}"], door
            )
        return answer


@pytest.fixture(scope="module")
def expected(prepared: Path) -> Prepared:
    return Prepared(prepared / "expected")


def test_a_request_gives_the_same_bits_through_every_door(server, expected: Prepared) -> None:
    """The request says its prompt, and sometimes a policy or LoRAs; all else is the bundle's."""
    for name, (cache, _, _) in expected.requests.items():
        answer = expected.ask(server.grpc, name)
        assert answer.summary["seed"] == 42
        assert answer.summary["steps"] == (4 if cache == "listed" else 50)
    assert len(expected.requests) == len(expected.latents.files) // len(DOORS) >= 8


def test_instances_with_other_loras_do_not_see_each_others_weights(
    server, expected: Prepared
) -> None:
    """Two at a time, so that each instance's weights change while the other one runs."""
    names = [n for n, (_, _, lora) in expected.requests.items() if lora]
    assert len(names) >= 3
    turns = [*names, "nothing said", *reversed(names), "nothing said", names[0], "overrides"] * 2
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda name: expected.ask(server.grpc, name, "pair"), turns))
    assert len(answers) == len(turns)


def test_no_weight_of_a_lora_stays(server, expected: Prepared) -> None:
    """Both instances have run a LoRA, one after another or at once; then each runs without."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: expected.ask(server.grpc, "two LoRAs", "pair"), range(4)))
        list(pool.map(lambda _: expected.ask(server.grpc, "nothing said", "pair"), range(4)))


REFUSED = {
    "stile": "did you mean 'style'",
    "../loras/style": "is no plain name",
    "/etc/passwd": "is no plain name",
    "style:much": "has scale 'much'; write name:0.8",
    "style,style": "is named twice",
    "foreign": "was written for the checkpoint 000000000000",
    "broken": "broken.safetensors",
}


def test_a_lora_that_can_t_be_used_gets_one_error_and_harms_nothing(
    server, prepared: Path, expected: Prepared
) -> None:
    folder = prepared / "expected" / "loras"
    written = (folder / "style.safetensors").read_bytes()
    (folder / "broken.safetensors").write_bytes(written[:-8])
    checkpoint = json.loads((prepared / "doors" / "manifest.json").read_text())["checkpoint"]
    assert checkpoint["sha256"].encode() in written
    (folder / "foreign.safetensors").write_bytes(
        written.replace(checkpoint["sha256"].encode(), b"0" * 64)
    )
    for lora, said in REFUSED.items():
        with pytest.raises(triton.InferenceServerException, match=re.escape(said)):
            ask(server.grpc, "doors", tensors=expected.states, lora=lora)
    expected.ask(server.grpc, "a LoRA")
    expected.ask(server.grpc, "nothing said")


def test_a_model_without_a_folder_takes_no_lora(server) -> None:
    with pytest.raises(triton.InferenceServerException, match="no folder of LoRAs is open here"):
        ask(server.grpc, lora="style")
