"""config.pbtxt: the tensors of a bundle, and how the backend is told to run it."""

from __future__ import annotations

import re

import pytest

from freewheel.bundle.manifest import InputEntry, IoEntry
from freewheel.bundle.reader import Bundle
from freewheel.core.errors import RequestError
from freewheel.serving.model_config import ServedModel, config_text, served_backend


def tensors(text: str, kind: str) -> dict[str, tuple[str, str]]:
    pattern = rf'{kind} \[ {{ name: "(\w+)" data_type: TYPE_(\w+) dims: (\[[^\]]*\])'
    return {name: (dtype, dims) for name, dtype, dims in re.findall(pattern, text)}


def test_text_to_video_takes_prompts_noise_and_seed(tiny_bundle: Bundle) -> None:
    text = config_text(tiny_bundle.manifest, ServedModel("wan", "openvino", 2, 1))
    assert tensors(text, "input") == {
        "text_states": ("FP32", "[-1, 24]"),
        "negative_text_states": ("FP32", "[-1, 24]"),
        "seed": ("INT64", "[1]"),
        "latents": ("FP32", "[4, -1, -1, -1]"),
    }
    assert tensors(text, "output") == {
        "progress": ("STRING", "[1]"),
        "latents": ("FP32", "[4, -1, -1, -1]"),
        "preview": ("FP32", "[4, -1, -1, -1]"),
    }
    assert "decoupled: true" in text
    assert "kind: KIND_CPU count: 2" in text
    assert 'key: "threads" value { string_value: "1" }' in text
    assert text.count("{") == text.count("}")


def test_image_to_video_takes_a_condition_and_image_states(i2v_bundle: Bundle) -> None:
    inputs = tensors(
        config_text(i2v_bundle.manifest, ServedModel("wan", "openvino", 1, 1)), "input"
    )
    assert inputs["condition"] == ("FP32", "[20, -1, -1, -1]")
    assert inputs["image_states"][1].endswith(", 20]")


def test_the_backend_is_one_that_c_plus_plus_runs(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    assert served_backend(manifest, None) == "openvino"
    with pytest.raises(RequestError, match=r"--backend onnxruntime.*use openvino"):
        served_backend(manifest, "onnxruntime")
    slow = manifest.model_copy(
        update={"engines": [e for e in manifest.engines if e.backend == "onnxruntime"]}
    )
    with pytest.raises(RequestError, match="build it with --backend openvino"):
        served_backend(slow, None)


def test_what_is_sampled_beside_the_first_goes_in_and_out_by_its_name(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    sound = IoEntry(dtype="float32", shape=["batch", "audio_tokens", 8])
    declared = InputEntry(**sound.model_dump(), argument="audio_hidden_states", runs="step")
    times = InputEntry(dtype="float32", shape=["frames"], argument="num_frames", runs="prompt")
    finish = manifest.graphs["finish"]
    outputs = {**finish.outputs, "audio_model_output": sound}
    both = manifest.model_copy(
        update={
            "inputs": {**manifest.inputs, "audio_latents": declared, "frame_times": times},
            "graphs": {**manifest.graphs, "finish": finish.model_copy(update={"outputs": outputs})},
        }
    )
    text = config_text(both, ServedModel("ltx", "openvino", 1, 1))
    assert tensors(text, "input")["frame_times"] == ("FP32", "[-1]"), "the same for a batch"
    for kind in ("input", "output"):
        assert tensors(text, kind)["audio_latents"] == ("FP32", "[-1, 8]")
        assert tensors(text, kind)["latents"] == ("FP32", "[4, -1, -1, -1]")
