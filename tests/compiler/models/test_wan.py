# SPDX-License-Identifier: Apache-2.0
"""The cut modules, run one after the other, are the transformer they were cut from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from chain import Chain, relative
from diffusers import WanTransformer3DModel
from torch import Tensor

from freewheel.bundle.manifest import StageEntry
from freewheel.compiler.cut.declared import Cut
from freewheel.core.dtypes import PRECISIONS
from freewheel.core.errors import CheckpointError

# Same float32 operations in another association; 2.3e-7 was seen.
TOLERANCE = 1e-6

TEXT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 3,
    "rope_max_seq_len": 64,
}
IMAGE = {**TEXT, "in_channels": 9, "image_dim": 20, "added_kv_proj_dim": 32}

ODD = {
    **TEXT,
    "num_attention_heads": 1,
    "attention_head_dim": 12,
    "num_layers": 1,
    "ffn_dim": 7,
    "eps": 1e-4,
    "cross_attn_norm": False,
    "in_channels": 5,
    "out_channels": 3,
    "patch_size": (2, 1, 2),
}
GEOMETRIES = [
    pytest.param(TEXT, id="text-to-video"),
    pytest.param(IMAGE, id="image-to-video"),
    pytest.param(ODD, id="all else at once"),
    *(
        pytest.param(config, id=name, marks=pytest.mark.nightly)
        for name, config in {
            "3 heads of 12": {**TEXT, "num_attention_heads": 3, "attention_head_dim": 12},
            "1 layer, eps": {**TEXT, "num_layers": 1, "ffn_dim": 7, "eps": 1e-4},
            "no norm, patch 112": {**TEXT, "cross_attn_norm": False, "patch_size": (1, 1, 2)},
            "patch 222": {**TEXT, "in_channels": 5, "out_channels": 3, "patch_size": (2, 2, 2)},
            "image, 1 head": {**IMAGE, "num_attention_heads": 1, "added_kv_proj_dim": 16},
        }.items()
    ),
]
"""A cut takes seconds: each kind and everything else at once in every run, one by one nightly."""

SIZES = [(1, 2, 4, 6, 5), (2, 4, 2, 8, 1), (2, 2, 8, 4, 13)]
"""Batch, frames, height, width, text tokens."""

# NOTE: with image states, diffusers 0.42 takes all tokens but the last 512 for the image's.
IMAGE_TEXT_TOKENS = 512


def random_model(seed: int = 0, **config: Any) -> WanTransformer3DModel:
    generator = torch.Generator().manual_seed(seed)
    model = WanTransformer3DModel(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(spread * (0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5))
    return model


def random_inputs(
    config: Mapping[str, Any], size: tuple[int, ...], seed: int = 1
) -> dict[str, Tensor]:
    batch, frames, height, width, tokens = size
    generator = torch.Generator().manual_seed(seed)
    if config.get("image_dim"):
        tokens = IMAGE_TEXT_TOKENS
    inputs = {
        "latents": torch.randn(
            batch, config["in_channels"], frames, height, width, generator=generator
        ),
        "timesteps": torch.tensor([731.0]),
        "text_states": torch.randn(batch, tokens, config["text_dim"], generator=generator),
    }
    if config.get("image_dim"):
        inputs["image_states"] = torch.randn(batch, 7, config["image_dim"], generator=generator)
    return inputs


def eager(model: WanTransformer3DModel, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(
            hidden_states=inputs["latents"],
            timestep=inputs["timesteps"].expand(inputs["latents"].shape[0]),
            encoder_hidden_states=inputs["text_states"],
            encoder_hidden_states_image=inputs.get("image_states"),
            return_dict=False,
        )[0]
    return output


@pytest.mark.parametrize("config", GEOMETRIES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_chained_segments_equal_the_eager_transformer(
    cut_model: Callable[..., Cut], config: dict[str, Any], size: tuple[int, ...]
) -> None:
    model = random_model(**config)
    inputs = random_inputs(config, size)
    found = Chain(cut_model(model), model).run(inputs)
    expected = eager(model, inputs)
    assert found.shape == expected.shape
    assert relative(found, expected) < TOLERANCE


@pytest.mark.parametrize("config", [TEXT, IMAGE], ids=["text", "image"])
def test_every_checkpoint_tensor_is_some_graphs_weight(
    cut_model: Callable[..., Cut], config: dict[str, Any]
) -> None:
    model = random_model(**config)
    cut = cut_model(model)
    taken = {
        (s.prefix + name).replace("{block}", str(block))
        for s in cut.segments
        for name, _ in s.module.named_parameters()
        for block in range(config["num_layers"])
    }
    assert taken == set(model.state_dict())


def test_signals_are_what_the_transformer_computes(cut_model: Callable[..., Cut]) -> None:
    model = random_model(**TEXT)
    inputs = random_inputs(TEXT, SIZES[1])
    seen: dict[str, Any] = {}
    model.condition_embedder.register_forward_hook(lambda m, i, o: seen.update(embedder=o))
    model.blocks[0].attn1.register_forward_pre_hook(lambda m, i: seen.update(modulated=i[0]))
    model.blocks[1].attn1.register_forward_hook(lambda m, i, o: seen.update(attention=o))
    eager(model, inputs)
    chain = Chain(cut_model(model), model)
    chain.run(inputs)
    temb, timestep_proj = seen["embedder"][:2]
    assert relative(chain.values["temb"], temb[:1]) < TOLERANCE
    assert relative(chain.values["timestep_proj"].flatten(1), timestep_proj[:1]) < TOLERANCE
    assert relative(chain.values["modulated_input"], seen["modulated"]) < TOLERANCE
    assert chain.cut.feature_block == 1
    table = model.blocks[1].scale_shift_table + timestep_proj[:1].unflatten(1, (6, -1))
    gated = seen["attention"] * table[:, 2:3]
    assert relative(chain.values["feature.1"], gated) < TOLERANCE


def test_timesteps_of_a_run_go_in_one_batch(cut_model: Callable[..., Cut]) -> None:
    model = random_model(**TEXT)
    chain = Chain(cut_model(model), model)
    steps = torch.tensor([999.0, 500.5, 1.0])
    chain.values = {"timesteps": steps}
    together = chain.call("timestep")
    for index in range(3):
        chain.values = {"timesteps": steps[index : index + 1]}
        alone = chain.call("timestep")
        for name in ("temb", "timestep_proj"):
            assert relative(together[name][index : index + 1], alone[name]) < TOLERANCE


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_bodies_stay_close_and_keep_float32_between_blocks(
    cut_model: Callable[..., Cut], precision: str
) -> None:
    model = random_model(**IMAGE)
    inputs = random_inputs(IMAGE, SIZES[2])
    cut = cut_model(model, precision)
    chain = Chain(cut, model)
    found = chain.run(inputs)
    expected = eager(model, inputs)
    # Rounding of the products of three blocks: 4e-3 of bfloat16, 5e-4 of float16 was seen.
    assert 1e-6 < relative(found, expected) < {"bfloat16": 2e-2, "float16": 3e-3}[precision]
    states = ("encoder_hidden_states_2", "encoder_hidden_states_image_2")
    for name in ("hidden_out", "feature.2", "temb", "modulated_input", *states):
        assert chain.values[name].dtype == torch.float32, name
    for name in ("attn2_key", "attn2_value", "attn2_key_2", "attn2_value_2"):
        assert chain.values[name].dtype == getattr(torch, precision), name
    assert found.dtype == torch.float32


def test_hidden_states_beyond_float16_do_not_overflow(cut_model: Callable[..., Cut]) -> None:
    model = random_model(**IMAGE)
    with torch.no_grad():
        model.patch_embedding.weight.mul_(1e6)
    inputs = random_inputs(IMAGE, SIZES[0])
    chain = Chain(cut_model(model, "float16"), model)
    found = chain.run(inputs)
    assert chain.values["hidden_out"].abs().max() > torch.finfo(torch.float16).max
    assert relative(found, eager(model, inputs)) < 3e-3
    # Without float32 islands the same weights and inputs overflow.
    halves = {n: t.half() if t.is_floating_point() else t for n, t in inputs.items()}
    assert not torch.isfinite(eager(model.half(), halves)).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_only_what_the_block_loop_multiplies_by_is_converted(
    cut_model: Callable[..., Cut], precision: str, stored: str
) -> None:
    cut = cut_model(random_model(**IMAGE), precision, stored)
    segments = {s.name: s for s in cut.segments}
    dtypes = {
        f"{name}.{n}": str(p.dtype).removeprefix("torch.")
        for name in ("prompt", "context", "timestep", "head", "block", "finish")
        for n, p in segments[name].module.named_parameters()
    }
    for name in (
        "block.attn1.to_q.weight",
        "block.ffn.net.2.bias",
        "context.attn2.add_k_proj.weight",
    ):
        assert dtypes[name] == precision, name
    for name in ("block.norm2.weight", "block.attn1.norm_q.weight", "block.scale_shift_table"):
        assert dtypes[name] == stored, name
    outside = [d for n, d in dtypes.items() if n.split(".")[0] not in ("block", "context")]
    assert set(outside) == {stored}
    assert {n: s.precision for n, s in segments.items() if s.precision != "float32"} == (
        {}
        if precision == "float32"
        else dict.fromkeys(("context", "block", "block_tapped"), precision)
    )


def test_declared_specs_are_those_of_the_modules(cut_model: Callable[..., Cut]) -> None:
    model = random_model(**IMAGE)
    batch, frames, height, width, tokens = size = (2, 3, 4, 6, IMAGE_TEXT_TOKENS)
    chain = Chain(cut_model(model), model)
    chain.run(random_inputs(IMAGE, size))
    sizes = {
        "batch": batch,
        "frames": frames,
        "height": height,
        "width": width,
        "text_tokens": tokens,
        "image_tokens": 7,
        "tokens": frames * height * width // 4,
        "steps": 1,
    }
    checked = 0
    for segment in chain.cut.segments:
        for name, spec in {**segment.inputs, **segment.outputs}.items():
            if name in chain.values and segment.name != "timestep":
                shape = tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
                assert tuple(chain.values[name].shape) == shape, (segment.name, name)
                assert str(chain.values[name].dtype) == f"torch.{spec.dtype}", (segment.name, name)
                checked += 1
    assert checked > 30


def test_derived_dimensions_follow_the_patch(cut_model: Callable[..., Cut]) -> None:
    cut = cut_model(random_model(**ODD))
    assert cut.dims == {
        "tokens": (("frames", 2), ("height", 1), ("width", 2)),
        "tokens_per_frame": (("height", 1), ("width", 2)),
    }
    dims = cut.example_dims
    assert dims["tokens"] == (dims["frames"] // 2) * dims["height"] * (dims["width"] // 2)


def test_the_cut_costs_no_memory_and_follows_the_config(cut_model: Callable[..., Cut]) -> None:
    with torch.device("meta"):
        model = WanTransformer3DModel()
    cut = cut_model(model, "bfloat16")
    assert cut.stages == (
        StageEntry(block="block", context="context", tapped="block_tapped", count=40),
    )
    assert cut.feature_block == 20
    assert cut.history_dtype == "bfloat16"
    parameters = [p for s in cut.segments for p in s.module.parameters()]
    assert {p.device.type for p in parameters} == {"meta"}
    assert not any(p.requires_grad for p in parameters)


def test_tapped_and_plain_template_share_their_module(cut_model: Callable[..., Cut]) -> None:
    segments = {s.name: s for s in cut_model(random_model(**TEXT)).segments}
    assert segments["block"].module is segments["block_tapped"].module
    assert segments["block"].dropped == ("attention_output",)
    assert segments["block_tapped"].dropped == ()


def test_first_and_last_frame_models_are_refused(cut_model: Callable[..., Cut]) -> None:
    with torch.device("meta"):
        model = WanTransformer3DModel(**{**IMAGE, "pos_embed_seq_len": 514})
    with pytest.raises(CheckpointError) as caught:
        cut_model(model)
    assert "'pos_embed_seq_len'" in caught.value.where
    assert "first-and-last-frame" in caught.value.what
    assert "image-to-video" in caught.value.hint
