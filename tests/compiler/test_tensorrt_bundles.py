# SPDX-License-Identifier: Apache-2.0
"""Whole bundles for TensorRT-RTX, built ahead of time on a machine without a GPU."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from freewheel.bundle.files import cache_beside
from freewheel.bundle.manifest import ConfigEntry, GenerationDefaults, GraphEntry
from freewheel.bundle.reader import Bundle
from freewheel.cli import app
from freewheel.compiler import build as building
from freewheel.compiler import plan as planning
from freewheel.compiler.build import build
from freewheel.compiler.cut.declared import Cut
from freewheel.compiler.defaults import resolve_configs
from freewheel.compiler.engines import compile_graph
from freewheel.compiler.graphs.write import write_graphs
from freewheel.compiler.inspect import inspect_bundle, render
from freewheel.compiler.plan import plan
from freewheel.compiler.profiles import BuildSizes, dim_ranges, profiles_of
from freewheel.compiler.request import BuildRequest
from freewheel.core.errors import BuildError, OutputError, RequestError
from freewheel.core.progress import Silent
from freewheel.engines import Target
from freewheel.engines.tensorrt import TensorRTRTX
from freewheel.policies.setting import CacheSetting

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
pytestmark = pytest.mark.tensorrt

SIZES = BuildSizes(height=(32, 64, 64), width=(48, 64, 96), frames=(1, 9, 17), batch=(1, 1, 2))
OFF = {"off": ConfigEntry(cache=CacheSetting(), generation=GenerationDefaults(text_tokens=16))}
LADA = Target(compute_capabilities=("8.9",))


class Watcher(Silent):
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def advance(self, what: str, steps: int = 1) -> None:
        self.told.append((what, steps))


@pytest.fixture(scope="module")
def built(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, traced: Path
) -> tuple[Bundle, Watcher]:
    """A bundle of the tiny checkpoint, and what the first build of its engines told."""
    watcher, folder = Watcher(), tmp_path_factory.mktemp("built")
    cache = folder / "cache"
    shutil.copytree(traced, cache, ignore=shutil.ignore_patterns(".*"))
    request = BuildRequest(
        model=str(tiny_checkpoint),
        out=folder / "bundle",
        configs=OFF,
        backends=[TensorRTRTX()],
        target=LADA,
        sizes=SIZES,
        cache=cache,
    )
    build(plan(request), watcher)
    return Bundle(request.out), watcher


@pytest.fixture
def request_for(
    tiny_checkpoint: Path, tmp_path: Path, built: tuple[Bundle, Watcher]
) -> Callable[..., BuildRequest]:
    """Return a function that asks for a bundle of the tiny checkpoint, tracing nothing."""

    def make(**options: Any) -> BuildRequest:
        given = {
            "model": str(tiny_checkpoint),
            "out": tmp_path / "out" / "bundle",
            "configs": OFF,
            "backends": [TensorRTRTX()],
            "target": LADA,
            "sizes": SIZES,
            "cache": built[0].folder.parent / "cache",
        }
        return BuildRequest(**{**given, **options})

    return make


def test_every_graph_has_an_engine_and_every_build_tells_its_steps(
    built: tuple[Bundle, Watcher],
) -> None:
    bundle, watcher = built
    (engines,) = bundle.manifest.engines
    assert (engines.backend, engines.target) == ("tensorrt-rtx", "sm89")
    assert engines.files.keys() == bundle.manifest.graphs.keys()
    steps = [what for what, count in watcher.told if count == 0]
    assert any(s.startswith("block: building engine ") for s in steps)
    assert {s.split(":")[0] for s in steps} == set(bundle.manifest.graphs)
    timings = list((bundle.folder.parent / "cache").glob("*.timing"))
    assert timings
    assert all(timing.stat().st_size > 0 for timing in timings)


def test_no_engine_wants_an_input_in_host_memory(built: tuple[Bundle, Watcher]) -> None:
    for engine in inspect_bundle(built[0])["engines"][0]["graphs"].values():
        assert engine["details"]["shape_inputs"] == []


def test_no_policys_engine_is_larger_than_a_blocks(built: tuple[Bundle, Watcher]) -> None:
    """TensorRT-RTX writes elementwise expressions out once per use, which can grow without bound."""
    bundle = built[0]
    (engines,) = bundle.manifest.engines
    sizes = {n: (bundle.path(f) / "model.plan").stat().st_size for n, f in engines.files.items()}
    assert {n for n in sizes if n.startswith("decide.") and sizes[n] > sizes["block"]} == set()


def test_fine_tunes_share_their_engines(
    built: tuple[Bundle, Watcher],
    request_for: Callable[..., BuildRequest],
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    tuned = Path(shutil.copytree(tiny_checkpoint, tmp_path / "tuned"))
    path = tuned / "diffusion_pytorch_model.safetensors"
    save_file({n: t + 0.01 for n, t in load_file(path).items()}, path)
    request = request_for(model=str(tuned))
    first, again = built[0].manifest, build(plan(request)).manifest
    assert again.checkpoint.sha256 != first.checkpoint.sha256
    files = [n for n in first.files if n.startswith("engines/")]
    assert len(files) == 2 * len(first.graphs)
    assert {n: again.files[n] for n in files} == {n: first.files[n] for n in files}


def test_inspect_shows_the_layers_that_the_builder_made(built: tuple[Bundle, Watcher]) -> None:
    data = inspect_bundle(built[0], height=64, width=64, frames=9, engine="block")
    block = data["engines"][0]["graphs"]["block"]
    assert block["details"]["nodes"]["Attention"] == 2
    assert block["attention"] == {"nodes": 2, "fused": 0, "kernels": []}  # float32 has no kernel
    assert block["layers"] == len(block["details"]["layers"]) > 10
    text = "\n".join(render(data))
    assert "0 of 2" in text
    assert "layers of 'block' for tensorrt-rtx" in text
    assert "node_rms_norm" in text
    with pytest.raises(RequestError, match="engine 'blok': is not in the bundle; did you mean"):
        inspect_bundle(built[0], engine="blok")


def test_a_refused_operator_names_segment_and_node(
    request_for: Callable[..., BuildRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = building.write_graphs

    def spoil(segments: Any, dims: Any, *, bundle: Path, **options: Any) -> dict[str, GraphEntry]:
        entries = write(segments, dims, bundle=bundle, **options)
        if "head" in entries:
            path = bundle / entries["head"].file
            model = onnx.load(path)
            node = onnx.helper.make_node("Fourierise", ["hidden"], ["odd"], name="peculiar")
            model.graph.node.append(node)
            onnx.save(model, path)
        return entries

    monkeypatch.setattr(building, "write_graphs", spoil)
    request = request_for()
    with pytest.raises(BuildError) as caught:
        build(plan(request))
    assert caught.value.where == "graph 'head', head.onnx"
    assert "node 'peculiar' (Fourierise)" in caught.value.what
    assert not request.out.exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"target": Target(compute_capabilities=("9.0",))},
            BuildError,
            "compute capability '9.0' is unknown to tensorrt-rtx-cu12; known: 7.5, 8.0",
        ),
        ({"target": Target(options={"builder_optimization_level": 9})}, BuildError, "levels go"),
        (
            {"sizes": BuildSizes(frames=(1, 9, 1 + 4 * 64))},
            RequestError,
            "beyond the model's 64 positions",
        ),
        ({"sizes": BuildSizes(height=(32, 64, 70))}, RequestError, "--height 70"),
    ],
)
def test_what_cannot_be_built_is_refused_before_tracing(
    request_for: Callable[..., BuildRequest],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(building, "write_graphs", lambda *a, **k: pytest.fail("must not trace"))
    request = request_for(**options)
    with pytest.raises(error, match=message):
        build(plan(request))
    assert not request.out.parent.exists()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to write more than ``size`` bytes into a file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_without_space_for_an_engine_nothing_is_left(
    request_for: Callable[..., BuildRequest],
) -> None:
    request = request_for()
    with largest_file(100_000), pytest.raises(OutputError) as caught:
        build(plan(request))
    assert caught.value.where.endswith("/rotary")
    assert "can't be written: File too large" in caught.value.what
    assert "free some space" in caught.value.hint
    assert list(request.out.parent.iterdir()) == []


def freewheel(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def test_the_command_line_offers_every_option(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shown = freewheel("build", "--help").output
    for flag in (
        "--height",
        "--width",
        "--frames",
        "--batch",
        "--compute-capability",
        "--optimization-level",
        "--workspace-mib",
        "--build-cache",
    ):
        assert flag in shown
    command = (
        "build", tiny_checkpoint, "--out", tmp_path / "b", "--backend", "tensorrt-rtx", "--json",
        "--dry-run", "--frames", "17:81:81", "--height", "480", "--width", "832", "--batch", "1:1:2",
    )  # fmt: skip
    done = freewheel(*command, "--compute-capability", "8.9", "--optimization-level", 3)
    assert done.exit_code == 0, done.output
    ranges = json.loads(done.stdout)["ranges"]
    assert ranges["tokens"] == [7800, 32760, 32760]
    assert ranges["batch"] == [1, 1, 2]
    for wrong, code, where in (
        (("--compute-capability", "9.0"), 1, "backend 'tensorrt-rtx'"),
        (("--optimization-level", "7"), 2, "freewheel build"),
        (("--frames", "81:17:81"), 3, "--frames 81:17:81"),
    ):
        refused = freewheel(*command, *wrong)
        assert refused.exit_code == code
        assert json.loads(refused.stdout)["error"]["where"].startswith(where)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_fills_the_request(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    seen: list[BuildRequest] = []

    def note(request: BuildRequest) -> None:
        seen.append(request)
        raise OutputError("here", "stops", "")

    monkeypatch.setattr(planning, "plan", note)
    out = tmp_path / "b"
    freewheel(
        "build", tiny_checkpoint, "--out", out, "--backend", "tensorrt-rtx", "--workspace-mib", 256,
        "--optimization-level", 2, "--compute-capability", "8.0", "--compute-capability", "12.0",
    )  # fmt: skip
    (request,) = seen
    options = {"builder_optimization_level": 2, "workspace_bytes": 256 << 20}
    assert request.target == Target(compute_capabilities=("8.0", "12.0"), options=options)
    assert request.cache == cache_beside(out)


LOW = {"bfloat16": onnx.TensorProto.BFLOAT16, "float16": onnx.TensorProto.FLOAT16}


@pytest.fixture(scope="module", params=list(LOW))
def low(
    request: pytest.FixtureRequest,
    cut_model: Callable[..., Cut],
    wide_config: dict[str, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Cut, Path, dict[str, GraphEntry]]:
    """A low-precision block and context of 1,024 channels: name, cut, folder and entries."""
    rest = {"in_channels": 4, "out_channels": 4, "text_dim": 24, "freq_dim": 32}
    with torch.device("meta"):
        model = WanTransformer3DModel(**wide_config, **rest, rope_max_seq_len=64)
    cut = cut_model(model, request.param)
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "graphs").mkdir()
    segments = [s for s in cut.segments if s.name in ("block", "context")]
    return request.param, cut, folder, write_graphs(segments, cut.example_dims, folder, Silent())


def test_islands_stay_float32_in_the_graphs(low: Any) -> None:
    precision, _, folder, entries = low
    for name, products in (("block", 8), ("context", 2)):
        model = onnx.shape_inference.infer_shapes(onnx.load(folder / entries[name].file))
        values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
        dtype = {v.name: v.type.tensor_type.elem_type for v in values}
        dtype |= {t.name: t.data_type for t in model.graph.initializer}
        found: dict[str, set[int]] = {}
        for node in model.graph.node:
            names = [n for n in (*node.input, *node.output) if n]
            kinds = {dtype[n] for n in names} & {onnx.TensorProto.FLOAT, *LOW.values()}
            found.setdefault(node.op_type, set()).update(kinds)
        counts = [n.op_type for n in model.graph.node]
        assert counts.count("MatMul") == products
        lowered = {op for op, kinds in found.items() if kinds == {LOW[precision]}}
        exact = {op for op, kinds in found.items() if kinds == {onnx.TensorProto.FLOAT}}
        assert "MatMul" in lowered
        assert "RMSNormalization" in exact
        if name == "block":
            assert {"Attention", "Gelu"} <= lowered
            islands = {"LayerNormalization", "RMSNormalization", "RotaryEmbedding", "Split", "Mul"}
            assert islands <= exact
            assert dtype["hidden"] == dtype["hidden_out"] == onnx.TensorProto.FLOAT
            assert dtype["timestep_proj"] == onnx.TensorProto.FLOAT


def test_low_precision_attention_is_fused_at_any_size(low: Any, tmp_path: Path) -> None:
    precision, cut, folder, entries = low
    ranges = dim_ranges(cut, SIZES, resolve_configs(OFF, None, cut), None)
    profiles = profiles_of(entries, {}, cut, ranges)
    target = Target(precision, profiles["block"], ("8.0", "8.9", "12.0"))
    TensorRTRTX().compile(folder / entries["block"].file, target, tmp_path / "engine")
    details = json.loads((tmp_path / "engine" / "engine.json").read_text())["details"]
    assert details["nodes"]["Attention"] == 2
    assert sum("mha" in layer["kernel"] for layer in details["layers"]) == 2
    assert details["shape_inputs"] == []


def test_text_and_image_attention_of_one_query_are_both_fused(tmp_path: Path) -> None:
    """TensorRT-RTX 1.7 ends the process on this graph, unless a pass changes it."""
    tensors = {"q": "t", "k": "s", "v": "s", "k2": "i", "v2": "i"}
    given = ", ".join(f"bfloat16[1, 12, {dim}, 128] {name}" for name, dim in tensors.items())
    graph = tmp_path / "shared.onnx"
    text = (
        f'<ir_version: 10, opset_import: ["": 23]> g ({given}) => (bfloat16[1, 12, t, 128] o)'
        "{ a = Attention(q, k, v)  b = Attention(q, k2, v2)  o = Add(a, b) }"
    )
    onnx.save(onnx.parser.parse_model(text), graph)
    sizes = {"t": (64, 1560, 32760), "s": (1, 512, 512), "i": (257, 257, 257)}
    shapes = {n: [(1, 12, size, 128) for size in sizes[dim]] for n, dim in tensors.items()}
    target = Target("bfloat16", {n: (s[0], s[1], s[2]) for n, s in shapes.items()}, ("8.9",))
    compile_graph(TensorRTRTX(), graph, target, tmp_path / "engine")
    details = json.loads((tmp_path / "engine" / "engine.json").read_text())["details"]
    assert sum("mha" in layer["kernel"] for layer in details["layers"]) == 2


HEADS = (12, 16, 32, 40, 64, 72, 80, 88, 96, 112, 128, 160, 192, 256)
MASKS = (("bool", "1"), ("bool", "t"), ("bfloat16", "1"), ("bfloat16", "t"))
"""dtype, and rows: one for all queries, or one for each."""


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("head", "mask"), [*((head, None) for head in HEADS), *((64, mask) for mask in MASKS)]
)
def test_attention_of_released_models_is_fused(
    head: int, mask: tuple[str, str] | None, tmp_path: Path
) -> None:
    tensors = dict.fromkeys("qkv", f"bfloat16[1, 12, t, {head}]")
    shapes = {n: tuple((1, 12, t, head) for t in (64, 1560, 4096)) for n in tensors}
    if mask is not None:
        dtype, rows = mask
        tensors["m"] = f"{dtype}[1, 1, {rows}, t]"
        shapes["m"] = tuple((1, 1, t if rows == "t" else 1, t) for t in (64, 1560, 4096))
    given = ", ".join(f"{kind} {name}" for name, kind in tensors.items())
    graph = tmp_path / "attention.onnx"
    text = (
        f'<ir_version: 10, opset_import: ["": 23]> g ({given}) => ({tensors["v"]} o)'
        f"{{ o = Attention({', '.join(tensors)}) }}"
    )
    onnx.save(onnx.parser.parse_model(text), graph)
    target = Target("bfloat16", {n: (s[0], s[1], s[2]) for n, s in shapes.items()}, ("8.9",))
    compile_graph(TensorRTRTX(), graph, target, tmp_path / "engine")
    details = json.loads((tmp_path / "engine" / "engine.json").read_text())["details"]
    assert sum("mha" in layer["kernel"] for layer in details["layers"]) == 1
