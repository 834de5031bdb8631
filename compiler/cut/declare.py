# SPDX-License-Identifier: Apache-2.0
"""Say a cut in the bundle's words: streams, stages, inputs by their usual names, dimensions, dtypes.

The cutter names values as the model's source does. A bundle has names of its own for what runtimes
handle: ``latents`` and ``timesteps`` come in, ``hidden`` goes from block to block and its residual is
cached, ``model_output`` goes out. What a bundle has no word for is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import fx

from ...bundle.manifest import InputEntry, SkipEntry, StageEntry
from ...bundle.streams import LATENTS, MODEL_OUTPUT, beside
from ...core.dtypes import Precision
from ...engines.base import TensorSpec
from .alone import alone
from .arguments import by_path
from .cut import AHEAD, cut_model
from .declared import Cut as Declared
from .declared import Runs as GraphRuns
from .declared import Segment as Graph
from .declared import StoredDtype
from .dimensions import Dimensions
from .domain import limits_of
from .names import fresh_name
from .precision import typed
from .reads import find_reads
from .refusal import refuse, refuse_what_has_no_word
from .row import Ignored, Input, OfConfig, Row, Same
from .streams import find_streams, latents_of
from .taps import attention_output, modulated_input
from .words import PRODUCTS, Call, Cut, arguments, operation, results

__all__ = ["cut_once", "declare"]

INPUT_NAMES = {
    "audio_encoder_attention_mask": "audio_text_mask",
    "audio_encoder_hidden_states": "audio_text_states",
    "cap_feats": "text_states",
    "encoder_attention_mask": "text_mask",
    "encoder_mask": "text_mask",
    "encoder_hidden_states": "text_states",
    "encoder_hidden_states_image": "image_states",
    "encoder_hidden_states_mask": "text_mask",
    "height": "row_index",
    "img_ids": "image_ids",
    "num_frames": "frame_index",
    "pooled_projections": "pooled_states",
    "rope_interpolation_scale": "rope_scale",
    "txt_ids": "text_ids",
    "width": "column_index",
}
"""Argument of a transformer's `forward` → the bundle's name for it."""

MOMENTS: Mapping[str, GraphRuns] = {
    "shape": "shape",
    "prompt": "prompt",
    "run": "run",
    "context": "prompt_block",
    "modulation": "run_block",
    "step": "step",
    "block": "block",
}
"""When a segment runs, in the cutter's words and in the bundle's."""

BODY = ("context", "block")
"""Moments of segments that compute in the body's precision."""

FEATURE = "attention_output"
SIGNAL = "modulated_input"


def declare(
    row: Row,
    model_class: Any,
    config: Mapping[str, Any],
    precision: Precision,
    stored: StoredDtype,
) -> Declared:
    """Cut a transformer and say the cut as a build takes it.

    Args:
        row: What the transformer takes.
        model_class: The diffusers class.
        config: Its config, with defaults.
        precision: Precision of ``body``: block templates and their context.
        stored: Checkpoint tensor name → stored dtype.

    Raises:
        ExportError: it can't be traced, or a bundle has no word for something in its cut.
    """
    cut = cut_once(row, model_class, json.dumps(dict(config), sort_keys=True))
    return _Declaration(row, cut, config, precision, stored).declared()


@lru_cache(maxsize=32)
def cut_once(row: Row, model_class: Any, config: str) -> Cut:
    """Cut a transformer, once for all precisions and all that ask again; ``config`` is JSON."""
    return cut_model(row, model_class, json.loads(config))


def _arguments(row: Row, config: Mapping[str, Any]) -> dict[str, bool | int | float | str | None]:
    """Return the arguments of `forward` that are no inputs → their one value; None is any."""
    plain = {
        name: None if isinstance(value, Ignored) else value
        for name, value in row.inputs.items()
        if isinstance(value, (Ignored, bool, int, float, str))
    }
    told = {
        path: leaf.number(config)
        for path, leaf in by_path(row.inputs)
        if isinstance(leaf, OfConfig)
    }
    return {**plain, **told}


def _timesteps(one: Input) -> str:
    """Return the bundle's name for a timestep, or for a vector of them."""
    if len(one.of) > 1:
        return "step_timesteps"
    return "timesteps" if one.of == (LATENTS,) else f"{one.of[0]}_timesteps"


