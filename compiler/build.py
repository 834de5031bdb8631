# SPDX-License-Identifier: Apache-2.0
"""Build a bundle: checkpoint → segments → graphs → weights → engines → manifest.

The phases stand in one function so that their order can be seen. Everything is written to a staged
folder that takes the bundle's name at the very end.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import onnx
import onnx_ir as ir

from ..bundle.files import describe_files, digests_ahead, disk_use, link_or_none, sha256_of
from ..bundle.manifest import (
    CheckpointEntry,
    ConfigEntry,
    EngineSetEntry,
    ExpertEntry,
    FileEntry,
    GraphEntry,
    InputEntry,
    Manifest,
    PipelineEntry,
    PolicyEntry,
    ResolvedConfig,
    SamplerEntry,
    SignalEntry,
    StageEntry,
    TensorEntry,
)
from ..bundle.reader import MANIFEST
from ..bundle.safetensors_header import StoredTensor
from ..bundle.staging import check_target, staged_folder
from ..bundle.store import NO_STORE, Store
from ..core.dtypes import Precision
from ..core.errors import BuildError, CheckpointError, ConfigError, OutputError
from ..core.output import check_folder
from ..core.progress import Progress, Silent
from ..engines.base import Backend, ProfiledBackend, Target, TensorSpec
from ..passes import backend_pipeline, run_passes
from ..policies import POLICIES, policy_class
from ..policies.base import Policy
from .checkpoints.checkpoint import Checkpoint, open_checkpoint
from .checkpoints.completeness import CAST_DTYPES, check_tensors
from .checkpoints.folders import linked_names
from .checkpoints.sources import lies_as
from .checkpoints.weights import bring_weights
from .code_version import code_version
from .cut.declared import FIRST_BLOCK_RESIDUAL, Cut, StoredDtype
from .cut.document import CUT, write_cut
from .cut.models import family_of
from .cut.row import Row
from .cut.transformer import cut_transformer
from .defaults import policy_setting, resolve_configs, scheduler_shift
from .forecast.build import forecast_build
from .graphs.caching import cache_segments
from .graphs.decide import write_decide_graph
from .graphs.ends import PipelinePart, part_tensors, text_encoder_part, vae_decode_part
from .graphs.filters import filter_segments, signals_of
from .graphs.groups import check_group_blocks, write_groups
from .graphs.write import wanted_weights, write_graphs
from .profiles import BuildSizes, Profile, Range, dim_ranges, profiles_of
from .samplers import write_tables
from .sizes import Size, latent_scale, read_part

__all__ = ["BuildReport", "BuildRequest", "build", "carried_policies", "model_cut", "plan"]

PIPELINE_PARTS = (
    "scheduler", "tokenizer", "text_encoder", "vae", "image_encoder", "image_processor",
    "tokenizer_2", "text_encoder_2", "feature_extractor",
)  # fmt: skip
SMALL_FILE_BYTES = 64 << 20
STORE = "store"
TRAIN_TIMESTEPS = 1000
"""Of the flow-matching schedulers: what a boundary between experts is a fraction of."""


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        model: A diffusers folder, a transformer's single file, or a hub id.
        out: The bundle's folder.
        backends: Compile the engines; the first is what runs use by default.
        configs: Name → config to carry; the first is the default. What they leave open is filled
            in (`compiler/defaults.py`).
        policies: Names of policies and pairs to carry beside ``off`` and those of the configs; None
            carries every policy.
        row: What a class takes that the table has no row of (`compiler.cut.watch`).
        precision: Precision of ``body``.
        weights: Block templates with weights as inputs, or groups of blocks with weights inside.
            ``baked`` computed 6 to 12 % faster on a CPU at 180 and 1,560 tokens
            (`benchmarks/weights_form.py`), for engines of one checkpoint alone and no LoRA at run.
        group_blocks: Blocks per group of the baked form; None takes as many as 4 GiB of weights.
        revision: Commit of a hub checkpoint.
        replace: Whether an existing bundle may be replaced.
        target: Devices and options of backends that are told them (`ProfiledBackend`); precision
            and profiles are each graph's own.
        sizes: What engines of those backends are to serve.
        cache: Folder of what saves time in the next build: graphs and engines without weights
            (`Store`), and the caches of such backends. None keeps nothing.
        dump: Folder for graphs as text after each pass, or None.
        with_text_encoder: Whether to carry the text encoder as a graph, for programs without Python.
        with_vae: Likewise for the VAE's decoder, at the default config's size.
        pipeline: Folder or hub id of the pipeline, where ``model`` is a transformer alone.
        low_noise: Folder or file of the second expert, where ``model`` is the first alone.
        variant: Which of several sets of weights the folders have, as ``fp16``.
    """

    model: str
    out: Path
    backends: Sequence[Backend]
    configs: Mapping[str, ConfigEntry]
    policies: Sequence[str] | None = None
    row: Row | None = None
    precision: Precision = "float32"
    weights: Literal["inputs", "baked"] = "inputs"
    group_blocks: int | None = None
    revision: str | None = None
    replace: bool = False
    target: Target = field(default_factory=Target)
    sizes: BuildSizes = field(default_factory=BuildSizes)
    cache: Path | None = None
    dump: Path | None = None
    with_text_encoder: bool = False
    with_vae: bool = False
    pipeline: str | None = None
    low_noise: str | None = None
    variant: str | None = None


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
        CheckpointError: nothing usable at ``request.model``.
        ExportError, PassError, BuildError: a graph could not be traced, rewritten or compiled.
        OutputError: the target exists or can't be written.
        ConfigError: groups of no block are asked for, or groups in a bundle that has none; a policy
            is not known, or needs a signal that the model does not give.
        RequestError: sizes that the model can't serve.
    """
    check_group_blocks(request.group_blocks, request.weights)
    check_target(request.out, replace=request.replace)  # a checkpoint may be downloaded next
    for option, folder in (("--dump-passes", request.dump), ("--build-cache", request.cache)):
        if folder is not None:
            check_folder(folder, option)
    progress = progress or Silent()
    clock = _Clock()
    checkpoint = _open(request)
    configs = resolve_configs(request.configs, checkpoint.pipeline)
    store = Store(request.cache / STORE if request.cache is not None else None)
    row, cut = model_cut(checkpoint, request.precision, store, request.row)
    laws = carried_policies(cut, configs, request.policies)
    targets = [complete_target(b, request.target) for b in request.backends]
    ranges = _ranges(request, cut, checkpoint, configs)
    parts = pipeline_parts(request, checkpoint, configs)
    if checkpoint.experts and request.weights == "baked":
        raise ConfigError(
            "--weights baked", "means engines of one checkpoint, and this pipeline has two",
            "build with --weights inputs: engines are the same for both",
        )  # fmt: skip
    with (
        staged_folder(request.out, replace=request.replace) as folder,
        # Reading tens of GB takes about as long as tracing, which leaves the disk idle.
        digests_ahead(_shards_to_link(checkpoint, cut, folder)) as ahead,
    ):
        (folder / "graphs").mkdir()
        write_cut(cut, folder / CUT)
        clock.start("trace")
        signals = _signals(cut, request.weights)
        cache = cache_segments(_hidden_spec(cut), cut.history_dtype)
        segments = (*cut.segments, *cache, *filter_segments(cut))
        segments = tuple(s for s in segments if s.runs != "probe" or s.name in signals)
        progress.phase("trace", len(segments) + len(laws))
        config = {n: v for n, v in checkpoint.config.items() if not n.startswith("_")}
        made_from = {
            "class": checkpoint.transformer_class, "config": config, "precision": request.precision,
        }  # fmt: skip
        graphs = write_graphs(
            segments, cut.example_dims, folder, progress, request.dump,
            store=store, made_from=made_from,
        )  # fmt: skip
        policies: dict[str, PolicyEntry] = {}
        for name, policy_class in laws.items():
            graphs[f"decide.{name}"] = write_decide_graph(policy_class(), folder, store)
            policies[name] = PolicyEntry(
                graph=f"decide.{name}",
                spec=policy_class.spec,
                setting=policy_setting(name, signals),
            )
            progress.advance(f"decide.{name}")

        for part in parts:
            graphs |= write_graphs(
                [part.segment], {}, folder, progress, request.dump,
                store=store, made_from=part.config,
            )  # fmt: skip

        clock.start("weights")
        wanted = wanted_weights(cut, graphs)
        experts = _experts(checkpoint)
        wanted = {e.prefix + n: w for e in experts for n, w in wanted.items()} or wanted
        progress.phase("weights", sum(1 for _ in wanted))
        tensors = bring_weights(wanted, checkpoint.tensors, folder)
        progress.advance("weights", len(wanted))

        stages = [
            StageEntry(
                block=s.block, context=s.context, tapped=s.tapped, first=s.first, count=s.count
            )
            for s in cut.stages
        ]
        if request.weights == "baked":
            stages, groups = write_groups(
                stages, graphs, tensors, cut.feature_block, folder, request.group_blocks
            )
            graphs |= groups

        tensors |= part_tensors(parts, graphs, checkpoint.variant)

        clock.start("engines")
        engines = []
        # Templates of a baked body are carried for reference: nothing runs them.
        compiled = {
            n: g for n, g in graphs.items() if request.weights == "inputs" or g.runs != "block"
        }
        profiles = profiles_of(compiled, policies, cut, ranges) if ranges else {}
        for backend, target in zip(request.backends, targets, strict=True):
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
        samplers = tabulate_samplers(checkpoint, configs, folder, store)
        clock.start("digests")
        if parts and pipeline.folder is None:
            raise OutputError(
                str(request.out), "can't link the pipeline's files, which the extra graphs read",
                "choose an --out on the file system of the checkpoint",
            )  # fmt: skip
        files = describe_files(folder, ahead)
        manifest = Manifest(
            freewheel_version=version("freewheel"),
            family=row.name,
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
            inputs={
                n: InputEntry(
                    argument=i.argument,
                    runs=i.runs,
                    dtype=i.spec.dtype,
                    shape=list(i.spec.shape),
                    scale=i.scale,
                    absent=i.absent,
                )
                for n, i in cut.inputs.items()
            },
            dims={n: list(f) for n, f in cut.dims.items()},
            sums={n: list(terms) for n, terms in cut.sums.items()},
            latent_scale=latent_scale(cut, checkpoint.pipeline),
            vocabulary_size=next((p.vocabulary_size for p in parts if p.vocabulary_size), None),
            graphs=graphs,
            stages=stages,
            experts=experts,
            signals=signals,
            feature_block=cut.feature_block,
            history_dtype=cut.history_dtype,
            policies=policies,
            configs=configs,
            default_config=next(iter(configs)),
            tensors=tensors,
            engines=engines,
            samplers=samplers,
            files=files,
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        clock.stop()
    store.trim()
    return BuildReport(manifest, clock.seconds, checkpoint.notes, *disk_use(request.out, files))


def compile_graphs(
    backend: Backend,
    graphs: Mapping[str, GraphEntry],
    folder: Path,
    target: Target,
    progress: Progress,
    *,
    profiles: Mapping[str, Profile] = MappingProxyType({}),
    store: Store = NO_STORE,
) -> EngineSetEntry:
    """Compile every graph for ``backend`` into ``engines/<backend>-<target>``.

    Args:
        backend: Compiles.
        graphs: Graph name → entry.
        folder: The bundle's folder.
        target: Devices and options.
        progress: Advanced once per graph; told the steps of each build where they are known.
        profiles: Graph name → shapes of its inputs, for backends that need them.
        store: Where engines without weights are kept.

    Raises:
        BuildError: the backend refuses a graph; names it.
    """
    label = target_label(target)
    place = f"engines/{backend.name}-{label}"
    (folder / place).mkdir(parents=True, exist_ok=True)
    files, seconds = {}, {}
    for name, graph in graphs.items():
        began = time.perf_counter()
        out = f"{place}/{name}"
        if isinstance(backend, ProfiledBackend):
            backend.progress = partial(_report, progress, name)
        own = replace(target, precision=graph.precision, profiles=profiles.get(name, {}))
        try:
            compile_graph(backend, folder / graph.file, own, folder / out, store)
        except BuildError as error:
            # Where the graph lay while the bundle was made tells nobody anything.
            where = error.where.removeprefix(str((folder / graph.file).parent)).lstrip("/")
            raise BuildError(f"graph '{name}', {where}", error.what, error.hint) from error
        files[name], seconds[name] = out, round(time.perf_counter() - began, 3)
        progress.advance(name)
    return EngineSetEntry(backend=backend.name, target=label, files=files, seconds=seconds)


def compile_graph(
    backend: Backend, graph: Path, target: Target, out: Path, store: Store = NO_STORE
) -> None:
    """Compile one portable graph, after the passes that its backend needs.

    Compiling a graph twice does not give the same bytes (TensorRT-RTX 1.7 numbers its dynamic
    dimensions in no fixed order), so equal graphs of two bundles get one engine from ``store``.
    A graph that reads weights from a file is compiled each time.
    """
    passes = backend_pipeline(backend.name)
    model, changed = run_passes(ir.load(graph), passes) if passes else (None, [])
    if model is not None and changed:
        # Kept: a runtime without our passes compiles it again where the engine does not fit.
        graph = graph.with_name(f"{graph.stem}.{backend.name}.onnx")
        ir.save(model, graph)
    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    has_weights = any(t.data_location == onnx.TensorProto.EXTERNAL for t in tensors)
    about = [
        "engine", code_version(), backend.name, backend.compiler_version(), target,
        sha256_of(graph),
    ]  # fmt: skip
    keeping = NO_STORE if has_weights else store
    keeping.bring(about, out, lambda place: backend.compile(graph, target, place))


def complete_target(backend: Backend, target: Target) -> Target:
    """Return what ``backend`` compiles for: devices and options concern those that are told them.

    Raises:
        BuildError: there is no such device or option.
    """
    return backend.complete(target) if isinstance(backend, ProfiledBackend) else Target()


def _ranges(
    request: BuildRequest, cut: Cut, checkpoint: Checkpoint, configs: Mapping[str, ResolvedConfig]
) -> dict[str, Range]:
    """Return what engines are to serve, if any backend has to be told."""
    if not any(isinstance(b, ProfiledBackend) for b in request.backends):
        return {}
    return dim_ranges(cut, request.sizes, configs, checkpoint.pipeline)


def _report(progress: Progress, graph: str, phase: str, done: int, total: int) -> None:
    progress.advance(f"{graph}: {phase.lower()} {done}/{total}", 0)


def target_label(target: Target) -> str:
    """Name what engines are compiled for, for a folder's name."""
    if target.compute_capabilities:
        return "sm" + "-".join(c.replace(".", "") for c in target.compute_capabilities)
    return platform.machine().lower()


