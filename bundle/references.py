# SPDX-License-Identifier: Apache-2.0
"""Check that names which one part of a manifest uses are there in another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

from .manifest import MAX_BLOCKS, MAX_ENTRIES, Manifest, StageEntry
from .streams import HIDDEN, HISTORY, LATENTS, MODEL_OUTPUT, RESIDUAL, beside

__all__ = ["reference_faults"]

REQUIRED = {
    "prompt": None,
    "head": "hidden",
    "delta": "residual",
    "reuse": "hidden_out",
    "finish": "model_output",
}
"""Graphs that every run calls → the output that it takes from them."""


def reference_faults(manifest: Manifest) -> list[str]:
    """Say which names lead nowhere, and which parts contradict each other; empty when none do."""
    return [
        *_graph_faults(manifest),
        *_stream_faults(manifest),
        *_stage_faults(manifest),
        *_sequence_faults(manifest),
        *_policy_faults(manifest),
        *_file_faults(manifest),
    ]


def _graph_faults(manifest: Manifest) -> Iterator[str]:
    graphs = manifest.graphs
    for name, output in REQUIRED.items():
        if name not in graphs:
            yield f"'graphs.{name}' is missing"
        elif output is not None and output not in graphs[name].outputs:
            yield f"'graphs.{name}.outputs' lack '{output}'"
    read = {name for graph in graphs.values() for name in graph.inputs}
    read |= {n for stage in manifest.stages for names in stage.reads.values() for n in names}
    tables = {n for graph in graphs.values() if graph.runs == "run" for n in graph.outputs}
    if "text_encoder" in graphs and manifest.vocabulary_size is None:
        yield "'vocabulary_size' is missing, and there is a text encoder"
    if manifest.tokenizer is not None and "text_encoder" not in graphs:
        yield "'tokenizer' is there, and no text encoder"
    for name in sorted(tables - read - {signal.value for signal in manifest.signals.values()}):
        yield f"table '{name}' is read by no graph, and no signal"
    given = {"step": {n for g in graphs.values() for n in g.outputs} | manifest.inputs.keys()}
    given["run"] = tables
    for kind, signal in manifest.signals.items():
        # The first block's residual is what the runtime makes of a probe.
        if signal.value not in given[signal.known] | {"first_block_residual"}:
            yield f"'signals.{kind}.value' '{signal.value}' is given by nothing"


def _stream_faults(manifest: Manifest) -> Iterator[str]:
    """Say what is not there of each of the things that a model samples, and of each cached stream."""
    graphs = manifest.graphs
    if not graphs.keys() >= REQUIRED.keys():
        return
    if LATENTS not in manifest.latents:
        yield f"'inputs' lack '{LATENTS}'"
    for latents in manifest.latents[1:]:
        output = beside(latents, LATENTS, MODEL_OUTPUT)
        if output not in graphs["finish"].outputs:
            yield f"'graphs.finish.outputs' lack '{output}'"
    for stream in manifest.cached[1:]:
        if stream not in graphs["head"].outputs:
            yield f"'graphs.head.outputs' lack '{stream}'"
        residual, history = (beside(stream, HIDDEN, word) for word in (RESIDUAL, HISTORY))
        if residual not in graphs["delta"].outputs:
            yield f"'graphs.delta.outputs' lack '{residual}'"
        if history not in graphs["reuse"].inputs:
            yield f"'graphs.reuse.inputs' lack '{history}'"


def _stage_faults(manifest: Manifest) -> Iterator[str]:
    if not manifest.stages:
        yield "'stages' is empty"
    if manifest.block_count > MAX_BLOCKS:
        yield f"'stages' have more than {MAX_BLOCKS} blocks"
    for index, stage in enumerate(manifest.stages):
        named = [
            stage.block,
            stage.context,
            stage.modulation,
            stage.tapped,
            *(g.graph for g in stage.groups),
        ]
        for graph in named:
            if graph is not None and graph not in manifest.graphs:
                yield f"'stages.{index}' names graph '{graph}', which is not there"
        if stage.groups and not _groups_cover(stage):
            yield f"'stages.{index}.groups' don't cover the stage's blocks in order"
    yield from _read_faults(manifest)
    yield from _modulation_faults(manifest)
    yield from _skip_faults(manifest)


def _read_faults(manifest: Manifest) -> Iterator[str]:
    """Say which values of their own blocks read that nothing gives before the blocks run."""
    graphs = manifest.graphs
    made = (g.outputs for g in graphs.values() if g.runs in ("shape", "prompt", "run"))
    given = {name for outputs in made for name in outputs}
    given |= {name for name, entry in manifest.inputs.items() if entry.runs == "prompt"}
    for index, stage in enumerate(manifest.stages):
        named = (stage.block, stage.context, stage.modulation)
        readers = [graphs[n] for n in named if n in graphs]
        for name, values in stage.reads.items():
            where = f"'stages.{index}.reads.{name}'"
            if len(values) != stage.count:
                yield f"{where} names {len(values)} values for {stage.count} blocks"
            if not any(name in reader.inputs for reader in readers):
                yield f"{where} is no input of the stage's graphs"
            for value in sorted(set(values) - given):
                yield f"{where} names '{value}', which nothing gives before the blocks"


def _modulation_faults(manifest: Manifest) -> Iterator[str]:
    """Say what blocks make of the timesteps that their graphs don't take, or of what nothing gives."""
    graphs = manifest.graphs
    made = (g.outputs for g in graphs.values() if g.runs in ("prompt", "run"))
    given = {name for outputs in made for name in outputs}
    given |= {name for name, entry in manifest.inputs.items() if entry.runs == "prompt"}
    for index, stage in enumerate(manifest.stages):
        graph, block = graphs.get(stage.modulation or ""), graphs.get(stage.block)
        if graph is None or block is None:
            continue
        where = f"'stages.{index}.modulation' '{stage.modulation}'"
        if graph.runs != "run_block":
            yield f"{where} runs as '{graph.runs}', not as 'run_block'"
        if not graph.inputs:
            yield f"{where} takes no table"
        for name in sorted(graph.outputs.keys() - block.inputs.keys()):
            yield f"{where} gives '{name}', which graph '{stage.block}' does not take"
        for name in sorted(graph.inputs.keys() - stage.reads.keys() - given):
            yield f"{where} takes '{name}', which nothing gives before the steps"


