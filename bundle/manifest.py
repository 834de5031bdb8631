# SPDX-License-Identifier: Apache-2.0
"""The typed manifest of a bundle; `docs/reference/bundle.md` specifies it field by field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..core.dtypes import ITEM_BYTES, Precision
from ..core.limits import LARGEST_SEED
from ..core.tensor_spec import TensorSpec
from ..policies.setting import CacheSetting
from ..policies.spec import PolicySpec
from .streams import HIDDEN, LATENTS, passed_on

__all__ = [
    "MANIFEST",
    "MAX_BLOCKS",
    "MAX_ENTRIES",
    "MAX_SIZE",
    "SCHEMA_VERSION",
    "CheckpointEntry",
    "CheckpointSource",
    "ConfigEntry",
    "EngineSetEntry",
    "ExpertEntry",
    "FileEntry",
    "GenerationDefaults",
    "GraphEntry",
    "GroupEntry",
    "InputEntry",
    "IoEntry",
    "LatentScale",
    "LimitEntry",
    "Manifest",
    "PartEntry",
    "PipelineEntry",
    "PlannedManifest",
    "PolicyEntry",
    "ResolvedConfig",
    "ResolvedGeneration",
    "SamplerEntry",
    "SequenceEntry",
    "SignalEntry",
    "SkipEntry",
    "StageEntry",
    "TensorEntry",
]

MANIFEST = "manifest.json"
SCHEMA_VERSION = 2

MAX_SIZE = 1 << 48
MAX_BLOCKS = 4096
MAX_RANK = 8
MAX_ENTRIES = 1_000_000
"""Limits that the bundle reference names, checked before anything is allocated for what they count."""

Size = Annotated[int, Field(ge=0, le=MAX_SIZE)]
Positive = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Negative = Annotated[int, Field(ge=-MAX_SIZE, le=-1)]
BlockIndex = Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
BlockCount = Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
StoredDtype = Annotated[str, Field(pattern=f"^({'|'.join(ITEM_BYTES)})$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class IoEntry(_Entry):
    """A graph input or output: dtype and shape, dynamic dimensions by name."""

    dtype: StoredDtype
    shape: Annotated[list[Size | str], Field(max_length=MAX_RANK)]

    @property
    def spec(self) -> TensorSpec:
        """The same as engines and graphs have it."""
        return TensorSpec(self.dtype, tuple(self.shape))


class FileEntry(_Entry):
    """Size and digest of one file of the bundle."""

    bytes: Size
    sha256: Sha256


class TensorEntry(_Entry):
    """Where one weight lies: ``bytes`` bytes from ``offset`` of ``file``."""

    file: str
    dtype: StoredDtype
    shape: Annotated[list[Size], Field(max_length=MAX_RANK)]
    offset: Size
    bytes: Size


class GraphEntry(_Entry):
    """One ONNX graph.

    Attributes:
        file: Path below the bundle.
        runs: Dependency class (see the bundle reference).
        precision: Precision it computes in.
        inputs: Inputs that are not weights.
        outputs: Outputs in order.
        weights: Weight input → checkpoint tensor; ``{block}`` stands for the block index.
    """

    file: str
    runs: str
    precision: Precision = "float32"
    inputs: dict[str, IoEntry]
    outputs: dict[str, IoEntry]
    weights: dict[str, str] = {}

    @property
    def streams(self) -> list[str]:
        """What a block's graph passes on, or begins: streams that it gives as ``<stream>_out``."""
        return passed_on(self.outputs)


class GroupEntry(_Entry):
    """Consecutive blocks compiled as one graph with their weights inside (baked form)."""

    graph: str
    first: BlockIndex
    count: BlockCount


class SkipEntry(_Entry):
    """A skip connection: what each block of a stage reads of a block of an earlier stage.

    Attributes:
        stream: The maker gives it as ``<stream>_out``; it stays as the maker left it.
        blocks: The maker's place in the loop, counted over all stages, for each block.
    """

    stream: str
    blocks: list[BlockIndex]