def pipeline_parts(
    request: BuildRequest, checkpoint: Checkpoint, configs: Mapping[str, ResolvedConfig]
) -> list[PipelinePart]:
    """Describe the pipeline's other parts that are to be carried as graphs."""
    if not (request.with_text_encoder or request.with_vae):
        return []
    if checkpoint.pipeline is None:
        raise CheckpointError(
            request.model, "is a bare transformer, without text encoder and VAE",
            "give the pipeline's folder",
        )  # fmt: skip
    parts = []
    if request.with_text_encoder:
        parts.append(text_encoder_part(checkpoint.pipeline, checkpoint.variant))
    if request.with_vae:
        size = next(iter(configs.values())).generation
        parts.append(vae_decode_part(checkpoint.pipeline, size, checkpoint.variant))
    return parts


def tabulate_samplers(
    checkpoint: Checkpoint,
    configs: Mapping[str, ResolvedConfig],
    folder: Path,
    store: Store = NO_STORE,
) -> list[SamplerEntry]:
    """Tabulate the samplers at the flow shifts of the pipeline's scheduler and of every config."""
    scheduler = read_part(checkpoint.pipeline, "scheduler/scheduler_config.json")
    shifts = {scheduler_shift(checkpoint.pipeline)}
    shifts |= {c.generation.flow_shift for c in configs.values()}
    return write_tables(folder, scheduler or None, shifts, store=store)


