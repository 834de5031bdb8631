# SPDX-License-Identifier: Apache-2.0
"""Write one self-contained HTML page about a run or a bench, which fetches nothing.

`report.html` is the page, `report.js` draws it from one JSON object: tables, strips, lines, videos
as pictures, and replays of other settings.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..core.cells import cell
from ..core.errors import RequestError
from ..core.output import write_text
from ..policies import POLICIES
from ..policies.setting import CacheSetting
from ..runtime.pipeline.generate import Generation
from ..runtime.statistics import RunStatistics
from .bench import UNCACHED, BenchReport
from .quality import compare_frames, compare_videos
from .run_recorder import RunRecorder
from .vmaf import vmaf_of_frames
from .what_if import WhatIf, foretell, reached_distances

__all__ = ["write_bench_report", "write_run_report"]

Frames = NDArray[np.uint8]

WIDEST = 640
LOSSLESS_BYTES = 8 << 20
"""Videos up to this size are embedded as they are, larger ones as good pictures."""

EMPTY: dict[str, Any] = {
    "warnings": [], "tables": [], "provenance": [], "videos": [], "videos_text": "", "pareto": [],
    "strips": [], "distance": {"lines": {}, "bound": None, "text": ""}, "changes": {}, "seconds": {},
    "segments": {}, "what_if": [], "what_if_text": "", "own_first": False,
    "step_seconds": {"computed": None, "reused": None, "rest": 0.0, "uncached": 0.0},
}  # fmt: skip
"""What the page's script looks for."""


def write_run_report(
    path: Path,
    *,
    prompt: str,
    result: Generation,
    reference: Generation,
    recorder: RunRecorder,
    uncached: RunRecorder,
    setting: CacheSetting,
    parameters: Mapping[str, Any],
    provenance: Sequence[Sequence[str]] = (),
) -> None:
    """Write the page of one run beside the uncached run of its seed.

    Args:
        path: The HTML file.
        prompt: What was asked for.
        result: The cached run.
        reference: The uncached run of the same request.
        recorder: Watched the cached run.
        uncached: Watched the uncached run; other settings are replayed on its trace.
        setting: What the cached run was given.
        parameters: The policy's resolved parameters.
        provenance: Names and values, as `provenance` returns them.

    Raises:
        OutputError: it can't be written.
    """
    statistics = result.statistics
    told = statistics.as_dict(parameters)
    seconds = {f"{n}, cached": b.seconds for n, b in statistics.branches.items()}
    seconds |= {f"{n}, uncached": b.seconds for n, b in reference.statistics.branches.items()}
    panels, text = _what_if(uncached, setting)
    facts = [
        *provenance,
        ["policy", f"{statistics.policy} {json.dumps(dict(parameters))}"],
        ["guard", json.dumps(setting.guard.model_dump())],
    ]
    page = {
        "title": f"{statistics.policy}: {prompt}",
        "subtitle": "One run, beside the uncached run of its seed.",
        "warnings": told["warnings"],
        "tables": [_summary(result, reference)],
        "provenance": [[n, v] for n, v in facts],
        "videos": [
            _video(UNCACHED, reference.frames),
            _compared(statistics.policy, result.frames, reference.frames),
        ],
        "videos_text": "The uncached run, this one, and their difference.",
        "strips": [
            {"name": n, "computed": b.computed, "told": _mixes(b.mix)}
            for n, b in statistics.branches.items()
        ],
        "distance": _distance(recorder, statistics, setting, parameters.get("threshold")),
        "changes": recorder.changes,
        "seconds": seconds,
        "segments": statistics.seconds,
        "what_if": [vars(panel) for panel in panels],
        "what_if_text": text,
        "own_first": bool(panels) and panels[0].policy == setting.policy,
        "step_seconds": _step_seconds(result, reference),
    }
    _write(path, page)


def write_bench_report(
    path: Path, report: BenchReport, provenance: Sequence[Sequence[str]] = ()
) -> None:
    """Write the page of a bench.

    Args:
        path: The HTML file.
        report: Its table, pictures and decisions.
        provenance: Names and values, as `provenance` returns them.

    Raises:
        OutputError: it can't be written.
    """
    (name, reference), *others = report.pictures.items()
    cells = [[cell(value) for value in row] for row in report.rows()]
    page = {
        "title": "Speed and quality of cache settings",
        "subtitle": f"{report.steps} steps, {report.backend}, {report.precision}, {report.pairs} prompt and seed "
        f"pairs, {report.rounds} interleaved rounds of one pair each.",
        "tables": [{"title": "Table", "text": "", "columns": report.columns, "rows": cells}],
        "provenance": [[n, v] for n, v in provenance],
        "pareto": _pareto(report.entries),
        "videos": [_video(name, reference), *(_compared(n, f, reference) for n, f in others)],
        "videos_text": "Of the first prompt and seed: uncached, the chosen setting, and their difference.",
        "strips": [
            {"name": n if len(branches) == 1 else f"{n}, {branch}", "computed": computed}
            for n, branches in report.decisions.items()
            for branch, computed in _merged(branches).items()
        ],
    }
    _write(path, page)


