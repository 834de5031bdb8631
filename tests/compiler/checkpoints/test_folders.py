# SPDX-License-Identifier: Apache-2.0
"""A part's folder in diffusers layout: whole, in shards, and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from freewheel.compiler.checkpoints.folders import read_config, read_json, read_tensors
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
