# SPDX-License-Identifier: Apache-2.0
"""The run path against stand-ins that accept only what the installed package offers.

Every attribute must exist on the real class, every call must fit a real signature (they are read
from the docstrings of the binding), and every argument must be of the documented kind.
"""

import ast
import functools
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from freewheel.configs.errors import RequestError
from freewheel.engines import TensorSpec
from freewheel.engines.record import EngineRecord, engine_folder
from freewheel.engines.tensorrt import TensorRTRTX
from freewheel.engines.tensorrt_run import CapturedCalls, Scratch, TensorRTEngine

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
pytestmark = pytest.mark.tensorrt


class StandIn:
    """Answers like an object of a binding's class, and notes what it was asked."""

    def __init__(self, real, **answers):
        self.__dict__.update(real=real, answers=answers, calls=[])

    def __getattr__(self, name):
        member = getattr(self.real, name)  # AttributeError: the package has no such thing
        answer = self.answers.get(name)
        if isinstance(member, property):
            return answer

        def call(*arguments):
            check_call(member, arguments)
            self.calls.append((name, *arguments))
            return answer(*arguments) if callable(answer) else answer

        return call

    def __setattr__(self, name, value):
        assert isinstance(getattr(self.real, name), property), f"'{name}' can't be set"
        self.calls.append((name, value))

    def asked(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


def check_call(member, arguments):
    signatures = re.findall(
        r"\(self: [^,)]+((?:, [^()]*(?:\([^()]*\))?[^()]*)?)\) ->", member.__doc__
    )
    assert signatures, f"no signature in the docstring of {member}"
    assert any(fits(text, arguments) for text in signatures), (
        f"{member.__name__}{arguments} fits none of {signatures}"
    )


def fits(signature, arguments):
    parameters = [p for p in re.split(r", (?=\w+: )", signature) if p]
    required = [p for p in parameters if " = " not in p]
    if not len(required) <= len(arguments) <= len(parameters):
        return False
    kinds = (p.split(": ", 1)[1].split(" = ")[0] for p in parameters)
    return all(is_kind(a, kind) for kind, a in zip(kinds, arguments, strict=False))


def is_kind(argument, kind):
    if kind.endswith("SupportsInt"):
        return isinstance(argument, int)
    if kind.endswith("Buffer"):
        return memoryview(argument) is not None
    real = argument.real if isinstance(argument, StandIn) else type(argument)
    return real.__name__ == re.split(r"[.:]", kind)[-1]


RECORD = EngineRecord(
    "tensorrt-rtx",
    trt.__version__,
    "sm8.9",
    "float32",
    {"x": TensorSpec("float32", ("tokens", 4)), "w": TensorSpec("float32", (4, 4))},
    {"out": TensorSpec("float32", ("tokens", 4))},
)


@pytest.fixture(autouse=True)
def stream(monkeypatch):
    found = SimpleNamespace(cuda_stream=77, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: found)
    return found


def make_context(**answers):
    defaults = {
        "set_input_shape": True,
        "set_tensor_address": True,
        "infer_shapes": [],
        "get_tensor_shape": lambda name: trt.Dims([6, 4]),
        "update_device_memory_size_for_shapes": 1024,
        "execute_async_v3": True,
        "is_stream_capturable": True,
    }
    return StandIn(trt.IExecutionContext, **{**defaults, **answers})


def make_plan(contexts, **answers):
    queue = iter(contexts)
    defaults = {
        "get_tensor_location": trt.TensorLocation.DEVICE,
        "create_execution_context": lambda *_: next(queue),
        "get_tensor_profile_shape": [trt.Dims([1, 4]), trt.Dims([2, 4]), trt.Dims([5, 4])],
    }
    return StandIn(trt.ICudaEngine, **{**defaults, **answers})


def make_engine(*contexts, config=None, scratch=None, **answers):
    plan = make_plan(contexts, **answers)
    return TensorRTEngine(
        trt,
        plan,
        RECORD,
        name="block",
        scratch=scratch or Scratch(torch.device("cpu")),
        runtime=None,
        runtime_config=config,
    ), plan


def tensors():
    return {"x": torch.zeros(6, 4), "w": torch.zeros(4, 4), "out": torch.zeros(6, 4)}


def test_binding_sets_every_shape_address_and_the_scratch_memory():
    context = make_context()
    engine, plan = make_engine(context)
    bindings = tensors()
    call = engine.bind(bindings)
    assert plan.asked("create_execution_context") == [
        (trt.ExecutionContextAllocationStrategy.USER_MANAGED,)
    ]
    assert context.asked("set_input_shape") == [("x", (6, 4)), ("w", (4, 4))]
    assert dict(context.asked("set_tensor_address")) == {
        name: tensor.data_ptr() for name, tensor in bindings.items()
    }
    for _ in range(3):
        call.run()
    assert context.asked("set_device_memory") == [(engine.scratch.memory.data_ptr(), 1024)]
    assert context.asked("execute_async_v3") == [(77,)] * 3


def test_the_default_stream_is_left_to_a_stream_of_ours_and_waits_for_it(stream, monkeypatch):
    waits = []
    own = SimpleNamespace(cuda_stream=99, wait_stream=lambda other: waits.append(("own", other)))
    stream.cuda_stream, stream.wait_stream = 0, lambda other: waits.append(("default", other))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: own)
    context = make_context(
        execute_async_v3=lambda handle: waits.append(("enqueued", handle)) or True
    )
    engine, _ = make_engine(context)
    engine.bind(tensors()).run()
    assert waits == [("own", stream), ("enqueued", 99), ("default", own)]


