# SPDX-License-Identifier: Apache-2.0
"""Weights that pass through two sets of buffers give what resident ones give."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from freewheel.bundle.reader import Bundle
from freewheel.configs.errors import RequestError
from freewheel.configs.setting import CacheSetting
from freewheel.runtime.lora import Lora
from freewheel.runtime.model import DeviceOptions, LoadedModel, uploaded
from freewheel.runtime.offload import OffloadedWeights
from freewheel.runtime.session import Session

OFFLOAD = DeviceOptions(offload=True)
LORA = Lora("style", 0.5, {"blocks.1.attn1.to_q": (torch.ones(1, 32), torch.ones(32, 1), 1.0)}, {})


def run(model: LoadedModel, policy: str) -> list[torch.Tensor]:
    session = Session(model)
    generator = torch.Generator().manual_seed(0)
    for branch in ("cond", "uncond"):
        states = torch.randn(1, 5, 24, generator=generator)
        session.set_prompt(branch, {"text_states": states})
    session.begin(torch.linspace(999, 30, 6), CacheSetting(policy=policy))
    latents, outputs = torch.randn(1, 4, 3, 4, 6, generator=generator), []
    for step in range(6):
        answers = [session.step(b, step, {"latents": latents}).clone() for b in ("cond", "uncond")]
        outputs += answers
        latents = latents - answers[0] / 6
    return outputs


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("policy", ["off", "taylorseer", "adacache"])
def test_offloaded_runs_equal_resident_ones(tiny_bundle: Bundle, backend: str, policy: str) -> None:
    expected = run(LoadedModel(tiny_bundle, backend), policy)
    found = run(LoadedModel(tiny_bundle, backend, options=OFFLOAD), policy)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_lora_is_offloaded_with_its_weights(tiny_bundle: Bundle) -> None:
    plain = run(LoadedModel(tiny_bundle, "onnxruntime"), "off")
    expected = run(LoadedModel(tiny_bundle, "onnxruntime", [LORA]), "off")
    found = run(LoadedModel(tiny_bundle, "onnxruntime", [LORA], OFFLOAD), "off")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not torch.equal(plain[0], found[0])


def test_two_blocks_are_resident_however_many_there_are(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    model = LoadedModel(tiny_bundle, "onnxruntime", options=OFFLOAD)
    run(model, "adacache")  # binds blocks, their tapped variant and their context
    one_block = sum(
        tiny_bundle.tensor(name.replace("{block}", "0")).nbytes
        for graph in ("block", "context")
        for name in manifest.graphs[graph].weights.values()
    )
    assert manifest.stages[0].count == 3
    assert model._offloaded.resident_bytes() == 2 * one_block


class Streams:
    """Two CUDA streams and their events, as a log of what each is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        compute, copies = self.stream("compute"), self.stream("copies")
        self.names = iter(["0 here", "0 free", "1 here", "1 free"])
        self.current = compute
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: copies)
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)

    def stream(self, name: str) -> Any:
        wait = lambda event: self.log.append(f"{name} waits for {event.name}")  # noqa: E731
        return SimpleNamespace(name=name, wait_event=wait)

    def event(self) -> Any:
        name = next(self.names)
        record = lambda stream: self.log.append(f"{stream.name} tells {name}")  # noqa: E731
        return SimpleNamespace(name=name, record=record)

    @contextmanager
    def on(self, stream: Any) -> Any:
        self.current, before = stream, self.current
        yield
        self.current = before


def test_the_next_block_is_copied_while_one_runs_and_never_over_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = Streams(monkeypatch)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor, device: empty_like(tensor))
    weights = {f"{b}.w": torch.full((2,), float(b)) for b in range(3)}
    offloaded = OffloadedWeights(torch.device("cuda"), weights.__getitem__)
    seen: list[float] = []

    class Engine:
        def bind(self, bindings: Any) -> Any:
            def run() -> None:
                seen.append(float(bindings["w"][0]))
                streams.log.append(f"run {len(seen) - 1}")

            return SimpleNamespace(run=run)

    calls = [offloaded.bind(Engine(), {}, {"w": "{block}.w"}, b) for b in range(3)]
    for call in (*calls, *calls):
        call.run()
    assert seen == [0, 1, 2, 0, 1, 2]
    log = streams.log
    assert log[:9] == [
        "copies waits for 0 free", "copies tells 0 here",
        "compute waits for 0 here", "run 0", "compute tells 0 free",
        "copies waits for 1 free", "copies tells 1 here",
        "compute waits for 1 here", "run 1",
    ]  # fmt: skip
    for index, line in enumerate(log):
        if line.startswith("copies waits for"):
            place = line.split()[-2]
            used = [i for i in range(index) if log[i] == f"compute waits for {place} here"]
            if used:  # what computed from this set has told so before the copy may begin
                assert f"compute tells {place} free" in log[used[-1] : index]


def test_baked_bundles_and_cpu_backends_refuse_what_they_cannot(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match="--cuda-graphs: mean nothing to onnxruntime"):
        LoadedModel(tiny_bundle, "onnxruntime", options=DeviceOptions(cuda_graphs=True))
    bundle = Bundle(tiny_bundle.folder)
    bundle.manifest = bundle.manifest.model_copy(update={"weights": "baked"})
    with pytest.raises(RequestError, match=r"--offload: can't be had.*--weights inputs"):
        LoadedModel(bundle, "onnxruntime", options=OFFLOAD)


def test_a_weight_is_uploaded_once_while_anybody_holds_it(tiny_bundle: Bundle) -> None:
    name, place = "blocks.0.attn1.to_q.weight", torch.device("meta")
    first = uploaded(tiny_bundle, name, place)
    assert uploaded(Bundle(tiny_bundle.folder), name, place) is first
    assert uploaded(tiny_bundle, "blocks.1.attn1.to_q.weight", place) is not first
    other = Bundle(tiny_bundle.folder)
    checkpoint = other.manifest.checkpoint.model_copy(update={"sha256": "0" * 64})
    other.manifest = other.manifest.model_copy(update={"checkpoint": checkpoint})
    assert uploaded(other, name, place) is not first
    assert uploaded(tiny_bundle, name, torch.device("cpu")).device.type == "cpu"
