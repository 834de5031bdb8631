# SPDX-License-Identifier: Apache-2.0
"""Trace a diffusers transformer's own `forward`, once, into one graph with symbolic sizes.

No weight is loaded or allocated, and of a run of equal blocks the first two alone are traced. The
graph is functional (no operation writes into its inputs), and composite operations (`linear`,
`layer_norm`, `scaled_dot_product_attention`) stay whole in it.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sympy
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.utils import _pytree as pytree

from ...bundle.streams import LATENTS
from ...core.errors import ExportError
from .patch import patched
from .row import Ignored, Input, OfConfig, Row, Same, size_expression
from .symbolic import symbolic_python

__all__ = [
    "Assumption",
    "Trace",
    "by_path",
    "example",
    "filled",
    "hint",
    "leaves_of",
    "results_of",
    "skeleton",
    "tensors_of",
    "trace",
    "value_of",
]

ASSERTING_MODULES = (
    "torch._export.utils",
    "torch.export.exported_program",
    "torch.fx.passes.runtime_assert",
)
"""Where torch writes an assertion into a graph for each assumption about sizes."""

KEPT = 2
"""Blocks traced of a run of equal ones: what the second reads of the first, each reads of the one
before it."""


@dataclass(frozen=True)
class Assumption:
    """A branch that Python took on a size: the graph is right where ``condition`` holds.

    Attributes:
        condition: Over the names of `models.SIZES`.
        where: Source file and line.
        by_model: Whether the model's source asks, not an operation of torch's.
    """

    condition: sympy.Basic
    where: str
    by_model: bool = False


@dataclass
class Trace:
    """A transformer's forward as one graph.

    Attributes:
        model: The shortened transformer; its parameters have no storage.
        graph: Every node's ``meta["val"]`` is a fake tensor or a symbolic size.
        inputs: Placeholder → name of the input (argument, and place in it where that is nested).
        declared: Placeholder → its row's declaration.
        examples: Placeholder → the value that it was traced with.
        weights: Placeholder → name in the checkpoint.
        constants: Placeholder → value, of buffers and tensors that no checkpoint holds.
        results: What `forward` returns.
        mode: Makes fake tensors of the graph's sizes.
        symbols: Symbolic size → the row's expression for it.
        domain: What tracing took for granted about sizes.
        runs: Block → number of blocks that it stands for, itself included.
    """

    model: nn.Module
    graph: fx.Graph
    inputs: dict[fx.Node, str]
    declared: dict[fx.Node, Input]
    examples: dict[fx.Node, Any]
    weights: dict[fx.Node, str]
    constants: dict[fx.Node, Tensor]
    results: tuple[fx.Node, ...]
    mode: FakeTensorMode
    symbols: dict[sympy.Symbol, sympy.Basic]
    domain: tuple[Assumption, ...]
    runs: dict[str, int]


class Watched(nn.Module):
    """A transformer that also returns what each of its blocks returns.

    A last block's text stream, which nobody reads, would be removed as dead code there and nowhere
    else, and the last block would not be equal to the others.

    What it writes in place is traced as operations that write nowhere, in the same pass:
    `run_decompositions` would trace the whole graph twice more.
    """

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.arguments = arguments

    def forward(self, leaves: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the transformer's results and every block's."""
        mode = FunctionalTensorMode(pre_dispatch=True, export=True)
        returned: tuple[list[Tensor], list[Tensor]] = dispatch_functionalize(self.run, mode)(leaves)
        return returned

    def run(self, leaves: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Run the transformer, watched."""
        kept: list[Tensor] = []
        entries = [
            entry
            for module in self.model.modules()
            if isinstance(module, nn.ModuleList)
            for entry in module
        ]
        hooks = [
            entry.register_forward_hook(lambda _module, _inputs, out: kept.extend(tensors_of(out)))
            for entry in entries
        ]
        try:
            results = self.model(**filled(self.arguments, leaves))
        finally:
            for hook in hooks:
                hook.remove()
        return results_of(results), kept


def is_leaf(value: object) -> bool:
    """Say whether an argument's nesting ends here."""
    return isinstance(value, Input) or value is None


def tensors_of(values: Any) -> list[Tensor]:
    """Return the tensors of a nested value, in order."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def filled(arguments: Mapping[str, Any], leaves: Iterable[Any]) -> dict[str, Any]:
    """Return `forward`'s arguments with a value in place of each `Input`, in order."""
    given = iter(leaves)
    found: dict[str, Any] = pytree.tree_map(
        lambda leaf: leaf.argument(next(given)) if isinstance(leaf, Input) else leaf,
        dict(arguments),
        is_leaf=is_leaf,
    )
    for name, declared in arguments.items():
        if isinstance(declared, Input) and declared.over is not None:
            argument, dimension = declared.over
            times = found[argument].shape[dimension]
            found[name] = found[name].unsqueeze(-1).expand(-1, times)
    return {n: found[v.argument] if isinstance(v, Same) else v for n, v in found.items()}


def results_of(values: Any) -> list[Tensor]:
    """Return what a transformer returns; a list with each sample's result is one tensor."""
    returned = values if isinstance(values, tuple) else (values,)
    return [torch.stack(v) if isinstance(v, list) else v for v in returned if v is not None]


def leaves_of(row: Row, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Input]]:
    """Return `forward`'s arguments for a config, and their inputs by name (``img_shapes.0.1``)."""
    arguments: dict[str, Any] = {
        name: value for name, value in row.inputs.items() if _is_taken(value, config)
    }
    fixed = {name: str(value) for name, (key, value) in row.fixed.items() if config.get(key)}

    def at_config(leaf: Any) -> Any:
        if isinstance(leaf, OfConfig):
            return leaf.number(config)
        return leaf.with_fixed(fixed) if isinstance(leaf, Input) else leaf

    arguments = pytree.tree_map(at_config, arguments, is_leaf=is_leaf)
    named = {path: leaf for path, leaf in by_path(arguments) if isinstance(leaf, Input)}
    return {**arguments, "return_dict": False}, named


