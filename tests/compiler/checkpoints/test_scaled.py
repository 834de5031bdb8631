# SPDX-License-Identifier: Apache-2.0
"""Scaled 8-bit weights stay as they lie or become what they stand for; other forms stay for the refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import originals
import pytest
import torch
from cases import CASES
from diffusers import SD3Transformer2DModel, WanTransformer3DModel
from live import Live
from safetensors.torch import load_file, save_file
from test_original import COMFY, save, tiny
from torch import Tensor

from freewheel.bundle.reader import Bundle
from freewheel.bundle.safetensors_header import StoredTensor, read_header
from freewheel.bundle.scales import scale_name
from freewheel.compiler.checkpoints import conversion, scaled, weights
from freewheel.compiler.checkpoints.checkpoint import open_checkpoint
from freewheel.compiler.checkpoints.scaled import keep_float8, tell_of_scales, without_scales
from freewheel.compiler.checkpoints.sources import ScaledTensor, read_weight
from freewheel.compiler.checkpoints.weights import bring_weights
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.compiler.verify.bundle import verify_bundle
from freewheel.core.errors import CheckpointError
from freewheel.engines.onnxruntime import OnnxRuntime
from freewheel.runtime.model import Model
from freewheel.runtime.session import Session
from freewheel.runtime.settings import config_entries

State = dict[str, Tensor]
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}


def quantised(weight: Tensor, dtype: torch.dtype, *, by_row: bool) -> tuple[Tensor, Tensor]:
    """Return a weight in 8 bits and its scale, so that the largest value takes the largest number."""
    size = weight.abs().amax(dim=1, keepdim=True) if by_row else weight.abs().max()
    scale = size / LARGEST[dtype]
    values = weight / scale
    return (values.round() if dtype is torch.int8 else values).to(dtype), scale


def comfy(state: State) -> State:
    """ComfyUI's first form: one scale a weight, one of its input, and a mark."""
    out: State = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    for name, tensor in state.items():
        base = name.removesuffix(".weight")
        if tensor.ndim == 2 and base != name:
            out[name], out[f"{base}.scale_weight"] = quantised(
                tensor, torch.float8_e4m3fn, by_row=False
            )
            out[f"{base}.scale_input"] = torch.tensor(0.5)
        else:
            out[name] = tensor.to(torch.bfloat16)
    return out


def comfy_now(state: State) -> State:
    """ComfyUI's present form: a format in JSON beside each weight."""
    told = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    renames = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
    out = {}
    for name, tensor in comfy(state).items():
        base, _, last = name.rpartition(".")
        out[f"{base}.{renames[last]}" if last in renames else name] = tensor
        if last == "scale_weight":
            out[f"{base}.comfy_quant"] = told.clone()
    del out["scaled_fp8"]
    return out


def lightx2v(state: State, dtype: torch.dtype = torch.float8_e4m3fn) -> State:
    """LightX2V's form: a scale for each output row of the blocks' weights."""
    out: State = {}
    for name, tensor in state.items():
        out[name] = tensor
        if tensor.ndim == 2 and name.startswith("blocks.") and name.endswith(".weight"):
            out[name], out[f"{name}_scale"] = quantised(tensor, dtype, by_row=True)
    return out


def lightx2v_int8(state: State) -> State:
    return lightx2v(state, torch.int8)


FORMS = [comfy, comfy_now, lightx2v, lightx2v_int8]
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)


def multiplied(state: State) -> State:
    """Return what a state dict stands for, in float32, by the formula alone."""
    out = {}
    for name, tensor in state.items():
        base = name.removesuffix(".weight")
        scale = state.get(f"{base}.scale_weight", state.get(f"{base}.weight_scale"))
        if base != name and scale is not None:
            out[name] = tensor.to(torch.float32) * scale
        elif not name.endswith(("scale", "scale_weight", "scale_input", "comfy_quant", "_fp8")):
            out[name] = tensor.to(torch.float32)
    return out


