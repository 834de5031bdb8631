"""A LoRA of any layout, written for C++: what it adds is what PEFT adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from freewheel.bundle.reader import Bundle
from freewheel.core.errors import BundleError, OutputError, RequestError
from freewheel.runtime.lora import load_lora, parse_lora
from freewheel.runtime.pipeline.adapters import Adapters
from freewheel.runtime.pipeline.write_lora import write_lora

KOHYA = {
    "self_attn_q": "attn1.to_q",
    "self_attn_k": "attn1.to_k",
    "self_attn_v": "attn1.to_v",
    "self_attn_o": "attn1.to_out.0",
    "cross_attn_q": "attn2.to_q",
    "cross_attn_k": "attn2.to_k",
    "cross_attn_v": "attn2.to_v",
    "cross_attn_o": "attn2.to_out.0",
    "ffn_0": "ffn.net.0.proj",
    "ffn_2": "ffn.net.2",
}
"""What musubi-tuner calls a block's modules → what diffusers calls them."""


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    return folder


def rows_and_columns(bundle: Bundle, name: str) -> list[int]:
    return bundle.manifest.tensors[f"{name}.weight"].shape


def kohya(bundle: Bundle) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for block in range(3):
        for ours, theirs in KOHYA.items():
            rows, columns = rows_and_columns(bundle, f"blocks.{block}.{theirs}")
            place = f"lora_unet_blocks_{block}_{ours}"
            down = torch.randn(4, columns, generator=generator)
            state[f"{place}.lora_down.weight"] = down.bfloat16()
            state[f"{place}.lora_up.weight"] = torch.randn(rows, 4, generator=generator).bfloat16()
            state[f"{place}.alpha"] = torch.tensor(3.0)
    return state


def light(bundle: Bundle) -> dict[str, Tensor]:
    """LightX2V's distilled ones: pairs, and differences of biases, norms, tables and whole weights."""
    generator = torch.Generator().manual_seed(1)
    names = {
        "blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
        "blocks.2.self_attn.norm_k.diff": "blocks.2.attn1.norm_k.weight",
        "blocks.1.diff_m": "blocks.1.scale_shift_table",
        "head.diff_m": "scale_shift_table",
        "head.head.diff": "proj_out.weight",
        "patch_embedding.diff_b": "patch_embedding.bias",
    }
    state = {
        f"diffusion_model.{ours}": torch.randn(
            bundle.manifest.tensors[theirs].shape, generator=generator
        )
        for ours, theirs in names.items()
    }
    state["diffusion_model.blocks.2.norm3.diff"] = torch.zeros(32)
    for block in range(3):
        for ours, theirs in KOHYA.items():
            rows, columns = rows_and_columns(bundle, f"blocks.{block}.{theirs}")
            name = ours.replace("attn_", "attn.").replace("ffn_", "ffn.")
            place = f"diffusion_model.blocks.{block}.{name}"
            state[f"{place}.lora_down.weight"] = torch.randn(2, columns, generator=generator)
            state[f"{place}.lora_up.weight"] = torch.randn(rows, 2, generator=generator)
            state[f"{place}.diff_b"] = torch.randn(rows, generator=generator)
    return state


def dora(bundle: Bundle) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    state = {}
    for module in ("blocks.0.attn1.to_v", "blocks.2.ffn.net.0.proj"):
        rows, columns = rows_and_columns(bundle, module)
        state[f"transformer.{module}.lora_A.weight"] = torch.randn(3, columns, generator=generator)
        state[f"transformer.{module}.lora_B.weight"] = torch.randn(rows, 3, generator=generator)
        state[f"transformer.{module}.lora_magnitude_vector"] = torch.rand(rows, generator=generator)
    return state


def loha(bundle: Bundle) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows, columns = rows_and_columns(bundle, "blocks.0.attn1.to_q")
    sizes = {"w1_a": (rows, 2), "w1_b": (2, columns), "w2_a": (rows, 2), "w2_b": (2, columns)}
    return {
        f"transformer.blocks.0.attn1.to_q.hada_{n}": torch.randn(*s, generator=generator)
        for n, s in sizes.items()
    }


def convolution(bundle: Bundle) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shape = rows_and_columns(bundle, "patch_embedding")
    return {
        "transformer.patch_embedding.lora_A.weight": torch.randn(
            2, *shape[1:], generator=generator
        ),
        "transformer.patch_embedding.lora_B.weight": torch.randn(
            shape[0], 2, *[1] * len(shape[2:]), generator=generator
        ),
    }


LAYOUTS = {
    "kohya": kohya,
    "LightX2V": light,
    "DoRA": dora,
    "LoHa": loha,
    "convolution": convolution,
}


