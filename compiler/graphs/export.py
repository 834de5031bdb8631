# SPDX-License-Identifier: Apache-2.0
"""Trace a segment to ONNX without ever holding its weights.

The module lives on the ``meta`` device, so tracing costs no memory; its parameters come out as
initializers without data, which the passes then turn into graph inputs (block templates) or into
references to the bundle's weight files (baked form).
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from functools import cache

import onnx_ir as ir
import torch
from torch import fx

from ...core.errors import ExportError
from ...engines.base import TensorSpec
from ..cut.declared import Segment

__all__ = ["OPSET", "exporting", "trace"]

OPSET = 23
"""First opset with `Attention`, `RotaryEmbedding` and `RMSNormalization`."""

ATEN = torch.ops.aten

CHECKS = frozenset(
    {
        ATEN._assert_async.default,
        ATEN._assert_async.msg,
        ATEN._assert_scalar.default,
        ATEN._assert_tensor_metadata.default,
        ATEN.sym_constrain_range_for_size.default,
    }
)
"""Operators that give nothing: no graph of ONNX has them."""

SYNONYMS = {
    ATEN.__and__.Tensor: ATEN.bitwise_and.Tensor,
    ATEN.__or__.Tensor: ATEN.bitwise_or.Tensor,
}

BATCH_DIMS = {"batch": 2, "text_tokens": 11, "image_tokens": 13, "steps": 5, "slots": 3}


def trace(segment: Segment, example_dims: Mapping[str, int]) -> ir.Model:
    """Trace ``segment`` with every named dimension dynamic.

    Args:
        segment: What to trace.
        example_dims: Sizes of the family's own dimensions to trace with (any will do that its
            patches divide).

    Returns:
        The traced model, unoptimised: parameters are initializers without data.

    Raises:
        ExportError: torch could not export the module.
    """
    sizes = {**BATCH_DIMS, **example_dims}
    example = {n: _example(s, sizes) for n, s in segment.inputs.items()}
    dynamic = {
        n: {
            i: torch.export.Dim.DYNAMIC if d in BATCH_DIMS else torch.export.Dim.AUTO
            for i, d in enumerate(s.shape)
            if isinstance(d, str)
        }
        for n, s in segment.inputs.items()
    }
    names = list(segment.inputs)
    try:
        with exporting():
            program = torch.onnx.export(
                segment.module.eval(),
                kwargs=example,
                input_names=names,
                output_names=list(segment.outputs),
                dynamic_shapes=dynamic,
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"segment '{segment.name}'",
            f"torch could not export it: {error}",
            "report this with the model's config",
        ) from error
    assert program is not None, "torch.onnx.export(dynamo=True) returns a program"
    return program.model


def _example(spec: TensorSpec, sizes: Mapping[str, int]) -> torch.Tensor:
    shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
    return torch.empty(shape, dtype=getattr(torch, spec.dtype), device="meta")


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Let `torch.onnx.export` neither talk nor make what nobody reads, nor anything twice."""
    with (
        warnings.catch_warnings(),
        _quiet(),
        _without_stack_traces(),
        _one_operator_registry(),
        _operators_listed_once(),
        _traced_once(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own progress lines out of ours."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Note no Python stack at each node: the passes strip them (a twentieth of an export)."""
    from torch.fx import config

    previous = getattr(config, "do_not_emit_stack_traces", False)
    config.do_not_emit_stack_traces = True  # unknown to older releases of torch, which ignore it
    try:
        yield
    finally:
        config.do_not_emit_stack_traces = previous


@contextlib.contextmanager
def _one_operator_registry() -> Iterator[None]:
    """Let exports of one process share torch's operator registry.

    `torch.onnx.export` builds it anew each time (2 of 3 seconds of a small export, torch 2.13).
    Should torch move it, exports are slower and nothing else.
    """
    from torch.onnx._internal.exporter import _registration

    registry_class = getattr(_registration, "ONNXRegistry", None)
    original = getattr(registry_class, "from_torchlib", None)
    if registry_class is None or original is None:
        yield
        return
    registry_class.from_torchlib = classmethod(
        lambda cls, **options: _registry(original, **options)
    )
    try:
        yield
    finally:
        registry_class.from_torchlib = original


@contextlib.contextmanager
def _operators_listed_once() -> Iterator[None]:
    """Let an export list torch's composite operators once.

    `run_decompositions` lists all of them again for each namespace: 57 times in a twentieth of an
    export (torch 2.13). Should torch move it, exports are slower and nothing else.
    """
    from torch._export import utils

    name = "_materialize_cpp_cia_ops"
    original = getattr(utils, name, None)
    if original is None:
        yield
        return
    setattr(utils, name, cache(original))
    try:
        yield
    finally:
        setattr(utils, name, original)


@contextlib.contextmanager
def _traced_once() -> Iterator[None]:
    """Let an export whose operators ONNX has all leave out decomposition, which traces it again.

    That is half of an export (torch 2.13). Should torch move it, exports are slower and nothing else.
    """
    from torch.onnx._internal.exporter import _decomp, _fx_passes

    name = "decompose_with_registry"
    original = getattr(_fx_passes, name, None)
    implemented = getattr(_decomp, "get_onnx_implemented_overloads", None)
    if original is None or implemented is None:
        yield
        return

    def decompose(program: torch.export.ExportedProgram, registry: object) -> object:
        _spell_as_onnx_does(program.graph_module.graph)
        known = set(implemented(registry))
        is_left = all(_is_known(node, known) for node in program.graph_module.graph.nodes)
        return program if is_left else original(program, registry)

    setattr(_fx_passes, name, decompose)
    try:
        yield
    finally:
        setattr(_fx_passes, name, original)


def _spell_as_onnx_does(graph: fx.Graph) -> None:
    """Write operators as torch's translation to ONNX knows them, and drop checks of sizes."""
    for node in list(graph.nodes):
        if node.target in CHECKS:
            graph.erase_node(node)
        elif node.target in SYNONYMS:
            node.target = SYNONYMS[node.target]
        elif node.target is ATEN.to.dtype and len(node.args) == 2 and not node.kwargs:
            value, dtype = node.args
            node.target, node.args, node.kwargs = ATEN._to_copy.default, (value,), {"dtype": dtype}
    graph.eliminate_dead_code()


def _is_known(node: fx.Node, known: Container[object]) -> bool:
    """Tell whether a node can be translated as it stands."""
    if node.op != "call_function":
        return node.op != "call_module"
    if not isinstance(node.target, torch._ops.OpOverload):  # computes with sizes
        return getattr(node.target, "__module__", None) in ("_operator", "math")
    is_known = node.target.namespace == "onnx" or node.target in known
    return is_known and not node.target._schema.is_mutable


@cache
def _registry(build: Callable[..., object], **options: object) -> object:
    return build(**options)