@every_form
def test_weights_are_what_they_stand_for_and_near_the_plain_ones(
    form: Callable[[State], State], tmp_path: Path
) -> None:
    plain = originals.wan(dict(tiny("wan").state_dict()))
    state = form(plain)
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")
    found, notes = without_scales(stored, tmp_path)
    expected = multiplied(state)
    assert found.keys() == expected.keys() == plain.keys()
    for name, weight in found.items():
        read = read_weight(weight).to(torch.float32)
        assert torch.equal(read, expected[name]), name
        # A mantissa of 3 bits rounds by 2^-4 of a value; int8, of 127 steps, by half a step of a row.
        most = plain[name].abs().amax(dim=-1, keepdim=True) * 2**-8 + plain[name].abs() * 2**-4
        assert bool(((read - plain[name]).abs() <= most).all()), name
    made = [w for w in found.values() if isinstance(w, ScaledTensor)]
    assert {w.dtype for w in made} == {"bfloat16"}
    kind = "int8" if form is lightx2v_int8 else "float8_e4m3fn"
    size = sum(w.bytes for w in made) / 1e6
    (told,) = tell_of_scales(found)
    assert f"scaled {kind}: {len(made)} weights ({size / 2:.1f} MB)" in told
    assert f"{size:.1f} MB in bfloat16" in told
    dropped = f"{len(made)} scales of activations stay unused: products are not in 8 bits"
    assert notes == ((dropped,) if form in (comfy, comfy_now) else ())


def test_a_file_without_scales_is_as_it_was(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")
    assert without_scales(stored, tmp_path) == (stored, ())


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float8_e4m3fn, torch.ones(2, 2)),
        (torch.float8_e4m3fn, torch.ones(1, 4)),
        (torch.float8_e4m3fn, torch.ones(4, 1, dtype=torch.int32)),
        (torch.int8, torch.tensor(1.0)),
        (torch.float16, torch.ones(4, 1)),
    ],
    ids=["blocks", "by column", "whole number", "int8 by one number", "16 bits"],
)
def test_other_scales_are_left_for_the_refusal(
    tmp_path: Path, dtype: torch.dtype, scale: Tensor
) -> None:
    state = {"a.weight": torch.ones(4, 4).to(dtype), "a.weight_scale": scale}
    save_file(state, tmp_path / "x.safetensors")
    found, notes = without_scales(read_header(tmp_path / "x.safetensors"), tmp_path)
    assert found.keys() == state.keys()
    assert notes == ()


@pytest.mark.parametrize(
    ("told", "what"),
    [(b'{"format": "nvfp4"}', "says format 'nvfp4'"), (b"x", "is not JSON with a 'format'")],
)
def test_a_format_that_is_not_float8_is_refused(tmp_path: Path, told: bytes, what: str) -> None:
    state = comfy_now({"a.weight": torch.ones(4, 4)})
    state["a.comfy_quant"] = torch.tensor(list(told), dtype=torch.uint8)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as caught:
        without_scales(read_header(tmp_path / "x.safetensors"), tmp_path)
    assert caught.value.where == f"{tmp_path}, tensor 'a.comfy_quant'"
    assert what in caught.value.what
    assert caught.value.hint


def test_a_mark_that_the_converter_leaves_aside_names_the_quantisation(tmp_path: Path) -> None:
    tiny("sd3").save_config(tmp_path)
    state = originals.sd3(dict(tiny("sd3").state_dict()))
    state["x_embedder.proj.weight_scale_2"] = torch.ones(1)
    file = save(state, tmp_path / "x.safetensors", COMFY)
    with pytest.raises(
        CheckpointError, match="belongs to weights with scales: the checkpoint is quan"
    ):
        open_checkpoint(str(file))


def save_scaled(
    checkpoint: Path, form: Callable[[State], State], folder: Path
) -> tuple[Path, Path]:
    """Write a model in a form, and in another file what that stands for."""
    model: Any = WanTransformer3DModel.from_pretrained(checkpoint)
    state = form(originals.wan(dict(model.state_dict())))
    prefix = COMFY if form is comfy else ""
    for name in ("scaled", "plain"):
        model.save_config(folder / name)
    return (
        save(state, folder / "scaled" / "wan.safetensors", prefix),
        save(multiplied(state), folder / "plain" / "wan.safetensors", prefix),
    )


