# SPDX-License-Identifier: Apache-2.0
"""Files as users have them: each other layout is named, with the way to one that a build takes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from freewheel.compiler.checkpoints.checkpoint import open_checkpoint
from freewheel.core.errors import CheckpointError

STEM = "diffusion_pytorch_model"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint without its weights, which lie beside it as ``weights``."""
    target = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    (target / f"{STEM}.safetensors").rename(tmp_path / "weights")
    return target


@pytest.fixture
def put(folder: Path) -> Callable[..., None]:
    """Return a function that puts the weights into the folder under other names."""

    def copy(*names: str) -> None:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder.parent / "weights", folder / name)

    return copy


def refusal(model: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(model))
    assert "fetch the weights" not in caught.value.hint
    return caught.value


def test_a_variant_alone_is_named(folder: Path, put: Callable[..., None]) -> None:
    put(f"{STEM}.fp16.safetensors")
    error = refusal(folder)
    assert error.where == str(folder)
    assert f"as variant 'fp16' only, in '{STEM}.fp16.safetensors'" in error.what
    assert error.hint == "give --variant fp16"
    assert open_checkpoint(str(folder), variant="fp16").tensors


@pytest.mark.parametrize(
    "names",
    [
        [f"{STEM}.bf16-0000{n}-of-00002.safetensors" for n in (1, 2)],
        [f"{STEM}-0000{n}-of-00002.bf16.safetensors" for n in (1, 2)],
    ],
    ids=["before the number", "behind it"],
)
def test_shards_of_a_variant_are_named(
    folder: Path, put: Callable[..., None], names: list[str]
) -> None:
    put(*names)
    error = refusal(folder)
    assert f"as variant 'bf16' only, in '{names[0]}'" in error.what
    assert error.hint == "give --variant bf16"
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder), variant="bf16")
    assert "has shards of variant 'bf16', and no index of them" in caught.value.what
    assert f"fetch '{STEM}.safetensors.index.bf16.json'" in caught.value.hint


def test_a_variant_that_is_not_there_is_named(folder: Path, put: Callable[..., None]) -> None:
    put(f"{STEM}.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder), variant="fp16")
    assert caught.value.what == "has no weights of variant 'fp16'"
    assert caught.value.hint == "leave --variant out"
    put(f"{STEM}.bf16.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder), variant="fp16")
    assert "as variant 'bf16' and not as 'fp16', in" in caught.value.what
    assert caught.value.hint == "give --variant bf16"
    with pytest.raises(CheckpointError, match="means a folder's weights") as caught:
        open_checkpoint(str(folder / f"{STEM}.safetensors"), variant="fp16")
    assert caught.value.where == "--variant fp16"


def test_shards_without_an_index_are_counted(folder: Path, put: Callable[..., None]) -> None:
    put(*(f"{STEM}-0000{n}-of-00003.safetensors" for n in (1, 2, 3)))
    error = refusal(folder)
    assert f"has 3 shards, such as '{STEM}-00001-of-00003.safetensors', and no index" in error.what
    assert f"fetch '{STEM}.safetensors.index.json'" in error.hint


def test_a_folder_of_a_single_file_names_it(folder: Path, put: Callable[..., None]) -> None:
    put("wan2.1_t2v_1.3B_fp16.safetensors")
    expected = "has 'wan2.1_t2v_1.3B_fp16.safetensors', which is not named as diffusers names"
    for config in (True, False):
        if not config:
            (folder / "config.json").unlink()
        error = refusal(folder)
        assert expected in error.what, config
        assert f"give the file itself: '{folder}/wan2.1_t2v_1.3B_fp16.safetensors'" in error.hint


def test_a_folder_of_a_gguf_names_it(folder: Path, put: Callable[..., None]) -> None:
    put("wan2.1-t2v-14b-Q4_K_M.gguf")
    error = refusal(folder)
    assert error.where == str(folder)
    assert f"give the file itself: '{folder}/wan2.1-t2v-14b-Q4_K_M.gguf'" in error.hint


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt"])
def test_pickles_are_named(folder: Path, put: Callable[..., None], suffix: str) -> None:
    put(f"model.{suffix}")
    for place in (folder, folder / f"model.{suffix}"):
        error = refusal(place)
        assert "pickled weights, which Freewheel never opens" in error.what
        assert "safe_serialization=True" in error.hint
        file = folder / f"model.{suffix}"
        assert f"torch.load('{file}', weights_only=True), '{file}.safetensors')" in error.hint


def test_the_command_that_converts_a_pickle_does(folder: Path) -> None:
    """As it stands in the message; what it writes is a file that a build takes."""
    state = load_file(folder.parent / "weights")
    torch.save(state, folder / "wan.pt")
    command = re.search(r'python -c "(.*)"$', refusal(folder / "wan.pt").hint)
    assert command
    subprocess.run([sys.executable, "-c", command[1]], check=True)
    assert open_checkpoint(str(folder / "wan.pt.safetensors")).tensors.keys() == state.keys()


def test_a_file_of_no_weights_is_named(folder: Path, put: Callable[..., None]) -> None:
    put("notes.txt")
    error = refusal(folder / "notes.txt")
    assert error.where == str(folder / "notes.txt")
    assert "is a file of no kind that holds weights" in error.what
    assert "'config.json'" in error.hint


def test_a_folder_of_two_experts_is_told_how_to_name_them(tmp_path: Path) -> None:
    for level in ("high", "low"):
        (tmp_path / f"{level}_noise_model").mkdir()
    error = refusal(tmp_path)
    assert "holds two transformers, 'high_noise_model' and 'low_noise_model'" in error.what
    assert f"give '{tmp_path}/high_noise_model' as MODEL" in error.hint
    assert f"--low-noise-model '{tmp_path}/low_noise_model'" in error.hint


def test_a_pipeline_without_its_index_is_named(folder: Path, put: Callable[..., None]) -> None:
    put(f"{STEM}.safetensors")
    pipeline = folder.with_name("pipeline")
    pipeline.mkdir()
    folder.rename(pipeline / "transformer")
    error = refusal(pipeline)
    assert "has a folder 'transformer' and no 'model_index.json'" in error.what
    assert str(pipeline / "transformer") in error.hint
    assert open_checkpoint(str(pipeline / "transformer")).tensors


def test_a_folder_of_something_else_is_listed(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("")
    (tmp_path / "config.json.part").write_text("")
    error = refusal(tmp_path)
    assert "it holds 'README.md', 'config.json.part'" in error.what


def test_a_folder_without_weights_is_told_to_fetch_them(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no index of shards; fetch the weights"):
        open_checkpoint(str(folder))
