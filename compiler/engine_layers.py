# SPDX-License-Identifier: Apache-2.0
"""What a builder made of a graph: the nodes its parser saw, the layers that run, what got fused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["attention_of", "engine_rows", "layer_rows"]

ENGINE_COLUMNS = ("engine", "bytes", "seconds", "nodes", "layers", "attention fused", "scratch")
LAYER_COLUMNS = ("layer", "type", "nodes of the graph")
FUSED = "mha"
"""What names of kernels that compute a whole attention hold."""

LONGEST = 40


def attention_of(details: Mapping[str, Any]) -> dict[str, Any] | None:
    """Count attention nodes, and the kernels that each compute one whole.

    Args:
        details: What an engine recorded about itself.

    Returns:
        ``nodes``, ``fused`` and ``kernels``; None where the backend tells no layers.
    """
    if "layers" not in details:
        return None
    kernels = [layer["kernel"] for layer in details["layers"] if FUSED in layer["kernel"]]
    nodes = details["nodes"].get("Attention", 0)
    return {"nodes": nodes, "fused": len(kernels), "kernels": sorted(set(kernels))}


def engine_rows(
    graphs: Mapping[str, Mapping[str, Any]], amount: Any
) -> list[Sequence[str | int | float]]:
    """Return a row of `ENGINE_COLUMNS` for each engine that tells its layers.

    Args:
        graphs: Graph name → what `describe_engines` found.
        amount: Spells a count of bytes.
    """
    rows: list[Sequence[str | int | float]] = []
    for name, engine in graphs.items():
        attention, details = engine["attention"], engine["details"]
        if attention is None:
            continue
        fused = f"{attention['fused']} of {attention['nodes']}" if attention["nodes"] else "–"
        scratch = details["activation_bytes"]
        rows.append(
            (
                name,
                amount(engine["bytes"]),
                engine["seconds"],
                sum(details["nodes"].values()),
                engine["layers"],
                fused,
                "–" if scratch is None else amount(scratch),
            )
        )
    return rows


def layer_rows(details: Mapping[str, Any]) -> list[Sequence[str]]:
    """Return a row of `LAYER_COLUMNS` for each layer, in the order they run."""
    return [
        (_short(layer["name"]), layer["type"], ", ".join(layer["nodes"]) or "–")
        for layer in details["layers"]
    ]


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
