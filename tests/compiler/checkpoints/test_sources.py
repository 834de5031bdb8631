# SPDX-License-Identifier: Apache-2.0
"""A weight is read from its place alone, or made of what it needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from freewheel.bundle.safetensors_header import read_header
from freewheel.compiler.checkpoints.sources import MadeTensor, lies_as, read_weight
from freewheel.core.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.tensor(2.5, dtype=torch.bfloat16),
    "c": torch.tensor([1.5, -448.0]).to(torch.float8_e4m3fn),
    "d": torch.empty(0, 3),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("name", TENSORS)
def test_a_stored_tensor_is_read_as_the_library_reads_it(file: Path, name: str) -> None:
    found = read_weight(read_header(file)[name])
    assert (found.dtype, found.shape) == (TENSORS[name].dtype, TENSORS[name].shape)
    assert torch.equal(found.float(), TENSORS[name].float())


def test_a_file_that_became_shorter_is_told(file: Path) -> None:
    place = read_header(file)["c"]
    file.write_bytes(file.read_bytes()[: place.offset + 1])
    with pytest.raises(CheckpointError, match=r"tensor 'c': is cut short; fetch the file again"):
        read_weight(place)


def test_a_made_tensor_lies_nowhere_and_is_made_when_read(file: Path) -> None:
    made = MadeTensor("float32", (2, 3), "doubled", lambda: TENSORS["a"] * 2)
    assert made.bytes == 24
    assert torch.equal(read_weight(made), TENSORS["a"] * 2)
    stored = read_header(file)
    assert lies_as(stored["a"], "float32")
    assert not lies_as(stored["a"], "bfloat16")
    assert not lies_as(made, "float32")
    assert not lies_as(replace(stored["a"], offset=stored["a"].offset + 1), "float32")
