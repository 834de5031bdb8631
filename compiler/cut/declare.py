# SPDX-License-Identifier: Apache-2.0
"""Say a cut in the bundle's words: streams, stages, inputs by their usual names, dimensions, dtypes.

The cutter names values as the model's source does. A bundle has names of its own for what runtimes
handle: ``latents`` and ``timesteps`` come in, ``hidden`` goes from block to block and its residual is
cached, ``model_output`` goes out. What a bundle has no word for is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._sympy.functions import FloorDiv

from ...core.dtypes import Precision
from ...core.errors import ExportError
from ...engines.base import TensorSpec
from .cut import cut_model
from .declared import Cut as Declared
from .declared import DimFactor, ModelInput, Stage, StoredDtype
from .declared import Runs as GraphRuns
from .declared import Segment as Graph
from .models import Row, row_of
from .names import fresh_name
from .precision import typed
from .taps import attention_output, modulated_input
from .trace import value_of
from .words import Call, Cut, Segment, expression_of, operation

__all__ = ["declare"]

INPUT_NAMES = {
    "encoder_attention_mask": "text_mask",
    "encoder_hidden_states": "text_states",
    "encoder_hidden_states_image": "image_states",
    "encoder_hidden_states_mask": "text_mask",
    "height": "row_index",
    "img_ids": "image_ids",
    "num_frames": "frame_index",
    "pooled_projections": "pooled_states",
    "txt_ids": "text_ids",
    "width": "column_index",
}
"""Argument of a transformer's `forward` → the bundle's name for it."""

MOMENTS: Mapping[str, GraphRuns] = {
    "shape": "shape", "prompt": "prompt", "run": "run", "context": "prompt_block", "step": "step",
    "block": "block",
}  # fmt: skip
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
    cut = _cut_of(row.model, model_class, json.dumps(dict(config), sort_keys=True))
    return _Declaration(row, cut, config, precision, stored).declared()


@lru_cache(maxsize=4)
def _cut_of(model: str, model_class: Any, config: str) -> Cut:
    """Cut a transformer, once for all precisions and all that ask again."""
    row = row_of(model)
    assert row is not None, "who declares a cut has its row"
    return cut_model(row, model_class, json.loads(config), modulation=False)


@dataclass
class _Streams:
    """What goes from block to block.

    Attributes:
        of: Value → its stream.
        inputs: Template → position of an argument → stream.
        outputs: Template → position of a result → stream.
    """

    of: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, dict[int, str]] = field(default_factory=dict)
    outputs: dict[str, dict[int, str]] = field(default_factory=dict)


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
        self.blocks = [c for c in cut.calls if c.block and cut.segments[c.segment].runs == "block"]
        self.maker = {name: call for call in cut.calls for name in call.outputs}
        self.patches = row.sizes(config, dict.fromkeys(row.multiples, 1))
        self.sums: dict[str, tuple[str, ...]] = {}
        self.factors: dict[str, tuple[DimFactor, ...]] = {}
        self.refuse_what_has_no_word()
        self.streams = self._streams()
        self.words = self._words()
        self.aliases = self._aliases()
        self._derive_tokens()
        self.dtypes: dict[str, torch.dtype] = {
            name: getattr(torch, one.dtype) for name, one in cut.inputs.items()
        }

    def declared(self) -> Declared:
        """Return the cut in the bundle's words."""
        first = {call.segment: call for call in reversed(self.cut.calls)}
        graphs: list[Graph] = []
        tapped = self._first_of_hidden()
        for call in dict.fromkeys(c.segment for c in self.cut.calls):
            graphs += self._graphs(first[call], tapped=call == tapped)
        stages = self._stages(tapped)
        signals: dict[str, Any] = {n: (n, "run") for n in self.cut.told}
        signals[SIGNAL] = (SIGNAL, "step")
        sizes = self.row.sizes(self.config)
        examples = {**sizes, **self._derived(sizes)}
        return Declared(
            segments=tuple(graphs),
            stages=stages,
            inputs=self._inputs(),
            signals=signals,
            feature_block=next(s.first + s.count // 2 for s in stages if s.tapped is not None),
            dims=self.factors,
            history_dtype="bfloat16" if self.precision == "bfloat16" else "float32",
            example_dims={n: s for n, s in examples.items() if n not in ("batch",)},
            latent_scale=self.row.latent_scale,
            limits=self._limits(),
            sums=self.sums,
        )

    # Words

    def refuse_what_has_no_word(self) -> None:
        """Refuse cuts that need a graph or a value that no bundle has."""
        steps = [n for n, one in self.cut.inputs.items() if one.changes == "step"]
        runs = [n for n, one in self.cut.inputs.items() if one.changes == "run"]
        bridges = [c for c in self.cut.calls if not c.block and self._runs(c) == "block"]
        if len(steps) != 1:
            self._refuse(f"takes {len(steps)} inputs that change at every step", steps)
        if len(runs) != 1:
            self._refuse(f"takes {len(runs)} timesteps", runs)
        if len(self.cut.results) != 1:
            self._refuse(f"returns {len(self.cut.results)} values", self.cut.results)
        if not self.blocks:
            self._refuse("has no blocks", ())
        if bridges:
            self._refuse("computes something between two blocks", [c.segment for c in bridges])
        if not any(self._runs(call) == "prompt" for call in self.cut.calls):
            self._refuse("makes nothing of the prompt alone", ())

    def _refuse(self, what: str, names: Sequence[str]) -> None:
        raise ExportError(
            f"transformer '{self.row.model}'",
            what + (f": {', '.join(names)}" if names else ""),
            "a bundle has no word for that yet",
        )

    def _runs(self, call: Call) -> str:
        return self.cut.segments[call.segment].runs

    def _streams(self) -> _Streams:
        """Follow what blocks hand on: ``hidden`` comes from `head`, others from the prompt."""
        found = _Streams()
        carried = self._carried()
        made = {v for c in self.cut.calls if self._runs(c) == "step" for v in c.outputs}
        begun = list(dict.fromkeys(v for call in self.blocks for v in call.inputs if v in made))
        if len(begun) != 1:
            self._refuse(f"hands {len(begun)} values of the latents to its blocks", begun)
        found.of[begun[0]] = "hidden"
        texts = 0
        for position, call in enumerate(self.blocks):
            handed = (*begun, *(self.blocks[position - 1].outputs if position else ()))
            passed = carried[call.segment]
            inputs = found.inputs.setdefault(call.segment, {})
            for i, value in enumerate(call.inputs):
                if value not in found.of and i in passed.values():
                    texts += 1
                    found.of[value] = "text" if texts == 1 else f"text_{texts}"
                if value in found.of and value not in handed and self._is_of_block(value):
                    self._refuse("reads in one block what a block before the last made", [value])
                if value in found.of and (i in passed.values() or value in handed):
                    known = inputs.setdefault(i, found.of[value])
                    if known != found.of[value]:
                        self._refuse("hands different streams to equal blocks", [value])
            outputs = found.outputs.setdefault(call.segment, {})
            for j, value in enumerate(call.outputs):
                if passed.get(j) not in inputs:
                    self._refuse("has a block that begins a stream", [value])
                outputs[j] = found.of[value] = inputs[passed[j]]
        return found

    def _is_of_block(self, value: str) -> bool:
        """Say whether a block makes a value."""
        return value in self.maker and bool(self.maker[value].block)

    def _carried(self) -> dict[str, dict[int, int]]:
        """Return template → position of a result → argument of the next equal block that takes it.

        A block that no equal one follows takes as it gives: arguments and results of one shape.
        """
        carried: dict[str, dict[int, int]] = {c.segment: {} for c in self.blocks}
        for one, two in pairwise(self.blocks):
            if one.segment == two.segment:
                for i, value in enumerate(two.inputs):
                    if value in one.outputs:
                        carried[one.segment][one.outputs.index(value)] = i
        for call in self.blocks:
            passed = carried[call.segment]
            for j in range(len(call.outputs)):
                found = passed[j] if j in passed else self._alike(call, j)
                if found is not None:
                    passed[j] = found
        return carried

    def _alike(self, call: Call, output: int) -> int | None:
        """Return the stream's argument whose shape a result has."""
        segment = self.cut.segments[call.segment]
        wanted = _shape(_results(segment)[output])
        for i, node in enumerate(_arguments(segment)):
            made = self.maker.get(call.inputs[i])
            is_stream = made is not None and (made.block or self._runs(made) in ("step", "prompt"))
            if is_stream and _shape(node) == wanted:
                return i
        return None

    def _words(self) -> dict[str, str]:
        """Return the bundle's name of each value: streams by theirs, all else once."""
        words: dict[str, str] = {}
        for name, one in self.cut.inputs.items():
            word = {"step": "latents", "run": "timesteps"}.get(one.changes)
            argument = name.split(".")[0]
            words[name] = word or fresh_name(
                INPUT_NAMES.get(argument, name.replace(".", "_")), words.values()
            )
        words[self.cut.results[0]] = "model_output"
        for call in self.cut.calls:
            for value in call.outputs:
                if value in words:
                    continue
                if value in self.streams.of:
                    stream = self.streams.of[value]
                    words[value] = f"{stream}_out" if call.block else stream
                elif call.block:
                    words[value] = value.removeprefix(f"{call.block}.")
                else:
                    words[value] = fresh_name(value, {*words.values(), "hidden", "text"})
        return words

    def _aliases(self) -> dict[str, str]:
        """Return tables that are another's in another shape → that other: a step's row is a view."""
        found: dict[str, str] = {}
        for call in self.cut.calls:
            if self._runs(call) != "run":
                continue
            results = dict(
                zip(_results(self.cut.segments[call.segment]), call.outputs, strict=True)
            )
            for node, value in results.items():
                source: Any = node.args[0] if node.args else None
                is_view = operation(node) in ("reshape", "unflatten", "view")
                if is_view and results.get(source) in self.cut.told.values():
                    found[value] = results[source]
        return found

    # Dimensions

    def _derive_tokens(self) -> None:
        """Name the dimension of tokens, and say how it follows from those of the latents."""
        first = self._first_of_hidden()
        place = next(i for i, s in self.streams.inputs[first].items() if s == "hidden")
        hidden = _arguments(self.cut.segments[first])[place]
        tokens = self._over_sizes(expression_of(value_of(hidden).shape[1]))
        self.tokens = tokens
        if self.row.packed > 1:
            by = self.row.packed
            rows = {"rows": (("height", by),), "columns": (("width", by),)}
            given = {str(s) for one in self._sizes_of_inputs() for s in one}
            self.factors |= {n: f for n, f in rows.items() if n in given}
            self.factors["tokens"] = (("height", by), ("width", by))
            self.factors["tokens_per_frame"] = (("tokens", 1),)
            return
        factors = tuple(self._factor(part) for part in sympy.Mul.make_args(tokens))
        order = ("frames", "height", "width")
        factors = tuple(sorted(factors, key=lambda f: order.index(f[0]) if f[0] in order else 3))
        if factors != (("tokens", 1),):
            self.factors["tokens"] = factors
        per_frame = tuple(f for f in factors if f[0] != "frames")
        self.factors["tokens_per_frame"] = per_frame

    def _first_of_hidden(self) -> str:
        """Return the template of the first block that ``hidden`` goes through."""
        inputs = self.streams.inputs
        return next(c.segment for c in self.blocks if "hidden" in inputs[c.segment].values())

    def _sizes_of_inputs(self) -> list[set[sympy.Symbol]]:
        return [
            set(map(sympy.Symbol, re.findall(r"[a-z_]\w*", one.shape)))
            for one in self.cut.inputs.values()
        ]

    def _factor(self, part: sympy.Basic) -> DimFactor:
        """Return size and divisor of ``height`` or ``height // 2``."""
        if part.is_Symbol:
            return str(part), 1
        if type(part).__name__ in ("FloorDiv", "CleanDiv") and part.args[0].is_Symbol:
            return str(part.args[0]), int(part.args[1])
        self._refuse("has tokens that are no product of sizes", [str(part)])
        raise AssertionError("unreachable")

    def _over_sizes(self, expression: Any) -> Any:
        if not isinstance(expression, sympy.Basic):
            return expression
        expression = expression.xreplace(dict(self.cut.sizes))
        for size in expression.free_symbols:
            patch = self.patches.get(str(size), 1)  # it divides the size
            expression = expression.subs(patch * FloorDiv(size, patch), size)
        return expression

    def _dim(self, extent: Any, batch: str | int) -> str | int:
        """Return a dimension's name, or its size."""
        expression = self._over_sizes(expression_of(extent))
        if not isinstance(expression, sympy.Basic):
            return int(expression)
        if expression.is_Integer:
            return int(expression)
        if expression == self.tokens:
            return "tokens"
        if str(expression) == "batch":
            return batch
        if expression.is_Add:
            return self._sum(expression)
        if not expression.is_Symbol:
            self._refuse("hands on a value of a size that no input has", [str(expression)])
        return str(expression)

    def _sum(self, expression: sympy.Basic) -> str:
        """Name the sum of two sequences' lengths."""
        rest = expression - self.tokens
        has_tokens = rest.count_ops() < expression.count_ops()
        others = sympy.Add.make_args(rest if has_tokens else expression)
        terms = sorted(str(one) for one in others) + ["tokens"] * has_tokens
        if not all(term.isidentifier() for term in terms):
            self._refuse("hands on a value of a size that no input has", [str(expression)])
        name = "_plus_".join(terms)
        self.sums[name] = tuple(terms)
        return name

    def _spec(self, node: fx.Node, dtype: torch.dtype, batch: str | int = "batch") -> TensorSpec:
        shape = tuple(self._dim(extent, batch) for extent in value_of(node).shape)
        return TensorSpec(str(dtype).removeprefix("torch."), shape)

    def _derived(self, sizes: Mapping[str, int]) -> dict[str, int]:
        found = dict(sizes)
        if self.row.packed > 1:
            found |= {n: sizes.get(n, 1) * self.row.packed for n in ("height", "width")}
        for name, factors in self.factors.items():
            found[name] = 1
            for size, divisor in factors:
                found[name] *= found[size] // divisor
        return found | {n: sum(found[t] for t in terms) for n, terms in self.sums.items()}

    def _limits(self) -> dict[str, int]:
        """Return how far each size of the latents may go, where the model has tables."""
        limits: dict[str, int] = {}
        multiples = {dim: by for factors in self.factors.values() for dim, by in factors}
        for one in self.cut.domain:
            condition = one.condition
            if isinstance(condition, sympy.Le) and condition.args[0].is_Symbol:
                name, most = str(condition.args[0]), condition.args[1]
                if name in ("frames", "height", "width") and most.is_Integer:
                    by = multiples.get(name, 1)
                    limits[name] = min(int(most) // by * by, limits.get(name, int(most)))
        return limits

    # Graphs

    def _inputs(self) -> dict[str, ModelInput]:
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
                    self._dim_of_word(word) if i in dynamic else fixed[i]
                    for i, word in enumerate(words)
                )
                spec = TensorSpec(one.dtype, ("steps",) if one.changes == "run" else shape)
            found[self.words[name]] = ModelInput(
                name,
                "prompt" if one.changes == "shape" else one.changes,
                spec,
                self.row.timestep_scale if one.changes == "run" else 1.0,
                "ones" if one.fill == "mask" else None,
            )
        return found

    def _dim_of_word(self, word: str) -> str:
        if word.isidentifier():
            return word
        plain = {
            n: sympy.Symbol(n, integer=True, positive=True) for n in self.row.sizes(self.config)
        }
        if sympy.sympify(word, locals=plain) == self.tokens:
            return "tokens"
        self._refuse("takes an input of a size that has no name", [word])
        raise AssertionError("unreachable")

    def _graphs(self, call: Call, *, tapped: bool) -> list[Graph]:
        """Declare a segment's graph; of the first template also its tapped form and the signal."""
        segment = self.cut.segments[call.segment]
        streams = self.streams.inputs.get(call.segment, {})
        names: dict[str, str] = {}
        for i, argument in enumerate(segment.inputs):
            value = self.aliases.get(call.inputs[i], call.inputs[i])
            word = streams.get(i) or self.words[value]
            names[argument] = word
        if len(set(names.values())) < len(names):
            self._refuse(f"reads one value twice in segment '{segment.name}'", list(names.values()))
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
        returned = dict.fromkeys(
            (j for j, o in enumerate(outputs) if o.endswith("_out") or o == FEATURE), torch.float32
        ) if segment.runs == "block" else {}  # fmt: skip
        made, dtypes = typed(
            module, given, stored=stored, batch=self.batch,
            precision=getattr(torch, precision) if segment.runs in BODY else None,
            names=names, returned=returned,
            divisor=self.row.timestep_scale if segment.runs == "run" else 1.0,
        )  # fmt: skip
        for one in self.cut.calls:
            if one.segment == call.segment:
                self.dtypes.update(zip(one.outputs, dtypes, strict=False))
        inputs = {
            names[a]: self._argument_spec(node, value, given[a])
            for a, node, value in zip(segment.inputs, _arguments(segment), call.inputs, strict=True)
        }
        hidden_tables = tuple(self.words[v] for v in call.outputs if v in self.aliases)
        batch = "steps" if segment.runs == "run" else "batch"
        specs = {
            o: self._spec(node, dtype, batch)
            for o, node, dtype in zip(outputs, _results_of(module), dtypes, strict=True)
        }
        # Whole numbers come with the prompt: a pipeline hands them in beside it.
        by_prompt = any(
            i.changes == "shape" for n, i in self.cut.inputs.items() if n in call.inputs
        )
        graph = Graph(
            segment.name, "prompt" if by_prompt else MOMENTS[segment.runs], made, inputs, specs, prefix, precision,
            dropped=(FEATURE,) if tapped else hidden_tables,
        )  # fmt: skip
        if not tapped or signal is None:
            return [graph]
        whole = Graph(f"{segment.name}_tapped", "block", made, inputs, specs, prefix, precision)
        looked_at, _ = typed(
            _only(module, signal), given, precision=None, stored=stored,
            batch=self.batch, names=names, returned={}, drop_unread=True,
        )  # fmt: skip
        read = [n.name for n in looked_at.graph.nodes if n.op == "placeholder"]
        modulate = Graph(
            "modulate", "signal", looked_at, {n: inputs[n] for n in read},
            {SIGNAL: self._spec(signal, torch.float32)}, block_prefix,
        )  # fmt: skip
        return [modulate, graph, whole]

    def _argument_spec(self, node: fx.Node, value: str, dtype: torch.dtype) -> TensorSpec:
        """Return what a graph takes: of a table its step's row, of a whole number its indices."""
        declared = self.cut.inputs.get(value)
        if declared is not None:
            return self._inputs()[self.words[value]].spec
        made = self.maker.get(value)
        is_row = made is not None and self._runs(made) == "run"
        return self._spec(node, dtype, 1 if is_row else "batch")

    def _prefixes(self, call: Call) -> tuple[str, str]:
        """Return what precedes weights' names: for any block, and for the first."""
        if not call.block:
            return "", ""
        path, _, _ = call.block.rpartition(".")
        return f"{path}.{{block}}.", f"{call.block}."

    def _stages(self, tapped: str) -> tuple[Stage, ...]:
        context = {
            c.block: c.segment for c in self.cut.calls if c.block and self._runs(c) == "context"
        }
        stages = []
        for segment, group in groupby(self.blocks, key=lambda call: call.segment):
            calls = list(group)
            first = int(calls[0].block.rpartition(".")[2])
            prefix = next(c for c in self.blocks if c.segment == segment).block.rpartition(".")[0]
            for i, call in enumerate(calls):
                if call.block != f"{prefix}.{first + i}":
                    self._refuse("shares a graph between lists of blocks", [prefix, call.block])
            stages.append(
                Stage(
                    segment,
                    context.get(calls[0].block),
                    f"{segment}_tapped" if segment == tapped else None,
                    len(calls),
                    first,
                )
            )
        return tuple(stages)


def _arguments(segment: Segment) -> list[fx.Node]:
    return [node for node in segment.module.graph.nodes if node.op == "placeholder"]


def _results(segment: Segment) -> list[fx.Node]:
    return _results_of(segment.module)


def _results_of(module: fx.GraphModule) -> list[fx.Node]:
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    found: Any = output.args[0]
    return list(found)


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = value_of(node)
    return tuple(map(expression_of, value.shape)) if isinstance(value, Tensor) else ()


def _only(module: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    """Return a graph that returns one node's value alone."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for one in module.graph.nodes:
        if one.op == "output":
            continue
        copies[one] = graph.node_copy(one, copies.__getitem__)
        if one is node:
            break
    graph.output((copies[node],))
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph, class_name="modulate")
