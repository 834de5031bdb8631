# SPDX-License-Identifier: Apache-2.0
"""Our headers are the library's, and a damaged file is refused wherever it is cut."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from freewheel.bundle.safetensors_header import ALIGNMENT_BYTES, encode_header, read_header
from freewheel.core.dtypes import SAFETENSORS_DTYPES
from freewheel.core.errors import CheckpointError

DTYPES = sorted(SAFETENSORS_DTYPES.values())

tensor_specs = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 4), max_size=3).map(tuple)),
    min_size=1,
    max_size=5,
)


def random_tensors(specs: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    found = {}
    for index, (name, (dtype, shape)) in enumerate(specs.items()):
        generator = torch.Generator().manual_seed(index)
        values = torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8)
        found[name] = values.to(getattr(torch, dtype))
    return found


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write(path: Path, header: dict[str, object], data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in caught.value.where
    assert caught.value.hint == "fetch the file again"
    return caught.value


@given(specs=tensor_specs)
def test_the_library_reads_what_we_write(specs, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("ours") / "x.safetensors"
    tensors = random_tensors(specs)
    header, offsets = encode_header(specs)
    assert len(header) % ALIGNMENT_BYTES == 0
    path.write_bytes(header + b"".join(raw(t) for t in tensors.values()))
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].float(), tensor.float())
    assert {n: t.offset for n, t in read_header(path).items()} == offsets


@given(specs=tensor_specs)
def test_we_read_what_the_library_writes(specs, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("theirs") / "x.safetensors"
    tensors = random_tensors(specs)
    save_file(tensors, path, metadata={"format": "pt"})
    content = path.read_bytes()
    found = read_header(path)
    assert found.keys() == tensors.keys()
    for name, place in found.items():
        assert (place.dtype, place.shape) == specs[name]
        assert content[place.offset : place.offset + place.bytes] == raw(tensors[name])


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    content = save({"a": torch.arange(3, dtype=torch.float32), "b": torch.ones(2, 2)})
    path.write_bytes(content)
    assert set(read_header(path)) == {"a", "b"}
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert "truncated" in refusal(path).what, length


def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(save({"a": torch.ones(3)}) + b"\0")
    assert "its header says" in refusal(path).what


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "can't be read: No such file" in refusal(tmp_path / "absent.safetensors").what


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all ",
        b"\xff\xfe\x00\x01\x02\x03\x04\x05",
        b"[]",
        b"3",
        b"null",
        b'"text"',
        b'{"a": 1}',
    ],
)
def test_a_header_that_is_not_a_table_of_tensors_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refusal(path)


def test_a_deeply_nested_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.safetensors"
    header = b"[" * 200_000
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refusal(path)


def test_an_absurd_header_length_reads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "absurd.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    assert "truncated or not safetensors" in refusal(path).what


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"dtype": "F4"}, "F4"),
        ({"dtype": None}, "None"),
        ({"shape": 2}, "unusable"),
        ({"shape": ["two"]}, "unusable"),
        ({"shape": [3]}, "a size that its shape denies"),
        ({"shape": [-2]}, "unusable"),
        ({"shape": [-1, -2]}, "unusable"),
        ({"data_offsets": [0]}, "unusable"),
        ({"data_offsets": [8, 0]}, "a size that its shape denies"),
        ({"data_offsets": [-8, 0]}, "unusable"),
    ],
)
def test_a_faulty_entry_names_its_tensor(tmp_path: Path, change, what: str) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **change}
    path = write(tmp_path / "entry.safetensors", {"weight": entry}, bytes(8))
    error = refusal(path)
    assert error.where.endswith("tensor 'weight'")
    assert what in error.what


def test_an_entry_without_dtype_is_refused(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.safetensors", {"w": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)
    )
    assert "dtype" in refusal(path).what
