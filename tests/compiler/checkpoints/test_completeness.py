# SPDX-License-Identifier: Apache-2.0
"""Whatever a checkpoint says is used, known to be unused, or refused: nothing is dropped."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from freewheel.bundle.manifest import GenerationDefaults
from freewheel.compiler.checkpoints.checkpoint import open_checkpoint
from freewheel.compiler.checkpoints.completeness import check_keys, check_tensors
from freewheel.compiler.checkpoints.weights import bring_weights
from freewheel.compiler.graphs.ends import text_encoder_part, vae_decode_part
from freewheel.compiler.plan import model_cut, plan
from freewheel.compiler.request import BuildRequest
from freewheel.core.errors import CheckpointError
from freewheel.engines import backend
from freewheel.runtime.settings import config_entries

WEIGHTS = "diffusion_pytorch_model.safetensors"
NAME = "blocks.0.ffn.net.2"
Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def change_weights(file: Path, change: Change) -> None:
    state = load_file(file)
    change(state)
    file.unlink()
    save_file(state, file)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def request_for(model: Path, **options: Any) -> BuildRequest:
    return BuildRequest(
        model=str(model),
        out=model.parent / "bundle",
        backends=[backend("onnxruntime")],
        configs=config_entries(["off"], print),
        **options,
    )


def refusal(model: Path, **options: Any) -> CheckpointError:
    """Return why a plan refuses a model; nothing is left behind."""
    with pytest.raises(CheckpointError) as caught:
        plan(request_for(model, **options))
    assert {p.name for p in model.parent.iterdir()} == {model.name}
    return caught.value


def float8(state: dict[str, torch.Tensor]) -> None:
    state[f"{NAME}.weight"] = state[f"{NAME}.weight"].to(torch.float8_e4m3fn)


def float8_with(*names: str) -> Change:
    def change(state: dict[str, torch.Tensor]) -> None:
        float8(state)
        state |= {n: torch.tensor(2.0) for n in names}

    return change


def int8(state: dict[str, torch.Tensor]) -> None:
    state[f"{NAME}.weight"] = state[f"{NAME}.weight"].to(torch.int8)


def int8_with(*names: str) -> Change:
    def change(state: dict[str, torch.Tensor]) -> None:
        int8(state)
        state |= {n: torch.ones(3) for n in names}

    return change


def packed(state: dict[str, torch.Tensor]) -> None:
    size = state[f"{NAME}.weight"].numel()
    state[f"{NAME}.weight"] = torch.zeros(size // 2, 1, dtype=torch.uint8)


def four_bits(state: dict[str, torch.Tensor]) -> None:
    packed(state)
    for name in ("absmax", "quant_map", "quant_state.bitsandbytes__nf4"):
        state[f"{NAME}.weight.{name}"] = torch.zeros(4, dtype=torch.uint8)


def replaced(state: dict[str, torch.Tensor], *names: str) -> None:
    weight = state.pop(f"{NAME}.weight")
    state |= {f"{NAME}.{n}": weight.to(torch.int8) for n in names}


QUANTISED: Mapping[str, tuple[Change, str]] = {
    "two scales": (
        float8_with(f"{NAME}.scale_weight", f"{NAME}.weight_scale"),
        "weights with scales",
    ),
    "blocks of scales": (
        lambda s: (float8(s), s.update({f"{NAME}.weight_scale": torch.ones(2, 3)})),
        "weights with scales",
    ),
    "ComfyUI's mark": (float8_with("scaled_fp8"), "scaled float8 of ComfyUI"),
    "ComfyUI's inputs": (float8_with(f"{NAME}.scale_input"), "scaled float8 of ComfyUI"),
    "two levels": (
        float8_with(f"{NAME}.weight_scale", f"{NAME}.weight_scale_2"),
        "weights with scales",
    ),
    "weight_scale_inv": (float8_with(f"{NAME}.weight_scale_inv"), "weights with scales"),
    "input_scale": (float8_with(f"{NAME}.input_scale"), "optimum-quanto or ModelOpt"),
    "bitsandbytes int8": (int8_with(f"{NAME}.SCB"), "int8 of bitsandbytes"),
    "int8 alone": (int8, "is int8: the checkpoint is quantised"),
    "bitsandbytes 4-bit": (four_bits, "4-bit of bitsandbytes"),
    "GGUF's bytes": (packed, "is uint8: the checkpoint is quantised"),
    "torchao": (lambda s: replaced(s, "_weight_qdata", "_weight_scale"), "belongs to torchao"),
    "optimum-quanto": (lambda s: replaced(s, "weight._data", "weight._scale"), "optimum-quanto"),
    "GPTQ": (lambda s: replaced(s, "qweight", "qzeros", "scales"), "GPTQ, AWQ or SVDQuant"),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_refused_by_name(model: Path, kind: str) -> None:
    change, expected = QUANTISED[kind]
    change_weights(model / WEIGHTS, change)
    error = refusal(model)
    assert re.match(rf"{re.escape(str(model))}, tensor '.*(ffn\.net\.2|scaled_fp8)", error.where)
    assert expected in error.what
    assert "its weights mean nothing without" in error.what
    assert "dequantize, and save_pretrained" in error.hint


def test_float8_without_scales_and_float64_are_plain_casts(model: Path, tmp_path: Path) -> None:
    """Float8 values are the weights, as for diffusers, and are widened exactly; float64 is rounded.

    So are matrices, which are taken in the body's precision, and what is taken as it is stored.
    """
    stored_as = {
        f"{NAME}.weight": torch.float8_e4m3fn,
        "blocks.1.ffn.net.2.weight": torch.float8_e5m2,
        "blocks.0.norm2.weight": torch.float8_e4m3fn,
        "blocks.1.norm2.weight": torch.float8_e4m3fn,
        "proj_out.bias": torch.float64,
    }
    change_weights(
        model / WEIGHTS, lambda s: s.update({n: s[n].to(d) for n, d in stored_as.items()})
    )
    checkpoint = open_checkpoint(str(model))
    plan(request_for(model))
    wanted = model_cut(checkpoint, "float32")[1].weights()
    assert {d for d, _ in wanted.values()} == {"float32", "bfloat16"}
    entries = bring_weights(wanted, checkpoint.tensors, tmp_path)
    given = load_file(model / WEIGHTS)
    converted = load_file(tmp_path / entries["proj_out.bias"].file)
    for name in stored_as:
        assert "converted" in entries[name].file
        assert torch.equal(converted[name].float(), given[name].float()), name


def test_a_tensor_that_nothing_uses_is_refused(model: Path) -> None:
    adapter = {f"blocks.{n}.adapter.weight": torch.zeros(1) for n in range(7)}
    change_weights(model / WEIGHTS, lambda state: state.update(adapter))
    error = refusal(model)
    assert error.where == str(model)
    assert "has 7 tensors that the model would not use: 'blocks.0.adapter.weight'" in error.what
    assert "and 2 more" in error.what
    assert "--lora" in error.hint


def test_missing_tensors_are_counted_and_named(model: Path) -> None:
    change_weights(model / WEIGHTS, lambda state: [state.pop(n) for n in list(state)[:6]])
    error = refusal(model)
    assert error.where == str(model)
    assert re.match(r"6 of 96 tensors are missing: ('[^']*', ){4}'[^']*' and 1 more$", error.what)
    assert "a shard is missing, or 'config.json' belongs to another model" in error.hint


def test_names_of_another_layout_are_told_from_missing_ones(model: Path) -> None:
    def rename(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            state[f"model.diffusion_model.{name}"] = state.pop(name)

    change_weights(model / WEIGHTS, rename)
    error = refusal(model)
    assert "96 of 96 tensors are missing" in error.what
    assert "it has 96 of other names, such as 'model.diffusion_model." in error.what
    assert "another layout than diffusers'" in error.hint


def test_a_misshapen_tensor_is_named_with_both_shapes(model: Path) -> None:
    change_weights(model / WEIGHTS, lambda s: s.update({"proj_out.bias": torch.zeros(8)}))
    error = refusal(model)
    assert error.where == f"{model}, tensor 'proj_out.bias'"
    assert "has shape [8], its config says [16] (95 of 96 tensors fit)" in error.what
    assert "another model" in error.hint


def test_the_second_expert_is_accounted_for_too(model: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "two" / "pipeline"
    for part in ("transformer", "transformer_2"):
        shutil.copytree(model, pipeline / part)
    index = {"boundary_ratio": 0.9, "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    change_weights(pipeline / "transformer_2" / WEIGHTS, float8_with(f"{NAME}.weight_scale_inv"))
    error = refusal(pipeline)
    assert error.where == f"{pipeline / 'transformer_2'}, tensor '{NAME}.weight_scale_inv'"


def test_config_keys_that_diffusers_would_drop_are_refused(model: Path) -> None:
    change_config(model, rope_max_seq_lem=64, use_linear_attention=True, _name_or_path="here")
    error = refusal(model)
    assert error.where == "transformer/config.json"
    assert error.what.endswith("not understood: 'rope_max_seq_lem', 'use_linear_attention'")
    assert "did you mean 'rope_max_seq_len'?" in error.hint


def test_keys_without_effect_are_taken() -> None:
    check_keys({"a": 1, "_class_name": "X", "torch_dtype": "bfloat16"}, ["a"], "config.json")


@pytest.fixture
def pipeline(repository: Path, tmp_path: Path) -> Path:
    """A copy of the demo pipeline that a test may damage."""
    return Path(shutil.copytree(repository / "models" / "shapes_wan", tmp_path / "pipeline"))


PARTS: Mapping[str, tuple[Callable[[Path], Any], str, str]] = {
    "text_encoder": (
        text_encoder_part,
        "model.safetensors",
        "encoder.block.0.layer.0.SelfAttention.q",
    ),
    "vae": (
        lambda folder: vae_decode_part(folder, GenerationDefaults(frames=9, height=32, width=48)),
        WEIGHTS,
        "decoder.conv_in",
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_quantised_part_is_refused(pipeline: Path, part: str) -> None:
    make, file, name = PARTS[part]
    assert make(pipeline)
    path = pipeline / part / file
    original = path.read_bytes()

    def narrow(state: dict[str, torch.Tensor]) -> None:
        state[f"{name}.weight"] = state[f"{name}.weight"].to(torch.float8_e4m3fn)

    for change, expected in (
        (lambda s: s.update({f"{name}.SCB": torch.ones(1)}), "int8 of bitsandbytes"),
        (narrow, "is float8_e4m3fn"),
        (lambda s: s.update({f"{name}.extra": torch.ones(1)}), "1 tensors that the model would"),
        (lambda s: s.pop(f"{name}.weight"), "tensors are missing"),
    ):
        change_weights(path, change)
        with pytest.raises(CheckpointError, match=expected) as caught:
            make(pipeline)
        assert caught.value.where.startswith(str(pipeline / part))
        path.write_bytes(original)
    change_config(pipeline / part, quantization_config={"quant_method": "torchao"})
    with pytest.raises(CheckpointError, match="'quantization_config': is torchao"):
        make(pipeline)


def test_the_text_encoders_config_keys_are_accounted_for(pipeline: Path) -> None:
    change_config(pipeline / "text_encoder", output_past=True, scalable_attention=True)
    assert text_encoder_part(pipeline)
    change_config(pipeline / "text_encoder", relative_attention_num_bucket=64)
    with pytest.raises(
        CheckpointError,
        match=r"text_encoder/config.json: has keys.*'relative_attention_num_bucket'",
    ) as caught:
        text_encoder_part(pipeline)
    assert "did you mean 'relative_attention_num_buckets'?" in caught.value.hint


def test_the_vaes_config_keys_are_accounted_for(pipeline: Path) -> None:
    change_config(pipeline / "vae", clip_output=False)
    make = PARTS["vae"][0]
    assert make(pipeline)
    change_config(pipeline / "vae", use_tiling_blend=True)
    with pytest.raises(CheckpointError, match=r"vae/config.json: has keys.*'use_tiling_blend'"):
        make(pipeline)


def test_what_is_known_to_be_unused_is_taken(pipeline: Path) -> None:
    """The demo's VAE has an encoder, and a text encoder may be saved with what follows it."""
    stored = PARTS["vae"][0](pipeline).stored
    assert any(n.startswith("encoder.") for n in stored)
    path = pipeline / "text_encoder" / "model.safetensors"
    change_weights(path, lambda state: state.update({"lm_head.weight": torch.ones(1)}))
    assert text_encoder_part(pipeline)


def test_no_tensor_of_an_empty_model_is_wanted(tmp_path: Path) -> None:
    check_tensors({}, {}, tmp_path)
