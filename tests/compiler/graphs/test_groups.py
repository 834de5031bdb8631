"""Baked groups: the same numbers as block templates, and nothing copied."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo

from freewheel.bundle.files import describe_files
from freewheel.bundle.manifest import Manifest
from freewheel.bundle.reader import MANIFEST, Bundle
from freewheel.compiler.build import build
from freewheel.compiler.engines import compile_graph
from freewheel.compiler.graphs.groups import (
    GROUP_BYTES,
    block_bytes,
    check_group_blocks,
    split_blocks,
    stitch_blocks,
    write_groups,
)
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.core.errors import ConfigError, RequestError
from freewheel.engines import backend
from freewheel.engines.base import Target
from freewheel.policies.setting import CacheSetting, GuardSetting
from freewheel.runtime.model import Model
from freewheel.runtime.pipeline.adapters import Adapters
from freewheel.runtime.session import Session
from freewheel.runtime.step_record import StepRecord

BACKENDS = ("onnxruntime", pytest.param("openvino", marks=pytest.mark.openvino))
TOLERANCE = 1e-6
"""Relative L2; the same operators in the same order, fused over other boundaries: 1e-7 is seen."""
ADACACHE = CacheSetting(
    policy="adacache",
    parameters={"codebook_thresholds": [0.1, 0.6, 10.0], "codebook_skips": [3, 2, 1]},
    guard=GuardSetting(first_exact=2, last_exact=1),
)


def baked_copy(bundle: Bundle, folder: Path, group_blocks: int | None) -> Bundle:
    """Bake a bundle that was built with weights as inputs, without tracing it again."""
    shutil.copytree(bundle.folder, folder, copy_function=os.link)
    (folder / MANIFEST).unlink()
    manifest = bundle.manifest
    stages, groups = write_groups(
        manifest.stages,
        manifest.graphs,
        manifest.tensors,
        manifest.feature_block,
        folder,
        group_blocks,
    )
    engines = []
    for built in manifest.engines:
        files = {n: f for n, f in built.files.items() if manifest.graphs[n].runs != "block"}
        place = Path(next(iter(files.values()))).parent
        for name in built.files.keys() - files.keys():
            shutil.rmtree(folder / built.files[name])
        for name, graph in groups.items():
            files[name] = str(place / name)
            compile_graph(
                backend(built.backend), folder / graph.file, Target(), folder / files[name]
            )
        engines.append(built.model_copy(update={"files": files}))
    changed = {
        "weights": "baked",
        "stages": stages,
        "graphs": {**manifest.graphs, **groups},
        "engines": engines,
        "files": describe_files(folder),
    }
    written: Manifest = manifest.model_copy(update=changed)
    (folder / MANIFEST).write_text(written.model_dump_json())
    return Bundle(folder)


@pytest.fixture(scope="module")
def baked(tiny_checkpoint: Path, build_bundle: Callable[..., Bundle]) -> Bundle:
    """A bundle built with ``--weights baked``: two blocks, then one."""
    return build_bundle(tiny_checkpoint, weights="baked", group_blocks=2)


@pytest.fixture(scope="module", params=[1, 3, None])
def regrouped(
    request: pytest.FixtureRequest, tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    return baked_copy(tiny_bundle, tmp_path_factory.mktemp("baked") / "bundle", request.param)


class Kept:
    """A recorder that keeps every residual and feature."""

    wants_signals = False

    def __init__(self) -> None:
        self.residuals: list[torch.Tensor] = []
        self.features: list[torch.Tensor] = []

    def on_run(self, tables: object, timesteps: object) -> None:
        pass

    def on_step(self, record: StepRecord, dims: object) -> None:
        self.residuals.append(record.residual.clone())
        if record.feature is not None:
            self.features.append(record.feature.clone())


def run(
    bundle: Bundle, name: str, setting: CacheSetting | None = None, recorder: Kept | None = None
) -> tuple[torch.Tensor, list[bool]]:
    """Run six steps of two branches; return every output and the decisions of ``cond``."""
    generator = torch.Generator().manual_seed(3)
    session = Session(Model(bundle, name))
    session.begin(torch.linspace(990, 100, 6), setting, recorder)
    outputs = []
    for branch in ("cond", "uncond"):
        session.set_prompt(branch, {"text_states": torch.randn(1, 7, 24, generator=generator)})
    latents = torch.randn(1, 4, 2, 6, 8, generator=generator)
    for step in range(6):
        outputs += [session.step(b, step, {"latents": latents}).clone() for b in ("cond", "uncond")]
        latents = latents - 0.1 * outputs[-2]
    return torch.stack(outputs), session.statistics.branches["cond"].computed


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def external(bundle: Bundle, graph: str) -> Iterator[tuple[str, ExternalDataInfo]]:
    model = onnx.load(bundle.graph_path(graph), load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor.name, ExternalDataInfo(tensor)


def groups_of(bundle: Bundle) -> list[str]:
    return [g.graph for s in bundle.manifest.stages for g in s.groups]


@pytest.mark.parametrize("name", BACKENDS)
def test_built_groups_compute_what_block_templates_compute(
    name: str, tiny_bundle: Bundle, baked: Bundle
) -> None:
    expected, _ = run(tiny_bundle, name)
    assert relative(run(baked, name)[0], expected) < TOLERANCE


@pytest.mark.parametrize("name", BACKENDS)
def test_every_group_size_computes_what_block_templates_compute(
    name: str, tiny_bundle: Bundle, regrouped: Bundle
) -> None:
    expected, _ = run(tiny_bundle, name)
    assert relative(run(regrouped, name)[0], expected) < TOLERANCE


@pytest.mark.parametrize("name", BACKENDS)
def test_policy_that_taps_the_feature_decides_alike_and_sees_the_same_feature(
    name: str, tiny_bundle: Bundle, regrouped: Bundle
) -> None:
    kept, kept_baked = Kept(), Kept()
    expected, decisions = run(tiny_bundle, name, ADACACHE, kept)
    found, decisions_baked = run(regrouped, name, ADACACHE, kept_baked)
    assert decisions_baked == decisions
    assert not all(decisions), "the setting reuses something, or this test shows nothing"
    assert relative(found, expected) < TOLERANCE
    assert len(kept.features) == len(kept_baked.features) > 0
    for one, other in zip(kept.features, kept_baked.features, strict=True):
        assert relative(other, one) < TOLERANCE


@pytest.mark.parametrize("name", BACKENDS)
def test_run_without_feature_after_one_with_it_is_unharmed(name: str, baked: Bundle) -> None:
    expected, _ = run(baked, name)
    session = Session(Model(baked, name))
    generator = torch.Generator().manual_seed(3)
    prompts = {b: torch.randn(1, 7, 24, generator=generator) for b in ("cond", "uncond")}
    latents = torch.randn(1, 4, 2, 6, 8, generator=generator)
    for setting in (ADACACHE, None):
        session.begin(torch.linspace(990, 100, 6), setting)
        for branch, states in prompts.items():
            session.set_prompt(branch, {"text_states": states})
        first = session.step("cond", 0, {"latents": latents})
    assert torch.equal(first, expected[0])


def test_build_groups_blocks_and_builds_no_template_engine(baked: Bundle) -> None:
    manifest = baked.manifest
    assert manifest.weights == "baked"
    assert [(g.graph, g.first, g.count) for g in manifest.stages[0].groups] == [
        ("body_0_1", 0, 2),
        ("body_2_2", 2, 1),
    ]
    for engines in manifest.engines:
        assert not {"block", "block_tapped"} & engines.files.keys()
        assert {"body_0_1", "body_2_2"} <= engines.files.keys()
    assert {"graphs/block.onnx", "graphs/block_tapped.onnx"} <= manifest.files.keys()


def test_feature_is_an_output_of_its_group_alone(baked: Bundle) -> None:
    assert baked.manifest.feature_block == 1
    assert list(baked.manifest.graphs["body_0_1"].outputs) == ["hidden_out", "attention_output"]
    assert list(baked.manifest.graphs["body_2_2"].outputs) == ["hidden_out"]


def test_manifest_describes_the_group_as_its_onnx_file_does(baked: Bundle) -> None:
    for name in groups_of(baked):
        graph = ir.load(baked.graph_path(name)).graph
        entry = baked.manifest.graphs[name]
        for values, declared in ((graph.inputs, entry.inputs), (graph.outputs, entry.outputs)):
            assert [v.name for v in values] == list(declared)
            for value in values:
                assert value.shape is not None
                assert [str(d) for d in value.shape] == [str(d) for d in declared[value.name].shape]


def test_weights_are_references_into_the_bundle_by_offset_and_length(baked: Bundle) -> None:
    seen = set()
    for name in groups_of(baked):
        path = baked.graph_path(name)
        assert path.parent == baked.folder
        assert path.stat().st_size < 64_000
        for tensor, info in external(baked, name):
            entry = baked.manifest.tensors[tensor]
            assert (info.location, info.offset, info.length) == (
                entry.file,
                entry.offset,
                entry.bytes,
            )
            with (path.parent / info.location).open("rb") as stream:
                stream.seek(info.offset)
                assert stream.read(info.length) == baked.tensor(tensor).numpy().tobytes()
            seen.add(tensor)
    of_blocks = baked.manifest.graphs["block"].weights.values()
    assert seen == {p.replace("{block}", str(b)) for p in of_blocks for b in range(3)}


def test_template_constants_are_shared_by_the_blocks_of_a_group(baked: Bundle) -> None:
    def inline(name: str) -> set[str]:
        model = onnx.load(baked.graph_path(name), load_external_data=False)
        kept = onnx.TensorProto.EXTERNAL
        return {t.name for t in model.graph.initializer if t.data_location != kept}

    assert inline("body_0_1") == inline("body_2_2") == inline("block_tapped")


def test_stitching_leaves_the_template_as_it_was(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    template = ir.load(tiny_bundle.graph_path("block_tapped"))
    before = ir.to_proto(template).SerializeToString()
    stitch_blocks(
        template,
        range(3),
        manifest.graphs["block_tapped"],
        manifest.graphs["context"].outputs,
        manifest.tensors,
        tiny_bundle.folder,
        1,
    )
    assert ir.to_proto(template).SerializeToString() == before


def test_baked_bundle_verifies_and_notices_a_changed_group(baked: Bundle, tmp_path: Path) -> None:
    assert baked.digests() == []
    folder = tmp_path / "bundle"
    shutil.copytree(baked.folder, folder)
    file = folder / "body_0_1.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert Bundle(folder).digests() == ["body_0_1.onnx"]


def test_weights_inside_engines_are_not_also_held_as_tensors(baked: Bundle) -> None:
    model = Model(baked, "onnxruntime")
    session = Session(model)
    session.begin(torch.tensor([900.0]))
    session.set_prompt("cond", {"text_states": torch.ones(1, 7, 24)})
    session.step("cond", 0, {"latents": torch.ones(1, 4, 2, 6, 8)})
    held = {n for n in model._tensors if n.startswith("blocks.")}
    context = baked.manifest.graphs["context"].weights.values()
    assert held == {p.replace("{block}", str(b)) for p in context for b in range(3)}


def test_lora_on_a_baked_bundle_is_refused_with_the_way_out(baked: Bundle) -> None:
    with pytest.raises(RequestError, match=r"inside its engines.*--weights inputs"):
        Adapters(baked, "", None).module.load_lora_adapter({})


def test_groups_hold_no_more_than_the_byte_limit() -> None:
    quarter = GROUP_BYTES // 4
    assert list(split_blocks(0, 10, quarter)) == [(0, 4), (4, 4), (8, 2)]
    assert list(split_blocks(0, 10, quarter + 1)) == [(0, 3), (3, 3), (6, 3), (9, 1)]
    assert list(split_blocks(5, 2, 2 * GROUP_BYTES)) == [(5, 1), (6, 1)]
    assert list(split_blocks(0, 30, 1)) == [(0, 30)]
    assert list(split_blocks(0, 7, quarter, group_blocks=3)) == [(0, 3), (3, 3), (6, 1)]


def test_block_bytes_count_what_a_block_computes_with(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    matrices = 6 * 32 * 32 + 2 * 32 * 48  # to_q/k/v/out, cross-attention's to_q/out, two of ffn
    found = block_bytes(manifest.stages[0], manifest.graphs, manifest.tensors)
    assert 4 * matrices < found < 4 * (matrices + 1000)


def test_group_of_no_block_is_refused_before_anything_is_written(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    request = BuildRequest(
        str(tiny_checkpoint), tmp_path / "bundle", [], {}, weights="baked", group_blocks=0
    )
    with pytest.raises(ConfigError, match=r"--group-blocks.*is 0.*1 or more"):
        build(plan(request))
    assert list(tmp_path.iterdir()) == []


def test_group_size_without_baked_form_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--group-blocks.*--weights inputs.*--weights baked"):
        check_group_blocks(2, "inputs")
    check_group_blocks(None, "inputs")
