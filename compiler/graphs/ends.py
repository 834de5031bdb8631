# SPDX-License-Identifier: Apache-2.0
"""The ends of a Wan pipeline as optional graphs: token ids → text states, latents → frames.

A program without Python then goes from ids to pictures. Weights are not copied: the graphs take
them as inputs, and the manifest's tensors lie in the files that ``pipeline`` of the bundle links.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from ...bundle.manifest import GraphEntry, ResolvedGeneration, TensorEntry
from ...bundle.safetensors_header import StoredTensor
from ...core.errors import CheckpointError
from ...engines.base import TensorSpec
from ..checkpoints.completeness import check_keys, check_quantization, check_tensors
from ..checkpoints.folders import has_variant, plain_name, read_json, read_tensors
from ..cut.declared import Segment

__all__ = ["PipelinePart", "part_tensors", "text_encoder_part", "vae_decode_part"]

TIED_NAMES = {"shared.weight": "encoder.embed_tokens.weight"}
"""Names under which checkpoints may store a tied weight → by which it is traced."""

STEMS = {"text_encoder": "model", "vae": "diffusion_pytorch_model"}
"""Part → what the names of its weight files begin with."""


@dataclass(frozen=True)
class PipelinePart:
    """One optional graph and where its weights lie.

    Attributes:
        folder: Folder of the pipeline, as ``text_encoder``.
        config: Its config.json, which its module is made from.
        segment: What to trace.
        stored: The part's tensors, by the names that the graph has for them.
        vocabulary_size: Of a text encoder: token ids lie below it.
    """

    folder: str
    config: Mapping[str, Any]
    segment: Segment
    stored: Mapping[str, StoredTensor]
    vocabulary_size: int | None = None


def in_float32(module: nn.Module, *inputs: Any, **options: Any) -> Any:
    """Call ``module`` with its parameters cast to float32, whatever they are stored in."""
    weights = {n: p.float() for n, p in module.named_parameters()}
    return torch.func.functional_call(module, weights, inputs, options)


class TextEncoder(nn.Module):
    """Token ids → text states, zero where there is no token, as Wan's pipeline pads them."""

    def __init__(self, model: UMT5EncoderModel) -> None:
        super().__init__()
        self.encoder = model.encoder
        object.__setattr__(self, "whole", model)  # no submodule: its names are not the graph's

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return ``text_states`` [batch, text_tokens, width], computed in float32."""
        model: UMT5EncoderModel = self.whole  # type: ignore[assignment]  # set past nn.Module
        states: Tensor = in_float32(model, input_ids, attention_mask).last_hidden_state
        return states * attention_mask.unsqueeze(-1).to(states.dtype)


class VaeDecode(nn.Module):
    """Latents → frames, the causal decoder's loop unrolled over a fixed number of latent frames."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = model.post_quant_conv, model.decoder
        config = model.config
        self.patch = config.patch_size
        self.scales = list(zip(config.latents_mean, config.latents_std, strict=True))
        self.caches = sum(isinstance(m, WanCausalConv3d) for m in model.decoder.modules())

    def forward(self, latents: Tensor) -> Tensor:
        """Return ``frames`` [batch, frames, height, width, 3], float32 from 0 to 1."""
        # Per-channel numbers rather than a table: a constant of values can't be traced on meta.
        channels = [latents[:, i : i + 1] * s + m for i, (m, s) in enumerate(self.scales)]
        x = in_float32(self.post_quant_conv, torch.cat(channels, dim=1))
        cache: list[Tensor | str | None] = [None] * self.caches
        chunks = [
            in_float32(
                self.decoder,
                x[:, :, i : i + 1],
                feat_cache=cache,
                feat_idx=[0],
                first_chunk=i == 0,
            )
            for i in range(x.shape[2])
        ]
        frames = torch.cat(chunks, dim=2)
        if self.patch is not None:
            frames = unpatchify(frames, patch_size=self.patch)
        return (frames / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)


