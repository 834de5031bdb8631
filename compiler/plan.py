# SPDX-License-Identifier: Apache-2.0
"""What a build will do, from a checkpoint's config and headers alone: nothing is traced or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..bundle.manifest import ConfigEntry, ResolvedConfig, SignalEntry
from ..bundle.scales import scale_name
from ..bundle.store import NO_STORE, Store
from ..core.dtypes import Precision
from ..core.errors import CheckpointError, ConfigError
from ..engines.base import Backend, ProfiledBackend, Target
from ..policies import POLICIES, policy_class
from ..policies.base import Policy
from .checkpoints.checkpoint import Checkpoint, Float8, open_checkpoint
from .checkpoints.completeness import CAST_DTYPES, check_tensors
from .cut.declared import FIRST_BLOCK_RESIDUAL, Cut, Segment, StoredDtype
from .cut.models import family_of
from .cut.row import Row
from .cut.transformer import cut_transformer
from .defaults import resolve_configs
from .engines import complete_target
from .graphs.caching import cache_segments
from .graphs.ends import PipelinePart, text_encoder_part, vae_decode_part
from .graphs.filters import filter_segments, signals_of
from .graphs.groups import check_group_blocks
from .profiles import BuildSizes, Range, dim_ranges

__all__ = ["BuildRequest", "Plan", "carried_policies", "model_cut", "plan"]


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
        float8: Keep weights of the checkpoint that are in float8_e4m3fn where every backend takes
            them as inputs, or convert them to the graphs' own dtypes, which LoRAs need.
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
    float8: Float8 = "keep"


@dataclass(frozen=True)
class Plan:
    """Everything that `build` will do, known before it does it.

    Attributes:
        request: What was asked for.
        checkpoint: Where weights and pipeline lie.
        row: The model's declaration.
        cut: The transformer, cut.
        configs: Name → config that leaves nothing open; the first is the default.
        policies: Name → policy to carry.
        signals: Kind → signal that the bundle gives.
        segments: Graphs of the model and of caching.
        parts: Graphs of the pipeline's other parts.
        targets: What each backend of the request compiles for.
        ranges: Dimension → sizes that engines are to serve; empty where no backend is told.
    """

    request: BuildRequest
    checkpoint: Checkpoint
    row: Row
    cut: Cut
    configs: Mapping[str, ResolvedConfig]
    policies: Mapping[str, type[Policy]]
    signals: Mapping[str, SignalEntry]
    segments: tuple[Segment, ...]
    parts: tuple[PipelinePart, ...]
    targets: tuple[Target, ...]
    ranges: Mapping[str, Range]

    @property
    def graph_count(self) -> int:
        """Graphs that will be traced; groups of baked blocks come on top."""
        return len(self.segments) + len(self.policies) + len(self.parts)


def plan(request: BuildRequest, store: Store = NO_STORE) -> Plan:
    """Decide what a build will do; read configs and headers, and cut the model.

    Args:
        request: What to build.
        store: Where the cut is kept; without one, nothing is written.

    Raises:
        CheckpointError: nothing usable at ``request.model``, or nothing of what it is to carry.
        ConfigError: groups of no block, or of two transformers, are asked for; a policy is not known,
            or needs a signal that the model does not give.
        BuildError: there is no such device or option.
        RequestError: sizes that the model can't serve.
    """
    check_group_blocks(request.group_blocks, request.weights)
    targets = tuple(complete_target(b, request.target) for b in request.backends)
    checkpoint = open_checkpoint(
        request.model,
        request.revision,
        pipeline=request.pipeline,
        low_noise=request.low_noise,
        variant=request.variant,
        float8=_float8(request, targets),
    )
    configs = resolve_configs(request.configs, checkpoint.pipeline)
    row, cut = model_cut(checkpoint, request.precision, store, request.row)
    policies = carried_policies(cut, configs, request.policies)
    ranges = _ranges(request, cut, checkpoint, configs)
    parts = tuple(_pipeline_parts(request, checkpoint, configs))
    if checkpoint.experts and request.weights == "baked":
        raise ConfigError(
            "--weights baked", "means engines of one checkpoint, and this pipeline has two",
            "build with --weights inputs: engines are the same for both",
        )  # fmt: skip
    signals = _signals(cut, request.weights)
    cache = cache_segments(cut.cached, cut.history_dtype)
    segments = (*cut.segments, *cache, *filter_segments(cut))
    return Plan(
        request, checkpoint, row, cut, configs, policies, signals,
        tuple(s for s in segments if s.runs != "probe" or s.name in signals),
        parts, targets, ranges,
    )  # fmt: skip


def _float8(request: BuildRequest, targets: Sequence[Target]) -> Float8:
    """Say whether float8 stays float8: as an input of every engine, or nowhere."""
    takes = all(b.takes_float8(t) for b, t in zip(request.backends, targets, strict=True))
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


def _pipeline_parts(
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
