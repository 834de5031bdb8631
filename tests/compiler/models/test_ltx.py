# SPDX-License-Identifier: Apache-2.0
"""LTX-Video, cut: equal to diffusers' transformer in PyTorch and in engines, in a pipeline too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from bundles import TOLERANCE, check_attach, check_policies, save, session_output
from chain import Chain, randomised, relative, taken_weights
from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from torch import Tensor

from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut.declared import Cut
from freewheel.compiler.cut.models import family_of
from freewheel.core.errors import RequestError
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.model import Model
from freewheel.runtime.session import Session

LTX = family_of("LTXVideoTransformer3DModel", "")
TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "num_layers": 3,
    "caption_channels": 12,
}
HEADS = {"num_attention_heads": 3, "attention_head_dim": 10, "cross_attention_dim": 30}
NORMS = {"norm_elementwise_affine": True, "norm_eps": 1e-4}
BARE = {"attention_bias": False, "attention_out_bias": False}
GEOMETRIES = [
    pytest.param(TINY, id="tiny"),
    pytest.param(
        {
            **TINY,
            **HEADS,
            **NORMS,
            **BARE,
            "activation_fn": "gelu",
            "num_layers": 1,
            "out_channels": 7,
        },
        id="all else at once",
    ),
    *(
        pytest.param({**TINY, **config}, id=name, marks=pytest.mark.nightly)
        for name, config in {
            "gelu": {"activation_fn": "gelu"},
            "width that 6 divides": HEADS,
            "1 layer": {"num_layers": 1, "out_channels": 7},
            "weighted norms": NORMS,
            "no bias": BARE,
        }.items()
    ),
]
"""A cut takes seconds: everything else at once in every run, one by one nightly."""

SIZES = [(1, 1, 2, 3, 5), (2, 3, 2, 4, 7)]
"""Batch, frames, rows, columns, text tokens."""


def model_of(config: Mapping[str, Any]) -> Any:
    return randomised(LTXVideoTransformer3DModel(**config))


@pytest.fixture(scope="module")
def cut_of(shared_cut: Callable[..., Cut]) -> Callable[..., Cut]:
    """Return a function that cuts a model as if its checkpoint were float32."""
    return lambda model, precision="float32": shared_cut(LTX, model.config, precision)


def inputs_of(config: Mapping[str, Any], size: tuple[int, ...]) -> dict[str, Tensor]:
    batch, frames, height, width, text = size
    generator = torch.Generator().manual_seed(sum(size))
    mask = torch.ones(batch, text)
    mask[-1, text // 2 :] = 0
    tokens = frames * height * width
    return {
        "latents": torch.randn(batch, tokens, config["in_channels"], generator=generator),
        "timesteps": torch.tensor([731.0]),
        "text_states": torch.randn(batch, text, config["caption_channels"], generator=generator),
        "text_mask": mask,
        "frame_index": torch.arange(frames).float(),
        "row_index": torch.arange(height).float(),
        "column_index": torch.arange(width).float(),
        "rope_scale": torch.tensor([8 / 25, 32.0, 32.0]),
    }


def eager(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(
            hidden_states=inputs["latents"],
            encoder_hidden_states=inputs["text_states"],
            timestep=inputs["timesteps"].expand(len(inputs["latents"])),
            encoder_attention_mask=inputs["text_mask"],
            num_frames=len(inputs["frame_index"]),
            height=len(inputs["row_index"]),
            width=len(inputs["column_index"]),
            rope_interpolation_scale=tuple(inputs["rope_scale"].tolist()),
            return_dict=False,
        )[0]
    return output


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of(TINY)


@pytest.fixture(scope="module")
def bundle(model: Any, tmp_path_factory: Any, build_bundle: Callable[..., Bundle]) -> Bundle:
    folder = save(model, tmp_path_factory.mktemp("ltx") / "model")
    return build_bundle(folder, ("onnxruntime",))


@pytest.mark.parametrize("config", GEOMETRIES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_chained_segments_equal_the_eager_transformer(
    cut_of: Callable[..., Cut], config: dict[str, Any], size: tuple[int, ...]
) -> None:
    model, inputs = model_of(config), inputs_of(config, size)
    assert relative(Chain(cut_of(model), model).run(inputs), eager(model, inputs)) < 1e-6


def test_every_checkpoint_tensor_is_some_graphs_weight(
    cut_of: Callable[..., Cut], model: Any
) -> None:
    assert taken_weights(cut_of(model)) == set(model.state_dict())


def test_signals_and_feature_are_what_the_transformer_computes(
    cut_of: Callable[..., Cut], model: Any
) -> None:
    inputs, seen = inputs_of(TINY, SIZES[1]), dict[str, Any]()
    block = model.transformer_blocks[1]
    hooks = [
        model.time_embed.register_forward_hook(lambda m, i, o: seen.update(time=o)),
        model.transformer_blocks[0].attn1.register_forward_pre_hook(
            lambda m, i, k: seen.update(modulated=k["hidden_states"]), with_kwargs=True
        ),
        block.attn1.register_forward_hook(lambda m, i, o: seen.update(attention=o)),
    ]
    eager(model, inputs)
    for hook in hooks:
        hook.remove()
    chain = Chain(cut_of(model), model)
    chain.run(inputs)
    projection, temb = (t[:1] for t in seen["time"])
    assert relative(chain.values["temb"], temb) < 1e-6
    assert relative(chain.values["timestep_proj"].flatten(1), projection) < 1e-6
    assert relative(chain.values["modulated_input"], seen["modulated"]) < 1e-6
    gate = (block.scale_shift_table + projection.unflatten(1, (6, -1)))[:, 2:3]
    assert chain.cut.feature_block == 1
    assert relative(chain.values["feature.1"], seen["attention"] * gate) < 1e-6


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
    for size in [*SIZES, (1, 4, 3, 5, 9)]:
        inputs = inputs_of(TINY, size)
        found = session_output(session, inputs)
        assert relative(found, eager(model, inputs)) < TOLERANCE, size


def test_every_policy_runs_and_decides_by_content(bundle: Bundle) -> None:
    check_policies(bundle, inputs_of(TINY, SIZES[1]), "modulated_input")


def test_a_grid_that_is_not_the_latents_is_refused(bundle: Bundle) -> None:
    session = Session(Model(bundle, "onnxruntime"))
    inputs = inputs_of(TINY, SIZES[1])
    with pytest.raises(RequestError, match=r"'tokens'.*is 24, but frames · height · width give 30"):
        session_output(session, {**inputs, "column_index": torch.arange(5).float()})


def test_its_pipeline_takes_the_bundle(model: Any, bundle: Bundle) -> None:
    """Guidance in one batch, and a schedule shifted by the latents' size."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    pipe = LTXPipeline(scheduler, None, None, None, model)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 1, 6, 12, generator=generator)
    arguments = {
        "prompt_embeds": states[0],
        "negative_prompt_embeds": states[1],
        "prompt_attention_mask": torch.ones(1, 6),
        "negative_prompt_attention_mask": torch.tensor([[1.0, 1, 1, 0, 0, 0]]),
        "height": 64,
        "width": 96,
        "num_frames": 17,
        "guidance_scale": 3.0,
    }
    by_content = CacheSetting(
        policy="teacache", signal="modulated_input", parameters={"threshold": 1e6}
    )
    transformer = check_attach(pipe, bundle, arguments, ["taylorseer", by_content])
    assert set(transformer.statistics.branches) == {"cond_uncond"}
    with pytest.raises(RequestError, match=r"argument 'video_coords'.*is nothing that"):
        transformer.module(torch.zeros(1), torch.zeros(1), video_coords=torch.zeros(1, 3, 6))
