# SPDX-License-Identifier: Apache-2.0
"""What `freewheel run` writes and says once its loop is over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .screen import Screen

__all__ = ["outcome", "show_outcome", "write_media"]


def write_media(result: Any, out: Path, fps: int) -> list[Path]:
    """Write what came out: frames to ``out``, sound beside them as ``.wav``; return the files."""
    from ..runtime.pipeline.sound import write_sound
    from ..runtime.pipeline.video import write_video

    written = []
    if len(result.frames):
        write_video(result.frames, out, fps)
        written.append(out)
    if result.sound is not None:
        written.append(out.with_suffix(".wav"))
        write_sound(result.sound, written[-1])
    return written


def outcome(
    generator: Any, result: Any, seconds: Mapping[str, float], reference: Any, ranks: int | None
) -> dict[str, Any]:
    """Return what `run` tells of itself, as JSON.

    Args:
        generator: What ran.
        result: Its `Generation`.
        seconds: Of ``load``, ``encode``, ``denoise`` and ``decode``.
        reference: The uncached run of the same request, or None where none was made.
        ranks: Processes that shared the run; None where it ran in one.
    """
    from ..engines.host import peak_memory_bytes

    transformer = generator.transformer
    session, statistics = transformer.session, result.statistics
    told = statistics.as_dict(result.parameters)
    told["warnings"] = [*told["warnings"], *transformer.rank_warnings()]
    return {
        **told,
        "measured_speedup": None if reference is None else result.speedup_over(reference),
        "backend": session.model.backend.name,
        "phase_seconds": dict(seconds),
        "total_seconds": sum(seconds.values()),
        "steps_per_second": statistics.steps / seconds["denoise"] if seconds["denoise"] else None,
        "peak_memory_bytes": peak_memory_bytes(),
        **({} if ranks is None else {"exchange": _exchange(transformer, ranks)}),
    }


def show_outcome(screen: Screen, data: Mapping[str, Any]) -> None:
    """Show warnings, decisions, seconds and memory."""
    for warning in data["warnings"]:
        screen.warn(warning)
    _show_decisions(screen, data)
    steps = data["step_seconds"]
    speed = {
        "computed step s": _seconds(steps["computed"]),
        "reused step s": _seconds(steps["reused"]),
        "ideal speedup": data["ideal_speedup"],
        "estimated speedup": data["estimated_speedup"],
    }
    if data["measured_speedup"] is not None:
        speed["measured speedup"] = data["measured_speedup"]
    screen.table("speed", list(speed), [list(speed.values())])
    segments = [[name, _seconds(taken)] for name, taken in data["seconds"].items()]
    screen.table("seconds by segment", ["segment", "seconds"], segments)
    peak = data["peak_memory_bytes"]
    whole = {
        "backend": data["backend"],
        **{f"{phase} s": taken for phase, taken in data["phase_seconds"].items()},
        "total s": data["total_seconds"],
        "steps/s": data["steps_per_second"],
        "peak memory": None if peak is None else f"{peak / 2**30:.2f} GiB",
    }
    screen.table("whole run", list(whole), [list(whole.values())])
    for shared, sent in data.get("exchange", {}).items():
        if isinstance(sent, dict):
            screen.table(f"bytes that rank 0 sent, {shared}", list(sent), [list(sent.values())])


def _show_decisions(screen: Screen, data: Mapping[str, Any]) -> None:
    rows = []
    for name, branch in data["branches"].items():
        counts = (branch["computed"].count(True), branch["computed"].count(False))
        spread = branch["percentiles"] or {}
        rows.append([name, *counts, *(spread.get(p) for p in ("p25", "p50", "p75", "max"))])
    form = f", {data['form']}" if data["form"] else ""
    folded = " (folded ahead of the loop)" if data["folded"] else ""
    columns = ["branch", "computed", "reused", "distance p25", "p50", "p75", "max"]
    screen.table(f"policy {data['policy']}{form}{folded}", columns, rows)


def _exchange(transformer: Any, ranks: int) -> dict[str, Any]:
    """Return the bytes that a run sent, by what was shared; of two experts, of the last that ran."""
    found: dict[str, Any] = {"ranks": ranks}
    for expert in transformer.experts:
        counts = {name: c.as_dict() for name, c in expert.exchanges.items() if c.formula}
        found |= counts
    return found


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
