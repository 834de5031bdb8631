# SPDX-License-Identifier: Apache-2.0
"""GGUF files that the `gguf` package wrote are read as the package reads them, a weight at a time."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import originals
import pytest
import torch
from cases import CASES
from diffusers import WanTransformer3DModel
from live import Live
from test_original import save, tiny
from torch import Tensor

from freewheel.bundle.reader import Bundle
from freewheel.compiler.checkpoints import conversion, gguf_file, weights
from freewheel.compiler.checkpoints.checkpoint import open_checkpoint
from freewheel.compiler.checkpoints.gguf_file import read_gguf
from freewheel.compiler.checkpoints.sources import read_weight
from freewheel.compiler.checkpoints.weights import bring_weights
from freewheel.core import extras
from freewheel.core.errors import CheckpointError, DependencyError

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
Kind = gguf.GGMLQuantizationType
State = dict[str, Tensor]

WAN = {**CASES["wan"][1], "num_attention_heads": 1, "attention_head_dim": 256, "ffn_dim": 512}
"""As wide as a K-quant's block, so that every projection of the blocks can be in one."""

K_QUANTS = ("Q4_K", "Q5_K", "Q6_K")
ROUNDING = {"Q8_0": 1 / 127, "Q5_0": 1 / 15, "Q4_0": 1 / 7}
"""Kind that the package can write → half a step of it twice, of a block's largest value."""


