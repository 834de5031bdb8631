# SPDX-License-Identifier: Apache-2.0
"""FLUX.1, cut: equal to diffusers' transformer in PyTorch and in engines, in a pipeline too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import TOLERANCE, check_attach, check_policies, save, session_output
from chain import Chain, randomised, relative, taken_weights
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import save_file
from torch import Tensor, nn

from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut.declared import Cut
from freewheel.compiler.cut.models import family_of
from freewheel.core.errors import RequestError
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.model import Model
from freewheel.runtime.pipeline.attach import attach
from freewheel.runtime.session import Session

FLUX = family_of("FluxTransformer2DModel", "")
TINY = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
HEADS = {"num_attention_heads": 3, "attention_head_dim": 24, "axes_dims_rope": (4, 12, 8)}
ODD = {
    **TINY,
    **HEADS,
    "guidance_embeds": False,
    "num_layers": 1,
    "num_single_layers": 1,
    "out_channels": 7,
}
GEOMETRIES = [
    pytest.param(TINY, id="dev"),
    pytest.param(ODD, id="all else at once"),
    pytest.param({**TINY, "num_single_layers": 0}, id="no single blocks"),
    *(
        pytest.param(config, id=name, marks=pytest.mark.nightly)
        for name, config in {
            "schnell": {**TINY, "guidance_embeds": False},
            "3 heads of 24": {**TINY, **HEADS},
            "1 + 1": {**TINY, "num_layers": 1, "num_single_layers": 1, "out_channels": 7},
        }.items()
    ),
]
"""A cut takes seconds: everything else at once in every run, one by one nightly."""

SIZES = [(1, 2, 3, 5), (2, 4, 3, 7)]
"""Batch, rows and columns of tokens, text tokens."""


def model_of(config: Mapping[str, Any]) -> Any:
    return randomised(FluxTransformer2DModel(**config))


@pytest.fixture(scope="module")
def cut_of(shared_cut: Callable[..., Cut]) -> Callable[..., Cut]:
    """Return a function that cuts a model as if its checkpoint were float32."""
    return lambda model, precision="float32": shared_cut(FLUX, model.config, precision)


def inputs_of(config: Mapping[str, Any], size: tuple[int, ...]) -> dict[str, Tensor]:
    batch, rows, columns, text = size
    generator = torch.Generator().manual_seed(sum(size))
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {
        "latents": normal(batch, rows * columns, config["in_channels"]),
        "timesteps": torch.tensor([731.0]) / 1000 * 1000,
        "text_states": normal(batch, text, config["joint_attention_dim"]),
        "pooled_states": normal(batch, config["pooled_projection_dim"]),
        "text_ids": torch.zeros(text, 3),
        "image_ids": ids.flatten(0, 1),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = torch.linspace(3.5, 2.0, batch)
    return inputs


def eager(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(
            hidden_states=inputs["latents"],
            encoder_hidden_states=inputs["text_states"],
            pooled_projections=inputs["pooled_states"],
            timestep=inputs["timesteps"].expand(len(inputs["latents"])) / 1000,
            img_ids=inputs["image_ids"],
            txt_ids=inputs["text_ids"],
            guidance=inputs.get("guidance"),
            return_dict=False,
        )[0]
    return output


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of(TINY)


@pytest.fixture(scope="module")
def bundle(model: Any, tmp_path_factory: Any, build_bundle: Callable[..., Bundle]) -> Bundle:
    folder = save(model, tmp_path_factory.mktemp("flux") / "model")
    return build_bundle(folder, ("onnxruntime",))


@pytest.mark.parametrize("config", GEOMETRIES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_chained_segments_equal_the_eager_transformer(
    cut_of: Callable[..., Cut], config: dict[str, Any], size: tuple[int, ...]
) -> None:
    model, inputs = model_of(config), inputs_of(config, size)
    assert relative(Chain(cut_of(model), model).run(inputs), eager(model, inputs)) < 2e-6


def test_every_checkpoint_tensor_is_some_graphs_weight(
    cut_of: Callable[..., Cut], model: Any
) -> None:
    assert taken_weights(cut_of(model)) == set(model.state_dict())


def test_signal_and_feature_are_what_the_transformer_computes(
    cut_of: Callable[..., Cut], model: Any
) -> None:
    inputs, seen = inputs_of(TINY, SIZES[1]), dict[str, Any]()
    first, middle = model.transformer_blocks
    hooks = [
        first.norm1.register_forward_hook(lambda m, i, o: seen.update(modulated=o[0])),
        middle.norm1.register_forward_hook(lambda m, i, o: seen.update(gate=o[1])),
        middle.attn.register_forward_hook(lambda m, i, o: seen.update(attention=o[0])),
    ]
    eager(model, inputs)
    for hook in hooks:
        hook.remove()
    chain = Chain(cut_of(model), model)
    chain.run(inputs)
    assert relative(chain.values["modulated_input"], seen["modulated"]) < 2e-6
    assert chain.cut.feature_block == 1
    gated = seen["attention"] * seen["gate"].unsqueeze(1)
    assert relative(chain.values["feature.1"], gated) < 2e-6


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_bodies_stay_close(
    cut_of: Callable[..., Cut], model: Any, precision: str
) -> None:
    inputs = inputs_of(TINY, SIZES[1])
    found = Chain(cut_of(model, precision), model).run(inputs)
    bound = {"bfloat16": 3e-2, "float16": 4e-3}[precision]
    assert 1e-6 < relative(found, eager(model, inputs)) < bound


def test_engines_equal_the_eager_transformer_at_every_size(model: Any, bundle: Bundle) -> None:
    session = Session(Model(bundle, "onnxruntime"))
    for size in [*SIZES, (1, 5, 4, 9)]:
        inputs = inputs_of(TINY, size)
        found = session_output(session, inputs)
        assert relative(found, eager(model, inputs)) < TOLERANCE, size


def test_branches_keep_text_streams_of_their_own(model: Any, bundle: Bundle) -> None:
    """Of other lengths too: only the image's buffers are shared."""
    session = Session(Model(bundle, "onnxruntime"))
    cond, uncond = inputs_of(TINY, (1, 2, 3, 5)), inputs_of(TINY, (1, 2, 3, 8))
    session.begin(torch.tensor([731.0, 500.0]))
    expected = {}
    for step, timestep in enumerate(session.timesteps):
        for branch, inputs in (("cond", cond), ("uncond", uncond)):
            names = [n for n, i in bundle.manifest.inputs.items() if i.runs == "prompt"]
            session.set_prompt(branch, {n: inputs[n] for n in names})
            found = session.step(branch, step, {"latents": cond["latents"]})
            given = {**inputs, "latents": cond["latents"], "timesteps": timestep.reshape(1)}
            assert relative(found, eager(model, given)) < TOLERANCE, (branch, step)
            expected[branch] = found.clone()
    assert relative(expected["cond"], expected["uncond"]) > 1e-2


