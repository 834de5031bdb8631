# SPDX-License-Identifier: Apache-2.0
"""Files in their authors' layout: tensors equal what diffusers' from_single_file makes of the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import originals
import pytest
import torch
from bundles import session_output
from cases import CASES
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import load_file, save_file
from torch import Tensor

from freewheel.bundle.reader import Bundle
from freewheel.bundle.safetensors_header import StoredTensor, read_header
from freewheel.compiler.build import build
from freewheel.compiler.checkpoints.checkpoint import open_checkpoint
from freewheel.compiler.checkpoints.original import original_transformer
from freewheel.compiler.checkpoints.sources import MadeTensor, read_weight
from freewheel.compiler.cut.prove import random_weights
from freewheel.compiler.forecast.build import describe_plan, render_plan
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.compiler.sizes import Size
from freewheel.core.errors import CheckpointError
from freewheel.engines import backend
from freewheel.runtime.model import Model
from freewheel.runtime.session import Session
from freewheel.runtime.settings import config_entries

State = dict[str, Tensor]
COMFY = "model.diffusion_model."

TINY: dict[str, tuple[str, Callable[[State], State]]] = {
    "wan": ("wan", originals.wan),
    "wan_i2v": ("wan", originals.wan),
    "ltx": ("ltx", originals.ltx),
    "sd3": ("sd3", originals.sd3),
    "sd35": ("sd3", originals.sd3),
    "qwen_image": ("qwen_image", dict),
    "z_image": ("z_image", originals.z_image),
}
"""Case of the cutter's tests → family, and its authors' layout; Qwen-Image's is diffusers'."""


def save(state: State, file: Path, prefix: str = "") -> Path:
    file.parent.mkdir(exist_ok=True)
    save_file({prefix + n: t.clone().contiguous() for n, t in state.items()}, file)
    return file


def tiny(name: str) -> Any:
    kind, config = CASES[name]
    model = getattr(diffusers, kind)(**config)
    random_weights(model)
    return model


@pytest.mark.parametrize("prefix", ["", COMFY, "diffusion_model."])
@pytest.mark.parametrize("name", TINY)
def test_tensors_equal_what_diffusers_makes_of_the_file(
    tmp_path: Path, name: str, prefix: str
) -> None:
    model = tiny(name)
    file = save(TINY[name][1](dict(model.state_dict())), tmp_path / "x.safetensors", prefix)
    model.save_config(tmp_path)
    checkpoint = open_checkpoint(str(file))
    if prefix in ("", COMFY) and not (name == "qwen_image" and prefix):
        expected = type(model).from_single_file(str(file), config=str(tmp_path)).state_dict()
    else:
        expected = model.state_dict()  # diffusers does not take that prefix off
    assert checkpoint.tensors.keys() == expected.keys()
    for key, weight in checkpoint.tensors.items():
        assert torch.equal(read_weight(weight), expected[key]), key
    made = {n for n, w in checkpoint.tensors.items() if isinstance(w, MadeTensor)}
    swapped = {"norm_out.linear", "transformer_blocks.4.norm1_context.linear"}
    assert {n.rpartition(".")[0] for n in made} == (swapped if "sd3" in name else set())
    if name != "qwen_image":
        count = len(expected) - len(made)
        assert f"{count} of {len(expected)} tensors are read where they lie" in checkpoint.notes[0]
        assert ("4 are made of others" in checkpoint.notes[0]) == ("sd3" in name)


WIDE = {
    "FluxTransformer2DModel": (
        originals.flux,
        {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
    ),
    "HunyuanVideoTransformer3DModel": (
        originals.hunyuan,
        {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1},
    ),
}
"""diffusers' converters of these know one width, 3,072: one block of each kind, in bytes."""