def test_engines_of_a_session_share_the_largest_scratch_memory():
    scratch = Scratch(torch.device("cpu"))
    small = make_context()
    large = make_context(update_device_memory_size_for_shapes=4096)
    first, _ = make_engine(small, scratch=scratch)
    second, _ = make_engine(large, scratch=scratch)
    call = first.bind(tensors())
    call.run()
    second.bind(tensors()).run()
    call.run()  # with the grown memory
    assert scratch.memory.numel() == 4096
    address = scratch.memory.data_ptr()
    assert small.asked("set_device_memory")[-1] == (address, 1024)
    assert large.asked("set_device_memory") == [(address, 4096)]


def test_a_shape_outside_the_profile_is_named():
    engine, _ = make_engine(make_context(set_input_shape=lambda name, shape: name != "x"))
    with pytest.raises(RequestError) as caught:
        engine.bind(tensors())
    assert "'x'" in caught.value.where
    assert "[6, 4] is outside the engine's profile [1, 4] to [5, 4]" in caught.value.what
    assert "rebuild" in caught.value.hint


def test_an_output_of_another_shape_is_named():
    engine, _ = make_engine(make_context(get_tensor_shape=lambda name: trt.Dims([9, 4])))
    with pytest.raises(RequestError, match=r"\[6, 4\] but the graph gives \[9, 4\]"):
        engine.bind(tensors())


def test_a_failed_enqueue_is_an_error():
    engine, _ = make_engine(make_context(execute_async_v3=False))
    with pytest.raises(RequestError, match="could not enqueue"):
        engine.bind(tensors()).run()


def test_shape_tensors_stay_on_the_host():
    host = trt.TensorLocation.HOST
    engine, _ = make_engine(get_tensor_location=lambda name: host if name == "w" else None)
    assert engine.host_tensors == {"w"}


def test_captured_calls_run_once_and_are_replayed(monkeypatch):
    replays = []
    graph = SimpleNamespace(replay=lambda: replays.append(1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda found, capture_error_mode: nullcontext())
    context, larger = make_context(), make_context(update_device_memory_size_for_shapes=4096)
    scratch = Scratch(torch.device("cpu"))
    captured = CapturedCalls([make_engine(context, scratch=scratch)[0].bind(tensors())])
    captured.run()
    captured.run()
    assert len(context.asked("execute_async_v3")) == 2  # to settle kernels, and in the capture
    assert context.asked("is_stream_capturable") == [(77,)]
    assert len(replays) == 2
    make_engine(larger, scratch=scratch)[0].bind(tensors())
    captured.run()
    assert len(context.asked("execute_async_v3")) == 4  # the scratch memory moved
    assert context.asked("set_device_memory")[-1] == (scratch.memory.data_ptr(), 1024)
    assert len(replays) == 3


def test_what_cannot_be_captured_is_named():
    engine, _ = make_engine(make_context(is_stream_capturable=False))
    with pytest.raises(RequestError, match="engine 'block': can't be recorded"):
        CapturedCalls([engine.bind(tensors())])


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "RTX")


@pytest.fixture
def folder(tmp_path):
    with engine_folder(tmp_path / "engine") as partial:
        (partial / "model.plan").write_bytes(b"plan")
        RECORD.write(partial)
    return tmp_path / "engine"


def test_every_name_that_the_sources_take_from_the_package_is_there(repository):
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
    for chain in found:
        functools.reduce(getattr, chain, trt)  # AttributeError: the package has no such thing


def test_loading_shares_one_runtime_cache_and_keeps_it_in_a_file(gpu, folder, monkeypatch):
    cache = StandIn(trt.IRuntimeCache, serialize=b"kernels", deserialize=True)
    configs = [
        StandIn(trt.IRuntimeConfig, create_runtime_cache=cache, set_runtime_cache=True)
        for _ in range(3)
    ]
    queue = iter(configs)
    plan = make_plan([make_context()], create_runtime_config=lambda: next(queue))
    runtime = StandIn(trt.Runtime, deserialize_cuda_engine=plan)
    monkeypatch.setattr(trt, "Runtime", lambda journal: runtime)

    backend = TensorRTRTX(cache_folder=folder.parent / "cache", device=torch.device("cpu"))
    engines = [backend.load(folder) for _ in range(2)]
    engines[0].bind(tensors()).run()
    assert plan.asked("create_execution_context") == [(configs[0],)]
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    for config in configs[:2]:
        assert config.asked("set_execution_context_allocation_strategy") == [(strategy,)]
        assert config.asked("set_runtime_cache") == [(cache,)]
    assert len(configs[1].asked("create_runtime_cache")) == 0
    backend.synchronize()
    backend.save_caches()
    assert (folder.parent / "cache" / "tensorrt_rtx.runtime").read_bytes() == b"kernels"

    TensorRTRTX(cache_folder=folder.parent / "cache", device=torch.device("cpu")).load(folder)
    assert cache.asked("deserialize") == [(b"kernels",)]


def test_a_plan_that_the_runtime_refuses_is_a_bundle_error(gpu, folder):
    from freewheel.configs.errors import BundleError

    with pytest.raises(BundleError) as caught:
        TensorRTRTX().load(folder)
    assert "model.plan" in caught.value.where
    assert caught.value.what


def test_the_stand_in_refuses_what_the_package_lacks():
    context = make_context()
    with pytest.raises(AttributeError):
        context.set_device_memory_v9(1)
    with pytest.raises(AssertionError, match="fits none"):
        context.set_device_memory(1)
    with pytest.raises(AssertionError, match="fits none"):
        context.execute_async_v3("stream")
