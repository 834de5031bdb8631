# SPDX-License-Identifier: Apache-2.0
"""LoHa and LoKr as plain LoRA: the update that PEFT computes, and the pictures of a merged model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from test_lora import output, pipeline

from freewheel.bundle.reader import Bundle
from freewheel.core.errors import RequestError
from freewheel.runtime.low_rank import FACTORS, plain_lora
from freewheel.runtime.pipeline.attach import attach

CONFIGS: dict[str, Any] = {
    "LoHa": LoHaConfig(r=2, alpha=3, target_modules=["to_q"]),
    "LoHa of a high rank": LoHaConfig(r=8, alpha=3, target_modules=["to_q"]),
    "LoKr": LoKrConfig(r=2, alpha=3, decompose_factor=4, target_modules=["to_q"]),
    "LoKr of two products": LoKrConfig(r=1, alpha=3, decompose_both=True, target_modules=["to_q"]),
    "LoKr of a whole factor": LoKrConfig(r=64, alpha=64, target_modules=["to_q"]),
}


def made(kind: str, rows: int, columns: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return factors as PEFT has them for a layer, with LyCORIS' alpha, and PEFT's update."""
    holder = nn.ModuleDict({"to_q": nn.Linear(columns, rows)})
    layer: Any = inject_adapter_in_model(CONFIGS[kind], holder)["to_q"]
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in layer.named_parameters():
        factor = next((f for f in FACTORS if f"{f}." in f"{name}."), None)
        if factor is None:
            continue
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
        state[factor] = parameter.detach().clone()
    return {**state, "alpha": torch.tensor(float(CONFIGS[kind].alpha))}, layer.get_delta_weight(
        "default"
    ).detach()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("rows", "columns"), [(32, 24), (24, 48)])
def test_a_pair_is_pefts_update(kind: str, rows: int, columns: int) -> None:
    state, expected = made(kind, rows, columns, 0)
    for prefix in ("lora_unet_blocks_0_self_attn_q", "transformer.blocks.0.attn1.to_q"):
        found = plain_lora({f"{prefix}.{n}": t for n, t in state.items()}, "x")
        names = sorted(n.removeprefix(f"{prefix}.") for n in found)
        down, up, *scale = (found[f"{prefix}.{n}"] for n in _names(names))
        factor = float(scale[0]) / down.shape[0] if scale else 1.0
        assert down.shape[0] <= min(rows, columns)
        torch.testing.assert_close(factor * up @ down, expected, rtol=1e-4, atol=1e-5)


def _names(names: list[str]) -> list[str]:
    plain = ["lora_A.weight", "lora_B.weight"]
    wanted = plain if plain[0] in names else ["lora_down.weight", "lora_up.weight", "alpha"]
    assert sorted(wanted) == names
    return wanted


def test_other_tensors_stay() -> None:
    state = {"a.lora_down.weight": torch.ones(1, 2), "a.alpha": torch.tensor(1.0)}
    assert plain_lora(state, "x").keys() == state.keys()


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
@pytest.mark.parametrize("layout", ["ComfyUI", "diffusers"])
def test_a_file_changes_the_weights_by_pefts_update(
    tiny_bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path, kind: str, layout: str
) -> None:
    plain, attached = pipeline(tiny_checkpoint), pipeline(tiny_checkpoint)
    before = output(plain)
    prefixes = {
        "ComfyUI": "diffusion_model.blocks.{}.self_attn.q",
        "diffusers": "transformer.blocks.{}.attn1.to_q",
    }
    state = {}
    for index, block in enumerate(plain.transformer.blocks):
        own, update = made(kind, *block.attn1.to_q.weight.shape, index)
        place = prefixes[layout].format(index)
        state |= {f"{place}.{n}": t for n, t in own.items()}
        block.attn1.to_q.weight.data += 0.5 * update
    save_file(state, tmp_path / "lora.safetensors")
    attach(attached, tiny_bundle, "off", loras=[f"{tmp_path / 'lora.safetensors'}:0.5"])
    expected = output(plain)
    assert float((expected - before).abs().max()) > 1e-2
    torch.testing.assert_close(output(attached), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hada_w2_b": None}, "has no 'hada_w2_b'"),
        ({"hada_w2_b": torch.ones(2, 7)}, "can't be multiplied out"),
    ],
)
def test_a_broken_file_is_refused_by_its_module(
    change: dict[str, Tensor | None], message: str
) -> None:
    state, _ = made("LoHa", 32, 24, 0)
    given = {f"m.{n}": t for n, t in {**state, **change}.items() if t is not None}
    with pytest.raises(RequestError, match=f"module 'm'.*{message}"):
        plain_lora(given, "--lora 'x'")
