# SPDX-License-Identifier: Apache-2.0
"""Remove what the exporter recorded about the machine and the source that a graph came from."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from .base import Pass, PassResult

__all__ = ["StripTraceMetadata"]


class StripTraceMetadata(Pass):
    """Clear metadata and doc strings of model, graph, nodes and values.

    The exporter writes stack traces with local paths; without them equal models give equal bytes
    on every machine, so that bundles of two fine-tunes share their graphs.
    """

    def run(self, model: ir.Model) -> PassResult:
        """Clear them."""
        changed = False
        for carrier in [model, *carriers_of(model.graph)]:
            if carrier.metadata_props or carrier.doc_string:
                carrier.metadata_props.clear()
                carrier.doc_string = None
                changed = True
        return PassResult(model, changed)


def carriers_of(graph: ir.Graph) -> Iterator[ir.Graph | ir.Node | ir.Value]:
    """Yield everything of a graph that can carry metadata, inside branches and loops too."""
    for part in (graph, *graph.subgraphs()):
        yield part
        yield from part.inputs
        yield from part.initializers.values()
        for node in part:
            yield node
            yield from node.outputs
