# SPDX-License-Identifier: Apache-2.0
"""What the protocol promises, kept by every backend that runs here."""

import copy
from pathlib import Path

import pytest
import torch

from freewheel.core.errors import BuildError, BundleError, OutputError, RequestError
from freewheel.engines import Availability, Target, backend

CPU_BACKENDS = ["onnxruntime", pytest.param("openvino", marks=pytest.mark.openvino)]


@pytest.fixture(params=CPU_BACKENDS)
def cpu(request):
    return backend(request.param)


def compiled(cpu, graph: Path, precision: str = "float32"):
    out = graph.parent / f"{graph.stem}.engine"
    cpu.compile(graph, Target(precision=precision), out)
    return cpu.load(out)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = found.double() - expected.double()
    return (difference.norm() / expected.double().norm()).item()


def test_availability_says_where_a_graph_can_be_built():
    assert Availability(True, "").can_build
    assert Availability(False, "", builds_elsewhere=True).can_build
    assert not Availability(False, "").can_build


@pytest.mark.parametrize(("batch", "tokens"), [(1, 5), (2, 33), (3, 128)])
def test_block_equals_torch_at_any_size(cpu, block, inputs_of_block, tmp_path, batch, tokens):
    path, module = block
    engine_path = tmp_path / "engine"
    cpu.compile(path, Target(), engine_path)
    inputs = inputs_of_block(batch=batch, tokens=tokens)
    out = torch.full((batch, tokens, 64), torch.nan)
    cpu.load(engine_path).bind({**inputs, "hidden_out": out}).run()
    # float32 round-off through some ten operations; 2e-7 was seen
    assert relative_error(out, module(*inputs.values())) < 2e-6


def test_outputs_are_written_in_place_and_inputs_read_anew_each_run(cpu, graph):
    engine = compiled(cpu, graph("matmul"))
    x, w, out = torch.randn(2, 7, 64), torch.randn(64, 64), torch.zeros(2, 7, 64)
    addresses = [t.data_ptr() for t in (x, w, out)]
    call = engine.bind({"x": x, "w": w, "out": out})
    for _ in range(30):
        x.normal_()
        w.normal_()
        call.run()
        cpu.synchronize()
        torch.testing.assert_close(out, x @ w, rtol=1e-4, atol=1e-4)
    assert [t.data_ptr() for t in (x, w, out)] == addresses


def test_a_call_writes_into_a_slot_of_a_larger_tensor(cpu, graph):
    engine = compiled(cpu, graph("matmul"))
    ring = torch.zeros(3, 1, 7, 64)
    x, w = torch.randn(1, 7, 64), torch.randn(64, 64)
    engine.bind({"x": x, "w": w, "out": ring[1]}).run()
    torch.testing.assert_close(ring[1], x @ w, rtol=1e-4, atol=1e-4)
    assert ring[0].count_nonzero() == 0
    assert ring[2].count_nonzero() == 0


def test_calls_of_one_engine_keep_their_own_bindings(cpu, graph):
    engine = compiled(cpu, graph("matmul"))
    buffers = [torch.randn(1, 9, 64) / 8, torch.zeros(1, 9, 64)]
    weights = [torch.randn(64, 64) / 8 for _ in range(6)]
    chain = [
        engine.bind({"x": buffers[i % 2], "w": w, "out": buffers[(i + 1) % 2]})
        for i, w in enumerate(weights)
    ]
    start = buffers[0].clone()
    for _ in range(2):
        buffers[0].copy_(start)
        for call in chain:
            call.run()
        expected = start
        for weight in weights:
            expected = expected @ weight
        torch.testing.assert_close(buffers[0], expected, rtol=1e-4, atol=1e-5)


def test_calls_of_different_sizes_live_side_by_side(cpu, graph):
    engine = compiled(cpu, graph("matmul"))
    w = torch.randn(64, 64)
    sets = [(torch.randn(1, n, 64), torch.zeros(1, n, 64)) for n in (3, 50, 3, 11)]
    calls = [engine.bind({"x": x, "w": w, "out": out}) for x, out in sets]
    for _ in range(2):
        for call, (x, out) in zip(calls, sets, strict=True):
            call.run()
            torch.testing.assert_close(out, x @ w, rtol=1e-4, atol=1e-4)


def test_a_call_keeps_its_tensors_and_engine_alive(cpu, graph):
    out = torch.zeros(1, 3, 64)
    x = torch.ones(1, 3, 64)
    call = compiled(cpu, graph("matmul")).bind({"x": x, "w": torch.eye(64), "out": out})
    del x
    call.run()
    assert torch.equal(out, torch.ones(1, 3, 64))


def test_scalars_integers_and_booleans_pass(cpu, graph):
    engine = compiled(cpu, graph("scalars"))
    tensors = {
        "step": torch.tensor(5),
        "force": torch.tensor(True),
        "x": torch.randn(3, 4),
        "next": torch.tensor(0),
        "late": torch.tensor(False),
        "mean": torch.tensor(0.0),
    }
    engine.bind(tensors).run()
    assert tensors["next"].item() == 6
    assert tensors["late"].item() is True
    torch.testing.assert_close(tensors["mean"], tensors["x"].mean())
    assert engine.inputs["x"].shape == ("n", 4)
    assert engine.inputs["step"].shape == ()
    assert engine.inputs["step"].dtype == "int64"


