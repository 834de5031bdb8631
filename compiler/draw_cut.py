# SPDX-License-Identifier: Apache-2.0
"""Draw a cut: tables for a terminal, a Mermaid chart for a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .forecast.tables import draw_table, operations

__all__ = ["mermaid", "render_cut"]

MOMENTS = {
    "shape": "once per shape",
    "prompt": "once per prompt",
    "run": "once per run, all steps",
    "context": "once per prompt and block",
    "modulation": "once per run and block, all steps",
    "step": "every step",
    "block": "computed steps",
}
"""When a segment runs, as a reader is told."""


def render_cut(data: Mapping[str, Any]) -> list[str]:
    """Turn what `describe` tells of a cut into lines for people."""
    sizes = ", ".join(f"{name} {size}" for name, size in data["sizes"].items())
    segments = [
        [s["name"], MOMENTS[s["runs"]], s["calls"], _count(s["weights"]), _count(s["flops"])]
        for s in data["segments"]
    ]
    ahead = [
        [
            MOMENTS[runs],
            _count(one["weights"]),
            f"{one['weights_share']:.1%}",
            _count(one["flops"]),
            f"{one['flops_share']:.2%}",
        ]
        for runs, one in data["ahead"].items()
    ]
    lines = [f"{data['model']} at {sizes}", ""]
    lines += draw_table("segments", ["segment", "runs", "calls", "weights", "FLOPs"], segments)
    for s in data["segments"]:
        lines += [f"{s['name']}: {', '.join(s['inputs'])}", f"    → {', '.join(s['outputs'])}"]
    lines += ["", "stages"]
    for s in data["stages"]:
        parts = [s[part] for part in ("context", "modulation", "block") if part in s]
        lines.append(f"  {s['count']} blocks from {s['first']}: {', '.join(parts)}")
    columns = ["computed", "weights", "of all", "FLOPs", "of a step"]
    return [*lines, "", *draw_table("not computed in a step", columns, ahead)]


def _count(number: int) -> str:
    """Spell a count with its unit; nothing for none."""
    return operations(number) if number else ""


def mermaid(data: Mapping[str, Any]) -> str:
    """Return a chart of a cut's segments, grouped by when they run, and the values between them."""
    counts = {s["block"]: s["count"] for s in data["stages"]}
    lines = ["flowchart LR", "  inputs([inputs])"]
    for runs, when in MOMENTS.items():
        own = [s["name"] for s in data["segments"] if s["runs"] == runs]
        if own:
            lines.append(f'  subgraph {runs}_ ["{when}"]')
            lines += [
                f'    {name}["{name} × {counts[name]}"]' if name in counts else f"    {name}"
                for name in own
            ]
            lines.append("  end")
    lines.append("  results([results])")
    lines += [
        f'  {source} -->|"{", ".join(names)}"| {reader}' for source, reader, names in data["edges"]
    ]
    return "\n".join(lines)
