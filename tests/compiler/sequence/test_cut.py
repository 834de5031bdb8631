# SPDX-License-Identifier: Apache-2.0
"""Blocks cut at their attentions compute what they did, rank by rank; the rest is refused by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

sys.path.insert(0, str(Path(__file__).parents[1] / "cut"))
from small_configs import CASES

from freewheel.bundle.reader import Bundle
from freewheel.bundle.store import Store
from freewheel.compiler.cut.declared import Cut, Segment
from freewheel.compiler.cut.document import cut_of
from freewheel.compiler.cut.models import row_of
from freewheel.compiler.cut.transformer import cut_transformer
from freewheel.compiler.request import BuildRequest
from freewheel.compiler.sequence.cut import SequenceCut, cut_sequence
from freewheel.core.errors import ConfigError, ExportError
from freewheel.policies import POLICIES, policy_class
from freewheel.runtime.distributed.shares import Share

nightly = pytest.mark.nightly
TOLERANCE = 1e-5
RANKS = 3
SIZES = {"batch": 2, "tokens": 7, "text_tokens": 5}

CUT = (
    "flux", "qwen_image", "hunyuan_video", "wan_i2v", "sd3", "ltx", "pixart", "flux_2", "cogvideox",
    "lumina_2",
)  # fmt: skip


def weights_of(segment: Segment) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, weight in segment.module.named_parameters():
        scale = max(weight[0].numel(), 1) ** -0.5 if weight.ndim > 1 else 0.1
        found[name] = torch.randn(weight.shape, generator=generator) * scale
    return found


def inputs_of(segment: Segment, dims: Mapping[str, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    made = {}
    for name, spec in segment.inputs.items():
        shape = [dims[d] if isinstance(d, str) else d for d in spec.shape]
        value = torch.randn(shape, generator=generator)
        made[name] = value > -1 if spec.dtype == "bool" else value
    return made


def called(segment: Segment, weights: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Any:
    own = {n: weights[n] for n, _ in segment.module.named_parameters()}
    arguments = tuple(given[n] for n in segment.inputs)
    with torch.no_grad():
        made = torch.func.functional_call(segment.module, own, arguments)
    return dict(zip(segment.outputs, made if isinstance(made, tuple) else (made,), strict=True))


def over_ranks(
    sequence: SequenceCut,
    block: Segment,
    weights: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    dims: Mapping[str, int],
) -> dict[str, Tensor]:
    """Run a block's parts as ranks do, tensors handed over in one process."""
    segments = {s.name: s for s in sequence.segments}
    ranks = [Share(rank, RANKS, sequence.entry) for rank in range(RANKS)]
    held: list[dict[str, Tensor]] = []
    for own in ranks:
        taken = dict(given)
        for name, streams in sequence.entry.shared.items():
            if name in given:
                axis = sequence.tokens.axis(block.inputs[name])
                assert axis is not None
                parts = [
                    given[name].narrow(axis, a, b - a) for (a, b), _ in own.parts(streams, dims)
                ]
                taken[name] = torch.cat(parts, axis)
        held.append(taken)
    for place, part in enumerate(sequence.entry.blocks[block.name]):
        segment = segments[part.graph]
        if segment.runs != "attention":
            for taken in held:
                taken |= called(segment, weights, taken)
            continue
        number = place // 2 + 1
        whole = {
            n: torch.cat([t[f"{n}_{number}"] for t in held], 2) for n in ("query", "key", "value")
        }
        if part.mask is not None:
            masks = [t[part.mask] for t in held]
            is_whole = masks[0].shape[-1] == whole["key"].shape[2]
            whole["mask"] = masks[0] if is_whole else torch.cat(masks, -1)
        shape = whole["query"].shape
        rows = {n: t.reshape(-1, 1, *t.shape[2:]) if n != "mask" else t for n, t in whole.items()}
        attended = called(segment, {}, rows)["attended"].view(shape)
        counts = [t[f"query_{number}"].shape[2] for t in held]
        for taken, one in zip(held, attended.split(counts, 2), strict=True):
            taken[f"attended_{number}"] = one
    return {n: torch.cat([taken[n] for taken in held], 1) for n in block.outputs}


def check_blocks(cut: Cut) -> None:
    sequence = cut_sequence(cut)
    dims = {**cut.example_dims, **SIZES}
    dims |= {n: sum(dims[t] for t in ts) for n, ts in sequence.tokens.sums.items()}
    blocks = [s for s in cut.segments if s.name in sequence.entry.blocks]
    assert blocks
    for block in blocks:
        weights, given = weights_of(block), inputs_of(block, dims)
        expected = called(block, weights, given)
        found = over_ranks(sequence, block, weights, given, dims)
        for name, wanted in expected.items():
            apart = (found[name] - wanted).norm() / wanted.norm()
            assert apart < TOLERANCE, (block.name, name)