def bring_pipeline(checkpoint: Checkpoint, folder: Path) -> PipelineEntry:
    """Link the pipeline's other parts into the bundle, so that it runs by itself.

    Where the file system can't link, small files are copied and the manifest names the source of
    the rest.
    """
    if checkpoint.pipeline is None:
        return PipelineEntry()
    target = folder / "pipeline"
    target.mkdir()
    shutil.copyfile(checkpoint.pipeline / "model_index.json", target / "model_index.json")
    (target / "transformer").mkdir()
    config = json.dumps(checkpoint.config, indent=2)
    (target / "transformer" / "config.json").write_text(config, encoding="utf-8")
    for part in PIPELINE_PARTS:
        for source, name in linked_names(checkpoint.pipeline / part, checkpoint.variant).items():
            place = target / part / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if link_or_none(source, place) is not None:
                continue
            if source.stat().st_size > SMALL_FILE_BYTES:
                shutil.rmtree(target)
                return PipelineEntry(source=str(checkpoint.pipeline.resolve()))
            shutil.copyfile(source, place)
    return PipelineEntry(folder="pipeline")


def _experts(checkpoint: Checkpoint) -> list[ExpertEntry]:
    """Describe the experts: the first has its weights' plain names, others their part's before."""
    return [
        ExpertEntry(
            part=part, prefix=f"{part}." if index else "", from_timestep=ratio * TRAIN_TIMESTEPS
        )
        for index, (part, ratio) in enumerate(checkpoint.experts)
    ]


