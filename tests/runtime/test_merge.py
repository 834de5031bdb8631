"""Merges of low-rank changes: PEFT's own, and the same however a weight is shared out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from freewheel.runtime import merge
from freewheel.runtime.merge import LowRank, merged_weight

BASES = {"linear": lambda: nn.Linear(24, 40), "convolution": lambda: nn.Conv3d(6, 10, (1, 2, 2))}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapted(base: nn.Module, kinds: list[str]) -> Any:
    """Return PEFT's layer with adapters of some kinds, of random factors and strengths."""
    model = nn.ModuleDict({"layer": base})
    for index, kind in enumerate(kinds):
        config = LoraConfig(
            r=3 + index, lora_alpha=5, target_modules=["layer"], use_dora=kind == "DoRA"
        )
        inject_adapter_in_model(config, model, adapter_name=str(index))
    layer: Any = model["layer"]
    for index in range(len(kinds)):
        for side in (layer.lora_A, layer.lora_B):
            weight = side[str(index)].weight
            weight.data = 0.3 * random(*weight.shape, seed=index)
        if kinds[index] == "DoRA":
            magnitude = layer.lora_magnitude_vector[str(index)].weight
            magnitude.data = magnitude.data * (1 + 0.2 * random(*magnitude.shape).abs())
    layer.set_adapter([str(index) for index in range(len(kinds))])
    return layer


def changes(layer: Any) -> list[LowRank]:
    return [
        LowRank(
            layer.lora_B[a].weight * layer.scaling[a],
            layer.lora_A[a].weight,
            layer.lora_magnitude_vector[a].weight if a in layer.lora_magnitude_vector else None,
        )
        for a in layer.active_adapters
    ]


@pytest.mark.parametrize("elements", [1, 100, 1 << 18], ids=["a row", "some rows", "all"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kinds", [["LoRA"], ["DoRA"], ["LoRA", "DoRA"], ["DoRA", "LoRA", "DoRA"]])
def test_a_merge_is_pefts(
    kinds: list[str], base: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "ELEMENTS", elements)
    torch.manual_seed(0)
    layer = adapted(BASES[base](), kinds)
    plain = layer.get_base_layer().weight.detach().clone()
    found = merged_weight(plain, changes(layer))
    assert torch.equal(plain, layer.get_base_layer().weight)
    layer.merge()
    torch.testing.assert_close(found, layer.get_base_layer().weight.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, plain, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_is_rounded_once(dtype: torch.dtype) -> None:
    weight = random(40, 24).to(dtype)
    two = [LowRank(random(40, 4, seed=i), random(4, 24, seed=2 + i)) for i in range(2)]
    exact = weight.double() + sum(c.up.double() @ c.down.double() for c in two)
    found = merged_weight(weight, two)
    assert found.dtype == dtype
    # float32's rounding before the last one is all that lies between
    torch.testing.assert_close(
        found.double(), exact, rtol=0.5 * torch.finfo(dtype).eps + 1e-5, atol=1e-5
    )


class Allocated(TorchDispatchMode):
    """Collects the bytes of every result, by where it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            self.bytes[storage.data_ptr()] = storage.nbytes()
        return result


@pytest.mark.parametrize("magnitude", [None, random(4096)], ids=["LoRA", "DoRA"])
def test_memory_is_that_of_the_merged_weight(magnitude: Tensor | None) -> None:
    """Neither the update nor the weight is there in float32 as a whole."""
    weight = torch.zeros(4096, 1024, dtype=torch.bfloat16)
    change = LowRank(random(4096, 4), random(4, 1024), magnitude)
    with Allocated() as allocated:
        merged = merged_weight(weight, [change])
    others = allocated.bytes.keys() - {t.untyped_storage().data_ptr() for t in (weight, merged)}
    assert merged.untyped_storage().data_ptr() in allocated.bytes
    assert max(allocated.bytes[place] for place in others) == 4 * merge.ELEMENTS