class StageEntry(_Entry):
    """A run of equal blocks inside ``body``.

    A block passes streams on: each output ``<stream>_out`` whose input ``<stream>`` it takes goes
    to the next block. Those that ``head`` begins and ``finish`` reads are cached: ``hidden``, and
    beside it ``audio_hidden`` where a model samples sound with its video;
    others (a text stream) begin as an output of ``prompt``, or of a block, and end with the last
    block. A block need not write every stream. What is computed once per computed step, before the
    first block or between two, is a stage of one block whose weights are nobody else's.

    Attributes:
        block: Graph of each block.
        context: Graph run once per prompt for each block, or None.
        modulation: Graph run once per run for each block, all timesteps in one batch, or None; where
            it reads the prompt, once per prompt too.
        tapped: Variant of ``block`` that also gives the feature, or None.
        first: Index of the first block in the checkpoint's names.
        count: Blocks.
        groups: Blocks compiled together; empty where weights are inputs.
        skips: Input → what each block reads there of a block of an earlier stage.
        reads: Input of ``block``, ``context`` or ``modulation`` → the value that each block reads there: a table's
            row, an input of the prompt, or what a ``prompt`` or a ``shape`` graph gave.
    """

    block: str
    context: str | None = None
    modulation: str | None = None
    tapped: str | None = None
    first: BlockIndex = 0
    count: BlockCount = 1
    groups: list[GroupEntry] = []
    skips: dict[str, SkipEntry] = {}
    reads: dict[str, list[str]] = {}


class InputEntry(IoEntry):
    """A tensor that callers hand in.

    A whole number given for one of one dimension stands for that many indices, 0 first.

    Attributes:
        argument: Keyword of the diffusers transformer's ``forward``, with the place in it where
            that is nested (``img_shapes.0.0.1``). Complex numbers come as pairs of real ones, in a
            last dimension of two.
        runs: When it may change. A step's inputs have every dimension of ``head``'s.
        scale: What that argument is multiplied by; brings timesteps to the scheduler's values.
        offset: What is added then.
        absent: What stands for it where a pipeline leaves it out, or None.
        same: Other arguments of diffusers' that are given the same.
        of: Of a timestep: whose it is, that of ``latents`` or that of the ``next`` step.
            Of a vector of them: whose each is.
        indices: Of a vector of timesteps: the argument that says which of them each token has.
    """

    argument: str
    runs: Literal["step", "run", "prompt"]
    scale: float = 1.0
    offset: float = 0.0
    absent: Literal["ones"] | None = None
    same: list[str] = []
    of: list[str] = [LATENTS]
    indices: str | None = None


class LimitEntry(_Entry):
    """The largest size of a dimension, and what of the model ends there: module and source line."""

    most: Positive
    where: str


class SignalEntry(_Entry):
    """Which value carries a signal, and when it is known."""

    value: str
    known: Literal["run", "step"]


class PartEntry(_Entry):
    """A part of a block's graph, or an attention between two.

    Attributes:
        graph: Its graph. An attention's has ``query``, ``key``, ``value`` and ``mask``, of which the
            i-th of a block gets ``query_i``, … of the parts before it, and gives ``attended_i``.
        mask: Of an attention: the block's input, or a part's result, that masks its keys.
    """

    graph: str
    mask: str | None = None


class SequenceEntry(_Entry):
    """How ranks share one sequence: each has some tokens of every stream, and their caches.

    Attributes:
        sums: Dimension of several streams' tokens in one sequence → those of the streams.
        shared: Value → the dimensions, in order, of whose tokens each rank has a part of it.
        blocks: Block's graph that attention is cut out of → its parts: before, attention, after, ….
        rows: Graph of what ``finish`` computes token by token.
        joined: Graph that makes the model's output of all tokens' rows; None where they are it.
        policies: Policy → graph of the sums over tokens that it looks at, and graph that decides by
            them; policies that look at none, or at such of latents alone, have no entry.
    """

    sums: dict[str, list[str]]
    shared: dict[str, list[str]]
    blocks: dict[str, list[PartEntry]]
    rows: str
    joined: str | None
    policies: dict[str, tuple[str, str]]