@pytest.mark.parametrize(
    ("form", "precision", "float8"),
    [
        (lightx2v, "float32", "convert"),
        (comfy, "bfloat16", "convert"),
        pytest.param(lightx2v_int8, "float32", "keep", marks=pytest.mark.nightly),
    ],
    ids=["float32", "bfloat16", "int8"],
)
def test_a_bundle_holds_what_the_dequantised_checkpoints_holds(
    tiny_checkpoint: Path,
    tmp_path: Path,
    build_bundle: Callable[..., Bundle],
    form: Callable[[State], State],
    precision: str,
    float8: str,
) -> None:
    file, multiplied_out = save_scaled(tiny_checkpoint, form, tmp_path)
    options = {"precision": precision, "backends": ("openvino",)}
    plain = build_bundle(multiplied_out, **options)
    bundle = build_bundle(file, **options, float8=float8)
    for name, entry in bundle.manifest.tensors.items():
        expected = plain.tensor(name).to(getattr(torch, entry.dtype))
        assert torch.equal(bundle.tensor(name), expected), name
    body = bundle.manifest.tensors["blocks.0.ffn.net.2.weight"]
    assert body.dtype == precision
    assert "converted" in body.file


@pytest.mark.parametrize(
    ("form", "precision", "backends"),
    [
        (lightx2v, "float32", ("openvino", "onnxruntime")),
        (comfy, "bfloat16", ("openvino",)),
    ],
    ids=["of rows, float32", "of weights, bfloat16"],
)
def test_float8_stays_where_it_lies_and_engines_multiply_it(
    tiny_checkpoint: Path,
    tmp_path: Path,
    build_bundle: Callable[..., Bundle],
    form: Callable[[State], State],
    precision: str,
    backends: tuple[str, ...],
) -> None:
    file, _ = save_scaled(tiny_checkpoint, form, tmp_path)
    # No policy multiplies weights.
    options = {"precision": precision, "backends": backends, "policies": ["teacache"]}
    kept, converted = build_bundle(file, **options), build_bundle(file, **options, float8="convert")
    state, tensors = load_file(file), kept.manifest.tensors
    in_8_bits = {n for n, entry in tensors.items() if entry.dtype == "float8_e4m3fn"}
    assert len(in_8_bits) == sum(
        t.dtype == torch.float8_e4m3fn and t.ndim == 2 for t in state.values()
    )
    for name in in_8_bits:
        entry, scale = tensors[name], tensors[scale_name(name)]
        assert kept.path(entry.file).samefile(file), "linked, and nothing of it written"
        assert scale.dtype == "float32"
        assert scale.shape == [entry.shape[0], 1]
        multiplied_out = kept.tensor(name).float() * kept.tensor(scale_name(name))
        other = converted.tensor(name)
        assert torch.equal(multiplied_out.to(other.dtype), other), name
    if form is lightx2v:  # which has the scales as graphs take them
        assert not any("converted" in tensors[scale_name(n)].file for n in in_8_bits)
    for backend in backends:
        verify_bundle(kept, backend).raise_on_mismatch()
        found, expected = (one_step(bundle, backend) for bundle in (kept, converted))
        # The same products of the same numbers; engines may fuse what leads to them otherwise.
        most = 1e-6 if precision == "float32" else 1e-2
        assert float((found - expected).norm() / expected.norm()) <= most


def one_step(bundle: Bundle, backend: str) -> Tensor:
    """Return the model's output for random latents and text."""
    generator = torch.Generator().manual_seed(0)
    session = Session(Model(bundle, backend))
    session.set_prompt("cond", {"text_states": torch.randn(1, 5, 24, generator=generator)})
    session.begin(torch.tensor([600.0]))
    latents = torch.randn(1, 4, 3, 4, 6, generator=generator)
    return session.step("cond", 0, {"latents": latents}).clone()


@pytest.mark.parametrize("form", [comfy, lightx2v], ids=["of weights", "of rows"])
def test_parts_of_a_fused_weight_stay_where_they_lie(
    form: Callable[[State], State], tmp_path: Path
) -> None:
    """Of Stable Diffusion 3, whose file has query, key and value in one: a third of its rows each."""
    model = tiny("sd3")
    for folder in (tmp_path, tmp_path / "plain"):
        model.save_config(folder)
    original = originals.sd3(dict(model.state_dict()))
    renamed = {f"blocks.{n}" if form is lightx2v else n: t for n, t in original.items()}
    state = {n.removeprefix("blocks."): t for n, t in form(renamed).items()}
    file = save(state, tmp_path / "sd3.safetensors")
    expected = open_checkpoint(str(save(multiplied(state), tmp_path / "plain" / "sd3.safetensors")))
    tensors = open_checkpoint(str(file), float8="keep").tensors
    kept = [n for n in tensors if scale_name(n) in tensors]
    assert any(n.endswith("attn.to_k.weight") for n in kept)
    for name in kept:
        values, scale = tensors[name], tensors[scale_name(name)]
        assert isinstance(values, StoredTensor)
        assert isinstance(scale, StoredTensor) == (form is lightx2v)
        found = read_weight(values).float() * read_weight(scale)
        assert torch.equal(found, read_weight(expected.tensors[name])), name
    for name in tensors.keys() & expected.tensors.keys() - set(kept):
        assert torch.equal(
            read_weight(tensors[name]).float(), read_weight(expected.tensors[name])
        ), name


