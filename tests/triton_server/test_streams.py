"""Models that sample several things at once, or are given several timesteps, behind a real server.

LTX-2 makes a video and its sound, AnyFlow is told the next step's timestep beside its own.
`prepare.py` wrote what Python samples for the same requests.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc", reason="run by 'make test-triton'")

import tritonclient.grpc as triton
from client import Answer, Stream, ask, progress_of, until

pytestmark = pytest.mark.triton

SAMPLED = {"ltx_2": {"latents", "audio_latents"}, "any_flow": {"latents"}}
REQUESTS = ("by content", "by count")
BOTH = SAMPLED["ltx_2"]


class Prepared:
    """Requests of one model, and what Python samples for them."""

    def __init__(self, prepared: Path, model: str) -> None:
        folder = prepared / "several" / model
        self.model = model
        self.expected = np.load(folder / "expected.npz")
        self.requests = json.loads((folder / "requests.json").read_text())
        self.inputs, self.slow = (
            {name: value.astype(np.float32) for name, value in np.load(folder / file).items()}
            for file in ("inputs.npz", "slow.npz")
        )

    def ask(self, server, request: str, tensors: dict | None = None, **parameters: Any) -> Answer:
        given = self.requests[request]["parameters"] | parameters
        return ask(server.grpc, self.model, tensors=tensors or self.inputs, **given)


@pytest.fixture(params=SAMPLED)
def several(request: pytest.FixtureRequest, prepared: Path) -> Prepared:
    return Prepared(prepared, request.param)


@pytest.fixture
def sound(prepared: Path) -> Prepared:
    return Prepared(prepared, "ltx_2")


def check_equal(several: Prepared, request: str, answer: Answer) -> None:
    """Hold a response to Python's run: equal decisions and, bit for bit, equal samples."""
    wanted = several.requests[request]["computed"]
    branches = answer.summary["branches"]
    assert {branch: found["computed"] for branch, found in branches.items()} == wanted
    assert answer.tensors.keys() == SAMPLED[several.model]
    for name, sample in answer.tensors.items():
        np.testing.assert_array_equal(sample, several.expected[f"{request}/{name}"], name)


@pytest.mark.parametrize("request_name", REQUESTS)
def test_samples_and_decisions_are_pythons(server, several: Prepared, request_name: str) -> None:
    answer = several.ask(server, request_name)
    check_equal(several, request_name, answer)
    computed = answer.summary["branches"]["cond"]["computed"]
    assert computed[0]
    assert not all(computed)
    assert several.requests.keys() == {*REQUESTS}


def test_the_server_says_what_a_request_brings_and_gets(server, several: Prepared) -> None:
    about = json.loads(server.get(f"/v2/models/{several.model}"))
    assert {one["name"] for one in about["inputs"]} == {*several.inputs, "seed"}
    sampled = SAMPLED[several.model]
    assert {one["name"] for one in about["outputs"]} == {"progress", "preview", *sampled}


def test_the_sound_alone_is_sent_where_it_alone_is_asked_for(server, sound: Prepared) -> None:
    answer = sound.ask(server, "by count", outputs="audio_latents")
    assert answer.tensors.keys() == {"audio_latents"}
    expected = sound.expected["by count/audio_latents"]
    np.testing.assert_array_equal(answer.tensors["audio_latents"], expected)


def test_each_of_the_latents_has_a_guidance_scale_of_its_own(server, sound: Prepared) -> None:
    answer = sound.ask(server, "by count", audio_guidance_scale=3.0)
    for name, sample in answer.tensors.items():
        assert np.abs(sample - sound.expected[f"by count/{name}"]).max() > 1e-3, name


def test_what_is_no_text_need_not_be_said_twice(server, sound: Prepared) -> None:
    """The negative prompt has the size and the coordinates of the prompt."""
    tensors = {
        name: value
        for name, value in sound.inputs.items()
        if not name.startswith("negative_") or "text" in name
    }
    assert len(tensors) == len(sound.inputs) - 5
    check_equal(sound, "by count", sound.ask(server, "by count", tensors))


def test_a_seed_draws_noise_for_both(server, sound: Prepared) -> None:
    """The prompt's inputs tell the sizes of both, so that a request may name none."""
    tensors = {name: value for name, value in sound.inputs.items() if name not in BOTH}
    frames, height, width = (
        len(sound.inputs[f"{side}_index"]) for side in ("frame", "row", "column")
    )
    size = {"frames": 8 * (frames - 1) + 1, "height": 32 * height, "width": 32 * width}
    first, again, other = (
        sound.ask(server, "by count", tensors, seed=seed, **size) for seed in (7, 7, 8)
    )
    for name in BOTH:
        assert first.tensors[name].shape == sound.inputs[name].shape
        np.testing.assert_array_equal(first.tensors[name], again.tensors[name])
        assert np.abs(first.tensors[name] - other.tensors[name]).max() > 0.1


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "channels of the sound": (
        {"audio_latents": lambda given: given[:, :-1]}, {},
        "unexpected shape for input 'audio_latents'",
    ),
    "tokens of the sound": (
        {"audio_latents": lambda given: given[:-1]}, {},
        "has audio_tokens",
    ),
    "tokens of the video": (
        {"latents": lambda given: given[:-1]}, {},
        "has tokens",
    ),
    "a sound that is not finite": (
        {"audio_latents": lambda given: given * np.inf}, {},
        "input 'audio_latents': holds values that are not finite",
    ),
    "no sound": (
        {"audio_latents": None}, {},
        "input 'audio_latents': is missing beside 'latents'",
    ),
    "no video": ({"latents": None}, {}, "has tokens"),
    "a coordinate that is missing": (
        {"audio_coords": None}, {}, "branch 'cond', input 'audio_coords': is missing",
    ),
    "a scale of what is not sampled": (
        {}, {"sound_guidance_scale": 2.0},
        "input 'sound_latents': is not sampled beside 'latents' by this bundle",
    ),
    "an output that is not sampled": (
        {}, {"outputs": "sound_latents"}, "name some of progress, latents, audio_latents",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_request_is_refused_by_name(server, sound: Prepared, bad: str) -> None:
    changed, parameters, said = BAD[bad]
    tensors = {}
    for name, given in sound.inputs.items():
        change = changed.get(name, lambda given: given)
        if change is not None:
            tensors[name] = np.ascontiguousarray(change(given))
    with pytest.raises(triton.InferenceServerException, match=re.escape(said)):
        sound.ask(server, "by content", tensors, **parameters)
    check_equal(sound, "by content", sound.ask(server, "by content"))


def counted(server, model: str) -> tuple[float, float]:
    """Return the steps and the cancelled runs of a model, without caching."""
    return (
        server.metric("freewheel_steps_total", model=model, policy="off"),
        server.metric("freewheel_runs_total", model=model, policy="off", outcome="cancelled"),
    )


def test_cancelling_stops_the_run_and_the_next_one_is_whole(server, several: Prepared) -> None:
    steps_before, runs_before = counted(server, several.model)
    usual = several.requests["by count"]["parameters"]
    asked = {name: usual[name] for name in ("sampler", "flow_shift", "guidance_scale")}
    parameters = {**asked, "steps": 50, "policy": "off", "stream": 1}
    stream = Stream(server.grpc, several.model, several.slow, parameters)
    while progress_of(stream.next())["step_index"] < 2:
        pass
    stream.close(cancel=True)
    until(lambda: counted(server, several.model)[1] == runs_before + 1)
    assert 6 <= counted(server, several.model)[0] - steps_before < 2 * 50
    for request in REQUESTS:
        check_equal(several, request, several.ask(server, request))
