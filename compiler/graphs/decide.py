# SPDX-License-Identifier: Apache-2.0
"""Trace a guarded policy to the ONNX graph ``decide.<policy>``."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import onnx_ir as ir
import torch

from ...bundle.manifest import GraphEntry, IoEntry
from ...bundle.store import NO_STORE, Store
from ...core.errors import ExportError
from ...engines.base import TensorSpec
from ...passes import run_passes, template_pipeline
from ...policies.base import Policy
from ...policies.guard import Guarded, Shape, decide_inputs, decide_outputs
from ..code_version import code_version
from .export import OPSET, exporting

__all__ = ["decide_program", "write_decide_graph"]

EXAMPLE_SIZES = {"rows": 3, "width": 8, "frames": 4, "tokens_per_frame": 5, "channels": 6}


def decide_program(policy: Policy) -> ir.Model:
    """Trace a policy with its guard.

    The graph's inputs are those of `decide_inputs` which something reads: TensorRT drops the
    others and ONNX Runtime keeps them, so they are dropped here, once. Its outputs are all those of
    `decide_outputs`.

    Args:
        policy: The law.

    Returns:
        An optimised graph with dynamic signal and feature sizes.

    Raises:
        ExportError: torch could not export the law; most often a Python branch on a tensor's value.
    """
    return _program(type(policy)).clone()  # type: ignore[arg-type]  # a class is hashable


@cache
def _program(policy_class: type[Policy]) -> ir.Model:
    """Trace a law once in a process: it is a class's, and holds no weights."""
    policy = policy_class()
    inputs, outputs = decide_inputs(policy.spec), decide_outputs(policy.spec)
    example = {name: _example(dtype, shape) for name, (dtype, shape) in inputs.items()}
    dynamic = {
        name: {i: torch.export.Dim.DYNAMIC for i, size in enumerate(shape) if isinstance(size, str)}
        for name, (_, shape) in inputs.items()
    }
    try:
        with exporting():
            program = torch.onnx.export(
                Guarded(policy).eval(),
                kwargs={"inputs": example},
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes={"inputs": dynamic},
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"graph 'decide.{policy.spec.name}'",
            f"torch could not export the policy: {error}",
            "use torch operations only in 'decide', and no Python branch on a tensor's value",
        ) from error
    assert program is not None, "torch.onnx.export(dynamo=True) returns a program"
    model, _ = run_passes(program.model, template_pipeline([], _specs(inputs), _specs(outputs)))
    model.graph.name = f"decide.{policy.spec.name}"
    for value in [v for v in model.graph.inputs if not v.uses()]:
        model.graph.inputs.remove(value)
    return model


def write_decide_graph(policy: Policy, bundle: Path, store: Store = NO_STORE) -> GraphEntry:
    """Trace a policy, write ``graphs/decide.<policy>.onnx``, and describe it.

    Args:
        policy: The law.
        bundle: The bundle's folder; has a folder ``graphs``.
        store: Where graphs are kept.

    Returns:
        The manifest entry; its inputs are exactly the graph's.

    Raises:
        ExportError: torch could not export the law.
    """
    file = f"graphs/decide.{policy.spec.name}.onnx"
    law = type(policy)
    source = hashlib.sha256(Path(inspect.getfile(law)).read_bytes()).hexdigest()
    store.bring(
        ["decide", code_version(), law.__module__, law.__qualname__, source],
        bundle / file,
        lambda out: ir.save(decide_program(policy), out),
    )
    present = {str(value.name) for value in ir.load(bundle / file).graph.inputs}
    inputs, outputs = decide_inputs(policy.spec), decide_outputs(policy.spec)
    return GraphEntry(
        file=file,
        runs="decide",
        inputs={n: IoEntry(dtype=d, shape=list(s)) for n, (d, s) in inputs.items() if n in present},
        outputs={n: IoEntry(dtype=d, shape=list(s)) for n, (d, s) in outputs.items()},
    )


def _specs(declared: Mapping[str, tuple[str, Shape]]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(dtype, shape) for name, (dtype, shape) in declared.items()}


def _example(dtype: str, shape: Shape) -> torch.Tensor:
    sizes = [EXAMPLE_SIZES[size] if isinstance(size, str) else size for size in shape]
    return torch.ones(sizes, dtype=getattr(torch, dtype))
