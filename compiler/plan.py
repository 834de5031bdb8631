# SPDX-License-Identifier: Apache-2.0
"""What a build will do, from a checkpoint's config and headers alone: nothing is traced or written."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ..bundle.manifest import (
    CheckpointSource,
    ExpertEntry,
    PlannedManifest,
    PolicyEntry,
    ResolvedConfig,
    SignalEntry,
)
from ..bundle.scales import scale_name
from ..bundle.sections import divide
from ..bundle.staging import check_target
from ..bundle.store import NO_STORE, Store
from ..core.dtypes import Precision
from ..core.errors import CheckpointError, ConfigError
from ..core.output import check_folder
from ..engines.base import Backend, ProfiledBackend, Target
from ..policies import POLICIES, policy_class
from ..policies.base import Policy
from .checkpoints.checkpoint import Checkpoint, Float8, expert_prefixes, open_checkpoint
from .checkpoints.completeness import CAST_DTYPES, check_tensors
from .cut.declared import FIRST_BLOCK_RESIDUAL, Cut, Segment, StoredDtype
from .cut.models import family_of
from .cut.row import Row
from .cut.transformer import cut_transformer
from .defaults import policy_setting, resolve_configs
from .engines import STORE, complete_target
from .graphs.caching import caching_of
from .graphs.ends import PipelinePart, text_encoder_part, vae_decode_part
from .graphs.filters import filter_segments, signals_of
from .graphs.groups import check_group_blocks
from .profiles import Range, dim_ranges
from .request import BuildRequest
from .sequence.cut import SequenceCut, cut_sequence
from .sizes import latent_scale

__all__ = ["Plan", "carried_policies", "model_cut", "plan"]

TRAIN_TIMESTEPS = 1000
"""Of the flow-matching schedulers: what a boundary between experts is a fraction of."""


@dataclass(frozen=True)
class Plan:
    """Everything that `build` will do, known before it does it.

    Attributes:
        manifest: What the bundle's manifest will say, without what bytes alone tell.
        out: The bundle's folder.
        replace: Whether an existing bundle may be replaced.
        checkpoint: Where weights and pipeline lie.
        cut: The transformer, cut.
        sequence: Its cut for ranks that share a sequence, or None.
        output_sign: -1 where the pipeline turns the model output round before its scheduler has it.
        scheduler: As of `Row`.
        policies: Name → policy to trace.
        segments: Graphs of the model and of caching.
        parts: Graphs of the pipeline's other parts.
        backends: Each backend with what it compiles for; the first is what runs use by default.
        ranges: Dimension → sizes that engines are to serve; empty where no backend is told.
        group_blocks: Blocks per group of the baked form; None takes as many as 4 GiB of weights.
        with_tokenizer: Whether to carry the tokenizer as a graph.
        dump: Folder for graphs as text after each pass, or None.
        store: Where finished graphs and engines are kept.
    """

    manifest: PlannedManifest
    out: Path
    replace: bool
    checkpoint: Checkpoint
    cut: Cut
    sequence: SequenceCut | None
    output_sign: int
    scheduler: str
    policies: Mapping[str, type[Policy]]
    segments: tuple[Segment, ...]
    parts: tuple[PipelinePart, ...]
    backends: tuple[tuple[Backend, Target], ...]
    ranges: Mapping[str, Range]
    group_blocks: int | None
    with_tokenizer: bool
    dump: Path | None
    store: Store

    @property
    def graph_count(self) -> int:
        """Graphs that will be traced; groups of baked blocks come on top."""
        return len(self.segments) + len(self.policies) + len(self.parts)

    @property
    def example_dims(self) -> dict[str, int]:
        """Sizes to trace with."""
        beside = {} if self.sequence is None else self.sequence.example_dims
        return {**self.cut.example_dims, **beside}

    @property
    def own_segments(self) -> list[Segment]:
        """Graphs of the model itself; those around it are the same for every one of its width."""
        beside = () if self.sequence is None else self.sequence.segments
        own = {segment.name for segment in (*self.cut.segments, *beside)}
        return [segment for segment in self.segments if segment.name in own]


def plan(request: BuildRequest) -> Plan:
    """Decide what a build will do; read configs and headers, and cut the model.

    Raises:
        OutputError: the target exists or can't be written.
        CheckpointError: nothing usable at ``request.model``, or nothing of what it is to carry.
        ConfigError: groups of no block, or of two transformers, are asked for; a policy is not known,
            or needs a signal that the model does not give.
        BuildError: there is no such device or option.
        RequestError: sizes that the model can't serve.
    """
    check_target(request.out, replace=request.replace)  # a checkpoint may be downloaded next
    for option, folder in (("--dump-passes", request.dump), ("--build-cache", request.cache)):
        if folder is not None:
            check_folder(folder, option)
    check_group_blocks(request.group_blocks, request.weights)
    store = Store(request.cache / STORE) if request.cache is not None else NO_STORE
    backends = tuple(
        (b, complete_target(b, request.target, request.cache)) for b in request.backends
    )
    checkpoint = open_checkpoint(
        request.model,
        request.revision,
        pipeline=request.pipeline,
        low_noise=request.low_noise,
        variant=request.variant,
        float8=_float8(request, backends),
    )
    if checkpoint.experts and request.weights == "baked":
        raise ConfigError(
            "--weights baked",
            "means engines of one checkpoint, and this pipeline has two",
            "build with --weights inputs: engines are the same for both",
        )
    if request.sequence_parallel and request.weights == "baked":
        raise ConfigError(
            "--weights baked",
            "compiles blocks together, and --sequence-parallel cuts them",
            "build with --weights inputs",
        )
    row, cut = model_cut(checkpoint, request.precision, store, request.row)
    configs = resolve_configs(request.configs, checkpoint.pipeline, cut)
    policies = carried_policies(cut, configs, request.policies)
    sequence = cut_sequence(cut) if request.sequence_parallel else None
    signals = _signals(cut, request.weights)
    _check_sections(cut, configs, signals)
    parts = tuple(_pipeline_parts(request, checkpoint, configs))
    manifest = PlannedManifest(
        freewheel_version=version("freewheel"),
        family=row.name,
        checkpoint=CheckpointSource(
            source=checkpoint.source,
            revision=checkpoint.revision,
            transformer_class=checkpoint.transformer_class,
            config=dict(checkpoint.config),
        ),
        precision=request.precision,
        weights=request.weights,
        inputs=dict(cut.inputs),
        dims={n: list(factors) for n, factors in cut.dims.items()},
        sums={n: list(terms) for n, terms in cut.sums.items()},
        limits=dict(cut.limits),
        arguments=dict(cut.arguments),
        latent_scale=latent_scale(cut, checkpoint.pipeline),
        vocabulary_size=next((p.vocabulary_size for p in parts if p.vocabulary_size), None),
        stages=list(cut.stages),
        experts=_experts(checkpoint),
        signals=signals,
        feature_block=cut.feature_block,
        history_dtype=cut.history_dtype,
        policies={
            n: PolicyEntry(graph=f"decide.{n}", spec=p.spec, setting=policy_setting(n, signals))
            for n, p in policies.items()
        },
        configs=configs,
        default_config=next(iter(configs)),
    )
    segments = (
        *cut.segments,
        *(sequence.segments if sequence is not None else ()),
        *caching_of(cut, last_blocks=_runs_last_blocks(policies, signals)),
        *filter_segments(cut),
    )
    return Plan(
        manifest=manifest,
        out=request.out,
        replace=request.replace,
        checkpoint=checkpoint,
        cut=cut,
        sequence=sequence,
        output_sign=row.output_sign,
        scheduler=row.scheduler,
        policies=policies,
        segments=tuple(s for s in segments if s.runs != "probe" or s.name in signals),
        parts=parts,
        backends=backends,
        ranges=_ranges(request, cut, checkpoint, configs),
        group_blocks=request.group_blocks,
        with_tokenizer=request.with_text_encoder,
        dump=request.dump,
        store=store,
    )


def _float8(request: BuildRequest, backends: Sequence[tuple[Backend, Target]]) -> Float8:
    """Say whether float8 stays float8: as an input of every engine, or nowhere."""
    takes = all(backend.takes_float8(target) for backend, target in backends)
    return request.float8 if takes and request.weights == "inputs" else "convert"


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
        unread = {*cut.unread, *map(scale_name, cut.unread)}
        check_tensors(checkpoint.of_part(part), wanted, place, unread=unread)
    return row, cut


def _stored_dtype(checkpoint: Checkpoint) -> StoredDtype:
    """Return a lookup of the dtypes in which graphs take tensors that nothing has to convert.

    Float8 stays float8 where its scale is among the tensors.
    """

    def lookup(name: str) -> str:
        # A missing tensor is reported once the cut has told which ones there must be.
        dtype = checkpoint.tensors[name].dtype if name in checkpoint.tensors else "float32"
        return dtype if scale_name(name) in checkpoint.tensors else CAST_DTYPES.get(dtype, dtype)

    return lookup


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


def _experts(checkpoint: Checkpoint) -> list[ExpertEntry]:
    """Describe the experts: the first has its weights' plain names, others their part's before."""
    return [
        ExpertEntry(part=part, prefix=prefix, from_timestep=ratio * TRAIN_TIMESTEPS)
        for (part, ratio), prefix in zip(
            checkpoint.experts, expert_prefixes(checkpoint), strict=False
        )
    ]


def _signals(cut: Cut, weights: str) -> dict[str, SignalEntry]:
    """Return the signals that a bundle can give: groups of baked blocks can't be run one by one."""
    return {
        n: SignalEntry(value=v, known=k)
        for n, (v, k) in signals_of(cut).items()
        if n != FIRST_BLOCK_RESIDUAL or weights == "inputs"
    }


