# SPDX-License-Identifier: Apache-2.0
"""A part's folder in diffusers layout: whole, in shards, and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

from freewheel.compiler.checkpoints.folders import (
    linked_names,
    pipeline_folders,
    read_config,
    read_json,
    read_tensors,
)
from freewheel.compiler.checkpoints.sources import read_weight
from freewheel.core.errors import CheckpointError


@pytest.fixture(params=[None, "40KB"], ids=["whole", "shards"])
def folder(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint as diffusers writes it."""
    model = WanTransformer3DModel.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path, **({"max_shard_size": request.param} if request.param else {}))
    return tmp_path


def test_tensors_are_those_that_diffusers_wrote(folder: Path, tiny_checkpoint: Path) -> None:
    expected = load_file(tiny_checkpoint / "diffusion_pytorch_model.safetensors")
    found = read_tensors(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(read_weight(found[n]), t) for n, t in expected.items())


@pytest.mark.parametrize("size", [None, "40KB"], ids=["whole", "shards"])
def test_a_variant_is_read_as_diffusers_reads_it(
    tiny_checkpoint: Path, tmp_path: Path, size: str | None
) -> None:
    """The plain weights lie beside it, and are others."""
    model = WanTransformer3DModel.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path)
    options = {"max_shard_size": size} if size else {}
    model.to(torch.float16).save_pretrained(tmp_path, variant="fp16", **options)
    expected = WanTransformer3DModel.from_pretrained(
        tmp_path, variant="fp16", torch_dtype=torch.float16
    ).state_dict()
    found = read_tensors(tmp_path, variant="fp16")
    assert {t.dtype for t in found.values()} == {"float16"}
    assert found.keys() == expected.keys()
    assert all(torch.equal(read_weight(found[n]), t) for n, t in expected.items())
    assert {t.dtype for t in read_tensors(tmp_path).values()} == {"float32"}


@pytest.mark.parametrize("size", [None, "3KB"], ids=["whole", "shards"])
def test_a_variant_linked_by_plain_names_loads_without_one(
    tmp_path: Path, size: str | None
) -> None:
    config = UMT5Config(d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, vocab_size=100)
    model = UMT5EncoderModel(config)
    folder = tmp_path / "text_encoder"
    model.save_pretrained(folder)
    options = {"max_shard_size": size} if size else {}
    half = model.half()
    half.save_pretrained(folder, variant="fp16", **options)
    (folder / "notes.txt").write_text("")
    assert set(linked_names(folder).values()) == {p.name for p in folder.iterdir()}
    for source, name in linked_names(folder, "fp16").items():
        (tmp_path / "linked").mkdir(exist_ok=True)
        (tmp_path / "linked" / name).hardlink_to(source)
    names = {p.name for p in (tmp_path / "linked").iterdir()}
    assert {"config.json", "notes.txt"} < names
    assert ("model.safetensors" in names) == (size is None)
    loaded = UMT5EncoderModel.from_pretrained(tmp_path / "linked", dtype=torch.float16)
    expected = half.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in loaded.state_dict().items())
    assert linked_names(folder, "bf16") == linked_names(folder), "a part without the variant"


def test_another_stem_is_another_part(tmp_path: Path) -> None:
    save_file({"shared.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert list(read_tensors(tmp_path, "model")) == ["shared.weight"]
    with pytest.raises(CheckpointError, match=r"model.safetensors.*give the file itself"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("content", "what"),
    [("{", "is not JSON"), ("[1]", "is not a JSON object"), (None, "can't be read")],
)
def test_a_damaged_json_is_told(tmp_path: Path, content: str | None, what: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError) as caught:
        read_json(path)
    assert caught.value.where == str(path)
    assert what in caught.value.what
    assert caught.value.hint


def test_a_quantised_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(CheckpointError, match="is torchao: the checkpoint is quantised"):
        read_config(path)


def test_every_part_of_a_pipeline_is_one_of_the_bundle_but_its_transformers(tmp_path: Path) -> None:
    """Stable Diffusion 3 has three text encoders; whatever is named and there is a part."""
    parts = ["scheduler", "text_encoder_3", "tokenizer_3", "transformer", "transformer_2", "vae"]
    index = {p: ["diffusers", "X"] for p in (*parts, "absent", "..", "a/b")}
    for part in parts:
        (tmp_path / part).mkdir()
    index |= {"_class_name": "StableDiffusion3Pipeline", "boundary_ratio": None}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    kept = ["scheduler", "text_encoder_3", "tokenizer_3", "vae"]
    assert pipeline_folders(tmp_path) == kept
