"""LoRA files as users have them: applied by the family's own loader, or refused by name."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file

from freewheel.bundle.reader import Bundle
from freewheel.core.errors import RequestError
from freewheel.runtime.lora import check_parts, parse_lora
from freewheel.runtime.pipeline.adapters import Adapters
from freewheel.runtime.pipeline.attach import attach

Write = Callable[..., str]

KOHYA = {"self_attn": "attn1", "cross_attn": "attn2"}
PARTS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
FEED_FORWARD = {"ffn_0": "ffn.net.0.proj", "ffn_2": "ffn.net.2"}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def save(state: dict[str, torch.Tensor], name: str = "lora") -> str:
        path = tmp_path / f"{name}.safetensors"
        save_file(state, path)
        return str(path)

    return save


def pipeline(checkpoint: Path) -> Any:
    """The transformer alone: no text is encoded here."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    transformer = WanTransformer3DModel.from_pretrained(checkpoint)
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def output(pipe: Any) -> torch.Tensor:
    pipe.scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 3, 4, 6, generator=generator)
    states = torch.randn(1, 5, 24, generator=generator)
    with torch.no_grad():
        return pipe.transformer(latents, pipe.scheduler.timesteps[:1], states).sample.clone()


def kohya(model: Any, *, with_feed_forward: bool) -> dict[str, torch.Tensor]:
    """What musubi-tuner writes."""
    generator = torch.Generator().manual_seed(0)
    names = {
        f"{ours}_{part}": f"{theirs}.{module}"
        for ours, theirs in KOHYA.items()
        for part, module in PARTS.items()
    }
    if with_feed_forward:
        names |= FEED_FORWARD
    state = {}
    for index, block in enumerate(model.blocks):
        for ours, theirs in names.items():
            rows, columns = block.get_submodule(theirs).weight.shape
            place = f"lora_unet_blocks_{index}_{ours}"
            state[f"{place}.lora_down.weight"] = torch.randn(4, columns, generator=generator)
            state[f"{place}.lora_up.weight"] = torch.randn(rows, 4, generator=generator)
            state[f"{place}.alpha"] = torch.tensor(2.0)
    return state


def test_a_kohya_file_gives_what_diffusers_gives(
    tiny_bundle: Bundle, tiny_checkpoint: Path, write: Write
) -> None:
    plain, attached = pipeline(tiny_checkpoint), pipeline(tiny_checkpoint)
    base = output(plain)
    file = write(kohya(plain.transformer, with_feed_forward=True))
    plain.load_lora_weights(file)
    plain.set_adapters("default_0", 0.5)
    expected = output(plain)
    attach(attached, tiny_bundle, "off", backend="onnxruntime", loras=[f"{file}:0.5"])
    assert (output(attached) - expected).abs().mean() < 1e-4 * expected.abs().mean()
    assert (expected - base).abs().mean() > 0.01 * base.abs().mean()


def test_what_diffusers_converters_can_not_take_is_refused_by_layout_and_module(
    tiny_bundle: Bundle, tiny_checkpoint: Path, write: Write
) -> None:
    pipe = pipeline(tiny_checkpoint)
    own = pipe.transformer
    module = "diffusion_model.blocks.0.self_attn.q"
    weight = torch.ones(4, 4)
    cases = {
        r"tensor 'blocks_0_ffn_0.lora_down.weight'.*converts this layout only whole": kohya(
            own, with_feed_forward=False
        ),
        r"parameter 'blocks.0.attn1.to_q.weight': .*shape \[4, 4\].*has it as \[32, 32\]": {
            f"{module}.diff": weight
        },
        r"parameter 'blocks.9.attn1.to_q.weight': .*has no such parameter": {
            f"{module.replace('0', '9')}.diff": weight
        },
        r"blocks.0.self_attn.q'.*is LoHa of a convolution, which can't be applied": {
            f"{module}.hada_t1": weight.clone(),
        },
        r"self_attn.q'.*can't be multiplied out: has no 'hada_w2_a'": {
            f"{module}.hada_w1_a": weight.clone(),
            f"{module}.hada_w1_b": weight.clone(),
        },
        r"blocks.0.self_attn.q'.*kohya's DoRA": {f"{module}.dora_scale": weight},
        r"module 'text_encoder.layers.0.q'.*belongs to the text encoder": {
            "text_encoder.layers.0.q.lora_A.weight": weight.clone(),
            "text_encoder.layers.0.q.lora_B.weight": weight.clone(),
        },
        r"'blocks.0.attn1.to_q.weight' is no LoRA tensor": {"blocks.0.attn1.to_q.weight": weight},
    }
    for message, state in cases.items():
        with pytest.raises(RequestError, match=message):
            attach(pipe, tiny_bundle, "off", loras=[write(state)])
        assert pipe.transformer is own