class PolicyEntry(_Entry):
    """A compiled policy.

    Attributes:
        graph: Its ``decide`` graph.
        spec: Its declaration.
        setting: What a request gets that names the policy and no config.
    """

    graph: str
    spec: PolicySpec
    setting: CacheSetting


class LatentScale(_Entry):
    """What one latent stands for: frames after the first, and pixels along height and width."""

    frames: Annotated[int, Field(ge=1, le=1024)]
    pixels: Annotated[int, Field(ge=1, le=1024)]


class GenerationDefaults(_Entry):
    """What a config says about generation beside caching; None leaves it to `build`."""

    steps: int | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    seed: int | None = None
    text_tokens: int | None = None
    sampler: Annotated[str, Field(min_length=1)] | None = None
    guidance_scale_2: float | None = None


class ResolvedGeneration(GenerationDefaults):
    """What a run gets where its request says nothing, as manifests carry it.

    Attributes:
        steps: Denoise steps.
        height: Pixels.
        width: Pixels.
        frames: Frames of the video.
        guidance_scale: 1 or less runs the conditional branch alone.
        flow_shift: Of the sampler's noise levels.
        seed: Of the initial noise.
        text_tokens: Length to which prompts are padded.
        sampler: None is the pipeline's own.
        guidance_scale_2: Of the second expert; None is that of the first.
    """

    steps: Positive
    height: Positive
    width: Positive
    frames: Positive
    guidance_scale: float
    flow_shift: Annotated[float, Field(gt=0)]
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)]
    text_tokens: Positive


class ConfigEntry(_Entry):
    """A named caching config."""

    cache: CacheSetting
    generation: GenerationDefaults = GenerationDefaults()


class ResolvedConfig(ConfigEntry):
    """A config that leaves nothing open."""

    generation: ResolvedGeneration


class EngineSetEntry(_Entry):
    """Compiled engines of one backend.

    Attributes:
        backend: Backend name.
        target: What they were compiled for, as in the folder's name.
        files: Graph name → path below the bundle (a file or a folder).
        seconds: Graph name → seconds of compiling.
    """

    backend: str
    target: str
    files: dict[str, str]
    seconds: dict[str, float] = {}


class SamplerEntry(_Entry):
    """A sampler tabulated at one flow shift, for runtimes without diffusers.

    Attributes:
        name: Our name, as requests spell it.
        scheduler: The diffusers class that was probed.
        flow_shift: Its shift of the noise levels.
        window: Samples, and model outputs, that a step looks at.
        steps: Step counts that the file holds, ascending.
        file: Safetensors below the bundle; one float64 [steps, 2 + 2 * window] per step count.
        latents: Whose samples it makes: those beside the first may have a schedule of their own.
    """

    name: str
    scheduler: str
    flow_shift: float
    window: Annotated[int, Field(ge=1, le=16)]
    steps: list[Annotated[int, Field(ge=1, le=100_000)]]
    file: str
    latents: str = LATENTS


class CheckpointSource(_Entry):
    """Where the weights come from."""

    source: str
    revision: str | None = None
    transformer_class: str
    config: dict[str, Any]


class CheckpointEntry(CheckpointSource):
    """Where the weights came from, and the digest of all that the model computes with."""

    sha256: Sha256


class ExpertEntry(_Entry):
    """One of several transformers of equal config, each of which denoises a range of timesteps.

    Attributes:
        part: Folder of the diffusers pipeline, and the attribute there.
        prefix: What precedes the names of its tensors.
        from_timestep: It denoises from here on, up to where the expert before it begins.
    """

    part: str
    prefix: str
    from_timestep: float


class TokenizerEntry(_Entry):
    """The pipeline's tokenizer as a graph of OpenVINO's.

    Attributes:
        file: Its .xml; the .bin lies beside it.
        unknown: Id that stands for what the graph can't tell apart and the tokenizer can: a text
            that gives it is refused. None where it is an id like any other.
    """

    file: str
    unknown: Annotated[int, Field(ge=0)] | None = None