def raw(kind: Any, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return blocks of a K-quant, which the package reads and does not write: random, scales small."""
    size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(seed).integers(
        0, 256, (*shape[:-1], shape[-1] // size, block_bytes), dtype=np.uint8
    )
    scale = np.array([1e-4], dtype=np.float16).view(np.uint8)
    if kind == Kind.Q6_K:
        rows[..., -2:] = scale
    else:
        rows[..., :2] = rows[..., 2:4] = scale
    return rows.reshape(*shape[:-1], -1)


def write(file: Path, state: State, kind: str) -> State:
    """Write a file as ComfyUI-GGUF does; return what the package itself makes of each tensor."""
    writer = gguf.GGUFWriter(file, "wan")
    expected: State = {}
    for index, (name, tensor) in enumerate(state.items()):
        values = tensor.contiguous().numpy()
        if values.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
            values = values.reshape(values.shape[0], -1)
        if values.ndim == 2 and values.shape[1] % 256 == 0 and name.startswith("blocks."):
            of = Kind[kind]
            data = (
                raw(of, values.shape, index)
                if kind in K_QUANTS
                else gguf.quants.quantize(values, of)
            )
            writer.add_tensor(name, data, raw_dtype=of)
            expected[name] = torch.from_numpy(gguf.quants.dequantize(data, of).copy())
        else:
            half = values.astype(np.float16) if values.ndim == 2 else values
            writer.add_tensor(name, half)
            expected[name] = torch.from_numpy(half.astype(np.float32)).view(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture(scope="module")
def model() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(**WAN)


@pytest.mark.parametrize("kind", [*K_QUANTS, *ROUNDING])
def test_weights_are_what_the_package_makes_of_them(
    model: WanTransformer3DModel, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "PIECE", 1000)  # no whole number of blocks, nor of rows
    plain = originals.wan(dict(model.state_dict()))
    expected = write(tmp_path / "wan.gguf", plain, kind)
    found, notes = read_gguf(tmp_path / "wan.gguf")
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        read = read_weight(weight)
        assert weight.shape == tuple(plain[name].shape), name
        assert torch.equal(read, expected[name]), name
        if kind in ROUNDING and weight.reason == f"GGUF {kind}":
            most = plain[name].abs().unflatten(-1, (-1, 32)).amax(-1) * ROUNDING[kind]
            assert bool(((read - plain[name]).unflatten(-1, (-1, 32)).abs().amax(-1) <= most).all())
    made = [w for w in found.values() if w.reason == f"GGUF {kind}"]
    assert len(made) == 4 * 10
    assert {w.dtype for w in made} == {"bfloat16"}
    assert {w.dtype for w in found.values() if w not in made} == {"float16", "float32"}
    block, block_bytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
    count = sum(w.bytes // 2 for w in made)
    assert f"40 weights (40 in {kind}; {count / block * block_bytes / 1e6:.1f} MB)" in notes[0]
    assert f"into the bundle ({count * 2 / 1e6:.1f} MB in bfloat16" in notes[0]


def test_a_checkpoint_is_named_and_split_as_its_plain_file(tmp_path: Path) -> None:
    """Stable Diffusion 3 has fused projections: each is cut out of what is dequantised."""
    model = tiny("sd35")
    state = originals.sd3(dict(model.state_dict()))
    fused = [n for n in state if n.endswith("qkv.weight")]
    writer = gguf.GGUFWriter(tmp_path / "sd3.gguf", "sd3")
    for name, tensor in state.items():
        values = tensor.contiguous().numpy()
        of = Kind.Q8_0 if name in fused else Kind.F32
        data = gguf.quants.quantize(values, of) if name in fused else values
        writer.add_tensor(name, data, raw_dtype=of)
        if name in fused:
            state[name] = torch.from_numpy(gguf.quants.dequantize(data, of).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.save_config(tmp_path)
    plain = open_checkpoint(str(save(state, tmp_path / "sd3.safetensors")))
    found = open_checkpoint(str(tmp_path / "sd3.gguf"))
    assert found.config == plain.config
    assert found.tensors.keys() == plain.tensors.keys()
    for name, weight in found.tensors.items():
        assert torch.equal(read_weight(weight), read_weight(plain.tensors[name])), name
    assert found.notes[-1].startswith(f"GGUF: {len(fused)} weights ({len(fused)} in Q8_0;")


# A body of bfloat16 has weights of both dtypes.
@pytest.mark.parametrize(
    "precision", [pytest.param("float32", marks=pytest.mark.nightly), "bfloat16"]
)
def test_a_bundle_holds_the_dequantised_weights(
    model: WanTransformer3DModel,
    tmp_path: Path,
    build_bundle: Callable[..., Bundle],
    precision: str,
) -> None:
    model.save_config(tmp_path)
    expected = write(tmp_path / "wan.gguf", originals.wan(dict(model.state_dict())), "Q6_K")
    bundle = build_bundle(tmp_path / "wan.gguf", backends=("openvino",), precision=precision)
    plain = open_checkpoint(str(save(expected, tmp_path / "plain.safetensors")))
    for name, entry in bundle.manifest.tensors.items():
        value = read_weight(plain.tensors[name]).to(getattr(torch, entry.dtype))
        assert torch.equal(bundle.tensor(name), value), name
        assert entry.file.startswith("weights/converted"), "a GGUF file is no safetensors file"
    assert bundle.manifest.tensors["blocks.0.ffn.net.2.weight"].dtype == precision
    assert bundle.manifest.tensors["condition_embedder.time_proj.bias"].dtype == "float32"


def test_memory_holds_one_weight(
    model: WanTransformer3DModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_config(tmp_path)
    write(tmp_path / "wan.gguf", originals.wan(dict(model.state_dict())), "Q4_K")
    live = Live(monkeypatch, conversion, weights)
    tensors = open_checkpoint(str(tmp_path / "wan.gguf")).tensors
    assert live.reads == 0
    (tmp_path / "bundle").mkdir()
    bring_weights(
        {n: ("float32", w.shape) for n, w in tensors.items()}, tensors, tmp_path / "bundle"
    )
    assert (live.reads, live.now) == (len(tensors), 0)
    sizes = [4 * prod(w.shape) for w in tensors.values()]
    assert live.most == max(sizes) < sum(sizes) / 5


def damaged(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    "change", [damaged, lambda c: b"GGML" + c[4:], lambda c: c[:20], lambda c: b""]
)
def test_a_damaged_file_is_told(
    model: WanTransformer3DModel, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    file = tmp_path / "wan.gguf"
    write(file, originals.wan(dict(model.state_dict())), "Q8_0")
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(
        CheckpointError, match=r"is damaged, or no GGUF file: .*; fetch the file"
    ) as caught:
        read_gguf(file)
    assert caught.value.where == str(file)


def write_one(file: Path, data: np.ndarray, shape: list[int] | None = None) -> None:
    writer = gguf.GGUFWriter(file, "wan")
    if shape:
        writer.add_array("comfy.gguf.orig_shape.a.weight", shape)
    writer.add_tensor("a.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_shape_that_the_values_deny_is_told(tmp_path: Path) -> None:
    write_one(tmp_path / "x.gguf", np.zeros((4, 4), dtype=np.float32), [4, 5])
    with pytest.raises(CheckpointError, match=r"is \[4, 4\], and its key says \[4, 5\]"):
        read_gguf(tmp_path / "x.gguf")


def test_a_kind_that_holds_no_weights_is_refused(tmp_path: Path) -> None:
    write_one(tmp_path / "x.gguf", np.zeros((4, 4), dtype=np.int32))
    with pytest.raises(CheckpointError, match="is in I32, which holds no weights") as caught:
        read_gguf(tmp_path / "x.gguf")
    assert caught.value.where == f"{tmp_path / 'x.gguf'}, tensor 'a.weight'"
    assert "Q8_0, Q6_K, Q5_K or Q4_K" in caught.value.hint


def test_the_package_is_asked_for_by_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(
        DependencyError, match=r"needs gguf, which is not installed; pip install"
    ) as caught:
        open_checkpoint(str(tmp_path / "x.gguf"))
    assert "freewheel[gguf]" in caught.value.hint
