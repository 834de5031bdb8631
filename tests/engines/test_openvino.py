# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path

import pytest
import torch

from freewheel.core.errors import BuildError, BundleError
from freewheel.engines import Target, openvino
from freewheel.engines.openvino import OpenVino

pytestmark = pytest.mark.openvino


@pytest.mark.parametrize(
    ("name", "precision", "dtype", "tolerance"),
    [
        # One rounding to 8 bits at most 1 ulp off, 2**-8 each; float16 rounds to 11 bits.
        ("matmul_bf16", "bfloat16", torch.bfloat16, 2**-8),
        ("matmul_fp16", "float16", torch.float16, 2**-11),
        ("matmul", "float32", torch.float32, 1e-6),
    ],
)
def test_weights_as_inputs_in_every_precision(graph, name, precision, dtype, tolerance):
    path = graph(name)
    OpenVino().compile(path, Target(precision=precision), path.parent / "engine")
    engine = OpenVino().load(path.parent / "engine")
    x, w = torch.randn(2, 9, 64).to(dtype), (torch.randn(64, 64) / 8).to(dtype)
    out = torch.zeros(2, 9, 64, dtype=dtype)
    address = out.data_ptr()
    call = engine.bind({"x": x, "w": w, "out": out})
    for _ in range(3):
        x.copy_(torch.randn(2, 9, 64))
        call.run()
        expected = x.double() @ w.double()
        assert ((out.double() - expected).norm() / expected.norm()).item() < tolerance
    assert out.data_ptr() == address


@pytest.mark.parametrize("precision", OpenVino.precisions)
def test_the_precision_hint_is_the_target_and_what_it_became_is_recorded(graph, precision):
    path = graph("matmul")
    OpenVino().compile(path, Target(precision=precision), path.parent / "engine")
    record = json.loads((path.parent / "engine" / "engine.json").read_text())
    assert record["precision"] == precision
    native = OpenVino.probe().reason.split("(")[0].replace(",", " ").split()
    wanted = precision if precision in native else "float32"
    assert record["details"]["computed_in"] == wanted
    assert OpenVino.computed_in(precision) == wanted


@pytest.mark.parametrize(
    ("capabilities", "computed"),
    # The same rows as CpuPrecisionTest of cpp/tests.
    [
        (["FP32", "INT8"], {"float32": "float32", "bfloat16": "float32", "float16": "float32"}),
        (["BF16", "FP32"], {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}),
        (
            ["BF16", "FP16", "FP32"],
            {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"},
        ),
    ],
    ids=["neither", "bfloat16", "both"],
)
def test_each_kind_of_cpu_computes_in_what_it_has(graph, monkeypatch, capabilities, computed):
    asked = []
    properties = openvino._properties
    monkeypatch.setattr(openvino, "_capabilities", lambda: capabilities)
    monkeypatch.setattr(openvino, "_properties", lambda p: asked.append(p) or properties(p))
    path = graph("matmul")
    for precision, expected in computed.items():
        assert OpenVino.computed_in(precision) == expected
        folder = path.parent / precision
        OpenVino().compile(path, Target(precision=precision), folder)
        assert json.loads((folder / "engine.json").read_text())["details"] == {
            "computed_in": expected
        }
        OpenVino().load(folder)
        assert asked[-2:] == [expected, expected], "compiled and loaded alike"


def test_an_engine_is_loaded_in_the_recorded_precision(graph):
    path = graph("matmul")
    folder = path.parent / "engine"
    OpenVino().compile(path, Target(), folder)
    record = json.loads((folder / "engine.json").read_text())
    record["details"]["computed_in"] = "float8"
    (folder / "engine.json").write_text(json.dumps(record))
    with pytest.raises(BundleError, match="'float8', not one of float32") as caught:
        OpenVino().load(folder)
    assert "details.computed_in" in caught.value.where


def test_float16_is_never_computed_in_bfloat16(graph):
    path = graph("attention")
    OpenVino().compile(path, Target(precision="float16"), path.parent / "engine")
    engine = OpenVino().load(path.parent / "engine")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 12, 32, 128) for _ in range(3))
    out = torch.zeros(1, 12, 32, 128)
    engine.bind({"q": q, "k": k, "v": v, "out": out}).run()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    # float16 rounds to 11 bits, bfloat16 to 8: its error is 3e-3 here.
    assert ((out - expected).norm() / expected.norm()).item() < 1e-3