class PipelineEntry(_Entry):
    """The rest of the diffusers pipeline: a folder of the bundle, or where it was found."""

    folder: str | None = None
    source: str | None = None


SumTerm = str | Positive | Negative | tuple[str, Positive]
"""What a dimension is a sum of: another, a number, or another rounded up to a multiple."""


class PlannedManifest(_Entry):
    """A manifest without bytes: all that is known before a graph is traced or a file written."""

    schema_version: Literal[2] = 2
    freewheel_version: str
    family: str
    checkpoint: CheckpointSource
    precision: Precision
    weights: Literal["inputs", "baked"]
    inputs: dict[str, InputEntry]
    dims: dict[str, list[tuple[str, Positive]]]
    sums: dict[str, list[SumTerm]] = {}
    limits: dict[str, LimitEntry] = {}
    arguments: dict[str, bool | int | float | str | None] = {}
    latent_scale: LatentScale
    vocabulary_size: Positive | None = None
    stages: list[StageEntry]
    experts: list[ExpertEntry] = []
    signals: dict[str, SignalEntry]
    feature_block: BlockIndex
    history_dtype: StoredDtype
    policies: dict[str, PolicyEntry]
    configs: dict[str, ResolvedConfig]
    default_config: str

    @property
    def kept(self) -> frozenset[tuple[str, int]]:
        """Streams that a later stage reads as a block left them: (stream, place of the block)."""
        skips = (skip for stage in self.stages for skip in stage.skips.values())
        return frozenset((skip.stream, place) for skip in skips for place in skip.blocks)

    @property
    def latents(self) -> list[str]:
        """What the model samples, ``latents`` first: its inputs that change at every step."""
        steps = [name for name, entry in self.inputs.items() if entry.runs == "step"]
        return sorted(steps, key=lambda name: name != LATENTS)

    @property
    def block_count(self) -> int:
        """Blocks of all stages."""
        return sum(stage.count for stage in self.stages)

    @property
    def settings(self) -> dict[str, CacheSetting]:
        """The setting of every policy and of every config, by its name."""
        return {n: e.setting for n, e in self.policies.items()} | {
            n: e.cache for n, e in self.configs.items()
        }

    @property
    def specs(self) -> dict[str, PolicySpec]:
        """What each policy declares."""
        return {n: e.spec for n, e in self.policies.items()}


class Manifest(PlannedManifest):
    """The whole manifest."""

    checkpoint: CheckpointEntry
    pipeline: PipelineEntry
    tokenizer: TokenizerEntry | None = None
    graphs: dict[str, GraphEntry]
    sequence: SequenceEntry | None = None
    tensors: dict[str, TensorEntry]
    engines: list[EngineSetEntry]
    samplers: list[SamplerEntry] = []
    files: dict[str, FileEntry]

    def row_of(self, table: str) -> IoEntry | None:
        """Return a table's row as graphs read it; None where policies alone look at the table."""
        names = {table}
        for stage in self.stages:
            names |= {name for name, read in stage.reads.items() if table in read}
        readers = [g for g in self.graphs.values() if g.runs != "run_block"]  # which takes all rows
        return next((g.inputs[n] for g in readers for n in g.inputs if n in names), None)

    def reads_prompt(self, modulation: str) -> bool:
        """Tell whether what a stage's ``modulation`` makes is another for each prompt."""
        names = set(self.graphs[modulation].inputs)
        for stage in self.stages:
            if stage.modulation == modulation:
                names |= {v for n, read in stage.reads.items() if n in names for v in read}
        made = (g.outputs for g in self.graphs.values() if g.runs == "prompt")
        given = {name for outputs in made for name in outputs}
        given |= {name for name, entry in self.inputs.items() if entry.runs == "prompt"}
        return not given.isdisjoint(names)

    @property
    def cached(self) -> list[str]:
        """The streams whose residuals are kept, ``hidden`` first."""
        return sorted(self.graphs["reuse"].streams, key=lambda stream: stream != HIDDEN)
