# SPDX-License-Identifier: Apache-2.0
"""The run path over real signatures of every TensorRT admitted, executed by the stand-in."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import sys
import tomllib
from pathlib import Path

import onnx
import pytest
import real_bindings
import torch
from host_device import PLACE, RaceError
from stand_in import plan_of

from freewheel.core.errors import BackendUnavailable, BuildError, BundleError, RequestError
from freewheel.engines import Target
from freewheel.engines.record import EngineRecord
from freewheel.engines.tensorrt import OLDEST, TensorRT, TensorRTRTX, _serves

pytestmark = pytest.mark.tensorrt
every_tensorrt = pytest.mark.parametrize(
    "real_trt", ["tensorrt newest", "tensorrt oldest", "tensorrt-rtx"], indirect=True
)
PROFILE = {"x": ((1, 1, 64), (1, 4, 64), (2, 9, 64))}


def backend_of(real_trt, **settings):
    kind = TensorRTRTX if "rtx" in real_trt.__name__ else TensorRT
    return kind(device=PLACE, **settings)


@pytest.fixture
def backend(feigned, real_trt):
    return backend_of(real_trt)


@pytest.fixture
def compiled(backend, graph, feigned):
    """A folder with a compiled matmul."""
    path = graph("matmul")
    target = Target("float32", PROFILE, ("8.9",))
    backend.compile(path, target, path.parent / "engine")
    return path.parent / "engine"


@pytest.fixture
def gpu_of(monkeypatch):
    """Return a function that makes the feigned GPU one of a compute capability."""

    def set_capability(text):
        found = tuple(map(int, text.split(".")))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found)

    return set_capability


@pytest.fixture
def engine(backend, compiled):
    return backend.load(compiled)


def tensors(tokens=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(1, tokens, 64, generator=generator),
        "w": torch.randn(64, 64, generator=generator),
        "out": torch.zeros(1, tokens, 64),
    }


@every_tensorrt
def test_a_compiled_graph_runs_and_gives_what_onnxruntime_gives(engine, feigned):
    bound = tensors()
    engine.bind(bound).run()
    torch.testing.assert_close(bound["out"], bound["x"] @ bound["w"])
    (context,) = feigned.contexts
    assert context._memory is not None
    assert feigned.counts["enqueues on the default stream"] == 0


def test_the_wheel_disturbs_nothing(real_trt):
    found = importlib.util.find_spec("tensorrt")
    assert found is None or not Path(str(found.origin)).is_relative_to(real_bindings.FOLDER)
    assert "tensorrt_bindings" not in sys.modules
    assert not hasattr(real_trt.IExecutionContext, "is_stream_capturable")


@every_tensorrt
def test_every_name_that_the_sources_take_from_the_package_is_there(repository, real_trt):
    """Chains like `trt.MemoryPoolType.WORKSPACE`, wherever they stand."""
    found = set()
    for path in sorted((repository / "engines").glob("tensorrt*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            chain = []
            while isinstance(node, ast.Attribute):
                chain.insert(0, node.attr)
                node = node.value
            if chain and isinstance(node, ast.Name) and node.id == "trt":
                found.add(tuple(chain))
            elif chain[:1] == ["_trt"]:
                found.add(tuple(chain[1:]))
    found.discard(())
    assert {("Runtime",), ("TensorLocation", "HOST"), ("OnnxParser",)} <= found
    rtx_alone = {"ComputeCapability", "DynamicShapesKernelSpecializationStrategy"}
    for chain in found:
        if "rtx" in real_trt.__name__ or not (
            chain[0] in rtx_alone or chain[-1] == "REQUIRE_USER_ALLOCATION"
        ):
            functools.reduce(getattr, chain, real_trt)  # AttributeError: no such thing


@every_tensorrt
def test_scratch_memory_is_that_of_the_shapes_and_shared(backend, compiled, feigned):
    first = backend.load(compiled)
    small, large = tensors(2), tensors(9)
    call = first.bind(small)
    size = backend.lane.memory.numel()
    call.run()
    other = backend.load(compiled).bind(large)
    assert backend.lane.memory.numel() > size
    other.run()
    call.run()  # with the grown memory
    for bound in (small, large):
        torch.testing.assert_close(bound["out"], bound["x"] @ bound["w"])


@every_tensorrt
def test_a_call_on_the_default_stream_joins_it_at_both_ends(engine, host_device):
    bound = tensors()
    call = engine.bind(bound)
    host_device.reset_counts()
    call.run()
    assert host_device.counts["waits"] == 2
    bound["out"].add_(1)  # on the default stream: a RaceError, were it not waited for
    with engine.lane.joined():
        host_device.reset_counts()
        call.run()
        call.run()
        assert host_device.counts["waits"] == 0


def test_the_stand_in_finds_a_missing_wait(engine):
    bound = tensors()
    call = engine.bind(bound)
    stream = torch.cuda.Stream()
    call.run()
    with torch.cuda.stream(stream), pytest.raises(RaceError, match="is not waited for"):
        bound["out"].add_(1)


@every_tensorrt
def test_captured_calls_are_replayed_on_the_engines_stream(real_trt, compiled, feigned):
    backend = backend_of(real_trt, captures=True)
    engine = backend.load(compiled)
    bound = tensors()
    call = engine.bind(bound)
    captured = backend.capture([call, call])
    enqueued = feigned.counts["enqueues"]
    assert enqueued == 4  # to settle kernels, and in the capture
    for seed in (1, 2):
        for name, tensor in tensors(seed=seed).items():
            bound[name].copy_(tensor)
        captured.run()
        torch.testing.assert_close(bound["out"], bound["x"] @ bound["w"])
    assert feigned.counts["enqueues"] == enqueued
    assert feigned.device.counts["replays"] == 2
    engine.bind(tensors(9))  # the scratch memory moves
    captured.run()
    assert feigned.device.counts["captures"] == 2


@every_tensorrt
def test_what_cannot_be_captured_is_an_error_of_ours(real_trt, engine, backend, feigned):
    call = engine.bind(tensors())
    feigned.refuses = {"capture"}
    if "rtx" in real_trt.__name__:
        with pytest.raises(RequestError, match="engine 'engine': can't be recorded"):
            backend.capture([call])
    feigned.refuses = set()
    call.run()

    class Forbidding:
        lane = call.lane
        asked = 0

        def require_capturable(self):
            pass

        def run(self):
            self.asked += 1
            if self.asked > 1:
                torch.cuda.current_stream().synchronize()

    with pytest.raises(RequestError, match=r"--cuda-graphs: .*not permitted when stream is capt"):
        backend.capture([Forbidding()])


@every_tensorrt
def test_rtx_engines_require_user_allocation_and_regular_ones_do_not_have_it(real_trt, engine):
    about = engine._plan._about
    assert ("REQUIRE_USER_ALLOCATION" in about["flags"]) == ("rtx" in real_trt.__name__)


@every_tensorrt
@pytest.mark.parametrize(
    ("refused", "what"),
    [
        ("context", "makes no execution context: Error Code 2: OutOfMemory"),
        ("enqueue", "can't be enqueued: Error Code 1: Cuda Runtime"),
    ],
)
def test_nvidias_own_text_reaches_the_user(engine, feigned, refused, what):
    feigned.refuses = {refused}
    with pytest.raises(RequestError, match=what):
        engine.bind(tensors()).run()


def test_no_room_for_activations_is_an_error_of_ours(engine, monkeypatch):
    def full(size, **_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    bound = tensors()
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(RequestError, match=r"engine 'engine': activations take \d+ bytes.*9 GiB"):
        engine.bind(bound)


def test_an_address_that_is_not_aligned_is_our_bug(engine):
    bound = tensors()
    bound["x"] = torch.zeros(2 * 3 * 64 + 1)[1 : 1 + 3 * 64].view(1, 3, 64)
    with pytest.raises(AssertionError, match="not at 256 bytes"):
        engine.bind(bound)


def test_a_shape_outside_the_profile_is_named(engine):
    with pytest.raises(RequestError) as caught:
        engine.bind(tensors(12))
    assert "'x'" in caught.value.where
    assert (
        "[1, 12, 64] is outside the engine's profile [1, 1, 64] to [2, 9, 64]" in caught.value.what
    )
    assert "rebuild" in caught.value.hint


def test_an_output_of_another_shape_is_named(engine):
    engine.outputs["out"] = type(engine.outputs["out"])("float32", ("batch", "others", 64))
    bound = {**tensors(), "out": torch.zeros(1, 5, 64)}
    with pytest.raises(RequestError, match=r"\[1, 5, 64\] but the graph gives \[1, 3, 64\]"):
        engine.bind(bound)


@every_tensorrt
def test_the_usual_size_has_a_profile_of_its_own_where_kernels_are_chosen_ahead(
    engine, feigned, real_trt
):
    count = 1 if "rtx" in real_trt.__name__ else 2
    assert engine._plan.num_optimization_profiles == count
    for tokens, profile in ((4, count - 1), (3, 0)):
        bound = tensors(tokens)
        engine.bind(bound).run()
        assert feigned.contexts[-1].active_optimization_profile == profile
        torch.testing.assert_close(bound["out"], bound["x"] @ bound["w"])


def test_shape_tensors_stay_on_the_host(backend, compiled, graph):
    model = onnx.load(graph("matmul"))
    plan = plan_of(model, [{"x": [[1, 1, 64], [1, 4, 64], [2, 9, 64]]}], host=["w"])
    (compiled / "model.plan").write_bytes(plan)
    record = json.loads((compiled / "engine.json").read_text())
    record["files"]["model.plan"] = len(plan)
    (compiled / "engine.json").write_text(json.dumps(record))
    assert backend.load(compiled).host_tensors == {"w"}


@every_tensorrt
def test_a_plan_that_the_runtime_refuses_is_a_bundle_error(backend, compiled):
    plan = compiled / "model.plan"
    plan.write_bytes(b"x" * plan.stat().st_size)
    with pytest.raises(BundleError) as caught:
        backend.load(compiled)
    assert "model.plan" in caught.value.where
    assert "Serialization assertion" in caught.value.what


@every_tensorrt
def test_what_logs_at_run_time_is_tensorrts_own(engine, real_trt):
    """Its compile threads would wait for Python, which may wait for them."""
    assert type(engine._runtime._logger) is real_trt.Logger


def test_the_oldest_tensorrt_that_is_taken_stands_once(repository):
    with (repository / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    assert extras["tensorrt"] == [f"tensorrt>={OLDEST}"]
    assert real_bindings.OLDEST.startswith(f"{OLDEST}.")


def test_a_runtime_that_cannot_be_made_says_why(backend, compiled, real_trt, feigned):
    feigned.classes["Runtime"] = real_trt.Runtime  # over the stub, which returns null
    with pytest.raises(BackendUnavailable, match=r"makes no runtime .*nvidia-smi"):
        backend.load(compiled)


def test_an_older_tensorrt_is_unavailable_and_says_what_it_lacks(feigned, monkeypatch):
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "10.14.1.48.post1")
    found = TensorRT.probe()
    assert not found.available
    assert "older than 10.15: attention came with 10.14" in found.reason
    assert found.install == "pip install 'tensorrt>=10.15'"


def test_a_timing_cache_of_another_gpu_is_an_empty_one(graph, feigned, real_trt, tmp_path):
    path, folder = graph("matmul"), tmp_path / "cache"
    backend = backend_of(real_trt, cache_folder=folder)
    cache = folder / f"tensorrt-{real_trt.__version__}-Feigned-GPU.timing"
    for content in (None, b"timings of another GPU"):
        if content is not None:
            cache.write_bytes(content)
        backend.compile(path, Target("float32", PROFILE), path.parent / "engine")
        assert cache.read_bytes() == b"timings of this GPU"


@every_tensorrt
def test_options_and_previews_reach_the_builder(graph, backend, feigned, real_trt):
    options = {
        "builder_optimization_level": 1,
        "max_aux_streams": 0,
        "workspace_bytes": 2**20,
        "tiling_optimization_level": "fast",
        "preview_features": "aliased_plugin_io_10_03",
    }
    path = graph("matmul")
    backend.compile(path, Target("float32", PROFILE, ("8.9",), options), path.parent / "engine")
    (config,) = feigned.configs
    assert config._previews == {
        "RUNTIME_ACTIVATION_RESIZE_10_10": True,
        "ALIASED_PLUGIN_IO_10_03": True,
    }
    assert config.builder_optimization_level == 1
    assert config.max_aux_streams == 0
    assert config._pools == {"WORKSPACE": 2**20}
    assert config.tiling_optimization_level == real_trt.TilingOptimizationLevel.FAST


every_regular = pytest.mark.parametrize(
    "real_trt", ["tensorrt newest", "tensorrt oldest"], indirect=True
)


@every_regular
@pytest.mark.parametrize(
    ("level", "served", "runs_on", "refused_on"),
    [
        ("none", "sm8.9", ["8.9"], ["8.6", "9.0"]),
        ("same_compute_capability", "sm8.9", ["8.9"], ["8.6", "9.0"]),
        ("ampere_plus", "sm8.0+", ["8.9", "8.0", "9.0", "12.0"], ["7.5"]),
        ("AMPERE_PLUS", "sm8.0+", ["8.9", "8.0"], ["7.5"]),
    ],
)
def test_an_engine_runs_on_the_gpus_that_its_hardware_compatibility_names(
    graph, feigned, backend, gpu_of, real_trt, level, served, runs_on, refused_on
):
    path, out = graph("matmul"), graph("matmul").parent / "engine"
    target = Target("float32", PROFILE, (), {"hardware_compatibility_level": level})
    backend.compile(path, target, out)
    (config,) = feigned.configs
    levels = real_trt.HardwareCompatibilityLevel.__members__
    assert config.hardware_compatibility_level == levels[level.upper()]
    assert EngineRecord.read(out).machine == served
    for capability in runs_on:
        gpu_of(capability)
        bound = tensors()
        backend.load(out).bind(bound).run()
        torch.testing.assert_close(bound["out"], bound["x"] @ bound["w"])
    for capability in refused_on:
        gpu_of(capability)
        with pytest.raises(BundleError) as caught:
            backend.load(out)
        assert caught.value.what == f"compiled for {served}, but the GPU here is sm{capability}"
        assert caught.value.hint == f"rebuild it for sm{capability}"


@pytest.mark.parametrize(
    ("level", "here"), [("ampere_plus", "7.5"), ("same_compute_capability", "7.0")]
)
def test_a_gpu_too_old_to_build_for_others_is_refused_before_anything_is_traced(
    backend, gpu_of, level, here
):
    gpu_of(here)
    with pytest.raises(BuildError, match=rf"'{level}' is built on GPUs from .*here is {here}"):
        backend.complete(Target(options={"hardware_compatibility_level": level}))


@pytest.mark.parametrize("real_trt", ["tensorrt-rtx"], indirect=True)
def test_rtx_serves_the_capabilities_it_compiles_for(backend):
    with pytest.raises(BuildError, match="and no others; name each with --compute-capability"):
        backend.complete(Target(options={"hardware_compatibility_level": "ampere_plus"}))
    backend.complete(Target(options={"hardware_compatibility_level": "none"}))


@pytest.mark.parametrize(
    ("machine", "here", "is_served"),
    [
        ("sm8.6 sm12.0", "12.0", True),
        ("sm8.6 sm12.0", "8.9", False),
        ("sm12.0", "2.0", False),
        ("sm7.5 sm8.0+", "12.0", True),
        ("sm7.5 sm8.0+", "7.5", True),
        ("sm9.0+", "12.0", True),
        ("sm9.0+", "8.9", False),
        ("", "8.9", False),
        ("+ sm+ sm8+ xsm8.0+ sm8.0+x", "8.9", False),
    ],
)
def test_a_plus_in_a_record_means_newer_gpus_too(machine, here, is_served):
    assert _serves(machine, here) == is_served


@pytest.mark.parametrize("real_trt", ["tensorrt-rtx"], indirect=True)
def test_rtx_shares_one_kernel_cache_and_keeps_it_by_gpu(compiled, feigned, real_trt, tmp_path):
    folder = tmp_path / "cache"
    backend = backend_of(real_trt, cache_folder=folder, captures=True)
    engines = [backend.load(compiled) for _ in range(2)]
    for engine in engines:
        engine.bind(tensors()).run()
    first, second = (c._config for c in feigned.contexts)
    assert first._cache is second._cache
    eager = real_trt.DynamicShapesKernelSpecializationStrategy.EAGER
    assert first.dynamic_shapes_kernel_specialization_strategy == eager
    backend.save_caches()
    (path,) = folder.iterdir()
    assert path.name == f"tensorrt_rtx-{real_trt.__version__}-Feigned-GPU.runtime"
    again = backend_of(real_trt, cache_folder=folder)
    again.load(compiled).bind(tensors()).run()
    assert feigned.contexts[-1]._config._cache._taken == [path.read_bytes()]


@pytest.mark.parametrize("real_trt", ["tensorrt-rtx"], indirect=True)
@pytest.mark.parametrize("lacking", ["folder", "content"])
def test_a_run_is_not_undone_by_a_cache_that_cannot_be_kept(
    compiled, feigned, real_trt, tmp_path, lacking
):
    (tmp_path / "file").touch()
    folder = tmp_path / ("file/cache" if lacking == "folder" else "cache")
    backend = backend_of(real_trt, cache_folder=folder)
    backend.load(compiled).bind(tensors()).run()
    if lacking == "content":
        backend._runtime_cache._content = None
    backend.save_caches()
    assert not folder.exists()


def test_the_device_of_an_index_is_where_streams_and_memory_are_made(
    feigned, real_trt, compiled, monkeypatch
):
    asked = []
    make = torch.cuda.Stream
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: asked.append(device) or make())
    backend = backend_of(real_trt)
    backend.load(compiled).bind(tensors())
    assert asked == [PLACE]


def test_the_stand_in_refuses_what_the_package_lacks(engine, feigned):
    engine.bind(tensors())
    (context,) = feigned.contexts
    with pytest.raises(AttributeError):
        context.set_device_memory_v9(1)
    with pytest.raises(AttributeError):
        context.is_stream_capturable(1)
    with pytest.raises(TypeError, match="fits none"):
        context.set_device_memory(1)
    with pytest.raises(TypeError, match="fits none"):
        context.execute_async_v3("stream")


def test_the_stand_in_insists_on_the_protocol(engine, feigned):
    engine.bind(tensors())
    (plan,) = {c._engine for c in feigned.contexts}
    strategy = feigned.real.ExecutionContextAllocationStrategy
    with pytest.raises(AssertionError, match="memory of its own"):
        plan.create_execution_context(strategy.STATIC)
    context = plan.create_execution_context(strategy.USER_MANAGED)
    with pytest.raises(AssertionError, match="before every input's shape"):
        context.update_device_memory_size_for_shapes()
    with pytest.raises(AssertionError, match="before 'x' has an address"):
        context.execute_async_v3(1)
    assert not context.set_tensor_address("x", 100)
    context.set_input_shape("x", (1, 3, 64))
    context.set_input_shape("w", (64, 64))
    size = context.update_device_memory_size_for_shapes()
    with pytest.raises(AssertionError, match="bytes of scratch memory given"):
        context.set_device_memory(engine.lane.memory.data_ptr(), size - 1)
    with pytest.raises(AssertionError, match="are not all allocated"):
        context.set_device_memory(ALIGNED_NOWHERE, size)


ALIGNED_NOWHERE = 1 << 20
