# SPDX-License-Identifier: Apache-2.0
"""A row is learnt from what a pipeline gives its transformer, whoever wrote the class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from cases import CONDITIONED, Conditioned, row_and_config
from diffusers import DiffusionPipeline
from pipelines import CALLED, UNCUT, UNLEARNT, UNTRIED, pipeline_of, watched_calls
from small_configs import CASES
from torch import Tensor
from torch.utils import _pytree as pytree

from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut import models
from freewheel.compiler.cut import row as words
from freewheel.compiler.cut.learn import learn_row, watched_row
from freewheel.compiler.cut.prove import check_row
from freewheel.compiler.cut.row import Input, Row
from freewheel.compiler.cut.spell import spelled
from freewheel.compiler.cut.watch import stand_in, usual_calls
from freewheel.core.errors import CheckpointError, ExportError, RequestError
from freewheel.runtime.pipeline.attach import attach

EVERY_RUN = ("qwen_image", "cogvideox")
"""A picture packed to tokens, with its sizes in a list; a video of unpacked latents."""


def learnt(name: str) -> tuple[Row, Any, dict[str, Any]]:
    row, config = row_and_config(name)
    model_class = getattr(diffusers, row.model)
    one: Any = SimpleNamespace(model=stand_in(model_class, config), row=row)
    pipe, _ = pipeline_of(name, one)
    pipe.set_progress_bar_config(disable=True)
    return learn_row(pipe, *watched_calls(name, one)), model_class, config


def inputs_of(row: Row) -> dict[str, str]:
    """Return when each input changes, by its path."""
    leaves, _ = pytree.tree_flatten_with_path(dict(row.inputs))
    return {pytree.keystr(path): leaf.changes for path, leaf in leaves if isinstance(leaf, Input)}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in EVERY_RUN else pytest.mark.nightly)
        for name in CALLED
        if name not in UNLEARNT
    ],
)
def test_what_is_learnt_is_what_the_table_says(name: str) -> None:
    """The same inputs that change at the same times; and cut so, the model is equal to itself."""
    row, model_class, config = learnt(name)
    wanted, _ = row_and_config(name)
    known = inputs_of(wanted)
    assert inputs_of(row).items() <= known.items()
    assert {"step", "run"} <= set(inputs_of(row).values())
    assert row.pipelines[0] in wanted.pipelines
    assert row.output_sign == wanted.output_sign
    if name not in ("mochi", "bria"):  # their test's pipelines have other scales
        assert row.latent_scale[1] == wanted.latent_scale[1]
    assert (row.timestep_scale, row.packed) == (
        wanted.timestep_scale,
        wanted.packed if name != "bria" else row.packed,
    )
    if name in UNCUT:
        with pytest.raises(
            ExportError, match=r"can't (trace|be computed at)|away from itself|needs the size"
        ):
            check_row(row, model_class, config)
    elif name not in UNTRIED:
        check_row(row, model_class, config)


@pytest.mark.nightly
@pytest.mark.parametrize("name", UNLEARNT)
def test_what_is_not_learnt_is_refused_by_name(name: str) -> None:
    with pytest.raises((CheckpointError, RequestError), match=UNLEARNT[name]):
        learnt(name)


class Turned(DiffusionPipeline):
    """Counts timesteps from the other end, and turns the model output round, as Z-Image's does."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.transformer, self.scheduler = transformer, scheduler

    def __call__(
        self, prompt: str, height: int, width: int, num_inference_steps: int, **others: Any
    ) -> None:
        self.scheduler.set_timesteps(num_inference_steps)
        sample = torch.randn(1, 4, height // 8, width // 8)
        rows = self.text_tokens(prompt, height, width)
        text, pooled = torch.zeros(1, rows, 32), torch.zeros(1, 64)
        for t in self.scheduler.timesteps:
            given = (1000 - t[None]) / 1000
            (output,) = self.transformer(sample, text, pooled, given, return_dict=False)
            sample = self.scheduler.step(-output, t, sample).prev_sample

    def text_tokens(self, prompt: str, height: int, width: int) -> int:
        return 4 + len(prompt)


class Pictured(Turned):
    """Gives the transformer a row for each patch of the picture in place of a text, and three more."""

    def text_tokens(self, prompt: str, height: int, width: int) -> int:
        return height // 16 * (width // 16) + 3


def test_so_many_tokens_beside_others_are_learnt() -> None:
    model, config = CASES["sd3"]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = Pictured(stand_in(getattr(diffusers, model), config), scheduler)
    row = learn_row(pipe, *usual_calls(pipe, "x"))
    rows = "(height//2)*(width//2)+3"
    assert row.inputs["encoder_hidden_states"].shape.split()[1] == rows


def test_a_turned_output_and_timesteps_from_the_other_end_are_learnt() -> None:
    model, config = CASES["sd3"]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = Turned(stand_in(getattr(diffusers, model), config), scheduler)
    row = learn_row(pipe, *usual_calls(pipe, "x"))
    assert (row.timestep_scale, row.timestep_offset, row.output_sign) == (-1000.0, 1000.0, -1)
    assert row.inputs["encoder_hidden_states"].shape.split()[1] == "text_tokens"


def test_a_product_divides_a_pictures_sides_alike_and_by_its_patch() -> None:
    """At these sizes a height and a quarter of a width are as many as two halves."""
    row, config = row_and_config("cogvideox")
    model = stand_in(getattr(diffusers, row.model), config)
    one: Any = SimpleNamespace(model=model, row=row)
    pipe, arguments = pipeline_of("cogvideox", one)
    pipe.set_progress_bar_config(disable=True)
    first = {**arguments, "height": 64, "width": 96, "guidance_scale": 1.0}
    others = {"height": {"height": 128}, "width": {"width": 160}, "frames": {"num_frames": 9}}
    table, _ = learn_row(pipe, first, others).inputs["image_rotary_emb"]
    rows = "frames*(height//patch_size)*(width//patch_size)"
    assert table.shape == f"{rows} attention_head_dim"


def test_complex_numbers_are_learnt_as_pairs() -> None:
    row, _, _ = learnt("lumina_next")
    table = row.inputs["image_rotary_emb"]
    assert (table.shape, table.pairs) == ("384 384 4 2", True)
    assert '"image_rotary_emb": prompt("384 384 4 2", pairs=True),' in spelled(row)


def test_seconds_of_sound_are_frames() -> None:
    row, _, _ = learnt("longcat_audio")
    assert row.inputs["hidden_states"].shape == "batch frames latent_dim"
    assert row.inputs["attention_mask"] == words.prompt("batch frames", dtype="bool", fill="mask")
    assert (row.name, row.latent_scale) == ("long_cat_audio", (1, 1))


def test_the_next_steps_timestep_is_learnt() -> None:
    row, _, _ = learnt("hunyuan_image_distilled")
    assert (row.inputs["timestep"].of, row.inputs["timestep_r"].of) == (("latents",), ("next",))
    assert '"timestep_r": run("batch", of=("next",)),' in spelled(row)


def test_a_mask_of_pixels_is_learnt() -> None:
    row, _, _ = learnt("cosmos")
    assert row.inputs["padding_mask"].shape == "1 1 8*height 8*width"


def test_a_turned_output_with_a_variance_is_learnt() -> None:
    row, _, _ = learnt("lumina_next")
    assert row.output_sign == -1


class Sized(Conditioned):
    """Computes otherwise from 21 tokens on."""

    config: ClassVar[dict[str, Any]] = {}

    def forward(self, x: Tensor, t: Tensor, pooled: Tensor, *, return_dict: bool) -> Tensor:
        found = super().forward(x, t, pooled, return_dict=return_dict)
        return found * 2 if x.shape[1] > 20 else found


def test_a_cut_that_is_not_equal_at_another_size_is_refused() -> None:
    with pytest.raises(ExportError, match=r"is [1-9]e-01 away from itself at .*'tokens': 24"):
        check_row(CONDITIONED, Sized, {})


class Lost(DiffusionPipeline):
    """A pipeline that calls its transformer with what no row can tell."""

    def __init__(self, transformer: Any, scheduler: Any, wrong: str) -> None:
        super().__init__()
        self.transformer, self.scheduler, self.wrong = transformer, scheduler, wrong

    def __call__(
        self, prompt: str, height: int, width: int, num_inference_steps: int, **others: Any
    ) -> None:
        if self.wrong == "call":
            raise ValueError("no such size")
        self.scheduler.set_timesteps(num_inference_steps)
        text = torch.zeros(1, 4, 32)
        for step, t in enumerate(self.scheduler.timesteps[: 2 if self.wrong == "steps" else None]):
            time = t[None] ** 2 if self.wrong == "timestep" else t[None]
            text = torch.randn(1, 4, 32) if self.wrong == "text" else text
            odd = torch.zeros(1, height * 7 + 3, 16)
            pooled = odd if self.wrong == "size" else torch.zeros(1, 16)
            if self.wrong == "rank" and height > 128:
                pooled = pooled[None]
            noise = torch.randn(1, 4, height // 8, width // 8) * (step + 1)
            self.transformer(noise, text, pooled, time)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("call", r"can't be called with prompt='x'.*no such size; write a row"),
        ("steps", r"calls its transformer 2 times in 3 steps"),
        ("timestep", r"'timestep': doesn't follow from the scheduler's timesteps"),
        ("text", r"'encoder_hidden_states': 2 inputs change at every step"),
        ("size", r"'pooled_projections': has a dimension \(899, 1795, 899.*that no sizes tell"),
        ("rank", r"'pooled_projections': has dimensions that come and go"),
    ],
)
def test_what_no_row_can_tell_is_refused_by_name(wrong: str, said: str) -> None:
    model, config = CASES["sd3"]
    transformer = stand_in(getattr(diffusers, model), config)
    own = transformer.forward
    pipe = Lost(transformer, diffusers.FlowMatchEulerDiscreteScheduler(), wrong)
    with pytest.raises((CheckpointError, RequestError), match=said):
        learn_row(pipe, *usual_calls(pipe, "x"))
    assert transformer.forward == own


