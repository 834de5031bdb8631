# SPDX-License-Identifier: Apache-2.0
"""The table of models: what a diffusers transformer takes, and when each input may change.

A row says nothing about how the model computes: that is found in its own `forward`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

__all__ = ["MODELS", "Changes", "Input", "Row", "row_of"]

Changes = Literal["step", "run", "prompt", "shape"]
"""When an input may change: at every step (latents), with the timestep, with the prompt, or with
the sizes of a run."""

Fill = Literal["normal", "mask", "positions", "timestep", "fraction"] | int
"""Values to prove a cut with: normal, a prefix of ones, grid positions, a timestep of 0 … 1,000 or of
0 … 1, below a number."""

SIZES = {
    "batch": 2, "frames": 3, "height": 5, "width": 7, "tokens": 13, "text_tokens": 11,
    "text_tokens_2": 8, "image_tokens": 6, "audio_tokens": 9, "rows": 4, "columns": 12,
}  # fmt: skip
"""Dimensions that differ from run to run, and the sizes to trace with: no two of them equal."""


@dataclass(frozen=True)
class Input:
    """One argument, or one leaf of a nested argument, of a transformer's `forward`.

    Attributes:
        changes: When it may change.
        shape: Dimensions, apart by spaces: expressions over `SIZES` and the model's config. Of a
            whole number that follows from a run's sizes (``changes="shape"``): its value.
        dtype: As torch names it.
        fill: Values to prove a cut with.
        needs: Config key without which the model takes no such input.
    """

    changes: Changes
    shape: str
    dtype: str = "float32"
    fill: Fill = "normal"
    needs: str | None = None

    def dimensions(self, config: Mapping[str, Any], sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape at given sizes; of a whole number, its value alone."""
        names = {**config, **sizes}
        return tuple(eval(word, {"__builtins__": {}}, names) for word in self.shape.split())

    def with_fixed(self, fixed: Mapping[str, str]) -> Input:
        """Return the input with numbers in place of some sizes."""
        words = (fixed.get(word, word) for word in self.shape.split())
        return replace(self, shape=" ".join(words))

    def dynamic(self) -> tuple[int, ...]:
        """Return which dimensions differ from run to run."""
        words = (compile(word, word, "eval").co_names for word in self.shape.split())
        return tuple(i for i, names in enumerate(words) if SIZES.keys() & set(names))


def step(shape: str, **options: Any) -> Input:
    """Return an input that changes at every step."""
    return Input("step", shape, **options)


def run(shape: str = "batch", **options: Any) -> Input:
    """Return a timestep: its values of all steps are known before the first."""
    return Input("run", shape, **{"fill": "timestep", **options})


def prompt(shape: str, **options: Any) -> Input:
    """Return an input that changes with the prompt."""
    return Input("prompt", shape, **options)


def size(value: str) -> Input:
    """Return a whole number that follows from a run's sizes."""
    return Input("shape", value, "int64")


@dataclass(frozen=True)
class Row:
    """One transformer class of diffusers.

    Attributes:
        model: Name of the class.
        name: What manifests call the model's family; empty where no bundle is made by the row.
        inputs: Argument of `forward` → `Input`, a nested list or tuple of them, or a plain value.
        pipelines: Diffusers pipelines whose ``transformer`` it may be.
        multiples: Size → expression over the config of which it is a multiple (a patch).
        whole: Whether blocks must all be traced, because `forward` tells them apart by index.
        latent_scale: Frames and pixels per latent, where the VAE's config does not tell.
        signals: Signal that policies may look at, beside those of every model → path of the
            module that makes it, of timesteps alone.
        timestep_scale: Brings the timesteps that a pipeline hands in to the scheduler's.
        packed: Latent rows and columns in a token, where latents come as tokens.
        fixed: Size → config key with which `forward` takes one value of it alone, and the value.
        refused: Config key with which a model is of another kind → what kind, and what to use.
    """

    model: str
    inputs: Mapping[str, Any]
    pipelines: tuple[str, ...] = ()
    name: str = ""
    multiples: Mapping[str, str] = field(default_factory=dict)
    whole: bool = False
    latent_scale: tuple[int, int] = (4, 8)
    signals: Mapping[str, str] = field(default_factory=dict)
    timestep_scale: float = 1.0
    packed: int = 1
    fixed: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    refused: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def sizes(self, config: Mapping[str, Any], counts: Mapping[str, int] = SIZES) -> dict[str, int]:
        """Return sizes that the model takes: ``counts`` of its patches in each dimension."""
        patches = {
            n: eval(e, {"__builtins__": {}}, dict(config)) for n, e in self.multiples.items()
        }
        return {name: count * patches.get(name, 1) for name, count in counts.items()}


