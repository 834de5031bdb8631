# SPDX-License-Identifier: Apache-2.0
"""Stitch block templates into groups of consecutive blocks with their weights inside.

A group's ONNX file holds no weight: each is external data that points into the bundle's safetensors
by offset and length. ONNX forbids ``..`` in such a location, so the files lie at the bundle's root.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from ...bundle.manifest import GraphEntry, GroupEntry, IoEntry, StageEntry, TensorEntry
from ...core.errors import ConfigError
from ...engines.bindings import DTYPES

__all__ = [
    "GROUP_BYTES",
    "block_bytes",
    "check_group_blocks",
    "split_blocks",
    "stitch_blocks",
    "write_groups",
]

GROUP_BYTES = 4 << 30
"""Weights in one group unless asked otherwise; building one takes about three times the memory."""

IR_TYPES = {name: ir.DataType(kind) for kind, name in DTYPES.items()}


def block_bytes(
    stage: StageEntry, graphs: Mapping[str, GraphEntry], tensors: Mapping[str, TensorEntry]
) -> int:
    """Return the bytes of weights that one block of a stage computes with."""
    names = (p.replace("{block}", str(stage.first)) for p in graphs[stage.block].weights.values())
    return sum(tensors[name].bytes for name in names)


def check_group_blocks(group_blocks: int | None, asked: str) -> None:
    """Raise `ConfigError` where a group would hold no block, or no group is asked for."""
    if group_blocks is None:
        return
    if group_blocks < 1:
        raise ConfigError(
            "--group-blocks", f"is {group_blocks}", "give the blocks per group, 1 or more"
        )
    if asked != "baked":
        raise ConfigError(
            "--group-blocks", f"means nothing with --weights {asked}", "add --weights baked"
        )


def split_blocks(
    first: int, count: int, each: int, group_blocks: int | None = None
) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of each group of a stage.

    Args:
        first: Index of the stage's first block.
        count: Its number of blocks.
        each: Bytes of weights of one block.
        group_blocks: Blocks per group; None takes as many as `GROUP_BYTES` of weights allow.
    """
    size = group_blocks or max(1, GROUP_BYTES // max(1, each))
    for start in range(first, first + count, size):
        yield start, min(size, first + count - start)


def write_groups(
    stages: Sequence[StageEntry],
    graphs: Mapping[str, GraphEntry],
    tensors: Mapping[str, TensorEntry],
    feature_block: int,
    bundle: Path,
    group_blocks: int | None = None,
) -> tuple[list[StageEntry], dict[str, GraphEntry]]:
    """Write ``body_<first>_<last>.onnx`` for every group of every stage.

    Args:
        stages: The block loop.
        graphs: Graph name → entry; the block templates' files are read.
        tensors: Where the weights lie in the bundle.
        feature_block: Block whose feature its group gives as ``attention_output``.
        bundle: The bundle's folder.
        group_blocks: Blocks per group, or None.

    Returns:
        The stages with their groups, and the groups' graph entries.
    """
    entries: dict[str, GraphEntry] = {}
    grouped = []
    kept = {(s.stream, at) for stage in stages for s in stage.skips.values() for at in s.blocks}
    named = 0  # before a stage's indices, which may begin at 0 again
    before = 0  # blocks of earlier stages
    for stage in stages:
        # The tapped variant differs by one more output, which only the feature's group keeps.
        template = graphs[stage.tapped or stage.block]
        model = ir.load(bundle / template.file)
        context = graphs[stage.context].outputs if stage.context is not None else {}
        rows = graphs[stage.modulation].outputs if stage.modulation is not None else {}
        apart = [n for n in (*rows, *stage.skips, *stage.reads) if n in template.inputs]
        own = {**context, **{n: template.inputs[n] for n in apart}}
        place = before - stage.first
        groups = []
        size = block_bytes(stage, graphs, tensors)
        for first, count in split_blocks(stage.first, stage.count, size, group_blocks):
            blocks = range(first, first + count)
            name = f"body_{named + first}_{named + blocks[-1]}"
            tapped = feature_block if stage.tapped is not None else None
            left = {(stream, at - place) for stream, at in kept if at - place in blocks}
            group = stitch_blocks(model, blocks, template, own, tensors, bundle, tapped, left)
            group.graph.name = name
            ir.save(group, bundle / f"{name}.onnx")
            entries[name] = _describe(group, template, own, blocks, f"{name}.onnx")
            groups.append(GroupEntry(graph=name, first=first, count=count))
        named += stage.first + stage.count
        before += stage.count
        grouped.append(stage.model_copy(update={"groups": groups}))
    return grouped, entries


def stitch_blocks(
    template: ir.Model,
    blocks: Sequence[int],
    entry: GraphEntry,
    own_inputs: Mapping[str, IoEntry],
    tensors: Mapping[str, TensorEntry],
    bundle: Path,
    feature_block: int | None = None,
    kept: Collection[tuple[str, int]] = (),
) -> ir.Model:
    """Chain a copy of ``template`` for every block.

    ``hidden``, and other streams where there are, run through all copies. Values inside copy *b*
    end in ``.b``, and so do the inputs that each block has of its own; other inputs and the
    template's constants are shared.

    Args:
        template: A block's graph with weights as inputs; left as it is.
        blocks: Block indices in order.
        entry: The template's manifest entry: says which inputs are weights, and of what name.
        own_inputs: Inputs that differ between blocks: context, rows of tables, skip connections, values
            of their own.
        tensors: Where the weights lie below ``bundle``.
        bundle: The bundle's folder.
        feature_block: Block whose ``attention_output`` becomes an output, if it is in the group.
        kept: Streams that a later stage reads as block *b* left them: outputs ``<stream>_out.b``.

    Returns:
        A model whose weights are initializers over the bundle's files, named as in the checkpoint.
    """
    inputs: dict[str, ir.Value] = {}
    initializers: dict[str, ir.Value] = {}
    nodes: list[ir.Node] = []
    streams: dict[str, ir.Value] = {}
    left: list[ir.Value] = []
    feature: ir.Value | None = None
    for block in blocks:
        copy = template.clone().graph
        results = {str(value.name): value for value in copy.outputs}
        copy.outputs.clear()
        for value in copy.inputs:
            name = str(value.name)
            if name in streams:
                replacement = streams[name]
            elif name in entry.weights:
                stored = entry.weights[name].replace("{block}", str(block))
                weight = _weight(stored, tensors[stored], bundle)
                replacement = initializers.setdefault(stored, weight)
            else:
                key = f"{name}.{block}" if name in own_inputs else name
                replacement = inputs.setdefault(key, _like(value, key))
            value.replace_all_uses_with(replacement)
        for name, constant in list(copy.initializers.items()):
            del copy.initializers[name]
            if name in initializers:
                constant.replace_all_uses_with(initializers[name])
            else:
                initializers[name] = constant
        for node in list(copy):
            copy.remove(node)
            node.name = f"{node.name}.{block}"
            for result in node.outputs:
                result.name = f"{result.name}.{block}"
            nodes.append(node)
        streams = {stream: results[f"{stream}_out"] for stream in entry.streams}
        for stream in sorted(s for s, maker in kept if maker == block):
            value = streams[stream]
            if block == blocks[-1]:  # the group's own output has the value too
                value = _like(value, str(value.name))
                nodes.append(ir.node("Identity", [streams[stream]], outputs=[value]))
            left.append(value)
        if block == feature_block:
            feature = results["attention_output"]
    assert streams, "a group holds at least one block"
    for stream, value in streams.items():
        value.name = f"{stream}_out"
    outputs = [*streams.values(), *left]
    if feature is not None:
        feature.name = "attention_output"
        outputs.append(feature)
    graph = ir.Graph(
        list(inputs.values()),
        outputs,
        nodes=nodes,
        initializers=list(initializers.values()),
        opset_imports=dict(template.opset_imports),
        name="body",
    )
    return ir.Model(graph, ir_version=template.ir_version, producer_name=template.producer_name)


def _weight(name: str, entry: TensorEntry, bundle: Path) -> ir.Value:
    shape = ir.Shape(entry.shape)
    kind = IR_TYPES[entry.dtype]
    data = ir.ExternalTensor(
        entry.file, entry.offset, entry.bytes, kind, shape=shape, name=name, base_dir=bundle
    )
    return ir.Value(name=name, shape=shape, type=ir.TensorType(kind), const_value=data)


def _like(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type)


def _describe(
    group: ir.Model,
    template: GraphEntry,
    own_inputs: Mapping[str, IoEntry],
    blocks: Sequence[int],
    file: str,
) -> GraphEntry:
    """Describe a group in the template's words."""
    declared = dict(template.inputs)
    for name in own_inputs.keys() & template.inputs.keys():
        declared |= {f"{name}.{block}": template.inputs[name] for block in blocks}
    return GraphEntry(
        file=file,
        runs="group",
        precision=template.precision,
        inputs={str(v.name): declared[str(v.name)] for v in group.graph.inputs},
        outputs={
            str(v.name): template.outputs[str(v.name).partition(".")[0]]
            for v in group.graph.outputs
        },
    )
