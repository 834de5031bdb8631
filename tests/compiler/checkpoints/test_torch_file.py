# SPDX-License-Identifier: Apache-2.0
"""Files of `torch.save` are read as data: equal to torch's own reading, and nothing of them runs."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from freewheel.compiler.checkpoints.torch_file import read_torch_file
from freewheel.core.errors import CheckpointError


class Harmful:
    """Makes a file where an unpickler builds it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def saved(state: Any, folder: Path) -> Path:
    file = folder / "x.pth"
    torch.save(state, file)
    return file


SHARED = torch.arange(12.0)
STATES: dict[str, Any] = {
    "dtypes": {
        str(d): torch.arange(6).reshape(2, 3).to(d)
        for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)
    },
    "views": {"all": SHARED, "part": SHARED[3:7], "turned": SHARED.reshape(3, 4).T, "one": SHARED[5]},
    "a module's": nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).state_dict(),
    "empty": OrderedDict(a=torch.empty(0, 3), b=torch.tensor(2.5)),
    "many": {f"blocks.{i}.weight": torch.full((2, 2), float(i)) for i in range(300)},
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_tensors_are_those_that_torch_reads(tmp_path: Path, name: str) -> None:
    file = saved(STATES[name], tmp_path)
    expected = torch.load(file, weights_only=True)
    found = read_torch_file(file)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)


def test_a_harmful_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    made = tmp_path / "made"
    file = saved({"a": torch.zeros(1), "b": Harmful(made)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"x.pth: can't be read as tensors: .*; fetch"):
        read_torch_file(file)
    assert not made.exists()
    torch.load(file, weights_only=False)  # it would have
    assert made.exists()


@pytest.mark.parametrize(
    "state",
    [[torch.zeros(1)], {"a": 1}, {"a": {"b": torch.zeros(1)}}, nn.Parameter(torch.zeros(1))],
)
def test_more_than_named_tensors_is_refused(tmp_path: Path, state: Any) -> None:
    with pytest.raises(CheckpointError, match=r"holds more than named tensors"):
        read_torch_file(saved(state, tmp_path))


def test_damage_is_refused(tmp_path: Path) -> None:
    file = saved({"a": torch.zeros(100)}, tmp_path)
    whole = file.read_bytes()
    for data in (b"", b"no zip", whole[:-50], whole[: len(whole) // 2]):
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match="can't be read as tensors"):
            read_torch_file(file)


def test_a_tensor_that_leaves_its_storage_is_refused(tmp_path: Path) -> None:
    file = saved({"a": torch.zeros(100)}, tmp_path)
    changed = tmp_path / "changed.pth"
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(changed, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, data[:-4] if entry.filename.endswith("data/0") else data)
    with pytest.raises(CheckpointError, match=r"storage '0' has not the 400 bytes"):
        read_torch_file(changed)
