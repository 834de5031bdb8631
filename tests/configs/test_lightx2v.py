# SPDX-License-Identifier: Apache-2.0
"""LightX2V's whole configs: files, LoRAs and experts beside caching and generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from freewheel.configs.lightx2v import read_lightx2v
from freewheel.core.errors import ConfigError

RUN = {
    "infer_steps": 4,
    "target_video_length": 81,
    "text_len": 512,
    "target_height": 480,
    "target_width": 832,
    "self_attn_1_type": "flash_attn3",
    "sample_guide_scale": 6,
    "sample_shift": 5,
    "enable_cfg": False,
    "cpu_offload": False,
}
LISTED = {**RUN, "denoising_step_list": [1000, 750, 500, 250]}


def written(folder: Path, data: dict[str, Any]) -> Path:
    path = folder / "theirs.json"
    path.write_text(json.dumps(data))
    return path


def test_what_a_file_leaves_out_is_what_lightx2v_takes(tmp_path: Path) -> None:
    told = read_lightx2v(written(tmp_path, {"infer_steps": 20}), "wan2.1", "t2v")
    assert told.config.policy == "off"
    assert told.config.enable_cfg is False
    assert (told.fps, told.files, told.loras, told.boundary) == (16, {}, (), None)
    assert told.takes_image_encoder


def test_files_are_those_that_the_file_names_and_its_quantised_one_only_where_it_asks(
    tmp_path: Path,
) -> None:
    named = {
        "dit_original_ckpt": "a.safetensors",
        "dit_quantized_ckpt": "b.safetensors",
        "t5_original_ckpt": "c.pth",
        "vae_path": "d.pth",
        "clip_original_ckpt": "e.pth",
        "t5_tokenizer_path": "f",
        "use_image_encoder": False,
        "fps": 24,
    }
    told = read_lightx2v(written(tmp_path, {**RUN, **named}), "wan2.1", "i2v")
    assert {p: str(f) for p, f in told.files.items()} == {
        "transformer": "a.safetensors",
        "text_encoder": "c.pth",
        "vae": "d.pth",
        "image_encoder": "e.pth",
        "tokenizer": "f",
    }
    assert (told.takes_image_encoder, told.fps) == (False, 24)
    path = written(tmp_path, {**RUN, **named, "dit_quantized": True, "t5_quantized": True})
    told = read_lightx2v(path, "wan2.1", "t2v")
    assert str(told.files["transformer"]) == "b.safetensors"
    assert told.unread == ("'t5_quantized': the encoder's plain file is taken",)


def test_experts_have_files_and_the_boundary_lies_between_two_steps(tmp_path: Path) -> None:
    named = {"high_noise_original_ckpt": "h", "low_noise_original_ckpt": "l"}
    data = {**LISTED, **named, "boundary_step_index": 2, "sample_guide_scale": [3.5, 3.5]}
    told = read_lightx2v(written(tmp_path, data), "wan2.2_moe_distill", "i2v")
    assert {p: str(f) for p, f in told.files.items()} == {"transformer": "h", "low_noise": "l"}
    assert told.boundary == pytest.approx((5 * 0.75 / 4 + 5 * 0.5 / 3) / 2)
    told = read_lightx2v(written(tmp_path, {**RUN, "boundary": 0.9}), "wan2.2_moe", "t2v")
    assert told.boundary == 0.9


def test_the_list_of_steps_is_of_distilled_models_alone(tmp_path: Path) -> None:
    path = written(tmp_path, {**LISTED, "infer_steps": 20})
    distilled = read_lightx2v(path, "wan2.1_distill", "t2v").config
    assert (distilled.infer_steps, distilled.denoising_step_list) == (4, [1000, 750, 500, 250])
    plain = read_lightx2v(path, "wan2.1", "t2v")
    assert (plain.config.infer_steps, plain.config.denoising_step_list) == (20, None)
    assert "'denoising_step_list' is of the distilled models" in plain.unread[0]


def test_loras_are_files_with_their_strength(tmp_path: Path) -> None:
    loras = [{"path": "a.safetensors", "strength": 0.5}, {"name": "high_noise_model", "path": "b"}]
    loras.append({"name": "low_noise_model", "path": "c", "strength": 2})
    told = read_lightx2v(written(tmp_path, {**RUN, "lora_configs": loras}), "wan2.1", "t2v")
    assert told.loras == ("a.safetensors:0.5", "b:1", "transformer_2=c:2")


@pytest.mark.parametrize(
    ("model_cls", "task", "more", "message"),
    [
        ("wan2.1_vace", "t2v", {}, r"--model_cls wan2.1_vace: is not run here; .*'wan2.1'"),
        ("wan2.1", "flf2v", {}, r"--task flf2v: is not run here; use one of t2v, i2v"),
        ("wan2.1", "t2v", {"sub_servers": {}}, r"'sub_servers': is not a known key"),
        ("wan2.1", "t2v", {"changing_resolution": True}, r"'changing_resolution': a run keeps"),
        ("wan2.1_distill", "t2v", {}, r"has no 'denoising_step_list'.*add"),
        ("wan2.2_moe", "t2v", {"boundary": 2}, r"'boundary': is 2; give a number"),
        (
            "wan2.2_moe_distill",
            "t2v",
            {"denoising_step_list": [1000, 500]},
            r"'boundary_step_index': is None, of 2 steps",
        ),
        ("wan2.1", "t2v", {"lora_configs": [{"strength": 1}]}, r"names no 'path'; write"),
        (
            "wan2.1",
            "t2v",
            {"lora_configs": [{"path": "a", "strength": "x"}]},
            r"'strength' is 'x'; give a number",
        ),
    ],
)
def test_what_can_not_be_followed_is_refused_by_name(
    tmp_path: Path, model_cls: str, task: str, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_lightx2v(written(tmp_path, {**RUN, **more}), model_cls, task)