def _open(request: BuildRequest) -> Checkpoint:
    return open_checkpoint(
        request.model,
        request.revision,
        pipeline=request.pipeline,
        low_noise=request.low_noise,
        variant=request.variant,
    )


def model_cut(
    checkpoint: Checkpoint,
    precision: Precision,
    store: Store = NO_STORE,
    row: Row | None = None,
) -> tuple[Row, Cut]:
    """Cut the transformer, and account for every tensor of each expert.

    Raises:
        CheckpointError: no family cuts it, or a tensor is missing, quantised or not understood.
    """
    transformer = checkpoint.transformer
    where = str(transformer / "config.json" if transformer.is_dir() else transformer)
    row = row or family_of(checkpoint.transformer_class, where)
    cut = cut_transformer(row, checkpoint.config, precision, _stored_dtype(checkpoint), store)
    wanted = {n: shape for n, (_, shape) in cut.weights().items()}
    for part in [part for part, _ in checkpoint.experts] or ["transformer"]:
        place = checkpoint.place_of(part)
        check_tensors(checkpoint.of_part(part), wanted, place, unread=cut.unread)
    return row, cut


def _stored_dtype(checkpoint: Checkpoint) -> StoredDtype:
    """Return a lookup of the dtypes in which graphs take tensors that nothing has to convert."""

    def lookup(name: str) -> str:
        # A missing tensor is reported once the cut has told which ones there must be.
        dtype = checkpoint.tensors[name].dtype if name in checkpoint.tensors else "float32"
        return CAST_DTYPES.get(dtype, dtype)

    return lookup