@pytest.mark.parametrize("name", WIDE)
def test_a_file_of_real_width_is_split_where_it_lies(tmp_path: Path, name: str) -> None:
    layout, config = WIDE[name]
    with torch.device("meta"):
        model = getattr(diffusers, name)(**config)
    generator = torch.Generator().manual_seed(0)
    state = {
        n: torch.randint(0, 255, t.shape, dtype=torch.uint8, generator=generator)
        for n, t in model.state_dict().items()
    }
    file = save(layout(state), tmp_path / "x.safetensors", COMFY)
    checkpoint = open_checkpoint(str(file))
    converter = SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
    stored = {n.removeprefix(COMFY): t for n, t in load_file(file).items()}
    expected = converter(checkpoint=stored, config=None)
    assert checkpoint.config["_class_name"] == name
    assert checkpoint.config["num_layers"] == 1
    assert checkpoint.tensors.keys() == expected.keys()
    for key, weight in checkpoint.tensors.items():
        assert torch.equal(read_weight(weight), expected[key]), key
        assert isinstance(weight, MadeTensor) == key.startswith("norm_out.linear"), key


@pytest.fixture(scope="module")
def wan_file(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as ComfyUI keeps it, its config beside it."""
    folder = tmp_path_factory.mktemp("single")
    model = diffusers.WanTransformer3DModel.from_pretrained(tiny_checkpoint)
    model.save_config(folder)
    return save(originals.wan(dict(model.state_dict())), folder / "wan.safetensors", COMFY)


def test_a_bundle_links_the_file_and_computes_as_the_plain_one(
    wan_file: Path, tiny_bundle: Bundle, build_bundle: Callable[..., Bundle]
) -> None:
    bundle = build_bundle(wan_file)
    files = {t.file for t in bundle.manifest.tensors.values()}
    assert files == {"weights/wan.safetensors"}
    assert bundle.path("weights/wan.safetensors").stat().st_ino == wan_file.stat().st_ino
    sizes = {"batch": 1, "frames": 2, "height": 8, "width": 8, "text_tokens": 6, "steps": 1}
    given = {
        n: torch.randn([sizes.get(s, s) for s in i.shape])  # type: ignore[call-overload]
        for n, i in tiny_bundle.manifest.inputs.items()
    }
    given["timesteps"] = torch.tensor([500.0])
    first, second = (
        session_output(Session(Model(b, "onnxruntime")), given) for b in (bundle, tiny_bundle)
    )
    assert torch.equal(first, second)


def test_fused_weights_are_converted_into_the_bundle(
    tmp_path: Path, build_bundle: Callable[..., Bundle]
) -> None:
    model = tiny("sd35")
    model.save_config(tmp_path)
    file = save(originals.sd3(dict(model.state_dict())), tmp_path / "sd3.safetensors")
    bundle = build_bundle(file, backends=("onnxruntime",))
    state = model.state_dict()
    for name, entry in bundle.manifest.tensors.items():
        assert torch.equal(bundle.tensor(name), state[name]), name
        assert ("converted" in entry.file) == (
            name.startswith(("norm_out.linear", "transformer_blocks.4.norm1_context.linear"))
        ), name


SMALL = Size(height=64, width=64, frames=1, steps=4, text_tokens=8, guidance_scale=1.0)


def test_a_dry_run_tells_what_is_linked_and_what_is_made(tmp_path: Path, build_cache: Path) -> None:
    model = tiny("sd35")
    model.save_config(tmp_path)
    file = save(originals.sd3(dict(model.state_dict())), tmp_path / "sd3.safetensors")
    request = BuildRequest(
        str(file),
        tmp_path / "out",
        [backend("onnxruntime")],
        config_entries(["off"], print),
        cache=build_cache,
    )
    planned = describe_plan(plan(request), SMALL)
    assert "original layout" in planned["notes"][0]
    assert planned["notes"][0] in render_plan(planned)
    made = sum(
        w.bytes for w in open_checkpoint(str(file)).tensors.values() if isinstance(w, MadeTensor)
    )
    assert planned["forecast"]["disk"]["converted_bytes"] == made > 0
    report = build(plan(request))
    assert report.notes == tuple(planned["notes"])


def test_the_demo_as_a_single_file_with_its_pipeline(
    repository: Path, demo_bundle: Bundle, tmp_path: Path, build_bundle: Callable[..., Bundle]
) -> None:
    folder = repository / "models" / "shapes_wan"
    model = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer")
    file = save(originals.wan(dict(model.state_dict())), tmp_path / "wan.safetensors")
    configs = dict(demo_bundle.manifest.configs)
    bundle = build_bundle(
        file, pipeline=str(folder), configs=config_entries(["shapes_wan_off"], print)
    )
    assert bundle.manifest.pipeline.folder == "pipeline"
    assert bundle.manifest.latent_scale == demo_bundle.manifest.latent_scale
    assert bundle.manifest.configs["shapes_wan_off"] == configs["shapes_wan_off"]
    assert bundle.manifest.checkpoint.config == demo_bundle.manifest.checkpoint.config
    for name in demo_bundle.manifest.tensors:
        assert torch.equal(bundle.tensor(name), demo_bundle.tensor(name)), name


AUTHORS = {
    "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 24, "eps": 1e-6, "ffn_dim": 32,
    "freq_dim": 32, "in_dim": 4, "model_type": "t2v", "num_heads": 2, "num_layers": 4, "out_dim": 4,
    "text_len": 512,
}  # fmt: skip


@pytest.fixture
def authors(tmp_path: Path) -> Path:
    """A folder as Wan's authors ship it: their config, weights by their names, pickles beside."""
    folder = tmp_path / "Wan2.1-T2V"
    state = originals.wan(dict(tiny("wan").state_dict()))
    save(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(AUTHORS))
    (folder / "Wan2.1_VAE.pth").write_bytes(b"")
    return folder


@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_a_folder_of_wans_authors_is_taken(authors: Path, whole: bool) -> None:
    model = authors if whole else authors / "diffusion_pytorch_model.safetensors"
    checkpoint = open_checkpoint(str(model))
    wanted = dict(tiny("wan").config)
    for key, value in checkpoint.config.items():
        if not key.startswith("_") and key != "rope_max_seq_len":  # theirs has none to tell
            assert value == plain(wanted[key]), key
    expected = tiny("wan").state_dict()
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(isinstance(w, StoredTensor) for w in checkpoint.tensors.values())


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"num_layers": 5}, "'num_layers': is 5, and the tensors say 4"),
        ({"window_size": [3, 3]}, "'window_size': is not understood, and may change the model"),
    ],
)
def test_an_authors_config_that_tensors_deny_is_refused(
    authors: Path, change: dict[str, Any], what: str
) -> None:
    (authors / "config.json").write_text(json.dumps(AUTHORS | change))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(authors))
    assert what in str(caught.value)
    assert str(authors) in caught.value.where
    assert "take the config of these weights" in caught.value.hint


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A Wan 2.2 pipeline without its transformers' weights."""
    folder = tmp_path / "pipeline"
    for part in ("transformer", "transformer_2"):
        tiny("wan").save_config(folder / part)
    parts = {p: ["diffusers", "WanTransformer3DModel"] for p in ("transformer", "transformer_2")}
    (folder / "model_index.json").write_text(json.dumps({**parts, "boundary_ratio": 0.875}))
    return folder


