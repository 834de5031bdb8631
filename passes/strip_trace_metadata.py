# SPDX-License-Identifier: Apache-2.0
"""Remove what the exporter recorded about the machine and the source that a graph came from."""

from __future__ import annotations

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
        graph = model.graph
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            values.extend(node.outputs)
        carriers = [model, graph, *graph, *values]
        changed = False
        for carrier in carriers:
            if carrier.metadata_props or carrier.doc_string:
                carrier.metadata_props.clear()
                carrier.doc_string = None
                changed = True
        return PassResult(model, changed)