def _shards_to_link(checkpoint: Checkpoint, cut: Cut, folder: Path) -> list[Path]:
    """List the checkpoint's files that the bundle will share, as far as headers tell."""
    stored = checkpoint.tensors
    wanted = [(stored[n], d) for n, (d, _) in cut.weights().items() if n in stored]
    files = {w.file for w, d in wanted if isinstance(w, StoredTensor) and lies_as(w, d)}
    return sorted(f for f in files if f.stat().st_dev == folder.stat().st_dev)


def _hidden_spec(cut: Cut) -> TensorSpec:
    return next(s for s in cut.segments if s.name == "head").outputs["hidden"]


def _weights_digest(tensors: Mapping[str, TensorEntry], files: Mapping[str, FileEntry]) -> str:
    """Digest what the model computes with: every tensor's place and its file's digest."""
    text = json.dumps([[n, t.offset, files[t.file].sha256] for n, t in sorted(tensors.items())])
    return hashlib.sha256(text.encode()).hexdigest()


def plan(request: BuildRequest, size: Size | None = None) -> dict[str, Any]:
    """Say what a build and a run of it would do and need, from config and headers alone.

    Args:
        request: What would be built.
        size: Size of the run; None takes the default config's.

    Raises:
        CheckpointError: nothing usable at ``request.model``, or nothing of what it is to carry.
        ConfigError: groups of no block are asked for; a policy is not known, or needs a signal that
            the model does not give.
        RequestError: the size does not fit the model.
    """
    check_group_blocks(request.group_blocks, request.weights)
    checkpoint = _open(request)
    configs = resolve_configs(request.configs, checkpoint.pipeline)
    row, cut = model_cut(checkpoint, request.precision, row=request.row)
    stored = sum(t.bytes for t in checkpoint.tensors.values())
    laws = carried_policies(cut, configs, request.policies)
    for backend in request.backends:
        complete_target(backend, request.target)
    return {
        "family": row.name,
        "blocks": sum(s.count for s in cut.stages),
        "graphs": len(cut.segments)
        + 2
        + (FIRST_BLOCK_RESIDUAL in cut.signals)
        + len(filter_segments(cut))
        + len(laws)
        + len(pipeline_parts(request, checkpoint, configs)),
        "tensors": len(checkpoint.tensors),
        "notes": list(checkpoint.notes),
        "checkpoint_bytes": stored,
        "backends": [b.name for b in request.backends],
        "precision": request.precision,
        "ranges": _ranges(request, cut, checkpoint, configs),
        "out": str(request.out),
        "forecast": forecast_build(
            checkpoint, cut, configs, laws, out=request.out, precision=request.precision,
            backends=[b.name for b in request.backends], baked=request.weights == "baked",
            size=size,
        ),
    }  # fmt: skip