class _Declaration:
    def __init__(
        self,
        row: Row,
        cut: Cut,
        config: Mapping[str, Any],
        precision: Precision,
        stored: StoredDtype,
    ) -> None:
        self.row, self.cut, self.config = row, cut, config
        self.precision, self.stored = precision, stored
        self.batch = {s for s, name in cut.sizes.items() if str(name) == "batch"}
        self.maker = {name: call for call in cut.calls for name in call.outputs}
        refuse_what_has_no_word(row, cut, config)
        self.streams = find_streams(cut)
        self.words = self._words()
        self.aliases = self._aliases()
        self.reads = find_reads(cut, self.streams, self.words)
        self.dimensions = Dimensions(row, cut, config, self._hidden())
        self.dtypes: dict[str, torch.dtype] = {
            name: getattr(torch, one.dtype) for name, one in cut.inputs.items()
        }

    def declared(self) -> Declared:
        """Return the cut in the bundle's words."""
        first = {call.segment: call for call in reversed(self.cut.calls)}
        graphs: list[Graph] = []
        tapped = self.streams.first_of_hidden
        for call in dict.fromkeys(c.segment for c in self.cut.calls):
            graphs += self._graphs(first[call], tapped=call == tapped)
        stages = self._stages(tapped)
        signals: dict[str, Any] = {n: (n, "run") for n in self.cut.told}
        signals[SIGNAL] = (SIGNAL, "step")
        inputs = self._inputs()
        sizes = self.row.sizes(self.config)
        examples = {**sizes, **self.dimensions.derived(sizes)}
        return Declared(
            segments=tuple(graphs),
            stages=stages,
            inputs=inputs,
            signals=signals,
            feature_block=next(s.first + s.count // 2 for s in stages if s.tapped is not None),
            dims=self.dimensions.factors,
            history_dtype="bfloat16" if self.precision == "bfloat16" else "float32",
            example_dims={n: s for n, s in examples.items() if n not in ("batch",)},
            latent_scale=self.row.latent_scale,
            limits=limits_of(self.cut.domain, self.dimensions.factors),
            sums=self.dimensions.sums,
            usual=self.row.usual,
            arguments=_arguments(self.row, self.config),
        )

    def _runs(self, call: Call) -> str:
        return self.cut.segments[call.segment].runs

    def _words(self) -> dict[str, str]:
        """Return the bundle's name of each value: streams by theirs, all else once."""
        words: dict[str, str] = {}
        latents = latents_of(self.cut)
        for name, one in self.cut.inputs.items():
            place = name.removeprefix("joint_attention_kwargs.")
            known = _timesteps(one) if one.changes == "run" else latents.get(name)
            words[name] = known or fresh_name(
                INPUT_NAMES.get(place.split(".")[0], place.replace(".", "_")), words.values()
            )
        for result, word in zip(self.cut.results, latents.values(), strict=True):
            words[result] = beside(word, LATENTS, MODEL_OUTPUT)
        streams = {"text", *self.streams.of.values()}
        of_blocks: dict[
            tuple[str, str], str
        ] = {}  # a block's own, which all that are equal call so
        for call in self.cut.calls:
            for value in call.outputs:
                if value in words:
                    continue
                if value in self.streams.of:
                    stream = self.streams.of[value]
                    words[value] = f"{stream}_out" if self._runs(call) == "block" else stream
                    continue
                own = call.segment, value.removeprefix(f"{call.block}.")
                word = of_blocks.get(own) or fresh_name(own[1], {*words.values(), *streams})
                words[value] = word
                if call.block:
                    of_blocks[own] = word
        return words

    def _aliases(self) -> dict[str, str]:
        """Return tables that are another's in another shape → that other: a step's row is a view."""
        found: dict[str, str] = {}
        for call in self.cut.calls:
            if self._runs(call) != "run":
                continue
            nodes = results(self.cut.segments[call.segment].module)
            made = dict(zip(nodes, call.outputs, strict=True))
            for node, value in made.items():
                source: Any = node.args[0] if node.args else None
                is_view = operation(node) in ("reshape", "unflatten", "view")
                if is_view and made.get(source) in self.cut.told.values():
                    found[value] = made[source]
        return found

    def _hidden(self) -> fx.Node:
        """Return a node that stands for ``hidden``."""
        first = self.streams.first_of_hidden
        place = next(i for i, s in self.streams.inputs[first].items() if s == "hidden")
        return arguments(self.cut.segments[first].module)[place]

    def _inputs(self) -> dict[str, InputEntry]:
        found = {}
        for name, one in self.cut.inputs.items():
            words = one.shape.split()
            if one.changes == "shape":
                size = one.shape if one.shape.isidentifier() else words[0]
                spec = TensorSpec("float32", (size,))
            else:
                dynamic = one.dynamic()
                fixed = one.dimensions(self.config, self.row.sizes(self.config))
                shape = tuple(
                    self.dimensions.of_word(word) if i in dynamic else fixed[i]
                    for i, word in enumerate(words)
                )
                spec = TensorSpec(one.dtype, ("steps",) if one.changes == "run" else shape)
            found[self.words[name]] = InputEntry(
                argument=name,
                runs="prompt" if one.changes == "shape" else one.changes,
                dtype=spec.dtype,
                shape=list(spec.shape),
                scale=self.row.timestep_scale if one.changes == "run" else 1.0,
                offset=self.row.timestep_offset if one.changes == "run" else 0.0,
                absent="ones" if one.fill == "mask" else None,
                same=[
                    argument
                    for argument, other in self.row.inputs.items()
                    if isinstance(other, Same) and other.argument == name
                ],
                of=list(one.of),
                indices=one.indices,
            )
        return found

    def _graphs(self, call: Call, *, tapped: bool) -> list[Graph]:
        """Declare a segment's graph; of the first template also its tapped form and the signal."""
        segment = self.cut.segments[call.segment]
        streams = self.streams.inputs.get(call.segment, {})
        handed_on = {**streams, **self.streams.skip_names(call.segment)}
        own = self.reads.names[call.segment]
        names = {
            argument: handed_on.get(i) or own.get(i) or self._word(call.inputs[i])
            for i, argument in enumerate(segment.inputs)
        }
        if len(set(names.values())) < len(names):
            refuse(
                self.cut.model,
                f"reads one value twice in segment '{segment.name}'",
                list(names.values()),
            )
        module = segment.module
        signal: fx.Node | None = None
        outputs = [self.words[v] for v in call.outputs]
        if segment.runs == "block":
            outputs = [f"{self.streams.outputs[call.segment][j]}_out" for j in range(len(outputs))]
        if tapped:
            place = next(i for i, s in streams.items() if s == "hidden")
            hidden = segment.inputs[place]
            module = attention_output(module, hidden)
            signal = modulated_input(module, hidden)
            outputs.append(FEATURE)
        prefix, block_prefix = self._prefixes(call)
        precision = self.precision if segment.runs in BODY else "float32"

        def stored(path: str) -> str:
            return self.stored(block_prefix + path)

        given = {a: self.dtypes[v] for a, v in zip(segment.inputs, call.inputs, strict=True)}
        returned = self._returned(call, outputs)
        made, dtypes = typed(
            module,
            given,
            stored=stored,
            batch=self.batch,
            precision=getattr(torch, precision) if segment.runs in BODY else None,
            names=names,
            returned=returned,
            scale=self.row.timestep_scale if segment.runs == "run" else 1.0,
            offset=self.row.timestep_offset if segment.runs == "run" else 0.0,
        )
        for one in self.cut.calls:
            if one.segment == call.segment:
                self.dtypes.update(zip(one.outputs, dtypes, strict=False))
        inputs = {
            names[a]: self._argument_spec(node, value, given[a])
            for a, node, value in zip(
                segment.inputs, arguments(segment.module), call.inputs, strict=True
            )
        }
        if segment.runs == "modulation":
            inputs = {name: _of_all_steps(spec) for name, spec in inputs.items()}
        for name in own.values():
            self._refuse_other_shapes(name, inputs[name])
        hidden_tables = tuple(self.words[v] for v in call.outputs if v in self.aliases)
        specs = {
            o: self.dimensions.spec(node, dtype)
            for o, node, dtype in zip(outputs, results(module), dtypes, strict=True)
        }
        if segment.runs in ("run", "modulation"):
            specs = {output: _of_all_steps(spec) for output, spec in specs.items()}
        graph = Graph(
            segment.name,
            MOMENTS[segment.runs],
            made,
            inputs,
            specs,
            prefix,
            precision,
            dropped=(FEATURE,) if tapped else hidden_tables,
        )
        if not tapped or signal is None:
            return [graph]
        whole = Graph(f"{segment.name}_tapped", "block", made, inputs, specs, prefix, precision)
        return [self._modulate(call, module, signal, streams), graph, whole]

    def _word(self, value: str) -> str:
        """Return the bundle's name of a value; a view of a table is the table."""
        return self.words[self.aliases.get(value, value)]

    def _refuse_other_shapes(self, name: str, spec: TensorSpec) -> None:
        """Refuse values of blocks' own that are not all as the first."""
        for block, value in self.reads.values[name].items():
            made = self.maker.get(value)
            if made is None:
                found = self._inputs()[self.words[value]].spec
            else:
                node = results(self.cut.segments[made.segment].module)[made.outputs.index(value)]
                found = self._argument_spec(node, value, self.dtypes[value])
            if found != spec:
                refuse(
                    self.cut.model,
                    "hands values of different shapes to equal blocks",
                    [f"{value} to {block}"],
                )

    def _modulate(
        self, call: Call, module: fx.GraphModule, signal: fx.Node, streams: Mapping[int, str]
    ) -> Graph:
        """Declare the graph of the first block's modulated input."""
        looked_at, read = alone(self.cut, call, module, signal, name="modulate")
        of_stream = {call.inputs[i]: stream for i, stream in streams.items()}
        names = {a: of_stream.get(v) or self._word(v) for a, v in read.items()}
        given = {a: self.dtypes[v] for a, v in read.items()}
        made, _ = typed(
            looked_at, given, precision=None, stored=self.stored, batch=self.batch, names=names
        )
        specs = {
            names[node.name]: self._argument_spec(node, read[node.name], given[node.name])
            for node in arguments(looked_at)
        }
        outputs = {SIGNAL: self.dimensions.spec(signal, torch.float32)}
        return Graph("modulate", "signal", made, specs, outputs)

    def _returned(self, call: Call, outputs: Sequence[str]) -> dict[int, torch.dtype]:
        """Return dtypes that results are cast to: streams are float32, what products read is low."""
        runs = self.cut.segments[call.segment].runs
        if runs == "block":
            streams = (j for j, o in enumerate(outputs) if o.endswith("_out") or o == FEATURE)
            return dict.fromkeys(streams, torch.float32)
        if runs != "context":
            return {}
        low = getattr(torch, self.precision)
        return {j: low for j, v in enumerate(call.outputs) if self._is_for_products(v)}

    def _is_for_products(self, value: str) -> bool:
        """Say whether nothing but products of a block reads a value."""
        readers = {
            node
            for call in self.cut.calls
            for node, read in zip(
                arguments(self.cut.segments[call.segment].module), call.inputs, strict=True
            )
            if read == value
        }
        return all(operation(user) in PRODUCTS for node in readers for user in node.users)

    def _argument_spec(self, node: fx.Node, value: str, dtype: torch.dtype) -> TensorSpec:
        """Return what a graph takes: of a table its step's row, of a whole number its indices."""
        declared = self.cut.inputs.get(value)
        if declared is not None:
            return self._inputs()[self.words[value]].spec
        made = self.maker.get(value)
        is_row = made is not None and (
            self._runs(made) == "run"
            or (self._runs(made) == "modulation" and not self._sees_prompt(made))
        )
        return self.dimensions.spec(node, dtype, 1 if is_row else "batch")

    def _sees_prompt(self, modulation: Call) -> bool:
        """Say whether what a block makes ahead of the steps is another for each prompt."""
        makers = [self.maker.get(value) for value in modulation.inputs]
        return any(made is None or self._runs(made) == "prompt" for made in makers)

    def _prefixes(self, call: Call) -> tuple[str, str]:
        """Return what precedes weights' names: for any block, and for the first."""
        if not call.block:
            return "", ""
        path, _, _ = call.block.rpartition(".")
        return f"{path}.{{block}}.", f"{call.block}."

    def _stages(self, tapped: str) -> tuple[StageEntry, ...]:
        ahead = {
            (c.block, self._runs(c)): c.segment
            for c in self.cut.calls
            if c.block and self._runs(c) in AHEAD
        }
        stages = []
        for segment, group in groupby(self.streams.blocks, key=lambda call: call.segment):
            calls = list(group)
            streams = self.streams.skips[segment]
            skips = {
                name: SkipEntry(
                    stream=streams[i], blocks=[self.streams.place_of(c.inputs[i]) for c in calls]
                )
                for i, name in self.streams.skip_names(segment).items()
            }
            if not calls[0].block:  # before the first block, or between two
                stages.append(StageEntry(block=segment, skips=skips))
                continue
            first = int(calls[0].block.rpartition(".")[2])
            prefix = next(c for c in self.streams.blocks if c.segment == segment).block.rpartition(
                "."
            )[0]
            for i, call in enumerate(calls):
                if call.block != f"{prefix}.{first + i}":
                    refuse(
                        self.cut.model,
                        "shares a graph between lists of blocks",
                        [prefix, call.block],
                    )
            context, modulation = (ahead.get((calls[0].block, runs)) for runs in AHEAD)
            stages.append(
                StageEntry(
                    block=segment,
                    context=context,
                    modulation=modulation,
                    tapped=f"{segment}_tapped" if segment == tapped else None,
                    first=first,
                    count=len(calls),
                    skips=skips,
                    reads=self._reads_of((segment, context, modulation), calls),
                )
            )
        return tuple(stages)

    def _reads_of(
        self, segments: Sequence[str | None], calls: Sequence[Call]
    ) -> dict[str, list[str]]:
        """Return what each block of a stage reads for itself, in any of its segments."""
        names = {n for s in segments for n in self.reads.names.get(s or "", {}).values()}
        return {
            name: [self._word(self.reads.values[name][call.block]) for call in calls]
            for name in sorted(names)
        }


def _of_all_steps(spec: TensorSpec) -> TensorSpec:
    """Return what a tensor is when all steps come in one batch; one number is every step's as well."""
    return TensorSpec(spec.dtype, ("steps", *spec.shape[1:]))
