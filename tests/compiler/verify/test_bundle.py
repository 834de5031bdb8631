# SPDX-License-Identifier: Apache-2.0
"""A good bundle passes; every kind of wrong one is found, with its digests put right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from torch import Tensor

from freewheel.bundle.files import describe_files
from freewheel.bundle.reader import MANIFEST, Bundle
from freewheel.compiler.cut.document import cut_of
from freewheel.compiler.defaults import resolve_configs
from freewheel.compiler.graphs.decide import write_decide_graph
from freewheel.compiler.profiles import BuildSizes, dim_ranges, profiles_of
from freewheel.compiler.verify.bundle import VerifyReport, verify_bundle
from freewheel.compiler.verify.engines import EngineCheck
from freewheel.core.errors import BackendUnavailable, MismatchError
from freewheel.engines import Target, backend
from freewheel.engines.onnxruntime import OnnxRuntime, OnnxRuntimeEngine
from freewheel.policies.base import Decision
from freewheel.policies.teacache import TeaCache
from freewheel.runtime.settings import config_entries


@pytest.fixture
def copied(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the tiny bundle, free to be spoilt."""
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def baked(tiny_checkpoint: Path, build_bundle: Callable[..., Bundle]) -> Bundle:
    options = {"weights": "baked", "group_blocks": 2, "policies": ["teacache"]}
    return build_bundle(tiny_checkpoint, ("openvino",), **options)


def with_right_digests(folder: Path) -> Bundle:
    """Open a spoilt bundle after writing the digests of its files into its manifest."""
    manifest = Bundle.__new__(Bundle)
    manifest.folder = folder
    entries = manifest._read_manifest()
    (folder / MANIFEST).rename(folder.parent / MANIFEST)
    files = describe_files(folder)
    text = entries.model_copy(update={"files": files}).model_dump_json()
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return Bundle(folder)


def compile_again(bundle: Path, graph: str, name: str = "onnxruntime", file: str = "") -> None:
    """Replace the engine of a graph by one compiled from its file as it is now."""
    engines = next((bundle / "engines").glob(f"{name}-*"))
    shutil.rmtree(engines / graph)
    source = bundle / (file or f"graphs/{graph}.onnx")
    backend(name).compile(source, Target(), engines / graph)


def change_epsilon(graph: Path) -> None:
    """Make a graph normalise otherwise."""
    model = onnx.load(graph)
    norm = next(n for n in model.graph.node if n.op_type == "LayerNormalization")
    next(a for a in norm.attribute if a.name == "epsilon").f = 0.1
    onnx.save(model, graph)


def failing(report: VerifyReport) -> set[tuple[str, str]]:
    return {(c.graph, c.form) for c in report.engines if not c.ok} | {
        (f"decide.{c.policy}", c.form) for c in report.policies if not c.ok
    }


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_fresh_bundle_equals_pytorch_and_its_laws(tiny_bundle: Bundle, name: str) -> None:
    report = verify_bundle(tiny_bundle, name)
    assert failing(report) == set()
    assert report.ok
    report.raise_on_mismatch()
    compared = {c.graph for c in report.engines if c.form == name}
    assert compared == {n for n, g in tiny_bundle.manifest.graphs.items() if g.runs != "decide"}
    assert {c.block for c in report.engines if c.graph == "block"} == {0, 1, 2}
    assert {c.policy for c in report.policies} == set(tiny_bundle.manifest.policies)
    assert all(c.reused for c in report.policies if c.policy != "off")
    assert all(len(row) == 6 for row in report.rows())
    assert f"{len(report.engines)} of {len(report.engines)} outputs equal" in report.summary()


def test_a_flipped_byte_is_reported_and_nothing_else_is_believed(copied: Path) -> None:
    path = next((copied / "weights").iterdir())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    report = verify_bundle(Bundle(copied))
    name = path.relative_to(copied).as_posix()
    assert report.changed_files == (name,)
    assert report.engines == report.policies == ()
    assert not report.ok
    with pytest.raises(MismatchError, match=rf"{name}.*1 of \d+ files.*SHA-256.*build it again"):
        report.raise_on_mismatch()
    assert MismatchError.exit_code == 5


class Late(TeaCache):
    """Compares with another threshold than its name says."""

    def decide(self, step, signal, feature, kept, state, parameters) -> Decision:
        relaxed = {**parameters, "threshold": parameters["threshold"] * 1.5}
        return super().decide(step, signal, feature, kept, state, relaxed)


@pytest.fixture(scope="module")
def spoilt(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> VerifyReport:
    """The report on one bundle with five faults, each in graphs of its own."""
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path_factory.mktemp("spoilt") / "bundle"))
    engines = next((folder / "engines").glob("onnxruntime-*"))
    shutil.rmtree(engines / "block_tapped")
    shutil.copytree(engines / "block", engines / "block_tapped")
    block = folder / "graphs" / "block.onnx"
    original = block.read_bytes()
    change_epsilon(block)
    compile_again(folder, "block")
    block.write_bytes(original)
    change_epsilon(folder / "graphs" / "finish.onnx")
    write_decide_graph(Late(), folder)
    compile_again(folder, "decide.teacache")
    (engines / "decide.custom").rename(engines / "kept")
    (engines / "decide.adacache").rename(engines / "decide.custom")
    (engines / "kept").rename(engines / "decide.adacache")
    return verify_bundle(with_right_digests(folder), "onnxruntime")


