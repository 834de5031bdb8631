# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are found whole, sharded and on the hub; anything else gets one clear message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file

from freewheel.compiler.checkpoints.checkpoint import open_checkpoint
from freewheel.compiler.cut.models import family_of
from freewheel.core.errors import CheckpointError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def single(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "single"))


@pytest.fixture
def sharded(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint in shards, as diffusers writes them."""
    from diffusers import WanTransformer3DModel

    folder = tmp_path / "sharded"
    model = WanTransformer3DModel.from_pretrained(tiny_checkpoint)
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def refusal(model: Path | str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(model))
    assert caught.value.where
    assert caught.value.hint
    assert str(caught.value) == f"{caught.value.where}: {caught.value.what}; {caught.value.hint}"
    return caught.value


def hub_error(kind: type[HfHubHTTPError], text: str) -> HfHubHTTPError:
    error = kind.__new__(kind)
    OSError.__init__(error, text)
    return error


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_tensors_are_found_where_they_lie(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, layout: str
) -> None:
    folder = request.getfixturevalue(layout)
    checkpoint = open_checkpoint(str(folder))
    stored = load_file(tiny_checkpoint / WEIGHTS)
    assert (len(shards(folder)) > 3) == (layout == "sharded")
    assert checkpoint.tensors.keys() == stored.keys()
    for name, place in checkpoint.tensors.items():
        content = place.file.read_bytes()[place.offset : place.offset + place.bytes]
        assert place.dtype == "float32"
        found = torch.frombuffer(bytearray(content), dtype=torch.float32).view(place.shape)
        assert torch.equal(found, stored[name]), name


def test_a_transformer_folder_has_no_pipeline(single: Path) -> None:
    checkpoint = open_checkpoint(str(single))
    assert checkpoint.pipeline is None
    assert checkpoint.transformer == single
    assert checkpoint.revision is None
    assert checkpoint.transformer_class == "WanTransformer3DModel"
    assert checkpoint.config["num_layers"] == 3


def test_a_pipeline_folder_gives_its_transformer(single: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(single, folder / "transformer")
    (folder / "model_index.json").write_text("{}")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.pipeline == folder
    assert checkpoint.transformer == folder / "transformer"


def test_no_tensor_is_read(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only headers: a file whose data is a hole opens as fast as any."""
    weights = single / WEIGHTS
    size = weights.stat().st_size
    header = weights.read_bytes()[: 8 + int.from_bytes(weights.read_bytes()[:8], "little")]
    weights.write_bytes(header)
    with weights.open("r+b") as stream:
        stream.truncate(size)
    assert len(open_checkpoint(str(single)).tensors) > 50


def test_a_missing_shard_is_named_and_counted(sharded: Path) -> None:
    first, *_, last = shards(sharded)
    count = len(shards(sharded))
    first.unlink()
    last.unlink()
    error = refusal(sharded)
    assert error.where == str(sharded)
    assert f"2 of {count} weight shards are missing: {first.name}, {last.name}" in error.what
    assert "fetch" in error.hint


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_a_truncated_file_is_named(request: pytest.FixtureRequest, layout: str) -> None:
    path = shards(request.getfixturevalue(layout))[-1]
    content = path.read_bytes()
    for length in (0, 7, 8, 100, len(content) - 1):
        path.write_bytes(content[:length])
        error = refusal(path.parent)
        assert error.where == str(path)
        assert "truncated" in error.what


def test_a_damaged_header_is_named(single: Path) -> None:
    content = bytearray((single / WEIGHTS).read_bytes())
    content[8] = 0xFF
    (single / WEIGHTS).write_bytes(bytes(content))
    error = refusal(single)
    assert error.where == str(single / WEIGHTS)
    assert "header that is not JSON" in error.what


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_with_the_way_out(single: Path, name: str) -> None:
    (single / WEIGHTS).rename(single / name)
    error = refusal(single)
    assert error.where == str(single)
    assert "pickled weights, which Freewheel never opens" in error.what
    assert "save_pretrained(folder, safe_serialization=True)" in error.hint


def test_a_folder_without_weights_is_refused(single: Path) -> None:
    (single / WEIGHTS).unlink()
    error = refusal(single)
    assert f"no '{WEIGHTS}'" in error.what
    assert "fetch the weights" in error.hint


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path)
    assert error.where == str(tmp_path)
    assert "has neither 'model_index.json' nor 'config.json'; it is empty" in error.what
    assert "diffusers layout" in error.hint


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"{broken", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b"[" * 100_000, "is not JSON"),
    ],
    ids=["broken", "empty", "not text", "list", "deep"],
)
def test_a_config_that_is_no_json_object_is_refused(
    single: Path, content: bytes, what: str
) -> None:
    (single / "config.json").write_bytes(content)
    error = refusal(single)
    assert error.where == str(single / "config.json")
    assert what in error.what