def test_every_policy_runs_and_decides_by_content(bundle: Bundle) -> None:
    check_policies(bundle, inputs_of(TINY, SIZES[1]), "modulated_input")


def test_its_pipeline_takes_the_bundle(model: Any, bundle: Bundle) -> None:
    """Guidance inside the model: one branch, timesteps divided by 1,000 on their way."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, None, None, None, None, None, model)
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "prompt_embeds": torch.randn(1, 6, 12, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 10, generator=generator),
        "height": 48,
        "width": 64,
        "guidance_scale": 3.5,
    }
    by_content = CacheSetting(policy="teacache", parameters={"threshold": 1e6})
    transformer = check_attach(pipe, bundle, arguments, ["taylorseer", by_content])
    assert set(transformer.statistics.branches) == {"cond"}
    assert transformer.session.resolved.signal_name == "modulated_input", "the only one it has"
    with pytest.raises(RequestError, match=r"argument 'ip_adapter_image_embeds'.*is nothing"):
        pipe(
            **arguments,
            num_inference_steps=2,
            joint_attention_kwargs={"ip_adapter_image_embeds": 1},
        )


def test_an_image_to_image_run_begins_within_the_schedule(model: Any, bundle: Bundle) -> None:
    """On latents: an image is the VAE's business."""
    channels = TINY["in_channels"] // 4

    def run(base: FluxPipeline) -> torch.Tensor:
        pipe = FluxImg2ImgPipeline.from_pipe(base, torch_dtype=torch.float32)
        pipe.latent_channels = channels
        pipe.image_processor = VaeImageProcessor(vae_scale_factor=16, vae_latent_channels=channels)
        seed = torch.Generator().manual_seed(0)
        return pipe(
            image=torch.randn(1, channels, 6, 8, generator=seed),
            strength=0.6,
            num_inference_steps=10,
            prompt_embeds=torch.randn(1, 6, 12, generator=seed),
            height=48,
            width=64,
            pooled_prompt_embeds=torch.randn(1, 10, generator=seed),
            generator=seed,
            output_type="latent",
            return_dict=False,
        )[0]

    scheduler = FlowMatchEulerDiscreteScheduler()
    base = FluxPipeline(scheduler, None, None, None, None, None, copy.deepcopy(model))
    expected = run(base)
    transformer = attach(base, bundle, "off", backend="onnxruntime")
    assert relative(run(base), expected) < TOLERANCE
    assert transformer.statistics.steps == 6


