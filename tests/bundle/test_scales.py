# SPDX-License-Identifier: Apache-2.0
"""A weight in float8 has the scale of its rows beside it, under a name that no checkpoint has."""

from __future__ import annotations

from freewheel.bundle.reader import Bundle
from freewheel.bundle.scales import KEPT, scale_name


def test_graphs_take_every_float8_weight_with_the_scale_of_its_rows(float8_bundle: Bundle) -> None:
    tensors = float8_bundle.manifest.tensors
    kept = [n for n, entry in tensors.items() if entry.dtype == KEPT]
    assert len(kept) == 30
    assert scale_name("ffn.net.2.weight") == "ffn.net.2.weight_row_scale"
    for name in kept:
        scale = tensors[scale_name(name)]
        assert (scale.dtype, scale.shape) == ("float32", [tensors[name].shape[0], 1])
    for name, graph in float8_bundle.manifest.graphs.items():
        taken = set(graph.weights.values())
        of_float8 = {p for p in taken if p.replace("{block}", "0") in kept}
        assert {scale_name(p) for p in of_float8} <= taken, name