def carried_policies(
    cut: Cut, configs: Mapping[str, ResolvedConfig], named: Sequence[str] | None
) -> dict[str, type[Policy]]:
    """Return the policies and pairs that a bundle carries: ``off``, the configs', the named ones.

    Args:
        cut: The model, cut; a policy that finds nothing to look at in it is left out, if nobody named
            it. One block alone has no block ahead of others.
        configs: Configs to be carried.
        named: Further policies; None takes all of the table.

    Raises:
        ConfigError: a policy is not known, or a named one needs a signal that the model does not give.
    """
    asked = dict.fromkeys(["off", *(c.cache.policy for c in configs.values()), *(named or ())])
    given = signals_of(cut)
    carried = {}
    for name in dict.fromkeys([*POLICIES, *asked]) if named is None else asked:
        found = policy_class(name)
        if not found.spec.signals or any(s in given for s in found.spec.signals):
            carried[name] = found
        elif named is not None and name in named:
            raise ConfigError(
                f"--policy {name}",
                f"needs one of the signals {', '.join(found.spec.signals)}, and the model gives "
                f"{', '.join(given) or 'none'}",
                "leave it out",
            )
    return carried


def _signals(cut: Cut, weights: str) -> dict[str, SignalEntry]:
    """Return the signals that a bundle can give: groups of baked blocks can't be run one by one."""
    return {
        n: SignalEntry(value=v, known=k)
        for n, (v, k) in signals_of(cut).items()
        if n != FIRST_BLOCK_RESIDUAL or weights == "inputs"
    }


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
