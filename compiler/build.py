# SPDX-License-Identifier: Apache-2.0
"""Carry a plan out: graphs → weights → engines → samplers → manifest.

The phases stand in one function so that their order can be seen. Everything is written to a staged
folder that takes the bundle's name at the very end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..bundle.files import describe_files, digests_ahead, disk_use, weights_digest
from ..bundle.manifest import (
    CheckpointEntry,
    EngineSetEntry,
    GraphEntry,
    Manifest,
    PipelineEntry,
    SequenceEntry,
    TensorEntry,
)
from ..bundle.reader import MANIFEST
from ..bundle.staging import staged_folder
from ..core.errors import OutputError
from ..core.progress import Progress, Silent
from .checkpoints.weights import bring_weights, shards_to_link
from .cut.document import CUT, write_cut
from .engines import compile_graphs, compiled_graphs
from .graphs.decide import write_decide_graph
from .graphs.ends import part_tensors
from .graphs.groups import write_groups
from .graphs.tokenizer import bring_tokenizer
from .graphs.write import wanted_weights, write_graphs
from .pipeline_files import bring_pipeline
from .plan import Plan
from .profiles import profiles_of
from .samplers import bring_samplers
from .sequence.measures import measured_graphs, write_measured_graphs

__all__ = ["BuildReport", "build"]


@dataclass(frozen=True)
class BuildReport:
    """What came out.

    Attributes:
        manifest: The manifest as written.
        seconds: Phase → seconds.
        notes: What a user should know of how the weights were read.
        bytes: Bytes of the bundle, weights that are hard links to the checkpoint's included.
        written_bytes: Bytes really written.
    """

    manifest: Manifest
    seconds: Mapping[str, float]
    notes: tuple[str, ...]
    bytes: int
    written_bytes: int


def build(plan: Plan, progress: Progress | None = None) -> BuildReport:
    """Build the bundle that ``plan`` describes.

    Raises:
        ExportError, PassError, BuildError: a graph could not be traced, rewritten or compiled.
        OutputError: the bundle can't be written.
    """
    progress, seconds = progress or Silent(), _Clock()
    checkpoint, planned = plan.checkpoint, plan.manifest
    with (
        staged_folder(plan.out, replace=plan.replace) as folder,
        # Reading tens of GB takes about as long as tracing, which leaves the disk idle.
        digests_ahead(shards_to_link(plan.cut.weights(), checkpoint.tensors, folder)) as ahead,
    ):
        write_cut(plan.cut, folder / CUT)
        graphs = _trace(plan, folder, progress)
        seconds.end("trace")

        tensors, stages = _bring_weights(plan, graphs, folder, progress), list(planned.stages)
        if planned.weights == "baked":
            stages, groups = write_groups(
                stages, graphs, tensors, planned.feature_block, folder, plan.group_blocks
            )
            graphs |= groups
        tensors |= part_tensors(plan.parts, graphs, checkpoint.variant)
        seconds.end("weights")

        sequence = _sequence(plan, graphs)
        engines = _compile(plan, graphs, sequence, folder, progress)
        seconds.end("engines")

        pipeline, notes = bring_pipeline(checkpoint, folder), list(checkpoint.notes)
        _check_parts(plan, pipeline)
        samplers = bring_samplers(
            folder,
            checkpoint.pipeline,
            planned.configs.values(),
            planned.latents,
            plan.output_sign,
            plan.scheduler,
            plan.store,
        )
        tokenizer = None
        if plan.with_tokenizer and checkpoint.pipeline is not None:
            tokenizer, why_not = bring_tokenizer(checkpoint.pipeline, folder)
            notes += [why_not] if why_not else []
        seconds.end("samplers")

        files = describe_files(folder, ahead)
        origin = CheckpointEntry(**dict(planned.checkpoint), sha256=weights_digest(tensors, files))
        told = {**dict(planned), "checkpoint": origin, "stages": stages}
        manifest = Manifest(
            **told,
            pipeline=pipeline,
            tokenizer=tokenizer,
            graphs=graphs,
            tensors=tensors,
            engines=engines,
            samplers=samplers,
            sequence=sequence,
            files=files,
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        seconds.end("digests")
    plan.store.trim()
    return BuildReport(manifest, dict(seconds), tuple(notes), *disk_use(plan.out, files))


def _trace(plan: Plan, folder: Path, progress: Progress) -> dict[str, GraphEntry]:
    """Write every graph of the plan."""
    progress.phase("trace", plan.graph_count)
    (folder / "graphs").mkdir()
    origin, sizes = plan.manifest.checkpoint, plan.example_dims
    made_from = {
        "class": origin.transformer_class,
        "config": {n: v for n, v in origin.config.items() if not n.startswith("_")},
        "precision": plan.manifest.precision,
    }
    own = plan.own_segments
    around = [segment for segment in plan.segments if segment not in own]
    read = {dim for s in around for spec in s.inputs.values() for dim in spec.shape}
    common = {n: size for n, size in sizes.items() if n in read}
    write = partial(
        write_graphs, bundle=folder, progress=progress, dump=plan.dump, store=plan.store
    )
    graphs = write(own, sizes, made_from=made_from)
    graphs |= write(around, common)
    for name, policy_class in plan.policies.items():
        graphs[f"decide.{name}"] = write_decide_graph(policy_class(), folder, plan.store)
        if plan.sequence is not None and plan.sequence.is_of_tokens(
            policy_class.spec, plan.manifest.signals
        ):
            graphs |= write_measured_graphs(name, policy_class(), folder, plan.store)
        progress.advance(f"decide.{name}")
    for part in plan.parts:
        graphs |= write([part.segment], {}, made_from=part.config)
    return graphs


def _sequence(plan: Plan, graphs: Mapping[str, GraphEntry]) -> SequenceEntry | None:
    """Say how ranks share a sequence, and by which graphs policies then decide."""
    if plan.sequence is None:
        return None
    pairs = {n: measured_graphs(n) for n in plan.policies}
    carried = {n: pair for n, pair in pairs.items() if graphs.keys() >= set(pair)}
    return plan.sequence.entry.model_copy(update={"policies": carried})


def _bring_weights(
    plan: Plan, graphs: Mapping[str, GraphEntry], folder: Path, progress: Progress
) -> dict[str, TensorEntry]:
    """Link or convert the transformers' tensors."""
    wanted = wanted_weights(plan.cut, graphs)
    experts = plan.manifest.experts
    wanted = {e.prefix + n: w for e in experts for n, w in wanted.items()} or wanted
    progress.phase("weights", len(wanted))
    tensors = bring_weights(wanted, plan.checkpoint.tensors, folder)
    progress.advance("weights", len(wanted))
    return tensors


def _compile(
    plan: Plan,
    graphs: Mapping[str, GraphEntry],
    sequence: SequenceEntry | None,
    folder: Path,
    progress: Progress,
) -> list[EngineSetEntry]:
    """Compile the graphs for every backend."""
    compiled = compiled_graphs(graphs, plan.manifest.weights)
    ranges, policies = plan.ranges, plan.manifest.policies
    profiles = profiles_of(compiled, policies, plan.cut, ranges, sequence) if ranges else {}
    engines = []
    for backend, target in plan.backends:
        progress.phase(f"compile for {backend.name}", len(compiled))
        engines.append(
            compile_graphs(
                backend, compiled, folder, target, progress, profiles=profiles, store=plan.store
            )
        )
    return engines


def _check_parts(plan: Plan, pipeline: PipelineEntry) -> None:
    if plan.parts and pipeline.folder is None:
        raise OutputError(
            str(plan.out),
            "can't link the pipeline's files, which the extra graphs read",
            "choose an --out on the file system of the checkpoint",
        )


class _Clock(dict[str, float]):
    """Seconds of each phase that has ended."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def end(self, phase: str) -> None:
        now = time.perf_counter()
        self[phase], self._began = round(now - self._began, 3), now
