# SPDX-License-Identifier: Apache-2.0
"""Make a diffusers pipeline of what lies around a Wan transformer in its authors' folder.

Text encoder, VAE and image encoder are renamed into a folder of their own; the transformer stays
where it lies, and `open_checkpoint` reads it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from ...bundle.files import link_or_none
from ...bundle.safetensors_header import encode_header
from ...bundle.staging import staged_folder
from ...core.errors import CheckpointError
from .folders import read_json
from .torch_file import read_torch_file

__all__ = ["AuthorsFolder", "PartFiles", "find_authors_folder", "write_pipeline"]

EXPERTS = ("high_noise_model", "low_noise_model")
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16"
VAE = "Wan2.1_VAE"
WIDE_VAE = "Wan2.2_VAE"
IMAGE_ENCODER = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
TOKENIZER = "google/umt5-xxl"
SUFFIXES = (".safetensors", ".pth")
SUBFOLDERS = ("", "original", "distill_models")
"""Where LightX2V looks for a part's file in a model's folder."""

BOUNDARIES = {"t2v": 0.875, "i2v": 0.9}
"""Fraction of the timesteps from which Wan 2.2's first expert denoises, as its authors publish it."""

IMAGE_CHANNELS = 36
"""Latents of an image-to-video transformer: 16 of noise, 16 of the picture, 4 of its mask."""

HEAD_CHANNELS = 80
"""Channels of one head of the image encoder, which its tensors don't tell."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class AuthorsFolder:
    """Where the parts of a Wan model lie.

    Attributes:
        transformer: Folder or file of the transformer, of two experts that of the high noise levels.
        low_noise: Folder or file of the second expert.
        config: The transformer's config, as its authors write it.
        text_encoder: File of the T5 encoder.
        tokenizer: Its tokenizer's folder.
        vae: File of the VAE.
        image_encoder: File of the CLIP encoder, or None where the transformer takes none.
    """

    transformer: Path
    low_noise: Path | None
    config: Path
    text_encoder: Path
    tokenizer: Path
    vae: Path
    image_encoder: Path | None

    @property
    def task(self) -> str:
        """``t2v`` or ``i2v``, by the channels that the transformer takes."""
        return "i2v" if read_json(self.config).get("in_dim") == IMAGE_CHANNELS else "t2v"

    @property
    def files(self) -> list[Path]:
        """Every file that the model is read from, sorted."""
        places = [p for p in vars(self).values() if isinstance(p, Path)]
        return sorted(
            {f for p in places for f in (p.glob("*") if p.is_dir() else [p]) if f.is_file()}
        )


@dataclass(frozen=True)
class PartFiles:
    """Files that a config names instead of those in the model's folder; None takes the latter."""

    transformer: Path | None = None
    low_noise: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    vae: Path | None = None
    image_encoder: Path | None = None
    takes_image_encoder: bool = True


def find_authors_folder(folder: Path, named: PartFiles | None = None) -> AuthorsFolder | None:
    """Return where the parts of a Wan model lie; None if the folder has no text encoder and VAE.

    Raises:
        CheckpointError: a part is missing, or is of Wan 2.2 TI2V.
    """
    named = named or PartFiles()
    if _file(folder, WIDE_VAE) is not None and named.vae is None and _file(folder, VAE) is None:
        raise CheckpointError(
            str(_file(folder, WIDE_VAE)),
            "is the VAE of Wan 2.2 TI2V-5B, which gives each token a timestep of its own",
            "models: docs/reference/models.md",
        )
    text_encoder = named.text_encoder or _file(folder, TEXT_ENCODER)
    vae = named.vae or _file(folder, VAE)
    if text_encoder is None and vae is None:
        return None
    has_experts = all((folder / name).is_dir() for name in EXPERTS)
    transformer = named.transformer or (folder / EXPERTS[0] if has_experts else folder)
    low_noise = named.low_noise or (folder / EXPERTS[1] if has_experts else None)
    configs = [
        p / "config.json" for p in (folder, folder / EXPERTS[0], transformer, transformer.parent)
    ]
    config = next((p for p in configs if p.is_file()), configs[0])
    wanted = {
        f"{TEXT_ENCODER}.*": text_encoder,
        f"{VAE}.*": vae,
        "config.json": config,
        TOKENIZER: named.tokenizer or folder / TOKENIZER,
        str(transformer): transformer,
        **({} if low_noise is None else {str(low_noise): low_noise}),
    }
    missing = [name for name, path in wanted.items() if path is None or not path.exists()]
    if missing or text_encoder is None or vae is None:
        raise CheckpointError(
            str(folder),
            f"has no '{missing[0]}'",
            "fetch it into the folder, as Wan's authors lay a model out",
        )
    image_encoder = named.image_encoder or _file(folder, IMAGE_ENCODER)
    found = AuthorsFolder(
        transformer,
        low_noise,
        config,
        text_encoder,
        named.tokenizer or folder / TOKENIZER,
        vae,
        image_encoder if named.takes_image_encoder else None,
    )
    if (
        found.task == "t2v" or low_noise is not None
    ):  # Wan 2.2 sees the picture by its latents alone
        return AuthorsFolder(**{**vars(found), "image_encoder": None})
    if found.image_encoder is None and named.takes_image_encoder:
        raise CheckpointError(
            str(folder),
            f"has no '{IMAGE_ENCODER}.*', and the transformer takes a picture",
            "fetch it into the folder, as Wan's authors lay a model out",
        )
    return found


