# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo, cut: equal to diffusers' transformer in PyTorch and in engines, in a pipeline too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from bundles import TOLERANCE, check_attach, check_policies, save, session_output
from chain import Chain, randomised, relative, taken_weights
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from torch import Tensor

from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut.declared import Cut
from freewheel.compiler.cut.models import family_of
from freewheel.compiler.cut.transformer import cut_transformer
from freewheel.core.errors import CheckpointError
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.model import Model
from freewheel.runtime.session import Session

HUNYUAN = family_of("HunyuanVideoTransformer3DModel", "")
TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "text_embed_dim": 12,
    "pooled_projection_dim": 10,
    "rope_axes_dim": (4, 6, 6),
}
HEADS = {
    "num_attention_heads": 3,
    "attention_head_dim": 24,
    "rope_axes_dim": (8, 4, 12),
    "patch_size": 1,
    "patch_size_t": 2,
    "out_channels": 5,
}
UNGUIDED = {"guidance_embeds": False, "num_refiner_layers": 1}
IMAGE = {"in_channels": 9, "image_condition_type": "latent_concat"}
GEOMETRIES = [
    pytest.param(TINY, id="tiny"),
    pytest.param({**TINY, **HEADS, **UNGUIDED, **IMAGE}, id="all else at once"),
    *(
        pytest.param({**TINY, **config}, id=name, marks=pytest.mark.nightly)
        for name, config in {
            "no guidance": UNGUIDED,
            "image's latents": IMAGE,
            "3 heads of 24, patch 211": HEADS,
        }.items()
    ),
]
"""A cut takes seconds: everything else at once in every run, one by one nightly."""

SIZES = [(1, 2, 4, 2, 5), (2, 4, 2, 6, 7)]
"""Batch, frames, height, width, text tokens."""


def model_of(config: Mapping[str, Any]) -> Any:
    return randomised(HunyuanVideoTransformer3DModel(**config))


@pytest.fixture(scope="module")
def cut_of(shared_cut: Callable[..., Cut]) -> Callable[..., Cut]:
    """Return a function that cuts a model as if its checkpoint were float32."""
    return lambda model, precision="float32": shared_cut(HUNYUAN, model.config, precision)


def inputs_of(config: Mapping[str, Any], size: tuple[int, ...]) -> dict[str, Tensor]:
    batch, frames, height, width, text = size
    generator = torch.Generator().manual_seed(sum(size))
    mask = torch.ones(batch, text)
    mask[-1, text // 2 :] = 0

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {
        "latents": normal(batch, config["in_channels"], frames, height, width),
        "timesteps": torch.tensor([731.0]),
        "text_states": normal(batch, text, config["text_embed_dim"]),
        "text_mask": mask,
        "pooled_states": normal(batch, config["pooled_projection_dim"]),
    }
    if config.get("guidance_embeds", True):
        inputs["guidance"] = torch.linspace(6000.0, 1000.0, batch)
    return inputs


def eager(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(
            hidden_states=inputs["latents"],
            timestep=inputs["timesteps"].expand(len(inputs["latents"])),
            encoder_hidden_states=inputs["text_states"],
            encoder_attention_mask=inputs["text_mask"],
            pooled_projections=inputs["pooled_states"],
            guidance=inputs.get("guidance"),
            return_dict=False,
        )[0]
    return output


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of(TINY)


@pytest.fixture(scope="module")
def bundle(model: Any, tmp_path_factory: Any, build_bundle: Callable[..., Bundle]) -> Bundle:
    folder = save(model, tmp_path_factory.mktemp("hunyuan") / "model")
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
    for size in [*SIZES, (1, 3, 4, 6, 9)]:
        inputs = inputs_of(TINY, size)
        found = session_output(session, inputs)
        assert relative(found, eager(model, inputs)) < TOLERANCE, size


def test_every_policy_runs_and_decides_by_content(bundle: Bundle) -> None:
    check_policies(bundle, inputs_of(TINY, SIZES[1]), "modulated_input")


def test_its_pipeline_takes_the_bundle(model: Any, bundle: Bundle) -> None:
    pipe = HunyuanVideoPipeline(
        None, None, model, None, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None
    )
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "prompt_embeds": torch.randn(1, 6, 12, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 10, generator=generator),
        "prompt_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "guidance_scale": 6.0,
    }
    by_content = CacheSetting(policy="teacache", parameters={"threshold": 1e6})
    transformer = check_attach(pipe, bundle, arguments, ["taylorseer", by_content])
    assert set(transformer.statistics.branches) == {"cond"}
    assert not transformer.session.resolved.is_folded


def test_token_replacing_models_are_refused() -> None:
    config = {**TINY, "image_condition_type": "token_replace"}
    with pytest.raises(CheckpointError, match=r"'image_condition_type'.*'token_replace'"):
        cut_transformer(HUNYUAN, config, "float32", lambda name: "float32")