def test_two_files_are_the_experts_of_a_pipeline(pipeline: Path, tmp_path: Path) -> None:
    states = [originals.wan(dict(tiny("wan").state_dict())) for _ in range(2)]
    states[1]["head.head.bias"] = states[1]["head.head.bias"] + 1
    high, low = (
        str(save(state, tmp_path / f"{name}.safetensors", COMFY))
        for name, state in zip(("high", "low"), states, strict=True)
    )
    checkpoint = open_checkpoint(high, pipeline=str(pipeline), low_noise=low)
    assert checkpoint.experts == (("transformer", 0.875), ("transformer_2", 0.0))
    assert [str(checkpoint.place_of(part)) for part, _ in checkpoint.experts] == [high, low]
    for (part, _), state in zip(checkpoint.experts, states, strict=True):
        read = read_weight(checkpoint.of_part(part)["proj_out.bias"])
        assert torch.equal(read, state["head.head.bias"])
    assert len(checkpoint.notes) == 1, "both were read alike: said once"
    for options, what in (
        ({"pipeline": str(pipeline)}, f"is one transformer, and the pipeline '{pipeline}' has two"),
        ({"low_noise": low}, "no pipeline says from which noise level on it denoises"),
    ):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(high, **options)
        assert what in caught.value.what
        assert "--low-noise-model" in str(caught.value)


