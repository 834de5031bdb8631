# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile bundles are refused with a message, whatever was done to them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from freewheel.bundle.manifest import SCHEMA_VERSION
from freewheel.bundle.reader import MANIFEST, Bundle
from freewheel.core.errors import BundleError

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage; unlink a file before writing to it."""
    target = tmp_path / "copy"
    shutil.copytree(tiny_bundle.folder, target, copy_function=os.link)
    (target / MANIFEST).unlink()
    shutil.copyfile(tiny_bundle.folder / MANIFEST, target / MANIFEST)
    return target


def rewrite(folder: Path, edit: Edit) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    edit(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def overwrite(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def refusal(folder: Path) -> BundleError:
    with pytest.raises(BundleError) as caught:
        Bundle(folder)
    assert caught.value.where
    assert caught.value.hint
    return caught.value


def weight_file(folder: Path) -> Path:
    return next((folder / "weights").glob("*.safetensors"))


def test_a_copied_bundle_opens_and_its_digests_agree(folder: Path) -> None:
    assert Bundle(folder).digests() == []
    assert Bundle(str(folder)).manifest.family == "wan"


def test_weights_are_those_of_the_checkpoint(folder: Path, tiny_checkpoint: Path) -> None:
    bundle = Bundle(folder)
    stored = load_file(tiny_checkpoint / "diffusion_pytorch_model.safetensors")
    assert bundle.manifest.tensors.keys() <= stored.keys()
    assert len(bundle.manifest.tensors) > 30
    for name in bundle.manifest.tensors:
        assert torch.equal(bundle.tensor(name), stored[name])


def test_offsets_of_the_manifest_find_the_same_bytes(folder: Path) -> None:
    """C++ reads weights by offset alone, Python through the file's header."""
    bundle = Bundle(folder)
    for name, entry in bundle.manifest.tensors.items():
        content = bundle.path(entry.file).read_bytes()[entry.offset : entry.offset + entry.bytes]
        tensor = torch.frombuffer(bytearray(content), dtype=getattr(torch, entry.dtype))
        assert torch.equal(tensor.view(entry.shape), bundle.tensor(name))


def test_a_tensor_is_found_by_its_place_whatever_the_file_calls_it(folder: Path) -> None:
    """An expert's weights have a prefix in the manifest, and none in a linked file."""
    name = "blocks.0.ffn.net.2.weight"
    expected = Bundle(folder).tensor(name)

    def rename(data: dict[str, Any]) -> None:
        data["tensors"][f"transformer_2.{name}"] = data["tensors"][name]

    rewrite(folder, rename)
    assert torch.equal(Bundle(folder).tensor(f"transformer_2.{name}"), expected)


@pytest.mark.parametrize("change", ["missing", "shorter", "longer", "folder"])
def test_a_file_of_another_size_is_named(folder: Path, change: str) -> None:
    path = folder / "graphs" / "block.onnx"
    content = path.read_bytes()
    path.unlink()
    if change == "folder":
        path.mkdir()
    elif change != "missing":
        path.write_bytes(content[:-1] if change == "shorter" else content + b"\0")
    error = refusal(folder)
    assert error.where.endswith("file 'graphs/block.onnx'")
    assert f"the manifest says {len(content)} bytes" in error.what


def test_a_flipped_byte_is_found_by_digest_alone(folder: Path) -> None:
    path = folder / "graphs" / "reuse.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    overwrite(path, bytes(content))
    assert Bundle(folder).digests() == ["graphs/reuse.onnx"]


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "a/../../outside", "..\\outside", "", "nul\0byte"]
)
def test_a_path_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_bytes(b"secret")
    entry = {"bytes": 6, "sha256": "0" * 64}
    rewrite(folder, lambda data: data["files"].update({name: entry}))
    error = refusal(folder)
    assert name in error.where
    assert "leaves the bundle's folder" in error.what


def test_a_link_that_leaves_the_folder_is_refused(folder: Path) -> None:
    path = folder / "graphs" / "block.onnx"
    path.rename(folder.parent / "outside.onnx")
    path.symlink_to(folder.parent / "outside.onnx")
    assert "leaves the bundle's folder" in refusal(folder).what


def test_paths_handed_out_stay_in_the_folder(folder: Path) -> None:
    bundle = Bundle(folder)
    assert bundle.path("graphs/block.onnx").is_file()
    with pytest.raises(BundleError, match="leaves the bundle's folder"):
        bundle.path("../x")


@pytest.mark.parametrize(
    "edit",
    [
        lambda entry: entry.update(offset=1 << 40),
        lambda entry: entry.update(bytes=1 << 40),
        lambda entry: entry.update(file="weights/absent.safetensors"),
    ],
)
def test_a_tensor_outside_its_file_is_refused(folder: Path, edit: Edit) -> None:
    rewrite(folder, lambda data: edit(data["tensors"]["patch_embedding.weight"]))
    error = refusal(folder)
    assert error.where.endswith("tensor 'patch_embedding.weight'")
    assert "lies outside file 'weights/" in error.what


def test_a_graph_that_is_no_file_of_the_bundle_is_refused(folder: Path) -> None:
    rewrite(folder, lambda data: data["graphs"]["block"].update(file="graphs/other.onnx"))
    error = refusal(folder)
    assert error.where.endswith("graph 'block'")
    assert "'graphs/other.onnx'" in error.what


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 1000])
def test_a_newer_schema_is_refused_with_both_versions(folder: Path, version: int) -> None:
    rewrite(folder, lambda data: data.update(schema_version=version, of_the_future=[1]))
    error = refusal(folder)
    assert error.where == str(folder / MANIFEST)
    assert f"schema_version {version}" in error.what
    assert f"reads up to {SCHEMA_VERSION}" in error.what
    assert "update Freewheel" in error.hint