def _ranges(
    request: BuildRequest, cut: Cut, checkpoint: Checkpoint, configs: Mapping[str, ResolvedConfig]
) -> dict[str, Range]:
    """Return what engines are to serve, if any backend has to be told."""
    if not any(isinstance(b, ProfiledBackend) for b in request.backends):
        return {}
    return dim_ranges(cut, request.sizes, configs, checkpoint.pipeline)


def _runs_last_blocks(policies: Mapping[str, type[Policy]], signals: Container[str]) -> bool:
    """Tell whether a policy may let last blocks run on reused steps, and gets its signal."""
    specs = (p.spec for p in policies.values())
    return any(s.last_blocks is not None and any(n in signals for n in s.signals) for s in specs)


def _check_sections(
    cut: Cut, configs: Mapping[str, ResolvedConfig], signals: Container[str]
) -> None:
    """Refuse a config whose blocks that always run the model does not have.

    Raises:
        ConfigError: as said; it names the config.
    """
    graphs = {segment.name: segment for segment in cut.segments}
    for name, config in configs.items():
        for setting in config.cache.every_branch():
            spec = policy_class(setting.policy).spec
            if spec.signal_of(setting.signal, signals) != FIRST_BLOCK_RESIDUAL:
                continue
            always = spec.always_run(spec.resolve(setting.parameters))
            try:
                divide(cut.stages, graphs, list(cut.cached), *always)
            except ConfigError as error:
                where = f"config '{name}', {error.where}"
                raise ConfigError(where, error.what, error.hint) from error


def _pipeline_parts(
    request: BuildRequest, checkpoint: Checkpoint, configs: Mapping[str, ResolvedConfig]
) -> list[PipelinePart]:
    """Describe the pipeline's other parts that are to be carried as graphs."""
    if not (request.with_text_encoder or request.with_vae):
        return []
    if checkpoint.pipeline is None:
        raise CheckpointError(
            request.model,
            "is a bare transformer, without text encoder and VAE",
            "give the pipeline's folder",
        )
    parts = []
    if request.with_text_encoder:
        parts.append(text_encoder_part(checkpoint.pipeline, checkpoint.variant))
    if request.with_vae:
        size = next(iter(configs.values())).generation
        parts.append(vae_decode_part(checkpoint.pipeline, size, checkpoint.variant))
    return parts