def test_a_header_that_names_no_modules_is_refused_by_what_it_lacks(
    tiny_bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pipe, path = pipeline(tiny_checkpoint), tmp_path / "header.safetensors"
    module = "transformer.blocks.0.attn1.to_q"
    pair = {
        f"{module}.lora_{side}.weight": torch.ones(4, 32).reshape(shape)
        for side, shape in (("A", (4, 32)), ("B", (32, 4)))
    }
    text = json.dumps({"transformer.lora_alpha": 16, "transformer.r": 4})
    save_file(pair, path, {"lora_adapter_metadata": text})
    with pytest.raises(
        RequestError, match=r"header 'lora_adapter_metadata': names no 'target_modules'"
    ):
        attach(pipe, tiny_bundle, "off", loras=[str(path)])


def distilled(model: Any) -> dict[str, torch.Tensor]:
    """Return the pairs of LightX2V's distilled LoRAs."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for ours, theirs in KOHYA.items():
        for part, module in PARTS.items():
            for index, block in enumerate(model.blocks):
                rows, columns = block.get_submodule(f"{theirs}.{module}").weight.shape
                place = f"diffusion_model.blocks.{index}.{ours}.{part}"
                state[f"{place}.lora_down.weight"] = torch.randn(2, columns, generator=generator)
                state[f"{place}.lora_up.weight"] = torch.randn(rows, 2, generator=generator)
    return state


DIFFERENCES = {
    "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
    "blocks.0.norm3.diff": "blocks.0.norm2.weight",
    "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
    "blocks.2.cross_attn.norm_k.diff": "blocks.2.attn2.norm_k.weight",
    "blocks.1.diff_m": "blocks.1.scale_shift_table",
    "blocks.1.ffn.0.diff": "blocks.1.ffn.net.0.proj.weight",
    "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
    "head.diff_m": "scale_shift_table",
    "head.head.diff": "proj_out.weight",
}
"""LightX2V's names, in which diffusers' loader knows the first alone → the model's parameters."""


@pytest.mark.parametrize("with_pairs", [True, False], ids=["pairs too", "differences alone"])
def test_differences_are_added_as_their_authors_name_them(
    tiny_bundle: Bundle, tiny_checkpoint: Path, write: Write, with_pairs: bool
) -> None:
    plain, attached = pipeline(tiny_checkpoint), pipeline(tiny_checkpoint)
    state = distilled(plain.transformer) if with_pairs else {}
    if with_pairs:
        plain.load_lora_weights(write(state, "pairs"), adapter_name="a")
        plain.set_adapters("a", 0.5)
    before = output(plain)
    generator = torch.Generator().manual_seed(1)
    parameters = {n.replace(".base_layer", ""): p for n, p in plain.transformer.named_parameters()}
    for ours, theirs in DIFFERENCES.items():
        difference = 0.3 * torch.randn(parameters[theirs].shape, generator=generator)
        state[f"diffusion_model.{ours}"] = difference
        parameters[theirs].data += 0.5 * difference
    expected = output(plain)
    assert (expected - before).abs().mean() > 0.01 * expected.abs().mean()
    attach(attached, tiny_bundle, "off", backend="onnxruntime", loras=[f"{write(state)}:0.5"])
    assert (output(attached) - expected).abs().mean() < 1e-4 * expected.abs().mean()
    assert attached.transformer.freewheel.is_fused is False, "they are part of the weights"


def test_arguments_of_the_loader_are_used_or_refused(
    tiny_bundle: Bundle, tiny_checkpoint: Path
) -> None:
    pipe = pipeline(tiny_checkpoint)
    attach(pipe, tiny_bundle, "off", backend="onnxruntime")
    name = "blocks.0.attn1.to_q"
    state = {
        f"transformer.{name}.lora_A.weight": torch.ones(2, 32),
        f"transformer.{name}.lora_B.weight": torch.ones(32, 2),
    }
    base = output(pipe)
    load = pipe.transformer.load_lora_adapter
    plain = WanTransformer3DModel.from_pretrained(tiny_checkpoint)
    alphas = {f"transformer.{name}.alpha": 0.5}
    for model in (pipe.transformer, plain):
        model.load_lora_adapter(state, network_alphas=alphas, adapter_name="a")
    scaled = output(pipe)
    attached, pipe.transformer = pipe.transformer, plain
    expected = output(pipe)
    pipe.transformer = attached
    assert (scaled - expected).abs().mean() < 1e-4 * expected.abs().mean()
    assert not torch.equal(scaled, base)
    with pytest.raises(ValueError, match="already in use"):
        load(state, adapter_name="a")
    load({k: 3 * v for k, v in state.items()}, adapter_name="a", hotswap=True)
    assert not torch.equal(output(pipe), scaled)
    with pytest.raises(
        RequestError, match=r"module 'text_encoder.q'.*is not part of 'transformer'"
    ):
        load({**state, "text_encoder.q.lora_A.weight": torch.ones(2, 2)}, adapter_name="b")
    with pytest.raises(RequestError, match=r"module 'blocks.0.attn1.to_q'.*one half of a pair"):
        load(dict(list(state.items())[:1]), adapter_name="b")
    with pytest.raises(RequestError, match=r"'blocks.0.norm2.weight'.*is to be replaced"):
        pipe.transformer.load_state_dict({"blocks.0.norm2.weight": torch.ones(32)}, strict=False)
    with pytest.raises(RequestError, match=r"load it with pipe.load_lora_weights"):
        load("file.safetensors")
    pipe.transformer.unload_lora()
    assert torch.equal(output(pipe), base)


def test_a_swap_frees_what_was_merged_before_and_copies_nothing(
    tiny_bundle: Bundle, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(tiny_checkpoint)
    transformer = attach(pipe, tiny_bundle, "off", backend="onnxruntime")
    name, merge = "blocks.0.attn1.to_q", Adapters.merged
    state = {
        f"transformer.{name}.lora_A.weight": torch.ones(2, 32),
        f"transformer.{name}.lora_B.weight": torch.ones(32, 2),
    }
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def merged(self: Adapters) -> dict[str, torch.Tensor]:
        alive.append(sum(tensor() is not None for tensor in made))
        found = merge(self)
        made.append(weakref.ref(found[f"{name}.weight"]))
        return found

    monkeypatch.setattr(Adapters, "merged", merged)
    pipe.load_lora_weights(state, adapter_name="a")
    for scale in (1.0, 0.5, 0.25):
        pipe.set_adapters("a", scale)
        output(pipe)
        assert transformer.session.model.tensor(f"{name}.weight") is made[-1]()
    assert alive == [0, 0, 0]


def test_a_second_attach_takes_the_place_of_the_first_unless_that_has_fused_adapters(
    tiny_bundle: Bundle, tiny_checkpoint: Path
) -> None:
    pipe = pipeline(tiny_checkpoint)
    expected = output(pipe)
    first = attach(pipe, tiny_bundle, "off", backend="onnxruntime")
    second = attach(pipe, tiny_bundle, "off", backend="onnxruntime")
    assert pipe.transformer is second.module is not first.module
    assert (output(pipe) - expected).abs().mean() < 1e-4 * expected.abs().mean()
    name = "transformer.blocks.0.attn1.to_q"
    factors = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2)}
    pipe.load_lora_weights({f"{name}.{n}.weight": t for n, t in factors.items()})
    pipe.fuse_lora()
    with pytest.raises(RequestError, match=r"has adapters fused into it; call pipe.unfuse_lora"):
        attach(pipe, tiny_bundle, "off", backend="onnxruntime")


def test_scale_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a:b.safetensors"  # a colon of its own
    save_file({"transformer.q.lora_A.weight": torch.ones(2, 2)}, path)
    assert parse_lora(str(path)).scale == 1.0
    assert parse_lora(f"{path}:0.8").scale == 0.8
    second = parse_lora(f"transformer_2={path}:0.8")
    assert (second.part, second.path, second.scale) == ("transformer_2", str(path), 0.8)
    check_parts([second], ["transformer", "transformer_2"])
    with pytest.raises(
        RequestError, match=r"is of 'transformer_2', and the bundle has transformer"
    ):
        check_parts([second], ["transformer"])
    with pytest.raises(RequestError, match=r"scale 'much' is not a number; write FILE:0.8"):
        parse_lora(f"{path}:much")


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(RequestError, match="can't be read"):
        parse_lora(str(path))