def write_pipeline(
    found: AuthorsFolder, out: Path, boundary: float | None = None, *, hollow: bool = False
) -> None:
    """Write text encoder, VAE, image encoder, tokenizer and scheduler in diffusers layout.

    Args:
        found: Where they lie.
        out: Folder to make; appears whole or not at all.
        boundary: Of two experts: the fraction of timesteps from which the first denoises; None
            takes the authors'.
        hollow: Write headers of weights without their values: what forecasts read, on no disk.

    Raises:
        CheckpointError: a file holds another model, or can't be read.
        OutputError: the folder can't be written.
    """
    index: dict[str, Any] = {
        "_class_name": "WanPipeline" if found.task == "t2v" else "WanImageToVideoPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", _tokenizer_class(found.tokenizer)],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if found.image_encoder is not None:
        index["image_encoder"] = ["transformers", "CLIPVisionModel"]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
    if found.low_noise is not None:
        index["transformer_2"] = ["diffusers", "WanTransformer3DModel"]
        index["boundary_ratio"] = boundary or BOUNDARIES[found.task]
    with staged_folder(out, replace=False) as folder:
        for part in ("transformer", "transformer_2"):
            if part in index:
                (folder / part).mkdir()
                shutil.copyfile(found.config, folder / part / "config.json")
        scheduler: Any = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        scheduler.save_pretrained(folder / "scheduler")
        shutil.copytree(found.tokenizer, folder / "tokenizer", copy_function=_link)
        save = _save_hollow if hollow else _save
        _write_part(found.text_encoder, folder / "text_encoder", text_encoder_of, "model", save)
        _write_part(found.vae, folder / "vae", vae_of, "diffusion_pytorch_model", save)
        if found.image_encoder is not None:
            _write_part(
                found.image_encoder, folder / "image_encoder", image_encoder_of, "model", save
            )
            CLIPImageProcessorPil().save_pretrained(folder / "image_processor")
        (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def text_encoder_of(state: Mapping[str, Tensor]) -> tuple[Any, State]:
    """Return the T5 encoder on ``meta``, and its tensors by transformers' names."""
    blocks = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks."))
    heads = state["blocks.0.pos_embedding.embedding.weight"].shape[1]
    words, width = state["token_embedding.weight"].shape
    config = UMT5Config(
        vocab_size=words,
        d_model=width,
        num_heads=heads,
        num_layers=blocks,
        d_kv=state["blocks.0.attn.q.weight"].shape[0] // heads,
        d_ff=state["blocks.0.ffn.fc1.weight"].shape[0],
        relative_attention_num_buckets=state["blocks.0.pos_embedding.embedding.weight"].shape[0],
        feed_forward_proj="gated-gelu",
    )
    renames = (
        (r"^token_embedding", "shared"),
        (r"^norm\.", "encoder.final_layer_norm."),
        (r"^blocks\.", "encoder.block."),
        (r"\.attn\.", ".layer.0.SelfAttention."),
        (r"\.pos_embedding\.embedding\.", ".layer.0.SelfAttention.relative_attention_bias."),
        (r"\.norm1\.", ".layer.0.layer_norm."),
        (r"\.norm2\.", ".layer.1.layer_norm."),
        (r"\.ffn\.gate\.0\.", ".layer.1.DenseReluDense.wi_0."),
        (r"\.ffn\.fc1\.", ".layer.1.DenseReluDense.wi_1."),
        (r"\.ffn\.fc2\.", ".layer.1.DenseReluDense.wo."),
    )
    with torch.device("meta"):
        return UMT5EncoderModel(config), {_renamed(n, renames): t for n, t in state.items()}


def vae_of(state: Mapping[str, Tensor]) -> tuple[Any, State]:
    """Return the VAE on ``meta``, and its tensors by diffusers' names."""
    named = convert_wan_vae_to_diffusers(dict(state))
    with torch.device("meta"):
        model: Any = AutoencoderKLWan(
            base_dim=state["encoder.conv1.weight"].shape[0], z_dim=state["conv2.weight"].shape[0]
        )
    return model, named


def image_encoder_of(state: Mapping[str, Tensor]) -> tuple[Any, State]:
    """Return the vision half of CLIP on ``meta``, and its tensors by transformers' names."""
    own = {n.removeprefix("visual."): t for n, t in state.items() if n.startswith("visual.")}
    layers = 1 + max(int(n.split(".")[1]) for n in own if n.startswith("transformer."))
    patches = own["patch_embedding.weight"]
    width, patch = patches.shape[0], patches.shape[-1]
    side = int((own["pos_embedding"].shape[1] - 1) ** 0.5)
    config = CLIPVisionConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        patch_size=patch,
        image_size=side * patch,
        intermediate_size=own["transformer.0.mlp.0.weight"].shape[0],
        num_attention_heads=max(1, width // HEAD_CHANNELS),
        hidden_act="gelu",
    )
    renames = (
        (r"^patch_embedding", "embeddings.patch_embedding"),
        (r"^pre_norm", "pre_layrnorm"),
        (r"^post_norm", "post_layernorm"),
        (r"^transformer\.", "encoder.layers."),
        (r"\.norm(\d)\.", r".layer_norm\1."),
        (r"\.attn\.proj\.", ".self_attn.out_proj."),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.2\.", ".mlp.fc2."),
    )
    named = {
        "embeddings.class_embedding": own.pop("cls_embedding").flatten(),
        "embeddings.position_embedding.weight": own.pop("pos_embedding").flatten(0, 1),
    }
    for name, tensor in own.items():
        if ".to_qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                place = _renamed(name, renames).replace("attn.to_qkv", f"self_attn.{letter}_proj")
                named[place] = part
        elif name != "head":  # of the comparison with texts
            named[_renamed(name, renames)] = tensor
    with torch.device("meta"):
        return CLIPVisionModel(config), named


def _write_part(
    file: Path,
    out: Path,
    converter: Callable[[State], tuple[Any, State]],
    stem: str,
    save: Callable[[State, Path], object],
) -> None:
    """Write one part's config and weights, having held the names and shapes to its class."""
    state = _read(file)
    try:
        model, named = converter(state)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            str(file),
            f"is not what its name says: {type(error).__name__} {error}",
            "fetch the file of Wan's authors again",
        ) from error
    wanted = {n: tuple(p.shape) for n, p in (*model.named_parameters(), *model.named_buffers())}
    wanted = {n: s for n, s in wanted.items() if n in model.state_dict()}
    found = {n: tuple(t.shape) for n, t in named.items()}
    odd = sorted(n for n in {*wanted, *found} if wanted.get(n) != found.get(n))
    if odd:
        raise CheckpointError(
            f"{file}, '{odd[0]}'",
            f"is {found.get(odd[0])}, {type(model).__name__} has {wanted.get(odd[0])} there",
            "give the part of a Wan 2.1 or 2.2 A14B model",
        )
    model.config.save_pretrained(out) if stem == "model" else model.save_config(out)
    save(named, out / f"{stem}.safetensors")