def by_peft(bundle: Bundle, file: str, scale: float, pipeline: Path) -> dict[str, Tensor]:
    """What `attach` merges, through a whole pipeline object."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    adapters = Adapters(bundle, "", None)
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=adapters.module,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    adapters.add(load_lora(pipe, parse_lora(file), "given", adapters.module), scale)
    if adapters.has_adapters:
        adapters.module.set_adapters(["given"], [scale])
    return adapters.merged()


def by_factors(bundle: Bundle, file: Path, scale: float) -> dict[str, Tensor]:
    """What C++ merges, in the terms of docs/how-to/use-loras.md."""
    state = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
    found = {}
    for name, tensor in state.items():
        module = name.rpartition(".lora_")[0]
        if name.endswith(".difference"):
            changed = name.removesuffix(".difference")
            found[changed] = bundle.tensor(changed).float() + scale * tensor
        if not name.endswith(".lora_A.weight"):
            continue
        base = bundle.tensor(f"{module}.weight").float()
        up = state[f"{module}.lora_B.weight"].flatten(1)
        weight = base + scale * (up @ tensor.flatten(1)).reshape(base.shape)
        length = state.get(f"{module}.lora_magnitude_vector.weight")
        if length is not None:
            weight = weight * (length.reshape(-1, 1) / weight.flatten(1).norm(dim=1, keepdim=True))
        found[f"{module}.weight"] = weight
    return {n: t.to(bundle.tensor(n).dtype) for n, t in found.items()}


def changes(bundle: Bundle, merged: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in merged.items() if not torch.equal(t, bundle.tensor(n))}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1.0, -0.4])
def test_what_is_written_adds_what_peft_adds(
    tiny_bundle: Bundle, tmp_path: Path, pipeline: Path, layout: str, scale: float
) -> None:
    file, out = tmp_path / "shared.safetensors", tmp_path / "loras" / "style.safetensors"
    save_file(LAYOUTS[layout](tiny_bundle), file)
    written = write_lora(tiny_bundle, parse_lora(str(file)), out, pipeline)
    expected = changes(tiny_bundle, by_peft(tiny_bundle, str(file), scale, pipeline))
    found = changes(tiny_bundle, by_factors(tiny_bundle, out, scale))
    assert found.keys() == expected.keys()
    assert written.weights == len(found)
    assert written.bytes == out.stat().st_size
    for name, tensor in expected.items():
        # float32, whose sums of a few terms come in another order
        largest = float(tensor.abs().max())
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6 * largest)
    with safe_open(out, "pt") as opened:
        assert opened.metadata() == {
            "freewheel_lora": "1",
            "checkpoint_sha256": tiny_bundle.manifest.checkpoint.sha256,
        }
        assert all(opened.get_slice(n).get_dtype() == "F32" for n in opened.keys())  # noqa: SIM118


def test_what_is_written_is_a_lora_for_python_too(
    tiny_bundle: Bundle, tmp_path: Path, pipeline: Path
) -> None:
    file, out = tmp_path / "shared.safetensors", tmp_path / "style.safetensors"
    save_file(kohya(tiny_bundle), file)
    write_lora(tiny_bundle, parse_lora(f"{file}:0.5"), out, pipeline)
    expected = by_peft(tiny_bundle, str(file), 0.5, pipeline)
    found = by_peft(tiny_bundle, str(out), 1.0, pipeline)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


def test_what_can_not_be_written_is_refused(
    tiny_bundle: Bundle, tmp_path: Path, pipeline: Path
) -> None:
    file = tmp_path / "shared.safetensors"
    save_file(convolution(tiny_bundle), file)
    lora = parse_lora(str(file))
    for name in ("style.bin", ".style.safetensors", "a style.safetensors", "a:1.safetensors"):
        with pytest.raises(RequestError, match=r"is no plain name that ends in \.safetensors"):
            write_lora(tiny_bundle, lora, tmp_path / name, pipeline)
    with pytest.raises(BundleError, match="with --model"):
        write_lora(tiny_bundle, lora, tmp_path / "style.safetensors", tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(OutputError, match="folder"):
        write_lora(tiny_bundle, lora, tmp_path / "folder.safetensors", pipeline)
    state = convolution(tiny_bundle)
    save_file(
        {n.replace("patch_embedding", "blocks.7.attn1.to_q"): t for n, t in state.items()}, file
    )
    with pytest.raises(RequestError, match=r"not in the model, such as 'blocks.7.attn1.to_q'"):
        write_lora(tiny_bundle, parse_lora(str(file)), tmp_path / "style.safetensors", pipeline)
    assert not (tmp_path / "style.safetensors").exists()


def test_a_weight_in_float8_is_refused(
    float8_bundle: Bundle, tmp_path: Path, pipeline: Path
) -> None:
    """Others of the same bundle are not."""
    file = tmp_path / "shared.safetensors"
    save_file(convolution(float8_bundle), file)
    write_lora(float8_bundle, parse_lora(str(file)), tmp_path / "style.safetensors", pipeline)
    save_file(dora(float8_bundle), file)
    with pytest.raises(
        RequestError, match=r"module 'blocks.0.attn1.to_v': has its weight in float8_e4m3fn"
    ) as caught:
        write_lora(float8_bundle, parse_lora(str(file)), tmp_path / "other.safetensors", pipeline)
    assert caught.value.hint == "build the bundle with --float8 convert"


def test_a_weight_that_no_graph_reads_is_refused(
    tiny_bundle: Bundle, tmp_path: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "shared.safetensors"
    save_file(convolution(tiny_bundle), file)
    tensors: dict[str, Any] = dict(tiny_bundle.manifest.tensors)
    del tensors["patch_embedding.weight"]
    other = tiny_bundle.manifest.model_copy(update={"tensors": tensors})
    monkeypatch.setattr(tiny_bundle, "manifest", other)
    with pytest.raises(
        RequestError, match=r"parameter 'patch_embedding.weight': is changed, and is no weight"
    ):
        write_lora(tiny_bundle, parse_lora(str(file)), tmp_path / "style.safetensors", pipeline)


def test_a_pipeline_is_made_of_its_transformer_alone(tiny_bundle: Bundle, pipeline: Path) -> None:
    """Loaders of the other families ask no other part for anything."""
    import diffusers

    from freewheel.runtime.pipeline.write_lora import _around

    transformer = WanTransformer3DModel.from_config(dict(tiny_bundle.manifest.checkpoint.config))
    for name in (
        "FluxPipeline",
        "QwenImagePipeline",
        "LTXPipeline",
        "HunyuanVideoPipeline",
        "WanPipeline",
    ):
        pipe = _around(getattr(diffusers, name), "transformer", transformer)
        assert pipe.transformer is transformer
        assert pipe.components["transformer"] is transformer
        assert pipe.vae is None
