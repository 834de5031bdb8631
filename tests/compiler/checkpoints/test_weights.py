# SPDX-License-Identifier: Apache-2.0
"""Weights are linked where they are right and converted where they are not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from freewheel.bundle.manifest import TensorEntry
from freewheel.bundle.safetensors_header import ALIGNMENT_BYTES, StoredTensor, read_header
from freewheel.compiler.checkpoints import weights
from freewheel.compiler.checkpoints.weights import bring_weights
from freewheel.core.errors import OutputError

Wanted = dict[str, tuple[str, tuple[int, ...]]]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5, generator=generator),
        "a.bias": torch.randn(3, generator=generator).to(torch.bfloat16),
        "b.weight": torch.randn(7, generator=generator),
        "b.scale": torch.tensor(2.5),
    }


@pytest.fixture
def checkpoint(tensors: dict[str, torch.Tensor], tmp_path: Path) -> dict[str, StoredTensor]:
    """Two shards, one with tensors of two dtypes."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    stored: dict[str, StoredTensor] = {}
    for shard in "ab":
        path = folder / f"{shard}.safetensors"
        save_file({n: t for n, t in tensors.items() if n.startswith(shard)}, path)
        stored |= read_header(path)
    return stored


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    return folder


def as_stored(checkpoint: dict[str, StoredTensor], **dtypes: str) -> Wanted:
    """Want every tensor as it is stored, but for those given by ``dtypes``."""
    return {n: (dtypes.get(n.replace(".", "_"), t.dtype), t.shape) for n, t in checkpoint.items()}


def value(bundle: Path, entry: TensorEntry) -> torch.Tensor:
    content = (bundle / entry.file).read_bytes()[entry.offset : entry.offset + entry.bytes]
    return torch.frombuffer(bytearray(content), dtype=getattr(torch, entry.dtype)).view(entry.shape)


def check(bundle: Path, entries: dict[str, TensorEntry], wanted: Wanted, tensors) -> None:
    assert entries.keys() == wanted.keys()
    for name, (dtype, shape) in wanted.items():
        assert (entries[name].dtype, tuple(entries[name].shape)) == (dtype, shape)
        expected = tensors[name].to(getattr(torch, dtype))
        assert torch.equal(value(bundle, entries[name]), expected), name
        loaded = load_file(bundle / entries[name].file)[name]
        assert torch.equal(loaded.to(expected.dtype), expected), name


def test_tensors_of_the_right_dtype_are_hard_links(checkpoint, tensors, bundle: Path) -> None:
    wanted = as_stored(checkpoint)
    entries = bring_weights(wanted, checkpoint, bundle)
    check(bundle, entries, wanted, tensors)
    found = sorted(p.name for p in (bundle / "weights").iterdir())
    assert found == ["a.safetensors", "b.safetensors"]
    for name, place in checkpoint.items():
        assert (bundle / entries[name].file).stat().st_ino == place.file.stat().st_ino


def test_tensors_of_another_dtype_are_converted_and_the_rest_linked(
    checkpoint, tensors, bundle: Path
) -> None:
    wanted = as_stored(checkpoint, a_weight="bfloat16", b_weight="float16")
    entries = bring_weights(wanted, checkpoint, bundle)
    check(bundle, entries, wanted, tensors)
    converted = {n for n, e in entries.items() if "converted" in e.file}
    assert converted == {"a.weight", "b.weight"}
    assert set(load_file(bundle / "weights" / "converted-00000.safetensors")) == converted


def test_a_shard_of_which_nothing_is_right_is_not_linked(checkpoint, tensors, bundle: Path) -> None:
    wanted = as_stored(checkpoint, b_weight="bfloat16", b_scale="bfloat16")
    check(bundle, bring_weights(wanted, checkpoint, bundle), wanted, tensors)
    found = sorted(p.name for p in (bundle / "weights").iterdir())
    assert found == ["a.safetensors", "converted-00000.safetensors"]


def test_converted_data_begins_aligned(checkpoint, bundle: Path) -> None:
    wanted = {"a.weight": ("bfloat16", (3, 5)), "b.weight": ("bfloat16", (7,))}
    entries = bring_weights(wanted, checkpoint, bundle)
    assert entries["a.weight"].offset % ALIGNMENT_BYTES == 0
    assert entries["b.weight"].offset == entries["a.weight"].offset + 30


def test_where_the_file_system_cannot_link_everything_is_copied(
    checkpoint, tensors, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    wanted = as_stored(checkpoint)
    entries = bring_weights(wanted, checkpoint, bundle)
    check(bundle, entries, wanted, tensors)
    assert {e.file for e in entries.values()} == {"weights/converted-00000.safetensors"}


def test_large_copies_are_split_into_files(
    checkpoint, tensors, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "CONVERTED_FILE_BYTES", 20)
    wanted = as_stored(checkpoint, a_weight="float16", b_weight="float16", b_scale="float16")
    entries = bring_weights(wanted, checkpoint, bundle)
    check(bundle, entries, wanted, tensors)
    assert len({e.file for e in entries.values() if "converted" in e.file}) == 2


def test_progress_counts_the_bytes_that_are_written(checkpoint, bundle: Path) -> None:
    reported: list[tuple[int, int]] = []
    wanted = as_stored(checkpoint, a_weight="float16", b_weight="float16")
    bring_weights(wanted, checkpoint, bundle, lambda done, total: reported.append((done, total)))
    assert reported == [(30, 44), (44, 44)]


def test_one_tensor_is_in_memory_at_a_time(
    checkpoint, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    original = weights._converted_bytes

    def spy(place: StoredTensor, dtype: str) -> memoryview:
        opened.append(place.name)
        return original(place, dtype)

    monkeypatch.setattr(weights, "_converted_bytes", spy)
    bring_weights(as_stored(checkpoint, a_weight="float16"), checkpoint, bundle)
    assert opened == ["a.weight"], "linked tensors are never read"


def test_shards_of_one_name_from_two_folders_are_told_apart(tmp_path: Path, bundle: Path) -> None:
    stored: dict[str, StoredTensor] = {}
    for index, name in enumerate(("x", "y")):
        path = tmp_path / name / "model.safetensors"
        path.parent.mkdir()
        save_file({name: torch.full((4,), float(index))}, path)
        stored |= read_header(path)
    entries = bring_weights(as_stored(stored), stored, bundle)
    for index, name in enumerate(("x", "y")):
        assert torch.equal(value(bundle, entries[name]), torch.full((4,), float(index)))


def test_a_full_disk_is_told(checkpoint, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: StoredTensor, dtype: str) -> memoryview:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "_converted_bytes", refuse)
    with pytest.raises(OutputError) as caught:
        bring_weights(as_stored(checkpoint, a_weight="float16"), checkpoint, bundle)
    assert caught.value.where.endswith("converted-00000.safetensors")
    assert "can't be written: No space left" in caught.value.what
    assert "--out" in caught.value.hint
