# SPDX-License-Identifier: Apache-2.0
"""Drawings of a cut hold what its description says."""

from __future__ import annotations

from typing import Any

from freewheel.compiler.draw_cut import mermaid, render_cut

DATA: dict[str, Any] = {
    "model": "Model",
    "sizes": {"batch": 1, "tokens": 64},
    "segments": [
        {
            "name": "prompt", "runs": "prompt", "calls": 1, "weights": 1500, "flops": 0,
            "inputs": ["text"], "outputs": ["embedded"],
        },
        {
            "name": "block", "runs": "block", "calls": 3, "weights": 3_000_000, "flops": 2_000_000,
            "inputs": ["x", "embedded"], "outputs": ["x"],
        },
    ],
    "stages": [{"first": "blocks.0", "count": 3, "block": "block"}],
    "ahead": {
        "prompt": {"weights": 1500, "weights_share": 0.25, "flops": 0, "flops_share": 0.0}
    },
    "edges": [
        ["inputs", "prompt", ["text"]], ["prompt", "block", ["embedded"]],
        ["block", "block", ["x"]], ["block", "results", ["x"]],
    ],
}  # fmt: skip


def test_lines_tell_sizes_segments_stages_and_what_is_done_ahead() -> None:
    text = "\n".join(render_cut(DATA))
    assert "Model at batch 1, tokens 64" in text
    assert "3.00 M" in text
    assert "block: x, embedded\n    → x" in text
    assert "3 blocks from blocks.0: block" in text
    assert "25.0%" in text


def test_a_chart_groups_segments_by_when_they_run() -> None:
    lines = mermaid(DATA).splitlines()
    assert lines[0] == "flowchart LR"
    assert '  subgraph prompt_ ["once per prompt"]' in lines
    assert '    block["block × 3"]' in lines
    assert '  block -->|"x"| results' in lines
