# SPDX-License-Identifier: Apache-2.0
"""Carry a plan out: checkpoint → graphs → weights → engines → manifest.

The phases stand in one function so that their order can be seen. Everything is written to a staged
folder that takes the bundle's name at the very end.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ..bundle.files import describe_files, digests_ahead, disk_use
from ..bundle.manifest import (
    CheckpointEntry,
    ExpertEntry,
    FileEntry,
    GraphEntry,
    InputEntry,
    Manifest,
    PolicyEntry,
    SamplerEntry,
    SkipEntry,
    StageEntry,
    TensorEntry,
)
from ..bundle.reader import MANIFEST
from ..bundle.safetensors_header import StoredTensor
from ..bundle.sampler import step_list
from ..bundle.staging import check_target, staged_folder
from ..bundle.store import Store
from ..core.errors import OutputError
from ..core.output import check_folder
from ..core.progress import Progress, Silent
from ..engines.base import ProfiledBackend
from .checkpoints.checkpoint import Checkpoint
from .checkpoints.sources import lies_as
from .checkpoints.weights import bring_weights
from .cut.declared import Cut
from .cut.document import CUT, write_cut
from .defaults import policy_setting, scheduler_shift
from .engines import STORE, compile_graphs, compiled_graphs
from .graphs.decide import write_decide_graph
from .graphs.ends import part_tensors
from .graphs.groups import write_groups
from .graphs.tokenizer import bring_tokenizer
from .graphs.write import wanted_weights, write_graphs
from .pipeline_files import bring_pipeline
from .plan import BuildRequest, Plan, plan
from .profiles import profiles_of
from .samplers import write_tables
from .sizes import latent_scale, read_part

__all__ = ["BuildReport", "BuildRequest", "build"]

TRAIN_TIMESTEPS = 1000
"""Of the flow-matching schedulers: what a boundary between experts is a fraction of."""


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


def build(request: BuildRequest, progress: Progress | None = None) -> BuildReport:
    """Build the bundle that ``request`` describes.

    Raises:
        CheckpointError, ConfigError, RequestError: what `plan` refuses.
        ExportError, PassError, BuildError: a graph could not be traced, rewritten or compiled.
        OutputError: the target exists or can't be written.
    """
    check_target(request.out, replace=request.replace)  # a checkpoint may be downloaded next
    for option, folder in (("--dump-passes", request.dump), ("--build-cache", request.cache)):
        if folder is not None:
            check_folder(folder, option)
    progress = progress or Silent()
    clock = _Clock()
    store = Store(request.cache / STORE if request.cache is not None else None)
    planned = plan(request, store)
    checkpoint, cut = planned.checkpoint, planned.cut
    with (
        staged_folder(request.out, replace=request.replace) as folder,
        # Reading tens of GB takes about as long as tracing, which leaves the disk idle.
        digests_ahead(_shards_to_link(checkpoint, cut, folder)) as ahead,
    ):
        (folder / "graphs").mkdir()
        write_cut(cut, folder / CUT)
        clock.start("trace")
        graphs, policies = _trace(planned, folder, progress, store)

        clock.start("weights")
        experts = _experts(checkpoint)
        tensors = _bring_weights(planned, experts, graphs, folder, progress)
        stages = [
            StageEntry(
                block=s.block,
                context=s.context,
                tapped=s.tapped,
                first=s.first,
                count=s.count,
                skips={
                    n: SkipEntry(stream=skip.stream, blocks=list(skip.blocks))
                    for n, skip in s.skips.items()
                },
                reads={n: list(values) for n, values in s.reads.items()},
            )
            for s in cut.stages
        ]
        if request.weights == "baked":
            stages, groups = write_groups(
                stages, graphs, tensors, cut.feature_block, folder, request.group_blocks
            )
            graphs |= groups
        tensors |= part_tensors(planned.parts, graphs, checkpoint.variant)

        clock.start("engines")
        compiled = compiled_graphs(graphs, request.weights)
        ranges = planned.ranges
        profiles = profiles_of(compiled, policies, cut, ranges) if ranges else {}
        engines = []
        for backend, target in zip(request.backends, planned.targets, strict=True):
            progress.phase(f"compile for {backend.name}", len(compiled))
            if isinstance(backend, ProfiledBackend):
                backend.cache_folder = request.cache
            engines.append(
                compile_graphs(
                    backend, compiled, folder, target, progress, profiles=profiles, store=store
                )
            )

        clock.start("samplers")
        pipeline = bring_pipeline(checkpoint, folder)
        samplers = _tabulate_samplers(planned, folder, store)
        tokenizer, notes = None, list(checkpoint.notes)
        if request.with_text_encoder and checkpoint.pipeline is not None:
            tokenizer, why_not = bring_tokenizer(checkpoint.pipeline, folder)
            notes += [why_not] if why_not else []

        clock.start("digests")
        if planned.parts and pipeline.folder is None:
            raise OutputError(
                str(request.out), "can't link the pipeline's files, which the extra graphs read",
                "choose an --out on the file system of the checkpoint",
            )  # fmt: skip
        files = describe_files(folder, ahead)
        manifest = Manifest(
            freewheel_version=version("freewheel"),
            family=planned.row.name,
            checkpoint=CheckpointEntry(
                source=checkpoint.source,
                revision=checkpoint.revision,
                transformer_class=checkpoint.transformer_class,
                config=dict(checkpoint.config),
                sha256=_weights_digest(tensors, files),
            ),
            pipeline=pipeline,
            precision=request.precision,
            weights=request.weights,
            inputs=_inputs(cut),
            dims={n: list(f) for n, f in cut.dims.items()},
            sums={n: list(terms) for n, terms in cut.sums.items()},
            latent_scale=latent_scale(cut, checkpoint.pipeline),
            arguments=dict(cut.arguments),
            vocabulary_size=next(
                (p.vocabulary_size for p in planned.parts if p.vocabulary_size), None
            ),
            tokenizer=tokenizer,
            graphs=graphs,
            stages=stages,
            experts=experts,
            signals=dict(planned.signals),
            feature_block=cut.feature_block,
            history_dtype=cut.history_dtype,
            policies=policies,
            configs=dict(planned.configs),
            default_config=next(iter(planned.configs)),
            tensors=tensors,
            engines=engines,
            samplers=samplers,
            files=files,
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        clock.stop()
    store.trim()
    return BuildReport(manifest, clock.seconds, tuple(notes), *disk_use(request.out, files))


def _trace(
    planned: Plan, folder: Path, progress: Progress, store: Store
) -> tuple[dict[str, GraphEntry], dict[str, PolicyEntry]]:
    """Write every graph of the plan; return the graphs' and the policies' entries."""
    checkpoint, dump = planned.checkpoint, planned.request.dump
    progress.phase("trace", planned.graph_count - len(planned.parts))
    made_from = {
        "class": checkpoint.transformer_class,
        "config": {n: v for n, v in checkpoint.config.items() if not n.startswith("_")},
        "precision": planned.request.precision,
    }
    own = [segment for segment in planned.segments if segment in planned.cut.segments]
    # The graphs around the model are the same for every one of this width.
    around = [segment for segment in planned.segments if segment not in own]
    sizes = planned.cut.example_dims
    read = {dim for s in around for spec in s.inputs.values() for dim in spec.shape}
    graphs = write_graphs(own, sizes, folder, progress, dump, store=store, made_from=made_from)
    graphs |= write_graphs(
        around, {n: size for n, size in sizes.items() if n in read}, folder, progress, dump,
        store=store,
    )  # fmt: skip
    policies = {}
    for name, policy_class in planned.policies.items():
        graphs[f"decide.{name}"] = write_decide_graph(policy_class(), folder, store)
        policies[name] = PolicyEntry(
            graph=f"decide.{name}",
            spec=policy_class.spec,
            setting=policy_setting(name, planned.signals),
        )
        progress.advance(f"decide.{name}")
    for part in planned.parts:
        graphs |= write_graphs(
            [part.segment], {}, folder, progress, dump, store=store, made_from=part.config
        )
    return graphs, policies


def _bring_weights(
    planned: Plan, experts: list[ExpertEntry], graphs: Mapping[str, GraphEntry], folder: Path,
    progress: Progress,
) -> dict[str, TensorEntry]:  # fmt: skip
    """Link or convert the transformers' tensors."""
    wanted = wanted_weights(planned.cut, graphs)
    wanted = {e.prefix + n: w for e in experts for n, w in wanted.items()} or wanted
    progress.phase("weights", len(wanted))
    tensors = bring_weights(wanted, planned.checkpoint.tensors, folder)
    progress.advance("weights", len(wanted))
    return tensors


