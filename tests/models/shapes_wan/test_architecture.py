# SPDX-License-Identifier: Apache-2.0
import json

import torch
from architecture import (
    FLOW_SHIFT,
    TEXT_TOKENS,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    make_vae,
)
from clips import all_captions
from safetensors.torch import load_file

SIZE_LIMIT_BYTES = 40_000_000
PARTS = {
    "transformer": (make_transformer, "diffusion_pytorch_model.safetensors"),
    "vae": (make_vae, "diffusion_pytorch_model.safetensors"),
    "text_encoder": (make_text_encoder, "model.safetensors"),
}


def test_checkpoint_loads_in_the_stock_pipeline(pipeline):
    assert type(pipeline).__name__ == "WanPipeline"
    assert type(pipeline.transformer).__name__ == "WanTransformer3DModel"
    assert type(pipeline.vae).__name__ == "AutoencoderKLWan"
    assert type(pipeline.text_encoder).__name__ == "UMT5EncoderModel"
    assert type(pipeline.scheduler).__name__ == "UniPCMultistepScheduler"
    assert pipeline.scheduler.config.flow_shift == FLOW_SHIFT


def test_checkpoint_is_float16_and_small(model_folder):
    files = sorted(model_folder.rglob("*.safetensors"))
    assert {file.parent.name for file in files} == {"lora", "text_encoder", "transformer", "vae"}
    assert sum(file.stat().st_size for file in files) <= SIZE_LIMIT_BYTES
    for file in files:
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}


def test_checkpoint_has_the_tensors_that_training_makes(model_folder):
    for part, (make, file) in PARTS.items():
        made = {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}
        tensors = load_file(model_folder / part / file)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        missing = set(made) - set(found)
        assert missing <= {"encoder.embed_tokens.weight"}, part  # tied to shared.weight
        assert all(made[name] == shape for name, shape in found.items()), part


def test_latent_statistics_are_measured(model_folder):
    config = json.loads((model_folder / "vae" / "config.json").read_text())
    assert len(config["latents_mean"]) == len(config["latents_std"]) == 16
    assert len(set(config["latents_std"])) == 16


def test_tokenizer_knows_every_word_and_equals_the_shipped_one(pipeline):
    tokenizer = make_tokenizer()
    for caption in all_captions()[::37]:
        tokens = tokenizer(str(caption)).input_ids
        assert tokens == pipeline.tokenizer(str(caption)).input_ids
        assert tokenizer.unk_token_id not in tokens
        assert len(tokens) == len(str(caption).split()) + 1 <= TEXT_TOKENS


def test_scheduler_equals_the_shipped_one(pipeline):
    made = make_scheduler()
    for scheduler in (made, pipeline.scheduler):
        scheduler.set_timesteps(30)
    assert torch.equal(made.sigmas, pipeline.scheduler.sigmas)
    assert torch.equal(made.timesteps, pipeline.scheduler.timesteps)
