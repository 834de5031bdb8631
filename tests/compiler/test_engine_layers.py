# SPDX-License-Identifier: Apache-2.0
"""Layers are told from what an engine recorded."""

from __future__ import annotations

from freewheel.compiler.engine_layers import attention_of, engine_rows, layer_rows

LAYERS = [
    {"name": "_gemm_mha_v2_1", "type": "kgen", "kernel": "_gemm_mha_v2_0x1", "nodes": ["attend"]},
    {"name": "n" * 60, "type": "gemm", "kernel": "stub", "nodes": ["up", "bias"]},
    {"name": "cast", "type": "kgen", "kernel": "", "nodes": []},
]
DETAILS = {"nodes": {"Attention": 2, "MatMul": 3}, "layers": LAYERS, "activation_bytes": 2000}


def test_fused_attention_is_counted_by_its_kernels() -> None:
    assert attention_of(DETAILS) == {"nodes": 2, "fused": 1, "kernels": ["_gemm_mha_v2_0x1"]}
    assert attention_of({**DETAILS, "nodes": {}})["nodes"] == 0
    assert attention_of({"computed_in": "float32"}) is None


def test_engines_that_tell_nothing_have_no_row() -> None:
    told = {
        "bytes": 7,
        "seconds": 0.5,
        "layers": 3,
        "attention": attention_of(DETAILS),
        "details": DETAILS,
    }
    rows = engine_rows({"block": told, "head": {**told, "attention": None}}, str)
    assert rows == [("block", "7", 0.5, 5, 3, "1 of 2", "2000")]
    silent = {**told, "attention": attention_of({**DETAILS, "nodes": {}})}
    silent["details"] = {**DETAILS, "nodes": {}, "activation_bytes": None}
    assert engine_rows({"delta": silent}, str) == [("delta", "7", 0.5, 0, 3, "–", "–")]


def test_layers_come_in_order_with_their_nodes_and_long_names_cut() -> None:
    rows = layer_rows(DETAILS)
    assert rows[0] == ("_gemm_mha_v2_1", "kgen", "attend")
    assert rows[1] == ("n" * 39 + "…", "gemm", "up, bias")
    assert rows[2][2] == "–"