PATCH_VIDEO = {"frames": "patch_size[0]", "height": "patch_size[1]", "width": "patch_size[2]"}
PATCH_IMAGE = {"height": "patch_size", "width": "patch_size"}

TEXT_MASK = prompt("batch text_tokens", fill="mask")

MODELS = (
    Row(
        "WanTransformer3DModel",
        {
            "hidden_states": step("batch in_channels frames height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens text_dim"),
            "encoder_hidden_states_image": prompt(
                "batch image_tokens image_dim", needs="image_dim"
            ),
        },
        pipelines=("WanPipeline", "WanImageToVideoPipeline"),
        multiples=PATCH_VIDEO,
        signals={
            "temb": "condition_embedder.time_embedder",
            "timestep_proj": "condition_embedder.time_proj",
        },
        fixed={"text_tokens": ("image_dim", 512)},
        refused={
            "pos_embed_seq_len": (
                "first-and-last-frame models (two images per batch element) can't be cut yet",
                "use a text-to-video or image-to-video checkpoint",
            )
        },
    ),
    Row(
        "FluxTransformer2DModel",
        {
            "hidden_states": step("batch tokens in_channels"),
            "timestep": run(fill="fraction"),
            "guidance": prompt("batch", needs="guidance_embeds"),
            "encoder_hidden_states": prompt("batch text_tokens joint_attention_dim"),
            "pooled_projections": prompt("batch pooled_projection_dim"),
            "img_ids": prompt("tokens 3", fill="positions"),
            "txt_ids": prompt("text_tokens 3", fill="positions"),
        },
        pipelines=("FluxPipeline",),
        latent_scale=(1, 8),
        timestep_scale=1000.0,
        packed=2,
    ),
    Row(
        "HunyuanVideoTransformer3DModel",
        {
            "hidden_states": step("batch in_channels frames height width"),
            "timestep": run(),
            "guidance": prompt("batch", needs="guidance_embeds"),
            "encoder_hidden_states": prompt("batch text_tokens text_embed_dim"),
            "encoder_attention_mask": TEXT_MASK,
            "pooled_projections": prompt("batch pooled_projection_dim"),
        },
        pipelines=("HunyuanVideoPipeline",),
        multiples={"frames": "patch_size_t", **PATCH_IMAGE},
    ),
    Row(
        "LTXVideoTransformer3DModel",
        {
            "hidden_states": step("batch frames*height*width in_channels"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens caption_channels"),
            "encoder_attention_mask": TEXT_MASK,
            "num_frames": size("frames"),
            "height": size("height"),
            "width": size("width"),
            "rope_interpolation_scale": prompt("3"),
        },
        pipelines=("LTXPipeline",),
        latent_scale=(8, 32),
    ),
    Row(
        "QwenImageTransformer2DModel",
        {
            "hidden_states": step("batch rows*columns in_channels"),
            "timestep": run(fill="fraction"),
            "encoder_hidden_states": prompt("batch text_tokens joint_attention_dim"),
            "encoder_hidden_states_mask": TEXT_MASK,
            "img_shapes": [[(1, size("rows"), size("columns"))]],
        },
        pipelines=("QwenImagePipeline",),
        name="qwen_image",
        latent_scale=(1, 8),
        timestep_scale=1000.0,
        packed=2,
    ),
    Row(
        "SD3Transformer2DModel",
        {
            "hidden_states": step("batch in_channels height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens joint_attention_dim"),
            "pooled_projections": prompt("batch pooled_projection_dim"),
        },
        pipelines=("StableDiffusion3Pipeline",),
        name="sd3",
        multiples=PATCH_IMAGE,
        latent_scale=(1, 8),
    ),
    Row(
        "BriaTransformer2DModel",
        {
            "hidden_states": step("batch tokens in_channels"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens joint_attention_dim"),
            "img_ids": prompt("tokens 3", fill="positions"),
            "txt_ids": prompt("text_tokens 3", fill="positions"),
        },
        pipelines=("BriaPipeline",),
        name="bria",
        latent_scale=(1, 8),
        packed=2,
    ),
    Row(
        "OvisImageTransformer2DModel",
        {
            "hidden_states": step("batch tokens in_channels"),
            "timestep": run(fill="fraction"),
            "encoder_hidden_states": prompt("batch text_tokens joint_attention_dim"),
            "img_ids": prompt("tokens 3", fill="positions"),
            "txt_ids": prompt("text_tokens 3", fill="positions"),
        },
        pipelines=("OvisImagePipeline",),
        name="ovis_image",
        latent_scale=(1, 8),
        timestep_scale=1000.0,
        packed=2,
    ),
    Row(
        "ChronoEditTransformer3DModel",
        {
            "hidden_states": step("batch in_channels frames height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens text_dim"),
            "encoder_hidden_states_image": prompt(
                "batch image_tokens image_dim", needs="image_dim"
            ),
        },
        pipelines=("ChronoEditPipeline",),
        multiples=PATCH_VIDEO,
    ),
    Row(
        "SanaVideoTransformer3DModel",
        {
            "hidden_states": step("batch in_channels frames height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens caption_channels"),
            "encoder_attention_mask": TEXT_MASK,
        },
        pipelines=("SanaVideoPipeline",),
        multiples=PATCH_VIDEO,
    ),
    Row(
        "Krea2Transformer2DModel",
        {
            "hidden_states": step("batch tokens in_channels"),
            "timestep": run(fill="fraction"),
            "encoder_hidden_states": prompt("batch text_tokens num_text_layers text_hidden_dim"),
            "position_ids": prompt("text_tokens+tokens 3", fill="positions"),
            "encoder_attention_mask": TEXT_MASK,
        },
        pipelines=("Krea2Pipeline",),
        latent_scale=(1, 8),
        timestep_scale=1000.0,
        packed=2,
    ),
    Row(
        "PRXTransformer2DModel",
        {
            "hidden_states": step("batch in_channels height width"),
            "timestep": run(fill="fraction"),
            "encoder_hidden_states": prompt("batch text_tokens context_in_dim"),
            "attention_mask": TEXT_MASK,
        },
        pipelines=("PRXPipeline",),
        name="prx",
        multiples=PATCH_IMAGE,
        latent_scale=(1, 8),
        timestep_scale=1000.0,
    ),
    Row(
        "JoyImageEditTransformer3DModel",
        {
            "hidden_states": step("batch in_channels frames height width"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch text_tokens text_dim"),
        },
        pipelines=("JoyImageEditPipeline",),
        name="joy_image_edit",
        multiples=PATCH_VIDEO,
    ),
    Row(
        "ZImageTransformer2DModel",
        {
            "x": [step("in_channels 1 height width")],
            "t": run("1"),
            "cap_feats": [prompt("text_tokens cap_feat_dim")],
        },
        pipelines=("ZImagePipeline",),
        multiples={"height": "all_patch_size[0]", "width": "all_patch_size[0]"},
        latent_scale=(1, 8),
    ),
)
"""In the order in which each came to be cut."""


def row_of(model: str) -> Row | None:
    """Return a class's row; None if the table has none."""
    return next((row for row in MODELS if row.model == model), None)
