# SPDX-License-Identifier: Apache-2.0
"""Wan's own folders become pipelines that compute what the same model in diffusers layout does."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from authors import KINDS, write_both
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from transformers import CLIPVisionModel, UMT5EncoderModel
from typer.testing import CliRunner

from freewheel.cli import app
from freewheel.compiler.checkpoints.authors_folder import (
    PartFiles,
    find_authors_folder,
    write_pipeline,
)
from freewheel.core.errors import CheckpointError

CLASSES: dict[str, Any] = {
    "text_encoder": UMT5EncoderModel,
    "vae": AutoencoderKLWan,
    "image_encoder": CLIPVisionModel,
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_part_is_the_one_of_the_diffusers_folder(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    plain, theirs, out = tmp_path / "plain", tmp_path / "theirs", tmp_path / "out"
    write_both(kind, plain, theirs, suffix)
    found = find_authors_folder(theirs)
    assert found is not None
    assert found.task == kind[-3:]
    assert (found.low_noise is not None) == ("moe" in kind)
    write_pipeline(found, out)
    index = json.loads((out / "model_index.json").read_text())
    expected = json.loads((plain / "model_index.json").read_text())
    assert index["_class_name"] == expected["_class_name"]
    assert index.get("boundary_ratio") == expected.get("boundary_ratio")
    parts = {p for p in CLASSES if index.get(p, [None])[0]}
    assert parts == {p for p in CLASSES if expected.get(p, [None])[0]}
    assert ("image_encoder" in parts) == (kind == "i2v")
    for part in parts:
        ours, same = (CLASSES[part].from_pretrained(f / part).state_dict() for f in (out, plain))
        assert ours.keys() == same.keys()
        assert all(torch.equal(ours[n], same[n]) for n in same)
    if kind == "i2v":
        ours, same = (
            CLIPVisionModel.from_pretrained(f / "image_encoder").config for f in (out, plain)
        )
        told = ("hidden_act", "num_attention_heads", "image_size", "patch_size")
        assert [getattr(ours, n) for n in told] == [getattr(same, n) for n in told]
    assert (out / "tokenizer" / "tokenizer.json").is_file()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("authors")
    write_both("i2v", base / "plain", base / "theirs")
    return base / "theirs"


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


T5 = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", T5, CLIP, "google", "config.json"])
def test_a_missing_part_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    place = copied(folder, tmp_path)
    (shutil.rmtree if (place / name).is_dir() else Path.unlink)(place / name)
    with pytest.raises(CheckpointError, match=rf"has no '{name.split('.')[0]}.*fetch it into"):
        find_authors_folder(place)


def test_a_config_names_other_files_and_turns_the_image_encoder_off(
    folder: Path, tmp_path: Path
) -> None:
    place = copied(folder, tmp_path)
    (place / T5).rename(tmp_path / "t5.pth")
    (place / CLIP).unlink()
    named = PartFiles(text_encoder=tmp_path / "t5.pth", takes_image_encoder=False)
    found = find_authors_folder(place, named)
    assert found is not None
    assert (found.text_encoder, found.image_encoder) == (tmp_path / "t5.pth", None)


def test_another_folder_is_none_of_them(tmp_path: Path) -> None:
    assert find_authors_folder(tmp_path) is None


def test_the_wide_vae_of_ti2v_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    place = copied(folder, tmp_path)
    (place / "Wan2.1_VAE.pth").rename(place / "Wan2.2_VAE.pth")
    with pytest.raises(CheckpointError, match=r"Wan2.2_VAE.pth: is the VAE of Wan 2.2 TI2V-5B"):
        find_authors_folder(place)


def write(state: Any, path: Path) -> None:
    torch.save(state, path)


def test_a_file_that_is_more_than_tensors_leaves_nothing_behind(
    folder: Path, tmp_path: Path
) -> None:
    place = copied(folder, tmp_path)
    write([torch.zeros(1)], place / T5)
    found = find_authors_folder(place)
    assert found is not None
    with pytest.raises(CheckpointError, match=f"{T5}: can't be read as tensors: holds more than"):
        write_pipeline(found, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_of_another_model_is_refused_by_its_first_tensor(
    folder: Path, tmp_path: Path
) -> None:
    place = copied(folder, tmp_path)
    state = torch.load(place / T5, weights_only=True)
    write({**state, "norm.weight": torch.zeros(7)}, place / T5)
    found = find_authors_folder(place)
    assert found is not None
    with pytest.raises(CheckpointError, match=r"'encoder.final_layer_norm.weight': is \(7,\)"):
        write_pipeline(found, tmp_path / "out")
    write({"a": torch.zeros(1)}, place / T5)
    with pytest.raises(CheckpointError, match=r"is not what its name says"):
        write_pipeline(found, tmp_path / "out")


def test_weights_keep_their_dtype(folder: Path, tmp_path: Path) -> None:
    place = copied(folder, tmp_path)
    state = torch.load(place / T5, weights_only=True)
    write({n: t.bfloat16() for n, t in state.items()}, place / T5)
    found = find_authors_folder(place)
    assert found is not None
    write_pipeline(found, tmp_path / "out")
    written = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    assert {t.dtype for t in written.values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["moe_t2v", pytest.param("i2v", marks=pytest.mark.nightly)])
def test_forecasts_are_those_of_the_diffusers_folder_and_write_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_both(kind, tmp_path / "diffusers", tmp_path / "authors")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def told(*arguments: str) -> dict[str, Any]:
        result = CliRunner().invoke(app, [*arguments, "--backend", "onnxruntime", "--json"])
        assert result.exit_code == 0, result.output
        forecast: dict[str, Any] = json.loads(result.stdout)["forecast"]
        return {n: forecast[n] for n in ("size", "dims", "flops")} | {
            "parts": forecast["memory"]["parts"]
        }

    out = str(tmp_path / "out")
    theirs, ours = (
        told("build", str(tmp_path / layout), "--out", out, "--dry-run")
        for layout in ("authors", "diffusers")
    )
    assert theirs == ours
    assert theirs["parts"]["other parts of the pipeline"] > 0
    assert told("inspect", str(tmp_path / "authors")) == theirs
    assert list((tmp_path / "temporary").iterdir()) == []
    assert {p.name for p in tmp_path.iterdir()} == {"authors", "diffusers", "temporary"}