def _summary(result: Generation, reference: Generation) -> dict[str, Any]:
    statistics, quality = result.statistics, compare_videos(result.frames, reference.frames)
    rows: list[list[Any]] = [
        ["steps", statistics.steps],
        ["computed steps, mean of branches", f"{statistics.computed_steps:g}"],
        ["ideal speedup", f"{statistics.ideal_speedup:.2f}"],
        ["measured speedup of the denoise loop", f"{result.speedup_over(reference):.2f}"],
        ["PSNR against uncached", "equal" if quality.psnr is None else f"{quality.psnr:.1f} dB"],
        ["SSIM against uncached", f"{quality.ssim:.4f}"],
        *([n, v] for n, v in result.resolved.items() if n != "steps"),
    ]
    return {"title": "Summary", "text": "", "columns": ["", statistics.policy], "rows": rows}


def _distance(
    recorder: RunRecorder, statistics: RunStatistics, setting: CacheSetting, threshold: Any
) -> dict[str, Any]:
    """Return the distance that each decision compared; of a run without trace, what it left."""
    bound = threshold if isinstance(threshold, int | float) else None
    trace = recorder.trace()
    try:
        told, reached = (None, {}) if trace is None else reached_distances(trace, setting)
    except RequestError:
        told, reached = None, {}
    decided = {n: b.computed for n, b in statistics.branches.items()}
    if told is not None and {n: b.computed for n, b in told.branches.items()} == decided:
        lines, text = reached, "Accumulated distance that each decision compared with the threshold"
    else:
        lines = {n: b.distance for n, b in statistics.branches.items()}
        text = "Accumulated distance after each decision"
    lines = {n: line for n, line in lines.items() if any(d is not None for d in line)}
    return {
        "lines": lines,
        "bound": bound,
        "text": f"{text}; a step that reaches the line of the threshold is computed, and resets it.",
    }


def _what_if(uncached: RunRecorder, setting: CacheSetting) -> tuple[list[WhatIf], str]:
    """Replay the run's policy first, then the others by their defaults."""
    trace = uncached.trace()
    if trace is None:
        return (
            [],
            "Other settings can't be replayed on a run of two transformers, or one with gaps.",
        )
    others = [CacheSetting(policy=p) for p in POLICIES if p != setting.policy]
    text = (
        "Other settings, replayed on the uncached run: move the value. The foretold error is the root mean "
        "square over all steps of the reused residual's relative error."
    )
    if "token_index" in trace.arrays:
        kept, whole = len(trace.arrays["token_index"]), int(trace.arrays["tokens_per_frame"])
        text += f" Of {kept} sampled tokens; a frame has {whole}."
    return foretell(trace, [setting, *others]), text


def _step_seconds(result: Generation, reference: Generation) -> dict[str, float | None]:
    """Return what the loop's time is foretold from: seconds of steps, and of all that is no step."""
    known, plain = result.statistics.step_seconds(), reference.statistics
    steps = sum(s for b in plain.branches.values() for s in b.seconds if s is not None)
    whole = reference.seconds["denoise"]
    return {
        "computed": plain.step_seconds()["computed"],
        "reused": known["reused"],
        "rest": max(0.0, whole - steps),
        "uncached": whole,
    }


def _pareto(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    points = [
        {
            "name": e["name"],
            "speedup": e["speedup"],
            "psnr": e["psnr_mean"],
            "worst": e["psnr_worst"],
            "spread": e["speedup_spread"] or [e["speedup"]] * 2,
        }
        for e in entries
        if e["psnr_mean"] is not None
    ]
    for point in points:
        point["front"] = not any(
            p["speedup"] > point["speedup"] and p["psnr"] > point["psnr"] for p in points
        )
    return points


def _merged(branches: Mapping[str, Sequence[bool | None]]) -> Mapping[str, Sequence[bool | None]]:
    """Return one strip where all branches decided alike."""
    alike = len({tuple(b) for b in branches.values()}) == 1
    return {" and ".join(branches): next(iter(branches.values()))} if alike else branches


def _mixes(mixes: Sequence[Sequence[float]]) -> list[str]:
    return ["mix " + ", ".join(f"{f:.3g}" for f in mix) if mix else "" for mix in mixes]


def _compared(name: str, frames: Frames, reference: Frames) -> dict[str, Any]:
    """Return a video with what sets it apart from the reference, frame by frame."""
    difference = np.abs(frames.astype(np.int16) - reference) * 8
    quality = compare_frames(frames, reference)
    return {
        **_video(name, frames),
        "difference": _pictures(difference.clip(0, 255).astype(np.uint8)),
        "psnr": [q.psnr for q in quality],
        "ssim": [q.ssim for q in quality],
        "vmaf": vmaf_of_frames(frames, reference),
    }


def _video(name: str, frames: Frames) -> dict[str, Any]:
    return {"name": name, "width": frames.shape[2], "frames": _pictures(frames)}


def _pictures(frames: Frames) -> list[str]:
    """Return each frame as a data URI, no wider than the page shows it."""
    found = []
    for frame in frames:
        picture = Image.fromarray(frame)
        picture.thumbnail((WIDEST, WIDEST * 4))
        stream = io.BytesIO()
        picture.save(stream, "WEBP", lossless=frames.nbytes <= LOSSLESS_BYTES, quality=85)
        found.append(f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}")
    return found


def _finite(value: Any) -> Any:
    """Return the value with null for what is no number: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {n: _finite(v) for n, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, page: Mapping[str, Any]) -> None:
    folder = Path(__file__).parent
    text, script = (
        (folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "js")
    )
    # A '<' in a prompt could end the element that holds the JSON.
    data = json.dumps(_finite({**EMPTY, **page}), allow_nan=False).replace("<", "\\u003c")
    whole = text.replace("/*script*/", script).replace("/*data*/", data)
    write_text(path, whole, "choose another --report")