def test_a_weight_that_is_wider_in_one_block_is_multiplied_in_all(tmp_path: Path) -> None:
    """Blocks share one graph, as experts do."""
    names = [
        f"{p}blocks.{i}.{m}.weight" for p in ("", "transformer_2.") for i in (0, 1) for m in "ab"
    ]
    state = lightx2v({n.replace("transformer_2.", "blocks.9."): torch.ones(2, 3) for n in names})
    state["blocks.9.blocks.1.a.weight"] = torch.ones(2, 3, dtype=torch.bfloat16)
    del state["blocks.9.blocks.1.a.weight_scale"]
    state["blocks.0.c.weight"] = torch.full((2, 3), 0.5).to(torch.float8_e4m3fn)
    save_file(state, tmp_path / "x.safetensors")
    found, _ = without_scales(read_header(tmp_path / "x.safetensors"), tmp_path)
    tensors = {n.replace("blocks.9.", "transformer_2."): w for n, w in found.items()}
    kept = keep_float8(tensors, "transformer_2.")
    float8 = {n for n in kept if scale_name(n) in kept}
    assert float8 == {n for n in names if n.endswith("b.weight")} | {"blocks.0.c.weight"}
    assert torch.equal(read_weight(kept[scale_name("blocks.0.c.weight")]), torch.ones(2, 1))
    assert tell_of_scales(kept) == (
        "float8_e4m3fn: 5 weights (0.0 MB) stay as they lie, and graphs multiply them by their scales",
        "scaled float8_e4m3fn: 3 weights (0.0 MB) are multiplied by their scales into the bundle "
        "(0.0 MB in bfloat16, twice that where it takes float32)",
    )


def test_baked_weights_and_backends_without_float8_take_none(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = save_scaled(tiny_checkpoint, lightx2v, tmp_path)
    request = BuildRequest(
        model=str(file),
        out=tmp_path / "out",
        backends=[OnnxRuntime()],
        configs=config_entries(["off"], lambda text: None),
    )

    def dtypes(request: BuildRequest) -> set[str]:
        return {dtype for dtype, _ in plan(request).cut.weights().values()}

    assert "float8_e4m3fn" in dtypes(request)
    assert "float8_e4m3fn" not in dtypes(replace(request, weights="baked"))
    monkeypatch.setattr(OnnxRuntime, "takes_float8", lambda self, target: False)
    assert "float8_e4m3fn" not in dtypes(request)


def test_memory_holds_one_weight_and_what_it_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused, scaled, swapped: the most that lives is bounded by the largest weight, not the file."""
    model = SD3Transformer2DModel(**{**CASES["sd35"][1], "pos_embed_max_size": 8, "sample_size": 8})
    model.save_config(tmp_path)
    state = {n: t.contiguous() for n, t in comfy(originals.sd3(dict(model.state_dict()))).items()}
    file = save(state, tmp_path / "x.safetensors")
    live = Live(monkeypatch, conversion, scaled, weights)
    checkpoint = open_checkpoint(str(file))
    assert live.reads == 0, "opening reads headers alone"
    wanted = {n: ("float32", w.shape) for n, w in checkpoint.tensors.items()}
    (tmp_path / "bundle").mkdir()
    bring_weights(wanted, checkpoint.tensors, tmp_path / "bundle")
    assert live.reads > len(wanted)
    assert live.now == 0
    largest = max(t.numel() * 4 for t in state.values())
    assert live.most <= 3 * largest, "in float32: stored, multiplied, and cut out of it"
    assert sum(t.numel() * 4 for t in state.values()) > 20 * largest


def test_the_scale_of_another_tensor_is_not_taken(tmp_path: Path) -> None:
    state = {"norm.scale_weight": torch.ones(1), "a.weight": torch.ones(2, 2)}
    save_file(state, tmp_path / "x.safetensors")
    found, _ = without_scales(read_header(tmp_path / "x.safetensors"), tmp_path)
    assert found.keys() == state.keys()
    assert all(isinstance(w, StoredTensor) for w in found.values())
