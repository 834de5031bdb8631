"""The text encoder and the VAE's decoder as segments, against the modules they restate."""

import json
import shutil

import pytest
import torch
from generations import generation_of

from freewheel.bundle.manifest import GraphEntry
from freewheel.compiler.graphs.ends import part_tensors, text_encoder_part, vae_decode_part
from freewheel.core.errors import CheckpointError

SIZE = generation_of(frames=9, height=32, width=48)


@pytest.fixture(scope="module")
def pipeline(repository):
    return repository / "models" / "shapes_wan"


def with_weights(part, aliases=None):
    """Return the part's module with its weights read from the part's files."""
    from safetensors.torch import load_file

    module = part.segment.module.to_empty(device="cpu")
    files = {s.file for s in part.stored.values()}
    state = {n: t for f in files for n, t in load_file(f).items()}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(state[(aliases or {}).get(name, name)])
    return module


def test_text_states_are_the_encoders_and_zero_behind_the_prompt(pipeline):
    from transformers import UMT5EncoderModel

    part = text_encoder_part(pipeline)
    module = with_weights(part, {"encoder.embed_tokens.weight": "shared.weight"})
    ids = torch.tensor([[3, 32, 27, 1, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    reference = UMT5EncoderModel.from_pretrained(pipeline / "text_encoder").float().eval()
    with torch.no_grad():
        found, expected = module(ids, mask), reference(ids, mask).last_hidden_state
    torch.testing.assert_close(found[:, :4], expected[:, :4], atol=1e-5, rtol=1e-5)
    assert not found[:, 4:].any()


def test_frames_are_the_vaes(pipeline):
    from diffusers import AutoencoderKLWan

    part = vae_decode_part(pipeline, SIZE)
    latents = torch.randn(part.segment.inputs["latents"].shape)
    vae = AutoencoderKLWan.from_pretrained(pipeline / "vae").float().eval()
    mean, std = (
        torch.tensor(getattr(vae.config, n)).view(1, -1, 1, 1, 1)
        for n in ("latents_mean", "latents_std")
    )
    with torch.no_grad():
        found = with_weights(part)(latents)
        expected = vae.decode(latents * std + mean, return_dict=False)[0]
    assert tuple(found.shape) == part.segment.outputs["frames"].shape == (1, 9, 32, 48, 3)
    expected = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_weights_lie_in_the_pipelines_files(pipeline):
    part = text_encoder_part(pipeline)
    weights = {n: part.segment.prefix + n for n, _ in part.segment.module.named_parameters()}
    graph = GraphEntry(file="x", runs="text_encoder", inputs={}, outputs={}, weights=weights)
    entries = part_tensors([part], {"text_encoder": graph})
    assert set(entries) == set(weights.values())
    entry = entries["text_encoder.encoder.embed_tokens.weight"]
    assert entry.file == "pipeline/text_encoder/model.safetensors"
    assert (
        entry.offset + entry.bytes <= (pipeline / "text_encoder/model.safetensors").stat().st_size
    )


def test_a_variant_of_a_part_lies_under_its_plain_name(pipeline, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline, folder)
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("model.fp16.safetensors"))
    part = text_encoder_part(folder, "fp16")
    assert {t.file.name for t in part.stored.values()} == {"model.fp16.safetensors"}
    names = {n: "text_encoder." + n for n, _ in part.segment.module.named_parameters()}
    graph = GraphEntry(file="x", runs="text_encoder", inputs={}, outputs={}, weights=names)
    entries = part_tensors([part], {"text_encoder": graph}, "fp16")
    assert {e.file for e in entries.values()} == {"pipeline/text_encoder/model.safetensors"}


def test_the_vocabulary_is_the_embeddings(pipeline):
    config = json.loads((pipeline / "text_encoder" / "config.json").read_text())
    assert text_encoder_part(pipeline).vocabulary_size == config["vocab_size"]
    assert vae_decode_part(pipeline, SIZE).vocabulary_size is None


def test_another_encoder_is_refused(pipeline, tmp_path):
    shutil.copytree(pipeline / "text_encoder", tmp_path / "text_encoder")
    config = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    config["architectures"] = ["T5EncoderModel"]
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"architectures.*T5EncoderModel.*UMT5EncoderModel"):
        text_encoder_part(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json.*can't be read"):
        vae_decode_part(tmp_path, SIZE)
