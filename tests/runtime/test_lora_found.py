# SPDX-License-Identifier: Apache-2.0
"""LoRAs on models whose cut was found: the layouts that users have, equal to diffusers with the same file."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "compiler" / "cut"))
sys.path.insert(0, str(Path(__file__).parents[1] / "compiler" / "models"))
from cases import CASES
from chain import relative

from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut.prove import random_weights
from freewheel.core.errors import RequestError
from freewheel.runtime.pipeline.attach import attach

State = dict[str, Tensor]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out", "net.0.proj", "net.2"]
PIPELINES = {"qwen_image": QwenImagePipeline, "sd35": StableDiffusion3Pipeline}


@pytest.fixture(scope="module", params=PIPELINES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    import diffusers

    kind, config = CASES[name]
    made = getattr(diffusers, kind)(**config)
    random_weights(made)
    return made.eval()


@pytest.fixture(scope="module")
def bundle(
    model: Any, tmp_path_factory: pytest.TempPathFactory, build_bundle: Callable[..., Bundle]
) -> Bundle:
    folder = tmp_path_factory.mktemp("found") / "model"
    model.save_pretrained(folder)
    return build_bundle(folder, backends=("onnxruntime",))


def pipeline(name: str, model: Any) -> Any:
    """The transformer alone: no text is encoded here."""
    own = copy.deepcopy(model)
    if name == "qwen_image":
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        return QwenImagePipeline(scheduler, None, None, None, own)  # type: ignore[arg-type]  # parts not needed
    return StableDiffusion3Pipeline(own, FlowMatchEulerDiscreteScheduler(), *[None] * 7)  # type: ignore[arg-type]  # parts not needed


def latents(name: str, pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    config = pipe.transformer.config
    embeds = torch.randn(1, 6, config.joint_attention_dim, generator=generator)
    more: dict[str, Any] = {"prompt_embeds_mask": torch.ones(1, 6, dtype=torch.int64)}
    if name != "qwen_image":
        pooled = torch.randn(1, config.pooled_projection_dim, generator=generator)
        more = {"pooled_prompt_embeds": pooled, "guidance_scale": 1.0}
    pipe.set_progress_bar_config(disable=True)
    found: Tensor = pipe(
        prompt_embeds=embeds,
        height=64,
        width=64,
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(1),
        return_dict=False,
        **more,
    )[0]
    return found.clone()


def trained(model: Any, **options: Any) -> tuple[State, LoraConfig]:
    """Return an adapter of every kind of layer, as PEFT names its tensors, and its config."""
    own = copy.deepcopy(model)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS, **options)
    own.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in own.named_parameters():
        if "lora_A" in key or "lora_B" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        elif "lora_magnitude" in key:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
    state = get_peft_model_state_dict(own)
    return {n: t.detach().clone().contiguous() for n, t in state.items()}, config


def saved_by_diffusers(name: str, state: State, config: LoraConfig, folder: Path) -> str:
    metadata = {"transformer_lora_adapter_metadata": config.to_dict()}
    PIPELINES[name].save_lora_weights(folder, transformer_lora_layers=state, **metadata)
    return str(folder / "pytorch_lora_weights.safetensors")


def with_alpha(state: State, prefix: str, rename: Callable[[str], str]) -> State:
    """kohya's and ComfyUI's names: down, up and alpha."""
    out: State = {}
    for key, tensor in state.items():
        module, _, kind = key.removesuffix(".weight").rpartition(".")
        place = prefix + rename(module)
        out[f"{place}.lora_{'down' if kind == 'lora_A' else 'up'}.weight"] = tensor
        out[f"{place}.alpha"] = torch.tensor(2.0)
    return out


@pytest.mark.parametrize("kind", ["plain", "rank-stabilised", "DoRA"])
def test_an_adapter_of_diffusers_gives_what_diffusers_gives(
    name: str, model: Any, bundle: Bundle, tmp_path: Path, kind: str
) -> None:
    options = {"plain": {}, "rank-stabilised": {"use_rslora": True}, "DoRA": {"use_dora": True}}
    state, config = trained(model, **options[kind])
    check(name, model, bundle, saved_by_diffusers(name, state, config, tmp_path))


def of_layout(layout: str, state: State) -> State:
    if layout == "ComfyUI":
        return with_alpha(state, "diffusion_model.", str)
    # diffusers' converter takes names of attention apart, and no others of a block.
    state = {n: t for n, t in state.items() if ".attn." in n}
    return with_alpha(state, "lora_unet_", lambda module: module.replace(".", "_"))


@pytest.mark.parametrize("layout", ["ComfyUI", "kohya"])
def test_a_file_of_others_gives_what_diffusers_gives_or_is_refused(
    name: str, model: Any, bundle: Bundle, tmp_path: Path, layout: str
) -> None:
    """diffusers' loader of Stable Diffusion 3 knows its own layout alone."""
    save_file(of_layout(layout, trained(model)[0]), tmp_path / "lora.safetensors")
    file = str(tmp_path / "lora.safetensors")
    if name == "qwen_image":
        check(name, model, bundle, file)
        return
    pipe = pipeline(name, model)
    own = pipe.transformer
    refusal = {
        "ComfyUI": "can't be applied",
        "kohya": "module 'lora_unet_transformer_blocks_0_attn_.*is not part of 'transformer'",
    }
    with pytest.raises(RequestError, match=refusal[layout]) as caught:
        attach(pipe, bundle, "off", backend="onnxruntime", loras=[file])
    assert caught.value.hint
    assert pipe.transformer is own


def check(name: str, model: Any, bundle: Bundle, file: str) -> None:
    """Hold a file at 0.5, swapped to 1, disabled and unloaded to diffusers' own."""
    plain, attached = pipeline(name, model), pipeline(name, model)
    base = latents(name, plain)
    plain.load_lora_weights(file, adapter_name="one")
    attach(attached, bundle, "off", backend="onnxruntime")
    attached.load_lora_weights(file, adapter_name="one")
    for scale in (0.5, 1.0):
        for pipe in (plain, attached):
            pipe.set_adapters("one", scale)
        expected = latents(name, plain)
        assert relative(latents(name, attached), expected) < 1e-4, scale
        assert relative(expected, base) > 1e-2
    attached.disable_lora()
    assert relative(latents(name, attached), base) < 1e-4
    attached.enable_lora()
    assert relative(latents(name, attached), expected) < 1e-4
    attached.unload_lora_weights()
    assert relative(latents(name, attached), base) < 1e-4


def test_two_at_once_with_their_weights(
    name: str, model: Any, bundle: Bundle, tmp_path: Path
) -> None:
    plain, attached = pipeline(name, model), pipeline(name, model)
    state, config = trained(model)
    other = {n: t.flip(0) for n, t in state.items()}
    files = [
        saved_by_diffusers(name, s, config, tmp_path / key)
        for key, s in (("a", state), ("b", other))
    ]
    for key, file in zip("ab", files, strict=True):
        plain.load_lora_weights(file, adapter_name=key)
    plain.set_adapters(["a", "b"], [0.7, 0.4])
    loras = [f"{files[0]}:0.7", f"{files[1]}:0.4"]
    attach(attached, bundle, "off", backend="onnxruntime", loras=loras)
    assert relative(latents(name, attached), latents(name, plain)) < 1e-4