def test_guidance_beside_the_models_own_is_a_second_branch(model: Any, bundle: Bundle) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    base = FluxPipeline(scheduler, None, None, None, None, None, copy.deepcopy(model))

    def run(scale: float) -> torch.Tensor:
        seed = torch.Generator().manual_seed(0)
        embeds = torch.randn(2, 1, 6, 12, generator=seed)
        pooled = torch.randn(2, 1, 10, generator=seed)
        return base(
            prompt_embeds=embeds[0],
            pooled_prompt_embeds=pooled[0],
            negative_prompt_embeds=embeds[1],
            negative_pooled_prompt_embeds=pooled[1],
            true_cfg_scale=scale,
            num_inference_steps=6,
            height=48,
            width=64,
            generator=seed,
            output_type="latent",
            return_dict=False,
        )[0]

    expected = {scale: run(scale) for scale in (1.0, 4.0)}
    transformer = attach(base, bundle, "off", backend="onnxruntime")
    for scale, wanted in expected.items():
        assert relative(run(scale), wanted) < TOLERANCE
        assert len(transformer.statistics.branches) == (2 if scale > 1 else 1)
    assert relative(expected[1.0], expected[4.0]) > 1e-2
    transformer.use("taylorseer")
    run(4.0)
    first, second = transformer.statistics.branches.values()
    assert first.computed == second.computed != [True] * 6


def test_loras_of_flux_layouts_give_what_diffusers_gives(
    model: Any, bundle: Bundle, tmp_path: Path
) -> None:
    """Kohya's fused projections, XLabs' processors, and alphas that diffusers hands over apart."""

    def pipeline() -> Any:
        return FluxPipeline(
            FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, copy.deepcopy(model)
        )

    def output(pipe: Any) -> torch.Tensor:
        seed = torch.Generator().manual_seed(0)
        return pipe(
            prompt_embeds=torch.randn(1, 6, 12, generator=seed),
            num_inference_steps=2,
            height=48,
            width=64,
            pooled_prompt_embeds=torch.randn(1, 10, generator=seed),
            generator=seed,
            output_type="latent",
            return_dict=False,
        )[0]

    block, generator = model.transformer_blocks[0], torch.Generator().manual_seed(1)
    width, inner = block.attn.to_q.in_features, block.attn.to_q.out_features

    def pair(down: str, up: str, rows: int) -> dict[str, torch.Tensor]:
        return {
            down: torch.randn(4, width, generator=generator),
            up: torch.randn(rows, 4, generator=generator),
        }

    fused = "lora_unet_double_blocks_0_img_attn_qkv"
    xlabs = "double_blocks.0.processor.qkv_lora1"
    plain_name = "transformer.transformer_blocks.0.attn.to_q"
    layouts = {
        "kohya": {
            **pair(f"{fused}.lora_down.weight", f"{fused}.lora_up.weight", 3 * inner),
            f"{fused}.alpha": torch.tensor(2.0),
        },
        "xlabs": pair(f"{xlabs}.down.weight", f"{xlabs}.up.weight", 3 * inner),
        "alphas": {
            **pair(f"{plain_name}.lora_A.weight", f"{plain_name}.lora_B.weight", inner),
            f"{plain_name}.alpha": torch.tensor(1.0),
        },
    }
    base = output(pipeline())
    for layout, state in layouts.items():
        file = tmp_path / f"{layout}.safetensors"
        save_file(state, file)
        plain, loaded, given = (pipeline() for _ in range(3))
        attach(loaded, bundle, "off", backend="onnxruntime")
        attach(given, bundle, "off", backend="onnxruntime", loras=[str(file)])
        for pipe in (plain, loaded):
            pipe.load_lora_weights(file)
        expected = output(plain)
        assert relative(base, expected) > 1e-3, layout
        for pipe in (loaded, given):
            assert relative(output(pipe), expected) < 10 * TOLERANCE, layout