def test_a_class_that_nobody_has_seen_is_built(
    repository: Path, monkeypatch: pytest.MonkeyPatch, build_bundle: Callable[..., Bundle]
) -> None:
    """Wan, with its row taken out of the table: learnt, built, and run in its pipeline."""
    folder = repository / "models" / "shapes_wan"
    config = json.loads((folder / "transformer" / "config.json").read_text())
    monkeypatch.setattr(models, "MODELS", ())
    monkeypatch.setattr(models, "FAMILIES", ())
    model = "WanTransformer3DModel"
    with pytest.raises(CheckpointError, match=r"no family cuts; .*--trace-with 'a prompt'"):
        build_bundle(folder, ("onnxruntime",), policies=["taylorseer"])
    row = watched_row(model, config, folder, "a red circle")
    bundle = build_bundle(folder, ("onnxruntime",), row=row, policies=["taylorseer"])
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def latents() -> torch.Tensor:
        found: torch.Tensor = pipe(
            "a red circle",
            height=64,
            width=96,
            num_frames=5,
            num_inference_steps=3,
            max_sequence_length=16,
            output_type="latent",
            generator=torch.Generator().manual_seed(1),
        ).frames
        return found

    expected = latents()
    attach(pipe, bundle, "off")
    assert float((latents() - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize(
    ("model", "pipeline", "said"),
    [
        ("NoSuchTransformer", "models", r"'NoSuchTransformer': is no class of diffusers"),
        ("WanTransformer3DModel", None, r"lies in no diffusers pipeline to be watched in"),
        ("SD3Transformer2DModel", "models", r"can't be loaded by diffusers"),
    ],
)
def test_what_cannot_be_watched_is_refused(
    repository: Path, model: str, pipeline: str | None, said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        watched_row(model, {}, None if pipeline is None else repository / pipeline, "x")
