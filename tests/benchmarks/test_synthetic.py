"""Synthetic checkpoints are what they claim: real geometry, sharded, seeded, of a sane scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import synthetic
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from synthetic import GEOMETRIES, random_tensor, write_checkpoint, write_transformer

from freewheel.compiler.checkpoints.checkpoint import open_checkpoint

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 3,
    "rope_max_seq_len": 64,
    "image_dim": 20,
    "added_kv_proj_dim": 32,
}


@pytest.mark.parametrize(
    ("geometry", "billions"),
    [("wan2.1-t2v-1.3b", 1.42), ("wan2.1-t2v-14b", 14.29), ("wan2.1-i2v-14b-480p", 16.39)],
)
def test_geometries_have_the_published_number_of_parameters(geometry: str, billions: float) -> None:
    with torch.device("meta"):
        model = WanTransformer3DModel(**GEOMETRIES[geometry])
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_sharded_checkpoint_is_diffusers_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "SHARD_BYTES", 60_000)
    total = write_transformer(TINY, tmp_path, "float32", seed=3)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    model = WanTransformer3DModel.from_pretrained(tmp_path)
    assert total == 4 * sum(p.numel() for p in model.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, random_tensor(name, tuple(parameter.shape), 3)), name
    assert open_checkpoint(str(tmp_path)).tensors.keys() == dict(model.named_parameters()).keys()


def test_equal_seeds_give_equal_bytes_and_other_seeds_others(tmp_path: Path) -> None:
    files = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_transformer(TINY, tmp_path / folder, "bfloat16", seed)
        files.append(next((tmp_path / folder).glob("*.safetensors")))
    first, same, other = (f.read_bytes() for f in files)
    assert first == same
    assert first != other
    assert {t.dtype for t in load_file(files[0]).values()} == {torch.bfloat16}


def test_weights_are_scaled_so_that_activations_stay_finite() -> None:
    projection = random_tensor("blocks.0.attn1.to_q.weight", (512, 2048), 0)
    assert float(projection.std()) == pytest.approx(2048**-0.5, rel=0.01)
    norm = random_tensor("blocks.0.attn1.norm_q.weight", (4096,), 0)
    assert float(norm.mean()) == pytest.approx(1.0, abs=0.01)


def test_a_geometry_can_be_cut_to_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GEOMETRIES, "tiny", TINY)
    write_checkpoint("tiny", tmp_path, layers=2)
    assert json.loads((tmp_path / "config.json").read_text())["num_layers"] == 2
    blocks = {n.split(".")[1] for n in open_checkpoint(str(tmp_path)).tensors if "blocks." in n}
    assert blocks == {"0", "1"}