def test_a_pipelines_folder_takes_no_other_parts(pipeline: Path) -> None:
    save(
        dict(tiny("wan").state_dict()), pipeline / "transformer/diffusion_pytorch_model.safetensors"
    )
    save(
        dict(tiny("wan").state_dict()),
        pipeline / "transformer_2/diffusion_pytorch_model.safetensors",
    )
    assert open_checkpoint(str(pipeline)).experts
    for options, flag in (
        ({"pipeline": "x"}, "--pipeline"),
        ({"low_noise": "x"}, "--low-noise-model"),
    ):
        with pytest.raises(CheckpointError, match="leave it out") as caught:
            open_checkpoint(str(pipeline), **options)
        assert caught.value.where == flag


def test_a_pipeline_without_an_index_is_refused(pipeline: Path, authors: Path) -> None:
    (pipeline / "model_index.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"has no 'model_index.json'; give the folder or hub id"
    ):
        open_checkpoint(str(authors), pipeline=str(pipeline))


def refusal(state: State, folder: Path, prefix: str = "") -> CheckpointError:
    file = save(state, folder / "x.safetensors", prefix)
    with pytest.raises(CheckpointError) as caught:
        original_transformer(read_header(file), file, None)
    assert caught.value.where == str(file)
    return caught.value


def test_other_parts_of_a_file_are_named_and_unknown_ones_refused(tmp_path: Path) -> None:
    state = {COMFY + n: t for n, t in originals.wan(dict(tiny("wan").state_dict())).items()}
    tiny("wan").save_config(tmp_path)
    one = torch.zeros(1)
    file = save(
        state | {"vae.decoder.bias": one, "text_encoders.t5.x": one}, tmp_path / "x.safetensors"
    )
    notes = open_checkpoint(str(file)).notes
    assert (
        notes[0]
        == "VAE and text encoders of the file stay unused: a build takes them by --pipeline"
    )
    error = refusal(state | {"control.bias": one}, tmp_path)
    assert f"1 tensors beside '{COMFY}…' of no known part, such as 'control.bias'" in error.what


def test_tensors_that_the_converter_leaves_aside_are_refused(tmp_path: Path) -> None:
    model = tiny("sd3")
    model.save_config(tmp_path)
    state = originals.sd3(dict(model.state_dict()))
    file = save(state | {"extra.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"leaves aside, such as 'extra.weight'.*--lora"):
        open_checkpoint(str(file))


@pytest.mark.parametrize(
    ("state", "what"),
    [
        (
            {"a.weight": (1,)},
            "holds no transformer that diffusers recognises; its tensors are 'a.weight'",
        ),
        ({"distilled_guidance_layer.in_proj.bias": (1,)}, "is 'chroma' to diffusers"),
        (
            {"layers.0.adaLN_modulation.0.weight": (1,)},
            "no usable tensor 'all_x_embedder.2-1.weight'",
        ),
        ({"head.modulation": (1, 2, 4)}, "diffusers' detection misses 'patch_embedding.weight'"),
        (
            {"head.modulation": (1, 2, 4), "patch_embedding.weight": (1536, 16, 1, 2, 2)},
            "looks like 'WanTransformer3DModel', and has no usable tensor",
        ),
        (
            {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)},
            "converter of 'FluxTransformer2DModel' stops at it: ",
        ),
    ],
)
def test_what_is_no_transformer_of_a_family_is_told(
    tmp_path: Path, state: dict[str, tuple[int, ...]], what: str
) -> None:
    error = refusal({n: torch.zeros(s) for n, s in state.items()}, tmp_path)
    assert what in error.what
    assert error.hint


def test_shapes_tell_what_no_file_does_and_it_is_said(tmp_path: Path) -> None:
    config = {**CASES["wan"][1], "num_attention_heads": 1, "attention_head_dim": 128}
    model = diffusers.WanTransformer3DModel(**config)
    file = save(originals.wan(dict(model.state_dict())), tmp_path / "wan.safetensors")
    checkpoint = open_checkpoint(str(file))
    found = {n: checkpoint.config[n] for n in config if n != "rope_max_seq_len"}
    assert found == {n: v for n, v in config.items() if n in found}
    assert (
        "no config.json: WanTransformer3DModel's geometry is told by shapes" in checkpoint.notes[-1]
    )