class Reused(nn.Module):
    """One of the blocks between: on a reused step all of them add what they did at the last computed one."""

    def __init__(self, block: nn.Module, known: dict[str, Any], place: str) -> None:
        super().__init__()
        self.block, self.known, self.place = block, known, place

    def forward(
        self, *, hidden_states: Tensor, encoder_hidden_states: Tensor, **given: Any
    ) -> tuple[Tensor, Tensor]:
        now = (encoder_hidden_states, hidden_states)
        if self.known["reuses"]:
            return (
                tuple(map(torch.add, now, self.known["residual"])) if self.place == "first" else now
            )
        if self.place == "first":
            self.known["before"] = now
        text, hidden = self.block(
            hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **given
        )
        self.known["residual"] = tuple(map(torch.sub, (text, hidden), self.known["before"]))
        return text, hidden


def test_last_blocks_read_the_text_that_the_cached_ones_would_have_left(
    tmp_path: Path, build_bundle: Callable[..., Bundle]
) -> None:
    """One block of two streams always runs, and the last two of one: another stage than the first's."""
    model = model_of(TINY)
    bundle = build_bundle(save(model, tmp_path), ("onnxruntime",), policies=["dbcache"])
    assert {"delta.text", "reuse.text"} <= bundle.manifest.graphs.keys()
    session = Session(Model(bundle, "onnxruntime"))
    steps = [inputs_of(TINY, size) for size in (SIZES[0], SIZES[0])]
    generator = torch.Generator().manual_seed(5)
    steps[1]["latents"] = torch.randn(steps[0]["latents"].shape, generator=generator)
    parameters = {"first_blocks": 1, "last_blocks": 2, "threshold": 1e6}
    session.begin(
        torch.cat([one["timesteps"] for one in steps]),
        CacheSetting(policy="dbcache", parameters=parameters),
    )
    prompts = {n for n, i in bundle.manifest.inputs.items() if i.runs == "prompt"}
    session.set_prompt("cond", {n: steps[0][n] for n in prompts})
    found = [
        session.step("cond", t, {"latents": one["latents"]}).clone() for t, one in enumerate(steps)
    ]
    assert session.statistics.branches["cond"].computed == [True, False]
    plain = copy.deepcopy(model)
    known: dict[str, Any] = {"reuses": False}
    plain.transformer_blocks[1] = Reused(plain.transformer_blocks[1], known, "first")
    plain.single_transformer_blocks[0] = Reused(plain.single_transformer_blocks[0], known, "last")
    assert relative(found[0], eager(plain, steps[0])) < TOLERANCE
    known["reuses"] = True
    assert relative(found[1], eager(plain, steps[1])) < TOLERANCE
    text, hidden = known["residual"]
    known["residual"] = torch.zeros_like(text), hidden
    assert relative(found[1], eager(plain, steps[1])) > 100 * TOLERANCE, "the text's part counts"