@pytest.mark.parametrize(
    "index",
    [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}],
    ids=json.dumps,
)
def test_an_index_that_names_no_shards_is_refused(sharded: Path, index: Any) -> None:
    path = sharded / f"{WEIGHTS}.index.json"
    path.write_text(json.dumps(index))
    assert refusal(sharded).where == str(path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/hostname"])
def test_an_index_cannot_name_files_elsewhere(sharded: Path, name: str) -> None:
    path = sharded / f"{WEIGHTS}.index.json"
    shutil.copyfile(shards(sharded)[0], sharded.parent / "secret.safetensors")
    path.write_text(json.dumps({"weight_map": {"a": name}}))
    error = refusal(sharded)
    assert error.where == str(path)
    assert name in error.what


def test_another_architecture_is_refused_with_the_nearest(single: Path) -> None:
    config = json.loads((single / "config.json").read_text())
    config["_class_name"] = "WanTransformer2DModel"
    (single / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(single))
    with pytest.raises(CheckpointError) as caught:
        family_of(checkpoint.transformer_class, str(single / "config.json"))
    assert caught.value.where == str(single / "config.json")
    assert "'_class_name' is 'WanTransformer2DModel', which no family cuts" in caught.value.what
    assert "did you mean 'WanTransformer3DModel'" in caught.value.hint


def test_a_hub_id_is_fetched_without_pickles(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / "0123abc"
    shutil.copytree(single, snapshot / "transformer")
    (snapshot / "model_index.json").write_text("{}")
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = open_checkpoint("someone/model", "main")
    assert asked["repository"] == "someone/model"
    assert asked["revision"] == "main"
    assert not any(p.endswith(("bin", "pt", "*")) for p in asked["allow_patterns"])
    assert "*.safetensors" in asked["allow_patterns"]
    assert checkpoint.source == "someone/model"
    assert checkpoint.revision == "0123abc", "the commit that was fetched, not the branch"
    assert checkpoint.pipeline == snapshot


@pytest.mark.parametrize(
    "error",
    [
        hub_error(RepositoryNotFoundError, "401 Client Error\nRepository Not Found"),
        hub_error(HfHubHTTPError, "500 Server Error"),
        LocalEntryNotFoundError("no connection"),
        OSError("disk full"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_the_hub_refuses_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def download(repository: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    caught = refusal("someone/absent")
    assert caught.where == "someone/absent"
    assert "no folder here, and can't be had from the hub" in caught.what
    assert str(error).splitlines()[0] in caught.what
    assert "\n" not in caught.what
    assert "diffusers folder" in caught.hint


@pytest.mark.parametrize(
    "path", ["/nowhere/at/all", "./foo", "../foo", "~/absent", "models/absent/deeper", "absent/"]
)
def test_a_missing_path_is_not_looked_up_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setenv("HOME", "/nowhere")
    error = refusal(path)
    assert error.where == path
    assert error.what == "there is no such folder or file"


def test_a_name_in_a_folder_that_is_here_is_a_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert refusal("models/absent").what == "there is no such folder or file"


def test_a_misspelt_path_names_the_nearest_folder(single: Path) -> None:
    error = refusal(single.with_name("singel"))
    assert "did you mean 'single'" in error.hint


def test_the_home_folder_is_expanded(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(single.parent))
    assert open_checkpoint("~/single").transformer == single


def test_a_name_that_no_repository_can_have_is_refused() -> None:
    error = refusal("no such thing!")
    assert error.where == "no such thing!"
    assert "neither a folder nor a hub id" in error.what
    assert "diffusers folder" in error.hint


@pytest.mark.parametrize("part", ["transformer", "transformer_2"])
@pytest.mark.parametrize("method", ["bitsandbytes", "gguf", "torchao", "quanto"])
def test_a_quantisation_in_the_config_is_refused(
    single: Path, tmp_path: Path, part: str, method: str
) -> None:
    folder = tmp_path / "pipeline"
    for name in ("transformer", "transformer_2"):
        shutil.copytree(single, folder / name)
    index = {"boundary_ratio": 0.9, "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    path = folder / part / "config.json"
    config = {**json.loads(path.read_text()), "quantization_config": {"quant_method": method}}
    path.write_text(json.dumps(config))
    error = refusal(folder)
    assert error.where == f"{path}, 'quantization_config'"
    assert f"is {method}: the checkpoint is quantised" in error.what
    assert "dequantize" in error.hint


def test_image_to_video_with_a_timestep_for_each_token_is_refused_by_name(
    i2v_checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(i2v_checkpoint, tmp_path / "ti2v")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "expand_timesteps": True}))
    with pytest.raises(
        CheckpointError, match=r"'expand_timesteps': gives the first frame's .*WanP"
    ):
        open_checkpoint(str(folder))
    (folder / "model_index.json").write_text(json.dumps({**index, "expand_timesteps": False}))
    open_checkpoint(str(folder))