def _skip_faults(manifest: Manifest) -> Iterator[str]:
    makers: list[tuple[str, str]] = []  # of each place in earlier stages: graph, end of its names
    for index, stage in enumerate(manifest.stages):
        for name, skip in stage.skips.items():
            where = f"'stages.{index}.skips.{name}'"
            if len(skip.blocks) != stage.count:
                yield f"{where} names {len(skip.blocks)} blocks for {stage.count}"
            for place in skip.blocks:
                graph, end = makers[place] if place < len(makers) else ("", "")
                maker = manifest.graphs.get(graph)
                if maker is None or f"{skip.stream}_out{end}" not in maker.outputs:
                    yield f"{where} reads '{skip.stream}' of block {place}, which gives none before"
        if len(makers) < MAX_BLOCKS:
            makers += _makers(stage)


def _makers(stage: StageEntry) -> list[tuple[str, str]]:
    """Return of each block the graph that makes what it leaves, and how its outputs' names end."""
    if not stage.groups:
        return [(stage.block, "")] * stage.count
    members = ((g.graph, range(g.first, g.first + g.count)) for g in stage.groups)
    makers = ((graph, f".{block}") for graph, blocks in members for block in blocks)
    return list(islice(makers, stage.count))


def _groups_cover(stage: StageEntry) -> bool:
    at = stage.first
    for group in stage.groups:
        if group.first != at:
            return False
        at += group.count
    return at == stage.first + stage.count


def _sequence_faults(manifest: Manifest) -> Iterator[str]:
    entry, graphs = manifest.sequence, manifest.graphs
    if entry is None:
        return
    for name, graph in (("rows", entry.rows), ("joined", entry.joined)):
        if graph is not None and graph not in graphs:
            yield f"'sequence.{name}' names '{graph}', which is not there"
    if entry.rows in graphs and len(graphs[entry.rows].outputs) != 1:
        yield "'sequence.rows' names a graph of several results"
    for block, parts in entry.blocks.items():
        runs = [graphs[p.graph].runs if p.graph in graphs else "" for p in parts]
        turns = ["attention" if place % 2 else "part" for place in range(len(parts))]
        if block not in graphs or runs != turns or len(parts) % 2 == 0:
            yield f"'sequence.blocks.{block}' is not parts of a block with attentions between"
            continue
        given = {*graphs[block].inputs, *(n for p in parts for n in graphs[p.graph].outputs)}
        for number, part in enumerate(parts[1::2], 1):
            wanted = [f"{operand}_{number}" for operand in ("query", "key", "value")]
            wanted += [] if part.mask is None else [part.mask]
            missing = [name for name in wanted if name not in given]
            if missing:
                yield f"'sequence.blocks.{block}' lacks '{missing[0]}'"
    for policy, pair in entry.policies.items():
        if policy not in manifest.policies or not graphs.keys() >= set(pair):
            yield f"'sequence.policies.{policy}' names what is not there"
    for dim, terms in entry.sums.items():
        if len(terms) < 2 or not set(terms).isdisjoint(entry.sums):
            yield f"'sequence.sums.{dim}' is no sum of streams' dimensions"


def _policy_faults(manifest: Manifest) -> Iterator[str]:
    taps = any(s.tapped is not None for s in manifest.stages)
    gives_gram = "gram" in manifest.graphs and "gram" in manifest.graphs["gram"].outputs
    for name, policy in manifest.policies.items():
        spec = policy.spec
        if policy.graph not in manifest.graphs:
            yield f"'policies.{name}.graph' names '{policy.graph}', which is not there"
        if spec.history.parameter is not None and spec.history.parameter not in spec.parameters:
            yield f"'policies.{name}.spec.history.parameter' names no parameter"
        if spec.distance is not None and spec.distance not in spec.state:
            yield f"'policies.{name}.spec.distance' names no state"
        if "gram" in spec.kept and not gives_gram:
            yield f"'policies.{name}.spec.kept' has 'gram', which no graph 'gram' gives"
        if spec.feature is not None and not taps:
            yield f"'policies.{name}.spec.feature' is tapped by no stage"
    if manifest.default_config not in manifest.configs:
        yield "'default_config' names no config"


def _file_faults(manifest: Manifest) -> Iterator[str]:
    for name in ("files", "tensors", "graphs"):
        if len(getattr(manifest, name)) > MAX_ENTRIES:
            yield f"'{name}' has more than {MAX_ENTRIES} entries"
    if not manifest.engines:
        yield "'engines' is empty"
    backends = Counter(engines.backend for engines in manifest.engines)
    for backend in sorted(n for n, count in backends.items() if count > 1):
        yield f"'engines' has backend '{backend}' twice"
    for index, sampler in enumerate(manifest.samplers):
        if sampler.file not in manifest.files:
            yield f"'samplers.{index}.file' '{sampler.file}' is not among the files"