def _save(state: State, path: Path) -> None:
    save_file({n: t.contiguous() for n, t in state.items()}, path)


def _save_hollow(state: State, path: Path) -> None:
    """Write a file's header; where its values would be, the file has a hole."""
    told = {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in state.items()}
    header, offsets = encode_header(told)
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(max(offsets[n] + t.nbytes for n, t in state.items()))


def _read(file: Path) -> State:
    """Return a file's tensors, mapped into memory."""
    if file.suffix != ".safetensors":
        return read_torch_file(file)
    try:
        with safe_open(file, framework="pt") as opened:
            return {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            str(file), f"can't be read as tensors: {error}", "fetch the file again"
        ) from error


def _tokenizer_class(folder: Path) -> str:
    try:
        return type(AutoTokenizer.from_pretrained(folder, local_files_only=True)).__name__
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            str(folder), f"is no tokenizer: {reason}", "fetch the folder again"
        ) from error


def _file(folder: Path, stem: str) -> Path | None:
    places = (folder / sub / f"{stem}{suffix}" for suffix in SUFFIXES for sub in SUBFOLDERS)
    return next((p for p in places if p.is_file()), None)


def _renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for old, new in renames:
        name = re.sub(old, new, name)
    return name


def _link(source: str, target: str) -> str:
    if link_or_none(Path(source), Path(target)) is None:
        shutil.copyfile(source, target)
    return target