def by_path(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what arguments are made of, by its place in them: ``img_shapes.0.1``."""
    leaves, _ = pytree.tree_flatten_with_path(dict(arguments), is_leaf=is_leaf)
    for path, leaf in leaves:
        yield ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), leaf


def _is_taken(argument: Any, config: Mapping[str, Any]) -> bool:
    """Say whether a model of a config takes an argument: one that has no input, or one that it takes."""
    if isinstance(argument, Ignored):
        return False
    inputs = [i for i in pytree.tree_leaves(argument, is_leaf=is_leaf) if isinstance(i, Input)]
    return not inputs or any(i.needs is None or config.get(i.needs) for i in inputs)


def example(
    declared: Input,
    config: Mapping[str, Any],
    sizes: Mapping[str, int],
    generator: torch.Generator,
) -> Any:
    """Return values for an input at given sizes: a tensor, or a whole number."""
    shape = declared.dimensions(config, sizes)
    dtype = getattr(torch, declared.dtype)
    if declared.changes == "shape":
        return shape[0]
    if declared.fill == "mask":  # each batch element has fewer ones than the one before it
        ones = torch.tensor([max(shape[-1] - 2 * i, 1) for i in range(shape[0])])
        return (torch.arange(shape[-1]) < ones[:, None]).reshape(shape).to(dtype)
    if declared.fill in ("timestep", "fraction"):
        values = torch.tensor([437.0 if one == LATENTS else 211.0 for one in declared.of])
        return (values if declared.fill == "timestep" else values / 1000).expand(shape).to(dtype)
    if declared.fill == "places":
        (before,) = replace(declared, shape=declared.behind).dimensions(config, sizes)
        return (before + torch.randperm(shape[0], generator=generator)).to(dtype)
    if declared.fill == "positions":
        return torch.randint(0, 9, shape, generator=generator).to(dtype)
    if isinstance(declared.fill, int):
        return torch.randint(0, declared.fill, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def skeleton(
    model_class: Any, config: Mapping[str, Any], whole: Collection[str] | None = ()
) -> tuple[nn.Module, dict[str, int]]:
    """Make a transformer whose weights have no storage, with two blocks of each run of equal ones.

    Args:
        model_class: A diffusers transformer.
        config: Its config.
        whole: Lists of blocks to leave as they are; None leaves all.

    Returns:
        The model, and block → number of blocks that it stands for. Blocks keep their names.
    """
    with _WeightsOnMeta():
        model = model_class.from_config(dict(config)).eval()
    runs = {} if whole is None else _shorten(model, whole)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                with mode:
                    fake = torch.empty(parameter.shape, dtype=torch.float32)
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
    return model, runs


class _WeightsOnMeta(torch.overrides.TorchFunctionMode):
    """Layers allocate weights by `torch.empty`; buffers, which are computed, keep their values."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.empty:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists that may hold blocks, by path: those that lie in no other list."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not path.startswith(tuple(f"{p}." for p in found)):
            found[path] = module
    return found


def _shorten(model: nn.Module, whole: Collection[str]) -> dict[str, int]:
    """Drop all blocks but two of each run of equal ones."""
    runs: dict[str, int] = {}
    for path, blocks in block_lists(model).items():
        if path in whole:
            continue
        for _, same in groupby(list(blocks._modules.items()), key=lambda item: _form(item[1])):
            names = [name for name, _ in same]
            if len(names) > KEPT:
                runs[f"{path}.{names[KEPT - 1]}"] = len(names) - KEPT + 1
                for name in names[KEPT:]:
                    del blocks._modules[name]
    return runs


def _form(module: nn.Module | None) -> tuple[Any, ...]:
    """Return what makes two blocks equal before they are traced: classes, settings, weights' shapes."""
    plain = (bool, int, float, str, tuple, type(None))
    return tuple(
        (
            name,
            type(part),
            [(k, v) for k, v in vars(part).items() if isinstance(v, plain) and k != "training"],
            [(k, tuple(p.shape)) for k, p in part.named_parameters(recurse=False)],
        )
        for name, part in (module.named_modules() if module is not None else ())
    )


def trace(
    row: Row, model_class: Any, config: Mapping[str, Any], whole: Collection[str] | None = ()
) -> Trace:
    """Trace a transformer's own forward.

    Args:
        row: What it takes.
        model_class: The diffusers class.
        config: Its config.
        whole: Lists of blocks to trace all of; None traces all of every list.

    Raises:
        ExportError: torch can't trace it.
    """
    with patched(model_class, row.patches):
        model, runs = skeleton(model_class, config, None if row.whole else whole)
    config = {**getattr(model, "config", {}), **config}
    arguments, named = leaves_of(row, config)
    generator = torch.Generator().manual_seed(0)
    sizes = row.sizes(config)
    leaves = [example(declared, config, sizes, generator) for declared in named.values()]
    automatic = torch.export.Dim.AUTO
    dynamic = [
        (automatic if declared.dynamic() else None)
        if declared.changes == "shape"
        else dict.fromkeys(declared.dynamic(), automatic)
        for declared in named.values()
    ]
    try:
        with (
            _assumptions() as domain,
            symbolic_python(),  # first: a patched method takes its module's names along
            patched(model_class, row.patches),
            torch.no_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            program = torch.export.export(
                Watched(model, arguments),
                (leaves,),
                dynamic_shapes=(dynamic,),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            if not _is_plain(program.graph):
                program = program.run_decompositions({})
            program.graph.eliminate_dead_code()  # views that were made again after a write
    except Exception as error:
        raise ExportError(
            f"transformer '{row.model}'",
            f"torch can't trace its forward: {error}",
            "report this with the model's config",
        ) from error
    return _read(program, model, config, dict(zip(named, leaves, strict=True)), named, runs, domain)


def _is_plain(graph: fx.Graph) -> bool:
    """Say whether no operation writes into a weight or a constant, or holds a graph as autocast does."""
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    schemas = (getattr(target, "_schema", None) for target in targets)
    return not any(
        isinstance(target, torch._ops.HigherOrderOperator) for target in targets
    ) and not any(schema is not None and schema.is_mutable for schema in schemas)


def _read(
    program: torch.export.ExportedProgram,
    model: nn.Module,
    config: Mapping[str, Any],
    examples: Mapping[str, Any],
    named: Mapping[str, Input],
    runs: dict[str, int],
    domain: Iterable[Assumption],
) -> Trace:
    """Sort an exported program's placeholders and results."""
    signature = program.graph_signature
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    inputs, declared, weights, constants = {}, {}, {}, {}
    user_inputs = iter(named.items())
    for spec in signature.input_specs:
        node = placeholders[spec.arg.name]
        kind, target = spec.kind.name, str(spec.target).removeprefix("model.")
        if kind == "USER_INPUT":
            inputs[node], declared[node] = next(user_inputs)
        elif kind == "PARAMETER" or (kind == "BUFFER" and spec.persistent):
            weights[node] = target
        elif kind == "BUFFER":
            constants[node] = model.get_buffer(target)
        else:
            constants[node] = program.constants[str(spec.target)]
    output = next(n for n in program.graph.nodes if n.op == "output")
    structure = program.call_spec.out_spec
    assert structure is not None, "an exported program knows what it returns"
    changed = len(signature.output_specs) - structure.num_leaves
    count = structure.children()[0].num_leaves
    mode = next(v.fake_mode for v in map(value_of, inputs) if hasattr(v, "fake_mode"))
    symbols = _symbols(declared, config)
    return Trace(
        model=model,
        graph=program.graph,
        inputs=inputs,
        declared=declared,
        examples={node: examples[name] for node, name in inputs.items()},
        weights=weights,
        constants=constants,
        results=tuple(output.args[0][changed : changed + count]),
        mode=mode,
        symbols=symbols,
        domain=_named(domain, symbols, mode.shape_env),
        runs=runs,
    )


def value_of(node: fx.Node) -> Any:
    """Return a node's fake tensor or symbolic size."""
    return node.meta.get("val")


def hint(extent: Any) -> Any:
    """Return a size's value at the traced sizes; a number as it is."""
    return extent.node.hint if hasattr(extent, "node") else extent


def _symbols(
    declared: Mapping[fx.Node, Input], config: Mapping[str, Any]
) -> dict[sympy.Symbol, sympy.Basic]:
    """Name each symbolic size by the expression that a row gives for it."""
    names: dict[sympy.Symbol, sympy.Basic] = {}
    for node, one in declared.items():
        value = value_of(node)
        for word, extent in zip(one.shape.split(), getattr(value, "shape", (value,)), strict=True):
            if isinstance(extent, torch.SymInt) and extent.node.expr.is_Symbol:
                names.setdefault(extent.node.expr, size_expression(word, config))
    return names


def _named(
    domain: Iterable[Assumption], symbols: Mapping[sympy.Symbol, sympy.Basic], environment: Any
) -> tuple[Assumption, ...]:
    """Write assumptions over a row's sizes; those that its names already say are left out."""
    upper = {s: environment.var_to_range[s].upper for s, name in symbols.items() if name.is_Symbol}
    limits = [
        Assumption(sympy.Le(symbol, most), "a table's length")
        for symbol, most in upper.items()
        # `torch.as_tensor(size)` bounds a size by the traced one; proofs go beyond that one.
        if most.is_Integer and most < MOST and most != environment.backed_var_to_val.get(symbol)
    ]
    equal = dict(environment.replacements)
    named = [
        replace(one, condition=one.condition.xreplace(equal).xreplace(symbols))
        for one in (*domain, *limits)
    ]
    return tuple(one for one in named if one.condition != sympy.true)


@contextlib.contextmanager
def _assumptions() -> Iterator[list[Assumption]]:
    """Collect what is taken for granted about sizes, where torch would write assertions of it."""
    found: dict[Any, Assumption] = {}
    collected: list[Assumption] = []

    def collect(_module: Any, environment: Any, *_: Any, **__: Any) -> None:
        for checks in environment.deferred_runtime_asserts.values():
            for check in checks:
                if check.expr not in found:
                    found[check.expr] = _assumption(check.expr, check.stack.summary())

    with contextlib.ExitStack() as stack:
        for name in ASSERTING_MODULES:
            module = importlib.import_module(name)
            if hasattr(module, "insert_deferred_runtime_asserts"):
                stack.enter_context(
                    patch.object(module, "insert_deferred_runtime_asserts", collect)
                )
        yield collected
    collected += (one for one in found.values() if _may_fail(one))


def _assumption(condition: sympy.Basic, frames: Sequence[Any]) -> Assumption:
    """Return an assumption with the innermost line of diffusers that led to it."""
    asked = [f for f in frames if "torch/fx/experimental" not in f.filename]
    asked = [f for f in asked if not f.filename.endswith("torch/__init__.py")]
    inside = [f for f in asked if "/diffusers/" in f.filename]
    where = f"{Path(inside[-1].filename).name}:{inside[-1].lineno}" if inside else ""
    return Assumption(condition, where, by_model=bool(inside) and inside[-1] is asked[-1])


MOST = 2**31

SAMPLES = (1, 2, 3, 8, 100, 5_000, 1_000_000)


def _may_fail(assumption: Assumption) -> bool:
    """Say whether some sizes break an assumption.

    What chooses strides breaks nothing: the graph is right either way (every cut is proved at sizes of 1).
    """
    condition = assumption.condition
    if not assumption.where:  # asked again when the graph was made functional
        return False
    if not assumption.by_model and _chooses_strides(condition):
        return False
    symbols = sorted(assumption.condition.free_symbols, key=str)
    draw = random.Random(0)
    for _ in range(40):
        sizes = {symbol: sympy.Integer(draw.choice(SAMPLES)) for symbol in symbols}
        try:
            if assumption.condition.xreplace(sizes) == sympy.false:
                return True
        except ZeroDivisionError:  # a latent smaller than one patch: no such size is run
            continue
    return False


def _chooses_strides(condition: sympy.Basic) -> bool:
    """Say whether torch asks if extents differ, if one is 0 or 1, or which of two strides is longer."""
    if isinstance(condition, sympy.Ne):
        return True
    if not isinstance(condition, (sympy.Le, sympy.Lt)):
        return False
    sides = (sympy.Mul.make_args(side) for side in condition.args)
    return condition.args[0] == 1 or all(
        type(factor).__name__ == "Max" and 1 in factor.args for side in sides for factor in side
    )