def _tabulate_samplers(planned: Plan, folder: Path, store: Store) -> list[SamplerEntry]:
    """Tabulate the samplers at the flow shifts of the pipeline's scheduler and of every config."""
    pipeline = planned.checkpoint.pipeline
    scheduler = read_part(pipeline, "scheduler/scheduler_config.json")
    shifts = {scheduler_shift(pipeline)}
    shifts |= {c.generation.flow_shift for c in planned.configs.values()}
    named = [c.generation.sampler for c in planned.configs.values()]
    lists = [name for name in named if name is not None and step_list(name) is not None]
    return write_tables(
        folder, scheduler or None, shifts, lists=lists, output_sign=planned.row.output_sign,
        store=store,
    )  # fmt: skip


def _experts(checkpoint: Checkpoint) -> list[ExpertEntry]:
    """Describe the experts: the first has its weights' plain names, others their part's before."""
    return [
        ExpertEntry(
            part=part, prefix=f"{part}." if index else "", from_timestep=ratio * TRAIN_TIMESTEPS
        )
        for index, (part, ratio) in enumerate(checkpoint.experts)
    ]


def _inputs(cut: Cut) -> dict[str, InputEntry]:
    return {
        n: InputEntry(
            argument=i.argument,
            runs=i.runs,
            dtype=i.spec.dtype,
            shape=list(i.spec.shape),
            scale=i.scale,
            offset=i.offset,
            absent=i.absent,
            same=list(i.same),
            of=list(i.of),
            indices=i.indices,
        )
        for n, i in cut.inputs.items()
    }


def _shards_to_link(checkpoint: Checkpoint, cut: Cut, folder: Path) -> list[Path]:
    """List the checkpoint's files that the bundle will share, as far as headers tell."""
    stored = checkpoint.tensors
    wanted = [(stored[n], d) for n, (d, _) in cut.weights().items() if n in stored]
    files = {w.file for w, d in wanted if isinstance(w, StoredTensor) and lies_as(w, d)}
    return sorted(f for f in files if f.stat().st_dev == folder.stat().st_dev)


def _weights_digest(tensors: Mapping[str, TensorEntry], files: Mapping[str, FileEntry]) -> str:
    """Digest what the model computes with: every tensor's place and its file's digest."""
    text = json.dumps([[n, t.offset, files[t.file].sha256] for n, t in sorted(tensors.items())])
    return hashlib.sha256(text.encode()).hexdigest()


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._began = "read", time.perf_counter()

    def start(self, name: str) -> None:
        self.stop()
        self._name, self._began = name, time.perf_counter()

    def stop(self) -> None:
        self.seconds[self._name] = round(time.perf_counter() - self._began, 3)