def test_a_division_by_a_constant_stays_one(graph):
    path = graph("thirds")
    OpenVino().compile(path, Target(), path.parent / "engine")
    x, out = torch.randn(1000), torch.zeros(1000)
    OpenVino().load(path.parent / "engine").bind({"x": x, "out": out}).run()
    assert torch.equal(out, x / 3), "a product with the reciprocal differs in a third of them"


def test_probe_names_version_and_native_precisions():
    found = OpenVino.probe()
    assert found.available
    assert "OpenVINO 20" in found.reason
    assert "float32" in found.reason


def test_probe_says_how_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = OpenVino.probe()
    assert not found.available
    assert found.install == "pip install openvino"


@pytest.mark.parametrize("field", ["version", "machine"])
def test_an_engine_from_elsewhere_is_refused(graph, field):
    path = graph("matmul")
    folder = path.parent / "engine"
    OpenVino().compile(path, Target(), folder)
    record = json.loads((folder / "engine.json").read_text())
    here = record[field]
    record[field] = "elsewhere"
    (folder / "engine.json").write_text(json.dumps(record))
    with pytest.raises(BundleError) as caught:
        OpenVino().load(folder)
    assert str(folder) in caught.value.where
    assert caught.value.what == f"compiled for {field} 'elsewhere', but here it is '{here}'"
    assert "freewheel build" in caught.value.hint


@pytest.mark.parametrize(
    ("found", "other"), [(b"isa=Intel AVX", b"isa=Intel XVA"), (b"ov=20", b"ov=19")]
)
def test_an_engine_of_other_instructions_or_version_is_refused_by_openvino(graph, found, other):
    path = graph("matmul")
    OpenVino().compile(path, Target(), path.parent / "engine")
    blob = path.parent / "engine" / "model.blob"
    content = blob.read_bytes()
    if found not in content:
        pytest.skip("this OpenVINO writes another header")
    blob.write_bytes(content.replace(found, other, 1))
    with pytest.raises(BundleError, match="mismatch") as caught:
        OpenVino().load(path.parent / "engine")
    assert "freewheel build" in caught.value.hint


def test_an_unknown_precision_is_refused(graph):
    path = graph("matmul")
    with pytest.raises(BuildError, match=r"not among.*float32, bfloat16, float16"):
        OpenVino().compile(path, Target(precision="float64"), path.parent / "engine")


def test_weights_that_are_inputs_are_not_in_the_engine(block, tmp_path):
    OpenVino().compile(block[0], Target(), tmp_path / "engine")
    assert (tmp_path / "engine" / "model.blob").stat().st_size < 60_000


def test_activation_memory_is_shared_between_calls(graph):
    path = graph("wide")
    OpenVino().compile(path, Target(), path.parent / "engine")
    engine = OpenVino().load(path.parent / "engine")
    x, up, down = torch.randn(4096, 8), torch.randn(8, 4096), torch.randn(4096, 8)
    outs = [torch.zeros(4096, 8) for _ in range(8)]
    calls = [engine.bind({"x": x, "up": up, "down": down, "out": out}) for out in outs]
    calls[0].run()
    before = anonymous_bytes()
    for call in calls:
        call.run()
    one = 4096 * 4096 * 4
    assert anonymous_bytes() - before < 3 * one, "seven more, if each call had its own"


def anonymous_bytes() -> int:
    """Return what is allocated and touched: pages of mapped files come and go with the machine's load."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024
