"""LoRA files: what is read from them, and the weights that come out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from freewheel.bundle.reader import Bundle
from freewheel.configs.errors import RequestError
from freewheel.runtime.lora import Lora, lora_from_state_dict, merge_loras, read_lora

MODULE = "blocks.0.attn1.to_q"


def halves(rank: int = 4, width: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {
        f"transformer.{MODULE}.lora_A.weight": torch.randn(rank, width, generator=generator),
        f"transformer.{MODULE}.lora_B.weight": torch.randn(width, rank, generator=generator),
    }


def update_of(state: dict[str, torch.Tensor]) -> torch.Tensor:
    down, up = state.values()
    return up @ down


def test_update_is_scale_times_alpha_over_rank(tiny_bundle: Bundle) -> None:
    state = halves()
    lora = lora_from_state_dict(
        "style", {**state, f"transformer.{MODULE}.alpha": torch.tensor(2.0)}, scale=0.5
    )
    found = merge_loras(tiny_bundle, [lora])
    assert list(found) == [f"{MODULE}.weight"]
    expected = tiny_bundle.tensor(f"{MODULE}.weight") + 0.5 * (2.0 / 4) * update_of(state)
    torch.testing.assert_close(found[f"{MODULE}.weight"], expected)


def test_several_add_up_and_the_bundle_stays_as_it_was(tiny_bundle: Bundle) -> None:
    before = tiny_bundle.tensor(f"{MODULE}.weight").clone()
    first, second = halves(4), halves(2)
    loras = [lora_from_state_dict("a", first), lora_from_state_dict("b", second, scale=-1.0)]
    found = merge_loras(tiny_bundle, loras)[f"{MODULE}.weight"]
    torch.testing.assert_close(found, before + update_of(first) - update_of(second))
    torch.testing.assert_close(tiny_bundle.tensor(f"{MODULE}.weight"), before, rtol=0, atol=0)


def test_a_bias_is_added(tiny_bundle: Bundle) -> None:
    state = {**halves(), f"transformer.{MODULE}.lora_B.bias": torch.ones(32)}
    found = merge_loras(tiny_bundle, [lora_from_state_dict("style", state, scale=0.25)])
    expected = tiny_bundle.tensor(f"{MODULE}.bias") + 0.25
    torch.testing.assert_close(found[f"{MODULE}.bias"], expected)


def test_no_lora_changes_no_weight(tiny_bundle: Bundle) -> None:
    assert merge_loras(tiny_bundle, []) == {}
    assert merge_loras(tiny_bundle, [Lora("empty", 1.0, {}, {})]) == {}


def test_half_a_pair_is_refused() -> None:
    state = dict(list(halves().items())[:1])
    with pytest.raises(RequestError, match=rf"module '{MODULE}'.*one half of a pair"):
        lora_from_state_dict("style", state)
    with pytest.raises(RequestError, match="holds no"):
        lora_from_state_dict("style", {"weight": torch.zeros(2)})


def test_scale_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a:b.safetensors"  # a colon of its own
    save_file(halves(), path)
    assert read_lora(str(path)).scale == 1.0
    assert read_lora(f"{path}:0.8").scale == 0.8
    with pytest.raises(RequestError, match=r"scale 'much' is not a number; write FILE:0.8"):
        read_lora(f"{path}:much")


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(RequestError, match="can't be read"):
        read_lora(str(path))