def text_encoder_part(pipeline: Path, variant: str | None = None) -> PipelinePart:
    """Describe the text encoder of a Wan pipeline; any batch and length.

    Raises:
        CheckpointError: the pipeline has none, it is no UMT5 encoder, or it is quantised.
    """
    config, stored = _open(pipeline, "text_encoder", "UMT5EncoderModel", "architectures", variant)
    check_keys(config, UMT5Config().to_dict().keys(), str(pipeline / "text_encoder/config.json"))
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**config)).eval()
    module = TextEncoder(model)
    stored = {TIED_NAMES.get(n, n): t for n, t in stored.items()}
    _store_as(module, stored, pipeline / "text_encoder")
    ids = TensorSpec("int64", ("batch", "text_tokens"))
    segment = Segment(
        "text_encoder",
        "text_encoder",
        module,
        {"input_ids": ids, "attention_mask": ids},
        {"text_states": TensorSpec("float32", ("batch", "text_tokens", config["d_model"]))},
        "text_encoder.",
    )
    return PipelinePart("text_encoder", config, segment, stored, model.shared.num_embeddings)


def vae_decode_part(
    pipeline: Path, generation: ResolvedGeneration, variant: str | None = None
) -> PipelinePart:
    """Describe the VAE's decoder for the one size that ``generation`` names.

    Its causal cache makes the calls depend on the number of frames, so the shape is fixed.

    Raises:
        CheckpointError: the pipeline has none, it is no Wan VAE, or it is quantised.
    """
    config, stored = _open(pipeline, "vae", "AutoencoderKLWan", "_class_name", variant)
    known = list(inspect.signature(AutoencoderKLWan.__init__).parameters)[1:]
    check_keys(config, known, str(pipeline / "vae" / "config.json"))
    with torch.device("meta"):
        module = VaeDecode(AutoencoderKLWan.from_config(config).eval())
    _store_as(module, stored, pipeline / "vae")
    in_time, in_space = config["scale_factor_temporal"], config["scale_factor_spatial"]
    latents = (
        1,
        config["z_dim"],
        (generation.frames - 1) // in_time + 1,
        generation.height // in_space,
        generation.width // in_space,
    )
    pixels = ((latents[2] - 1) * in_time + 1, latents[3] * in_space, latents[4] * in_space)
    segment = Segment(
        "vae_decode",
        "vae_decode",
        module,
        {"latents": TensorSpec("float32", latents)},
        {"frames": TensorSpec("float32", (1, *pixels, 3))},
        "vae.",
    )
    return PipelinePart("vae", config, segment, stored)


def part_tensors(
    parts: Sequence[PipelinePart], graphs: Mapping[str, GraphEntry], variant: str | None = None
) -> dict[str, TensorEntry]:
    """Return manifest entries of the parts' weights, where the bundle's pipeline folder has them."""
    found = {}
    for part in parts:
        for name in graphs[part.segment.name].weights:
            stored = part.stored[name]
            found[part.segment.prefix + name] = TensorEntry(
                file=f"pipeline/{part.folder}/{plain_name(stored.file.name, variant)}",
                dtype=stored.dtype,
                shape=list(stored.shape),
                offset=stored.offset,
                bytes=stored.bytes,
            )
    return found


def _store_as(module: nn.Module, stored: Mapping[str, StoredTensor], folder: Path) -> None:
    """Give each parameter the dtype in which its file has it; graphs cast inside.

    Raises:
        CheckpointError: the files have not exactly the tensors that the part uses.
    """
    parameters = dict(module.named_parameters())
    wanted = {n: tuple(p.shape) for n, p in parameters.items()}
    check_tensors(stored, wanted, folder, part=folder.name, cast=False)
    for name, parameter in parameters.items():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(getattr(torch, stored[name].dtype))


def _open(
    pipeline: Path, part: str, wanted: str, key: str, variant: str | None
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    folder = pipeline / part
    config = read_json(folder / "config.json")
    named = config.get(key)
    if wanted not in (named if isinstance(named, list) else [named]):
        raise CheckpointError(
            f"{folder}/config.json, '{key}'",
            f"is {named!r}, expected '{wanted}'",
            "only Wan's text encoder and VAE can be exported",
        )
    check_quantization(config, folder / "config.json")
    own = variant if variant and has_variant(folder, variant) else None
    return config, read_tensors(folder, STEMS[part], own)
