"""Fixtures shared by all tests: tiny random checkpoints and bundles built from them once."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import HealthCheck, settings
from PIL import Image
from safetensors.torch import load_file, save_file

from freewheel.bundle.reader import Bundle
from freewheel.compiler.build import build
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.engines import backend
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.pipeline.generate import Generator
from freewheel.runtime.pipeline.request import GenerationRequest
from freewheel.runtime.settings import config_entries
from freewheel.tuning.trace import Trace, TraceRecorder

# The NumPy transcription of the policies serves several folders, and so do synthetic checkpoints
# and the stand-in for TensorRT.
for folder in ("policies", "../benchmarks", "rig"):
    sys.path.insert(0, str(Path(__file__).parent / folder))

# A busy machine is not a failing one.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


# One thread on any number of cores: sums come out in one order, and workers don't starve each other.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


LONGEST = (
    "cpp/test_families.py", "runtime/distributed/test_sequence.py", "test_docs.py", "test_types.py",
    "test_cli.py", "compiler/cut/test_bundles.py", "tuning/test_calibrate.py", "tuning/test_tune.py",
    "engines/test_tensorrt_runs.py", "compiler/test_lightx2v.py", "cpp/test_parity.py",
    "compiler/checkpoints/test_original.py", "compiler/cut/test_declare.py", "cpp/test_frames.py",
    "compiler/graphs/test_groups.py", "runtime/pipeline/test_attach.py",
    "compiler/checkpoints/test_scaled.py", "runtime/distributed/test_ranks.py",
    "compiler/verify/test_bundle.py", "compiler/checkpoints/test_authors_folder.py",
    "compiler/cut/test_learn.py", "policies/test_compiled.py", "compiler/models/test_hunyuan.py",
    "compiler/models/test_wan.py", "cpp/test_feigned_gpu.py", "bundle/test_hostile.py",
)  # fmt: skip
"""What takes longest, in seconds of a processor: begun first, workers end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; ``--dist loadfile`` gives each to one worker."""
    names = {item: item.path.relative_to(Path(__file__).parent).as_posix() for item in items}
    items.sort(key=lambda i: LONGEST.index(names[i]) if names[i] in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """Collect cycles a hundredth as often, and never among the libraries' objects, a million.

    A trace makes objects so fast that collections take 3 of a small build's 45 seconds.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(70_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed torch before a test and its fixtures: whatever ran before, its numbers are the same."""
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rehearse", metavar="BACKEND", help="run tests/gpu on a CPU backend, as far as that goes"
    )


TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 3,
    "rope_max_seq_len": 64,
}


def random_transformer(seed: int = 0, **config: object) -> WanTransformer3DModel:
    """Return a Wan transformer whose every parameter is random, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    model = WanTransformer3DModel(**{**TINY, **config}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name and name.endswith("weight")
            scale = 0.1 if is_norm or parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(spread * scale + (1.0 if is_norm else 0.0))
    return model


@pytest.fixture(scope="session")
def real_trt(request: pytest.FixtureRequest) -> Any:
    """The real Python bindings of a TensorRT package, over a stub of its libraries or installed."""
    import real_bindings

    name = getattr(request, "param", "tensorrt newest")
    if name == "tensorrt-rtx":
        return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    newest = name == "tensorrt newest"
    try:
        return real_bindings.bindings(real_bindings.NEWEST if newest else real_bindings.OLDEST)
    except real_bindings.BindingsUnavailable as fault:
        pytest.skip(str(fault))


@pytest.fixture
def host_device() -> Iterator[Any]:
    """A GPU feigned in host memory, which sees every operation of torch during the test."""
    from host_device import HostDevice

    with HostDevice() as device:
        yield device


@pytest.fixture
def feigned(real_trt: Any, host_device: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install a stand-in for `real_trt` on `host_device`; returns its `Installation`."""
    from host_device import feign_cuda
    from stand_in import StandInModule

    name = "tensorrt_rtx" if "rtx" in real_trt.__name__ else "tensorrt"
    module = StandInModule(name, real_trt, host_device)
    monkeypatch.setitem(sys.modules, name, module)
    feign_cuda(monkeypatch, host_device)
    return module.stand_in


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer folder in diffusers layout: 3 layers, 32 channels, float32."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    random_transformer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def build_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all builds of a run, in all workers, keep graphs and engines."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "freewheel-cache"


