# SPDX-License-Identifier: Apache-2.0
"""`freewheel build` cuts classes that the table has no row of: learnt, proved, built, and run.

Their rows are taken out of the table for as long as a test runs.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from bundles import TOLERANCE, session_output
from cases import case, smallest
from chain import relative
from diffusers import DiffusionPipeline
from pipelines import PROMPT
from test_bundles import inputs_at
from test_prove import OTHER
from typer.testing import CliRunner, Result
from whole import save_pipeline

from freewheel.bundle.reader import Bundle
from freewheel.cli import app
from freewheel.compiler.cut import models
from freewheel.compiler.cut import row as words
from freewheel.compiler.cut.models import row_of
from freewheel.compiler.cut.row import SIZES, Row
from freewheel.compiler.cut.watch import usual_calls
from freewheel.runtime.model import Model
from freewheel.runtime.pipeline.attach import attach
from freewheel.runtime.session import Session

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

BUILT = (
    "longcat_audio",
    "pixart",
    "qwen_image",
    "stable_audio",
    "cogvideox",
    "cogview4",
    "sana",
    "krea_2",
    "aura_flow",
)
"""Sound of any length and of one; pictures, of patches and of packed tokens; and a video, with rotary
tables of as many rows as its latents have patches."""

SMALL = {
    "height": 64,
    "width": 96,
    "num_frames": 5,
    "audio_duration_s": 0.002,
    "audio_end_in_s": 5.0,
}
"""Sizes other than those that a pipeline is watched at."""

NAMES = {name: getattr(words, name) for name in ("Row", "step", "run", "prompt", "size")}


def printed_row(text: str) -> Row:
    """Return the row that a build printed, as it would stand in the table."""
    begun = text[text.index("Row(\n") :]
    row = eval(begun[: begun.index("\n)") + 2], NAMES)
    assert isinstance(row, Row)
    return row


def latents(pipe: Any, steps: int = 3) -> torch.Tensor:
    """Call a pipeline as it was called to be watched, at another size."""
    arguments, _ = usual_calls(pipe, PROMPT)
    arguments |= {name: size for name, size in SMALL.items() if name in arguments}
    seed = torch.Generator().manual_seed(3)
    options = {"num_inference_steps": steps, "output_type": "latent", "generator": seed}
    return torch.as_tensor(pipe(**{**options, **arguments}, return_dict=False)[0])


def check_engines(row: Row, name: str, bundle: Bundle) -> None:
    """Hold engines to the transformer at sizes other than the traced ones."""
    session = Session(Model(bundle, "onnxruntime"))
    one = case(name)
    learnt = replace(one, row=row)
    for counts in (SIZES, OTHER, smallest(one)):
        given, expected = inputs_at(learnt, bundle, counts)
        session_output(session, given)
        for found, wanted in zip(session.outputs("cond").values(), expected, strict=True):
            assert relative(found, wanted) < TOLERANCE, counts


def built(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path, build_cache: Path) -> Result:
    """Build a class from a whole pipeline's folder, its row taken out of the table."""
    one = case(name)
    for table in ("MODELS", "FAMILIES"):
        others = tuple(row for row in getattr(models, table) if row.model != one.row.model)
        monkeypatch.setattr(models, table, others)
    assert row_of(one.row.model) is None
    save_pipeline(name, one.model, folder / "pipeline")
    build = ["build", folder / "pipeline", "--out", folder / "bundle", "--build-cache", build_cache]
    build += ["--backend", "onnxruntime", "--policy", "taylorseer", "--trace-with", PROMPT]
    return CliRunner().invoke(app, [str(part) for part in build])


@pytest.mark.parametrize("name", BUILT)
def test_a_class_without_a_row_is_built(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, build_cache: Path
) -> None:
    one, folder = case(name), tmp_path / "pipeline"
    done = built(name, monkeypatch, tmp_path, build_cache)
    assert done.exit_code == 0, done.output
    row = printed_row(done.stderr)
    assert row.model == one.row.model
    bundle = Bundle(tmp_path / "bundle")
    check_engines(row, name, bundle)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    expected = latents(pipe)
    transformer = attach(pipe, bundle, "off")
    assert relative(latents(pipe), expected) < 10 * TOLERANCE
    assert transformer.statistics.computed_steps == 3
    transformer.use("taylorseer")
    assert bool(torch.isfinite(latents(pipe, 8)).all())
    assert transformer.statistics.computed_steps < 8