def test_an_older_schema_is_refused_with_both_versions(folder: Path) -> None:
    rewrite(folder, lambda data: data.update(schema_version=1))
    error = refusal(folder)
    assert error.what == f"has schema_version 1; this Freewheel reads {SCHEMA_VERSION}"
    assert error.hint == "build the bundle again"


def test_all_faults_of_a_manifest_are_named(folder: Path) -> None:
    def edit(data: dict[str, Any]) -> None:
        data["surprise"] = 1
        data["feature_block"] = -1
        del data["family"]

    rewrite(folder, edit)
    error = refusal(folder)
    assert error.what.startswith("3 faults: ")
    for name in ("'surprise'", "'feature_block'", "'family'"):
        assert name in error.what


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"NaN", b"[]", b"null", b"{}"],
    ids=["empty", "cut", "not text", "deep", "nan", "list", "null", "no fields"],
)
def test_a_manifest_that_is_none_is_refused(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    assert refusal(folder).where == str(folder / MANIFEST)


def test_a_truncated_manifest_is_refused_wherever_it_ends(folder: Path) -> None:
    content = (folder / MANIFEST).read_bytes()
    for share in range(1, 20):
        (folder / MANIFEST).write_bytes(content[: len(content) * share // 20])
        assert "is not JSON" in refusal(folder).what


@pytest.mark.parametrize("name", ["absent", "."])
def test_a_folder_without_a_bundle_is_refused(tmp_path: Path, name: str) -> None:
    error = refusal(tmp_path / name)
    assert "can't be read: No such file" in error.what
    assert "`build`" in error.hint


def test_an_absurdly_large_manifest_is_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freewheel.bundle.reader.MAX_MANIFEST_BYTES", 10)
    assert "absurdly large" in refusal(folder).what


def test_unknown_names_are_refused(folder: Path) -> None:
    bundle = Bundle(folder)
    with pytest.raises(BundleError, match=r"graph 'blocks': is not in the bundle; did you mean"):
        bundle.graph_path("blocks")
    with pytest.raises(BundleError, match=r"tensor 'x': is not in the bundle; build it again"):
        bundle.tensor("x")
    assert bundle.engines("tensorrt") is None
    assert bundle.engines("openvino").backend == "openvino"


def test_a_tensor_of_another_shape_or_dtype_is_refused(folder: Path) -> None:
    def edit(data: dict[str, Any]) -> None:
        data["tensors"]["proj_out.bias"]["shape"] = [4, 4]
        data["tensors"]["proj_out.weight"]["dtype"] = "int32"

    rewrite(folder, edit)
    bundle = Bundle(folder)
    with pytest.raises(
        BundleError, match=r"is torch.float32 \[16\], the manifest says .* \[4, 4\]"
    ):
        bundle.tensor("proj_out.bias")
    with pytest.raises(BundleError, match="the manifest says int32"):
        bundle.tensor("proj_out.weight")


def test_a_weight_is_read_as_a_part_of_the_tensor_that_holds_it(folder: Path) -> None:
    whole = Bundle(folder).tensor("proj_out.weight").clone()
    rows, columns = whole.shape

    def edit(data: dict[str, Any], **change: object) -> None:
        entry = data["tensors"]["proj_out.weight"]
        part = {
            "shape": [2, columns],
            "bytes": 8 * columns,
            "offset": entry["offset"] + 4 * columns,
        }
        data["tensors"]["proj_out.bias"] |= {**part, "file": entry["file"], **change}

    rewrite(folder, edit)
    assert torch.equal(Bundle(folder).tensor("proj_out.bias"), whole[1:3])
    rewrite(folder, lambda data: edit(data, dtype="int32"))
    with pytest.raises(BundleError, match=r"no part of tensor 'proj_out.weight', which is float32"):
        Bundle(folder).tensor("proj_out.bias")
    start = Bundle(folder).manifest.tensors["proj_out.weight"].offset
    rewrite(folder, lambda data: edit(data, offset=start + 2))
    with pytest.raises(BundleError, match=r"no part of tensor 'proj_out.weight'"):
        Bundle(folder).tensor("proj_out.bias")
    rewrite(folder, lambda data: edit(data, offset=start + 4 * columns * (rows - 1)))
    with pytest.raises(BundleError, match=f"no tensor lies in its {8 * columns} bytes from"):
        Bundle(folder).tensor("proj_out.bias")


def test_a_weight_file_full_of_garbage_is_refused(folder: Path) -> None:
    path = weight_file(folder)
    overwrite(path, b"\xa5" * path.stat().st_size)
    bundle = Bundle(folder)
    with pytest.raises(BundleError) as caught:
        bundle.tensor("proj_out.bias")
    assert "proj_out.bias" in caught.value.where
    assert path.name in caught.value.what
    assert caught.value.hint


def test_a_weight_file_without_the_tensor_is_refused(folder: Path) -> None:
    path = weight_file(folder)
    size = path.stat().st_size
    path.unlink()
    save_file({"other": torch.zeros(1)}, path)
    path.write_bytes(path.read_bytes() + bytes(size - path.stat().st_size))
    rewrite(folder, lambda data: None)
    with pytest.raises(BundleError, match=r"tensor 'proj_out.bias'"):
        Bundle(folder).tensor("proj_out.bias")