FAULTS = {
    "an engine of an altered graph": (
        {("block", "onnxruntime")},
        r"graph 'block' \(onnxruntime\), block 0.*differs by.*1e-05 is allowed",
    ),
    "a variant of the block in place of another": (
        {("block_tapped", "onnxruntime")},
        r"output 'attention_output' is in the manifest only",
    ),
    "an altered portable graph whose engine is good": (
        {("finish", "onnx")},
        r"graph 'finish' \(onnx\).*differs by",
    ),
    "a policy of another law": (
        {("decide.teacache", "onnxruntime"), ("decide.teacache", "onnx")},
        r"decide.teacache.*law says compute, graph says reuse",
    ),
    "swapped policies, by their interface": (
        {("decide.custom", "onnxruntime"), ("decide.adacache", "onnxruntime")},
        r"input '.*' is in the (engine|manifest) only",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_told(spoilt: VerifyReport, fault: str) -> None:
    graphs, message = FAULTS[fault]
    assert graphs <= failing(spoilt)
    alone = replace(
        spoilt,
        engines=tuple(c for c in spoilt.engines if (c.graph, c.form) in graphs),
        policies=tuple(c for c in spoilt.policies if (f"decide.{c.policy}", c.form) in graphs),
    )
    with pytest.raises(MismatchError, match=message):
        alone.raise_on_mismatch()


def test_nothing_but_the_faults_is_found(spoilt: VerifyReport) -> None:
    assert failing(spoilt) == set().union(*(graphs for graphs, _ in FAULTS.values()))
    with pytest.raises(MismatchError, match=r"graph 'block' \(onnxruntime\)"):
        spoilt.raise_on_mismatch()


def test_baked_groups_equal_their_blocks_in_a_row(baked: Bundle) -> None:
    report = verify_bundle(baked)
    assert failing(report) == set()
    groups = {c.graph: c.tolerance for c in report.engines if c.graph.startswith("body")}
    assert set(groups) == {"body_0_1", "body_2_2"}
    assert groups["body_0_1"] == pytest.approx(2**0.5 * groups["body_2_2"])
    assert "holds weights" in report.skipped["body_0_1"]
    assert {c.form for c in report.engines if c.graph == "block"} == {"onnx"}


def test_an_engine_with_other_weights_inside_is_found(baked: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(baked.folder, tmp_path / "bundle"))
    place = baked.manifest.tensors["blocks.1.ffn.net.2.weight"]
    path = folder / place.file
    original = path.read_bytes()
    content = bytearray(original)
    weight = np.frombuffer(content, np.float32, place.bytes // 4, place.offset)
    weight *= 1.01
    path.write_bytes(content)
    compile_again(folder, "body_0_1", "openvino", "body_0_1.onnx")
    path.write_bytes(original)
    report = verify_bundle(with_right_digests(folder))
    assert failing(report) == {("body_0_1", "openvino")}


@pytest.mark.slow
def test_low_precision_stays_within_its_tolerance(
    tiny_checkpoint: Path, build_bundle: Callable[..., Bundle]
) -> None:
    options = {"precision": "bfloat16", "policies": ["teacache"]}
    report = verify_bundle(build_bundle(tiny_checkpoint, ("openvino",), **options))
    assert failing(report) == set()
    low = [c for c in report.engines if c.tolerance > 1e-3]
    assert {c.graph for c in low} == {"context", "block", "block_tapped", "delta"}
    assert max(c.error for c in low) > 1e-4
    assert "bfloat16" in report.skipped["block"]


def test_a_backend_without_engines_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(BackendUnavailable, match="build it again with --backend tensorrt"):
        verify_bundle(tiny_bundle, "tensorrt")


def test_graphs_that_were_not_compared_are_named_in_the_summary() -> None:
    check = EngineCheck("block", "openvino", 0, "hidden_out", 1e-7, 1e-5)
    skipped = {"block": "is bfloat16", "vae_decode": "has no PyTorch module"}
    report = VerifyReport(Path("b"), "openvino", 3, engines=(check,), skipped=skipped)
    assert report.summary().endswith("; NOT compared: vae_decode")


def test_a_report_of_changed_files_is_plain_data() -> None:
    report = VerifyReport(Path("b"), "openvino", 3, ("x",))
    assert report.as_dict()["changed_files"] == ["x"]
    assert report.summary() == "1 of 3 files changed; engines were not verified"


def test_engines_of_a_range_are_given_sizes_inside_it(
    tiny_bundle: Bundle, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, cut = tiny_bundle.manifest, cut_of(tiny_bundle)
    sizes = BuildSizes((96, 128, 160), (128, 128, 128), (9, 9, 17))
    ranges = dim_ranges(
        cut, sizes, resolve_configs(config_entries(["off"], lambda text: None), None, cut), None
    )
    profiles = profiles_of(manifest.graphs, manifest.policies, cut, ranges)
    for path in copied.glob("engines/onnxruntime-*/*/engine.json"):
        record = json.loads(path.read_text())
        record["details"]["profiles"] = profiles[path.parent.name]
        path.write_text(json.dumps(record))
    load, bound = OnnxRuntime.load, set()

    def load_bounded(backend: OnnxRuntime, compiled: Path) -> OnnxRuntimeEngine:
        engine, name = load(backend, compiled), compiled.name
        if not compiled.is_relative_to(copied):
            return engine  # of a portable graph, which takes any size
        bind = engine.bind

        def bind_inside(bindings: Mapping[str, Tensor]) -> Any:
            for key, (low, _, high) in profiles[name].items():
                sizes = zip(low, bindings[key].shape, high, strict=True)
                assert all(a <= size <= b for a, size, b in sizes), f"{name}, {key}"
            bound.add(name)
            return bind(bindings)

        engine.bind = bind_inside  # type: ignore[method-assign]
        return engine

    monkeypatch.setattr(OnnxRuntime, "load", load_bounded)
    assert verify_bundle(with_right_digests(copied), "onnxruntime").ok
    assert bound == set(profiles)