@pytest.fixture(scope="session")
def build_bundle(
    tmp_path_factory: pytest.TempPathFactory, build_cache: Path
) -> Callable[..., Bundle]:
    """Return a function that builds a bundle of a checkpoint for both CPU backends."""

    def make(
        checkpoint: Path, backends: tuple[str, ...] = ("openvino", "onnxruntime"), **options: object
    ) -> Bundle:
        out = tmp_path_factory.mktemp("bundle") / "bundle"
        request = BuildRequest(
            model=str(checkpoint),
            out=out,
            backends=[backend(name) for name in backends],
            cache=build_cache,
            **{"configs": config_entries(["off"], lambda text: None), **options},
        )
        build(plan(request))
        return Bundle(out)

    return make


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, build_bundle: Callable[..., Bundle]) -> Bundle:
    """A bundle of `tiny_checkpoint` for both CPU backends, float32, weights as inputs."""
    return build_bundle(tiny_checkpoint)


@pytest.fixture(scope="session")
def float8_bundle(
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    build_bundle: Callable[..., Bundle],
) -> Bundle:
    """A bundle of `tiny_checkpoint`, matrices of its blocks in float8 with a scale of each row."""
    folder = tmp_path_factory.mktemp("float8") / "tiny"
    shutil.copytree(tiny_checkpoint, folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for name, weight in list(state.items()):
        if name.startswith("blocks.") and name.endswith(".weight") and weight.ndim == 2:
            scale = weight.abs().amax(dim=1, keepdim=True) / 448
            state |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
    save_file(state, file)
    return build_bundle(folder)


@pytest.fixture(scope="session")
def demo_bundle(repository: Path, build_bundle: Callable[..., Bundle]) -> Bundle:
    """A bundle of the trained demo model for both CPU backends, with its configs."""
    names = [f"shapes_wan_{p}" for p in ("teacache", "off", "taylorseer", "adacache", "custom")]
    configs = config_entries(names, lambda text: None)
    return build_bundle(repository / "models" / "shapes_wan", configs=configs)


@pytest.fixture(scope="session")
def sequence_bundle(repository: Path, build_bundle: Callable[..., Bundle]) -> Bundle:
    """A bundle of the demo model for ONNX Runtime, for ranks that share a sequence."""
    return build_bundle(
        repository / "models" / "shapes_wan", ("onnxruntime",), sequence_parallel=True
    )


IMAGE_TO_VIDEO = {
    **TINY,
    "in_channels": 36,
    "out_channels": 16,
    "image_dim": 20,
    "added_kv_proj_dim": 32,
}
"""16 latent channels, 4 of the mask and 16 of the encoded image."""


@pytest.fixture(scope="session")
def i2v_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole image-to-video pipeline in diffusers layout, tiny and random."""
    from synthetic import write_pipeline

    folder = tmp_path_factory.mktemp("checkpoint") / "i2v"
    write_pipeline(IMAGE_TO_VIDEO, folder)
    return folder


@pytest.fixture(scope="session")
def i2v_bundle(i2v_checkpoint: Path, build_bundle: Callable[..., Bundle]) -> Bundle:
    """A bundle of `i2v_checkpoint` for both CPU backends, with two of the shipped configs."""
    names = ["wan_i2v_custom_480p", "wan_i2v_ada"]
    return build_bundle(i2v_checkpoint, configs=config_entries(names, lambda text: None))


@pytest.fixture(scope="session")
def first_frame(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 100 x 80 pixels with some structure."""
    path = tmp_path_factory.mktemp("image") / "frame.png"
    rows, columns = np.mgrid[0:80, 0:100]
    pixels = np.stack([2 * columns, 3 * rows, rows + columns], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


PROMPT = "a green square moving up on a black background"


@pytest.fixture(scope="session")
def generator(demo_bundle: Bundle) -> Generator:
    return Generator(demo_bundle)


@pytest.fixture(scope="session")
def request_of(demo_bundle: Bundle) -> Any:
    """Return a function that makes a small request of the demo model."""
    defaults = demo_bundle.manifest.configs["shapes_wan_off"].generation

    def make(
        cache: CacheSetting, steps: int = 20, frames: int = 5, **options: Any
    ) -> GenerationRequest:
        return GenerationRequest(
            prompt=PROMPT, cache=cache, defaults=defaults, steps=steps, frames=frames, **options
        )

    return make


@pytest.fixture(scope="session")
def trace(generator: Generator, request_of: Any) -> Trace:
    """An uncached run of 20 steps, everything recorded."""
    torch.manual_seed(0)
    recorder = TraceRecorder(wants_signals=True)
    generator.generate(request_of(CacheSetting()), recorder=recorder)
    return recorder.trace()
