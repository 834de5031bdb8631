# SPDX-License-Identifier: Apache-2.0
"""Weights that pass through two sets of buffers give what resident ones give."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from host_device import PLACE, feign_cuda

from freewheel.bundle.reader import Bundle
from freewheel.core.errors import RequestError
from freewheel.core.tensor_spec import TensorSpec
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.model import DeviceOptions, Model, uploaded
from freewheel.runtime.offload import HostBlock, OffloadedWeights
from freewheel.runtime.session import Session

OFFLOAD = DeviceOptions(offload=True)
CHANGED = "blocks.1.attn1.to_q.weight"


def run(model: Model, policy: str) -> list[torch.Tensor]:
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
    expected = run(Model(tiny_bundle, backend), policy)
    found = run(Model(tiny_bundle, backend, options=OFFLOAD), policy)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_other_weights_are_offloaded_like_the_bundles_own(tiny_bundle: Bundle) -> None:
    model = Model(tiny_bundle, "onnxruntime")
    plain = run(model, "off")
    weights = {CHANGED: tiny_bundle.tensor(CHANGED) + 0.5}
    expected = run(model.with_weights(weights), "off")
    offloaded = Model(tiny_bundle, "onnxruntime", OFFLOAD).with_weights(weights)
    found = run(offloaded, "off")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not torch.equal(plain[0], found[0])


def test_two_blocks_are_resident_however_many_there_are(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    model = Model(tiny_bundle, "onnxruntime", options=OFFLOAD)
    run(model, "adacache")  # binds blocks, their tapped variant and their context
    one_block = sum(
        -(-tiny_bundle.tensor(name.replace("{block}", "0")).nbytes // 256) * 256
        for graph in ("block", "context")
        for name in manifest.graphs[graph].weights.values()
    )
    assert manifest.stages[0].count == 3
    assert model._offloaded.resident_bytes() == 2 * one_block


def names(block: int) -> tuple[str, str]:
    return f"{block}.w", f"{block}.b"


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    made = {f"{b}.w": torch.full((5, 100), float(b)) for b in range(3)}
    return made | {f"{b}.b": torch.full((3,), float(-b), dtype=torch.bfloat16) for b in range(3)}


class Engine:
    """Notes what it finds in the weights that it was bound to."""

    inputs: ClassVar = {"w": TensorSpec("float32", (5, 100)), "b": TensorSpec("bfloat16", (3,))}

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def bind(self, bindings: Any) -> Any:
        def run() -> None:
            w, b = bindings["w"].clone(), bindings["b"].clone()
            self.seen.append((float(w.sum()) / w.numel(), float(b.sum()) / b.numel()))

        return SimpleNamespace(run=run, bindings=bindings)


def offloaded_calls(read: Any, engine: Engine, **settings: Any) -> list[Any]:
    offloaded = OffloadedWeights(PLACE, read, **settings)
    patterns = {"w": "{block}.w", "b": "{block}.b"}
    return [offloaded.bind(engine, {}, patterns, block) for block in range(3)]


def test_blocks_arrive_in_one_copy_from_locked_memory_and_never_over_one_in_use(
    weights: dict[str, torch.Tensor], host_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The feigned GPU refuses a read or write that no wait orders, and a wait for nothing."""
    feign_cuda(monkeypatch, host_device)
    blocks: list[HostBlock] = []

    def read(names: Any) -> HostBlock:
        blocks.append(HostBlock({n: weights[n] for n in names}, pinned=True))
        return blocks[-1]

    engine = Engine()
    with torch.cuda.stream(torch.cuda.Stream()):
        calls = offloaded_calls(read, engine, streamed=True)
        for call in (*calls, *calls):
            call.run()
    expected = [(float(b), float(-b)) for b in range(3)] * 2
    assert engine.seen == expected
    # The weights of a block: 2,000 and 6 bytes at multiples of 256, locked at that size.
    assert set(host_device.registered.values()) == {2048 + 256}
    assert {t.numel() for t, _ in host_device.recorded} == {2048 + 256}
    assert len(host_device.recorded) == 2
    del call
    calls.clear()
    blocks.clear()
    gc.collect()
    assert not host_device.registered


def test_an_offloaded_block_is_one_copy_of_one_piece(
    weights: dict[str, torch.Tensor], host_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    feign_cuda(monkeypatch, host_device)
    calls = offloaded_calls(
        lambda names: HostBlock({n: weights[n] for n in names}, pinned=True),
        Engine(),
        streamed=True,
    )
    calls[0].run()
    host_device.reset_counts()
    calls[1]._lane.release(1)  # fetches block 2, which nobody holds
    assert host_device.counts["copies"] == 1
    assert host_device.largest == 2048 + 256


def test_a_block_is_unlocked_once_every_gpu_has_done_its_copies(
    weights: dict[str, torch.Tensor], host_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    feign_cuda(monkeypatch, host_device)
    done: list[Any] = []
    flags: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda place=None: done.append(place))
    feigned = SimpleNamespace(
        cudaHostRegister=lambda *given: flags.append(given[2]) or 0,
        cudaHostUnregister=lambda address: done.append("unlocked"),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: feigned)
    block = HostBlock({n: weights[n] for n in names(0)}, pinned=True)
    block.copy_to(torch.empty(2304, dtype=torch.uint8, device=PLACE))
    del block
    gc.collect()
    assert done == [torch.device("cpu"), "unlocked"]
    assert flags == [1]  # for every GPU's copies, not the current one's alone


def test_memory_that_cannot_be_locked_is_an_error_of_ours(
    weights: dict[str, torch.Tensor], host_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    feign_cuda(monkeypatch, host_device)
    refusing = SimpleNamespace(cudaHostRegister=lambda *_: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    with pytest.raises(
        RequestError, match=r"--offload: 2304 bytes .* page-locked \(CUDA error 2\)"
    ):
        HostBlock({n: weights[n] for n in names(0)}, pinned=True)


def test_sessions_share_a_block_in_host_memory_that_no_lora_changes(tiny_bundle: Bundle) -> None:
    first, second = (Model(tiny_bundle, "onnxruntime", OFFLOAD) for _ in range(2))
    other = first.with_weights({CHANGED: tiny_bundle.tensor(CHANGED) + 0.5})
    shared, own = (["blocks.0.attn1.to_q.weight"], [CHANGED])
    assert first._host_block(shared) is second._host_block(shared)
    assert first._host_block(own) is not other._host_block(own)


def test_baked_bundles_and_cpu_backends_refuse_what_they_cannot(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match="--cuda-graphs: mean nothing to onnxruntime"):
        Model(tiny_bundle, "onnxruntime", options=DeviceOptions(cuda_graphs=True))
    bundle = Bundle(tiny_bundle.folder)
    bundle.manifest = bundle.manifest.model_copy(update={"weights": "baked"})
    with pytest.raises(RequestError, match=r"--offload: can't be had.*--weights inputs"):
        Model(bundle, "onnxruntime", options=OFFLOAD)


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