def test_bfloat16_weight_can_be_an_input(cpu, graph):
    engine = compiled(cpu, graph("bf16_weight"))
    x, w, out = torch.randn(5, 64), torch.randn(64, 64).bfloat16(), torch.zeros(5, 64)
    engine.bind({"x": x, "w": w, "out": out}).run()
    assert relative_error(out, x.double() @ w.double()) < 1e-6


def test_baked_weights_survive_the_graph_they_came_from(cpu, baked):
    path, weight = baked
    engine_path = path.parent.parent / "engine"
    cpu.compile(path, Target(), engine_path)
    for file in path.parent.iterdir():
        file.unlink()
    x, out = torch.randn(5, 64), torch.zeros(5, 64)
    cpu.load(engine_path).bind({"x": x, "out": out}).run()
    assert relative_error(out, x @ weight) < 1e-6


@pytest.mark.parametrize(
    ("change", "tensor", "what", "hint"),
    [
        (lambda b: b.pop("w"), "'w'", "not bound", "float32 tensor [64, 64]"),
        (lambda b: b.update(outs=b["w"]), "'outs'", "no such input", "did you mean 'out'"),
        (lambda b: b.update(w=b["w"].half()), "'w'", "is float16", ".to(torch.float32)"),
        (lambda b: b.update(w=b["w"].t()), "'w'", "not contiguous", "copy"),
        (lambda b: b.update(w=b["w"][:63]), "'w'", "[63, 64]", "that shape"),
        (lambda b: b.update(x=b["x"][0]), "'x'", "[7, 64]", "that shape"),
        (lambda b: b.update(out=b["out"][:, :6].clone()), "'out'", "'tokens' is 6", "one size"),
    ],
)
def test_misfit_bindings_are_refused_by_name(cpu, graph, change, tensor, what, hint):
    engine = compiled(cpu, graph("matmul"))
    bindings = {
        "x": torch.zeros(2, 7, 64),
        "w": torch.zeros(64, 64),
        "out": torch.zeros(2, 7, 64),
    }
    change(bindings)
    with pytest.raises(RequestError) as caught:
        engine.bind(bindings)
    assert tensor in caught.value.where
    assert what in caught.value.what
    assert hint in caught.value.hint


@pytest.mark.parametrize("size", [3, 19, 21, 300])
def test_an_output_whose_size_only_the_graph_knows_is_checked_at_the_first_run(cpu, graph, size):
    engine = compiled(cpu, graph("doubled"))
    with pytest.raises(RequestError) as caught:
        engine.bind({"x": torch.randn(10), "out": torch.zeros(size)}).run()
    assert "20" in caught.value.what
    assert "bind" in caught.value.hint


def test_a_refused_graph_is_named_and_leaves_nothing_behind(cpu, graph):
    path = graph("unknown_op")
    out = path.parent / "engine"
    before = sorted(path.parent.iterdir())
    with pytest.raises(BuildError) as caught:
        cpu.compile(path, Target(), out)
    assert "unknown_op.onnx" in caught.value.where
    assert "Fourierise" in caught.value.what
    assert "--backend" in caught.value.hint
    assert sorted(path.parent.iterdir()) == before


def test_a_file_that_is_no_graph_is_refused(cpu, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"\x07 not a graph")
    for path in (tmp_path / "bad.onnx", tmp_path / "missing.onnx"):
        with pytest.raises(BuildError, match="not a readable ONNX file"):
            cpu.compile(path, Target(), tmp_path / "engine")


def test_a_place_that_cannot_be_written_is_named(cpu, graph):
    path = graph("matmul")
    (path.parent / "file").touch()
    with pytest.raises(OutputError) as caught:
        cpu.compile(path, Target(), path.parent / "file" / "engine")
    assert "engine" in caught.value.where
    assert "can't be written" in caught.value.what
    assert caught.value.hint


def test_compiling_again_replaces_the_engine(cpu, graph):
    path = graph("matmul")
    for _ in range(2):
        compiled(cpu, path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["matmul.engine", "matmul.onnx"]


def test_truncated_files_are_refused(cpu, graph):
    path = graph("matmul")
    compiled(cpu, path)
    folder = path.parent / "matmul.engine"
    for file in folder.iterdir():
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(BundleError) as caught:
            cpu.load(folder)
        assert file.name in str(caught.value)
        assert "freewheel build" in caught.value.hint
        file.write_bytes(content)
    cpu.load(folder)


def test_garbage_of_the_right_size_is_refused(cpu, graph):
    path = graph("matmul")
    compiled(cpu, path)
    folder = path.parent / "matmul.engine"
    blob = next(p for p in folder.iterdir() if p.suffix != ".json")
    blob.write_bytes(bytes(blob.stat().st_size))
    with pytest.raises(BundleError, match="refuses it"):
        cpu.load(folder)


def test_engines_of_another_backend_are_refused(cpu, graph):
    path = graph("matmul")
    compiled(cpu, path)
    other = backend("openvino" if cpu.name == "onnxruntime" else "onnxruntime")
    with pytest.raises(BundleError, match=f"compiled for backend '{cpu.name}'"):
        other.load(path.parent / "matmul.engine")


def test_backends_are_cheap_to_copy_and_hold_no_engine(cpu):
    assert copy.copy(cpu).name == cpu.name