def test_parts_over_ranks_are_the_block(demo_bundle: Bundle) -> None:
    check_blocks(cut_of(demo_bundle))


def test_policies_that_look_at_tokens_are_known(demo_bundle: Bundle) -> None:
    signals = demo_bundle.manifest.signals
    sequence = cut_sequence(cut_of(demo_bundle))
    looking = [n for n in POLICIES if sequence.is_of_tokens(policy_class(n).spec, signals)]
    probing = ["firstblock", "dicache", "dbcache", "dualblock"]
    assert looking == ["teacache", "adacache", "custom", *probing]


@nightly
@pytest.mark.parametrize("name", CUT)
def test_blocks_of_other_models_are_cut(name: str, build_cache: Path) -> None:
    check_blocks(_cut(name, build_cache))


@nightly
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("chroma", r"attention 1: can't be shared out by heads: a mask .*--sequence-parallel"),
        ("mochi", r"graph 'prompt': needs all tokens of 'text_mask'; .*--sequence-parallel"),
    ],
)
def test_blocks_that_want_all_tokens_are_refused(name: str, said: str, build_cache: Path) -> None:
    """A mask with a row for every query; a prompt that is summed up where its tokens are shared."""
    with pytest.raises(ExportError, match=said):
        cut_sequence(_cut(name, build_cache))


def _cut(name: str, build_cache: Path) -> Cut:
    model, config = CASES[name]
    row = row_of(model)
    assert row is not None
    store = Store(build_cache / "store")
    return cut_transformer(row, config, "float32", lambda tensor: "float32", store)


def _with_block(cut: Cut, change: Callable[[fx.GraphModule], None]) -> Cut:
    """Return a cut whose block computes something else."""
    segments = []
    for segment in cut.segments:
        if segment.name == "block":
            module: Any = segment.module
            graph = fx.Graph()
            graph.output(graph.graph_copy(module.graph, {}))
            changed = fx.GraphModule(module, graph)
            change(changed)
            segments.append(replace(segment, module=changed))
        elif segment.name != "block_tapped":
            segments.append(segment)
    stages = tuple(stage.model_copy(update={"tapped": None}) for stage in cut.stages)
    return replace(cut, segments=tuple(segments), stages=stages)


def _node(module: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in module.graph.nodes if name in str(n.target))


def mix_tokens(module: fx.GraphModule) -> None:
    node = _node(module, "layer_norm")
    with module.graph.inserting_after(node):
        mean = module.graph.call_function(torch.ops.aten.mean.dim, (node, [1], True))
    with module.graph.inserting_after(mean):
        added = module.graph.call_function(torch.ops.aten.add.Tensor, (node, mean))
    node.replace_all_uses_with(added, delete_user_cb=lambda user: user not in (mean, added))


def look_back_only(module: fx.GraphModule) -> None:
    node = _node(module, "scaled_dot_product_attention")
    node.args = (*node.args, None, 0.0, True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (mix_tokens, r"graph 'block.part_1', result '.*': is computed of other tokens of 'tokens'"),
        (look_back_only, r"graph 'block', attention 1: can't be shared out by heads: 5 = True"),
    ],
)
def test_what_can_not_be_shared_out_is_refused_by_name(
    demo_bundle: Bundle, change: Callable[[fx.GraphModule], None], said: str
) -> None:
    with pytest.raises(ExportError, match=said):
        cut_sequence(_with_block(cut_of(demo_bundle), change))


def test_two_things_sampled_at_once_are_refused(demo_bundle: Bundle) -> None:
    cut = cut_of(demo_bundle)
    segments = []
    for segment in cut.segments:
        hidden = {**segment.outputs}.get("hidden")
        if segment.name == "head":
            segment = replace(segment, outputs={**segment.outputs, "audio_hidden": hidden})
        if segment.name == "finish":
            given = {**segment.inputs, "audio_hidden_out": segment.inputs["hidden_out"]}
            segment = replace(segment, inputs=given)
        segments.append(segment)
    with pytest.raises(ExportError, match="samples several things at once: hidden, audio_hidden"):
        cut_sequence(replace(cut, segments=tuple(segments)))


def test_baked_weights_are_refused(
    repository: Path, tmp_path: Path, build_bundle: Callable[..., Bundle]
) -> None:
    assert BuildRequest.sequence_parallel is False
    with pytest.raises(ConfigError, match="--weights baked: compiles blocks together"):
        build_bundle(
            repository / "models" / "shapes_wan",
            ("onnxruntime",),
            weights="baked",
            sequence_parallel=True,
        )
