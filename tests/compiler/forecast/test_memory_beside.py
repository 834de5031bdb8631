"""What a run holds besides the model is counted as it will be loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generations import generation_of

from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut.declared import Cut
from freewheel.compiler.cut.document import cut_of
from freewheel.compiler.cut.models import family_of
from freewheel.compiler.forecast.memory_beside import PROGRAM_BYTES, memory_beside, vae_bytes
from freewheel.compiler.sizes import size_of
from freewheel.engines.openvino import OpenVino
from freewheel.runtime.pipeline.generate import Generator
from freewheel.runtime.pipeline.parts import loaded_bytes

WAN = family_of("WanTransformer3DModel", "")

SIZE = size_of(generation_of(height=64, width=96, frames=9))


@pytest.fixture(scope="module")
def cut(i2v_bundle: Bundle) -> Cut:
    return cut_of(i2v_bundle)


def test_parts_are_counted_as_they_are_loaded(i2v_bundle: Bundle, i2v_checkpoint: Path) -> None:
    pipe = Generator(i2v_bundle).pipe
    expected = {
        name: sum(p.numel() * p.element_size() for p in part.parameters())
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module) and name != "transformer"
    }
    assert loaded_bytes(i2v_checkpoint) == expected
    assert set(expected) == {"text_encoder", "vae", "image_encoder"}


def test_a_run_shares_the_host_with_program_pipeline_and_vae(
    cut: Cut, i2v_checkpoint: Path
) -> None:
    found = memory_beside(cut, SIZE, i2v_checkpoint, backend="onnxruntime", precision="float32")
    assert found == {
        "program": PROGRAM_BYTES,
        "other parts of the pipeline": sum(loaded_bytes(i2v_checkpoint).values()),
        "VAE at work": vae_bytes(i2v_checkpoint, SIZE, encodes=True),
    }
    alone = memory_beside(cut, SIZE, None, backend="onnxruntime", precision="float32")
    assert alone == {"program": PROGRAM_BYTES}


def test_the_vaes_work_grows_with_pixels_and_little_with_frames(i2v_checkpoint: Path) -> None:
    def work(**change: int) -> int:
        return vae_bytes(i2v_checkpoint, replace(SIZE, **change), encodes=False)

    pixels = 64 * 96 * 3 * 4
    # At least the widest full-size layer, 8 channels of 4 frames; at most some dozens of them.
    assert 4 * 8 * 64 * 96 * 4 < work() < 100 * 4 * 8 * 64 * 96 * 4
    assert work(height=128) == pytest.approx(2 * work(), rel=0.02)
    assert work(frames=81) - work() == 2 * 18 * 4 * pixels
    assert vae_bytes(i2v_checkpoint, SIZE, encodes=True) >= work()


def test_other_vaes_are_not_guessed_at(tmp_path: Path) -> None:
    assert vae_bytes(tmp_path, SIZE, encodes=False) == 0


def test_weights_that_the_cpu_must_convert_count_in_float32_once_per_template(
    shared_cut: Callable[..., Cut], monkeypatch: pytest.MonkeyPatch
) -> None:
    config: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    cut = shared_cut(WAN, config, "bfloat16")
    modules = {s.name: s.module for s in cut.segments}
    converted = sum(
        4 * p.numel()
        for name in ("block", "context")
        for p in modules[name].parameters()
        if p.dtype == torch.bfloat16
    )

    def found(computed_in: str) -> dict[str, int]:
        monkeypatch.setattr(OpenVino, "computed_in", lambda precision: computed_in)
        return memory_beside(cut, SIZE, None, backend="openvino", precision="bfloat16")

    assert converted > 0
    assert found("float32") == {"program": PROGRAM_BYTES, "converted weights": converted}
    assert found("bfloat16") == {"program": PROGRAM_BYTES}
