# SPDX-License-Identifier: Apache-2.0
"""What a converter makes of tensors is learnt from shapes, and equals what it makes of the tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from freewheel.bundle.safetensors_header import StoredTensor, read_header
from freewheel.compiler.checkpoints import conversion
from freewheel.compiler.checkpoints.conversion import convert
from freewheel.compiler.checkpoints.sources import MadeTensor, Weight, read_weight

State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        "qkv": torch.randn(12, 5, generator=generator),
        "bias": torch.randn(12, generator=generator).to(torch.float16),
        "plain": torch.randn(3, generator=generator),
    }


@pytest.fixture
def stored(state: State, tmp_path: Path) -> dict[str, StoredTensor]:
    save_file(state, tmp_path / "x.safetensors")
    return read_header(tmp_path / "x.safetensors")


def renamed(state: State) -> State:
    return {f"new.{n}": state.pop(n) for n in list(state)}


def chunked(state: State) -> State:
    q, k, v = state.pop("qkv").chunk(3, dim=0)
    return {"q": q, "k": torch.cat([k]), "v": v.clone()[1:].contiguous()}


def split(state: State) -> State:
    q, rest = torch.split(state.pop("bias"), (3, 9))
    return {"q": q, "rest": rest.view(3, 3)}


def swapped(state: State) -> State:
    first, second = state.pop("qkv").chunk(2)
    return {"swapped": torch.cat([second, first])}


def columns(state: State) -> State:
    qkv = state.pop("qkv")
    copied = torch.cat([qkv[:, 2:4]])
    return {"columns": qkv[:, 1:3], "copied": copied, "turned": state.pop("bias").view(3, 4).T}


def computed(state: State) -> State:
    return {"sum": state["qkv"].float().sum(1) + 1, "half": state["plain"].to(torch.bfloat16)}


CASES = [
    (renamed, True),
    (chunked, True),
    (split, True),
    (swapped, False),
    (columns, False),
    (computed, False),
]


@pytest.mark.parametrize(("converter", "lie"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_weights_equal_what_the_converter_makes_of_tensors(
    state: State, stored: dict[str, StoredTensor], converter: Callable[[State], State], lie: bool
) -> None:
    found, _ = convert(stored, converter)
    expected = converter(dict(state))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert isinstance(found[name], StoredTensor) == lie, name
        assert found[name].shape == tuple(tensor.shape)
        read = read_weight(found[name])
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor), name


def test_no_tensor_is_read_to_learn_it(
    stored: dict[str, StoredTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(weight: Weight) -> Tensor:
        raise AssertionError("was read")

    monkeypatch.setattr(conversion, "read_weight", refuse)
    for converter, _ in CASES:
        convert(stored, converter)


def test_a_source_is_read_once_for_each_tensor_made_of_it(
    stored: dict[str, StoredTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def spy(weight: StoredTensor) -> Tensor:
        read.append(weight.name)
        return read_weight(weight)

    monkeypatch.setattr(conversion, "read_weight", spy)
    found, _ = convert(stored, swapped)
    read_weight(found["swapped"])
    assert read == ["qkv"]


def test_parts_of_a_made_tensor_are_made_and_keep_its_reason() -> None:
    whole = torch.arange(12.0)
    made = MadeTensor("bfloat16", (12,), "scaled float8", lambda: whole)
    found, _ = convert({"qkv": made}, lambda s: dict(zip("qkv", s["qkv"].chunk(3), strict=True)))
    assert torch.equal(read_weight(found["k"]), whole[4:8])
    assert isinstance(found["k"], MadeTensor)
    assert (found["k"].dtype, found["k"].reason) == ("bfloat16", "scaled float8")


def test_what_is_left_aside_is_told(stored: dict[str, StoredTensor]) -> None:
    _, aside = convert(stored, lambda state: {"q": state["qkv"][:4], "plain": state["plain"]})
    assert aside == ["bias"]
    _, aside = convert(stored, swapped)
    assert set(aside) == {"bias", "plain"}


def test_a_converter_that_writes_is_refused(stored: dict[str, StoredTensor]) -> None:
    with pytest.raises(NotImplementedError, match=r"writes into a tensor: aten.mul_"):
        convert(stored, lambda state: {"q": state["qkv"].mul_(2)})
