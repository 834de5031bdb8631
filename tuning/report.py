# SPDX-License-Identifier: Apache-2.0
"""Write one self-contained HTML page about a run or a bench: no network, no script."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..core.output import write_text
from ..policies.schedule import Schedule
from ..runtime.pipeline.generate import Generation
from ..runtime.session import StepRecord
from .bench import BenchReport
from .quality import compare_videos

__all__ = ["ChangeRecorder", "write_bench_report", "write_run_report"]

Frames = NDArray[np.uint8]

COMPUTED, REUSED, ACCENT = "#1f6feb", "#d0d7de", "#d1242f"
SHOWN_FRAMES = 5
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "freewheel",
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class _Picture:
    alt: str
    source: str
    kind: str = "plot"


@dataclass(frozen=True)
class _Section:
    title: str
    text: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    pictures: Sequence[_Picture] = ()


@dataclass
class ChangeRecorder:
    """Keeps how much each step's residual of one run differs from the step before, and nothing else.

    Attributes:
        changes: Per branch and step, mean|r_t − r_s| / mean|r_s|, s the step that the branch ran
            before t; r is the body's residual or what was reused in its place. NaN at its first
            step and where it did not run.
    """

    wants_signals: bool = False
    across_experts: ClassVar[bool] = True
    changes: dict[str, list[float]] = field(default_factory=dict)
    _last: dict[str, Tensor] = field(default_factory=dict)
    _first: int = 0  # of the expert that runs
    _steps: int = 0  # of the experts so far

    def on_run(self, tables: Mapping[str, Tensor], schedule: Schedule) -> None:
        """Begin a run, or go on with its second expert."""
        self._first, self._steps = self._steps, self._steps + len(schedule)

    def on_step(self, record: StepRecord, dims: Mapping[str, int]) -> None:
        """Take one step of one branch."""
        changes = self.changes.setdefault(record.branch, [])
        changes += [math.nan] * (self._steps - len(changes))
        before = self._last.get(record.branch)
        if before is not None:
            change = (record.residual - before).abs().mean() / before.abs().mean()
            changes[self._first + record.step_index] = float(change)
        self._last[record.branch] = record.residual.clone()


def write_run_report(
    path: Path,
    *,
    prompt: str,
    result: Generation,
    reference: Generation,
    recorder: ChangeRecorder,
    parameters: Mapping[str, Any],
) -> None:
    """Write the page of one run beside the uncached run of its seed.

    Args:
        path: The HTML file.
        prompt: What was asked for.
        result: The cached run.
        reference: The uncached run of the same request.
        recorder: Watched the cached run.
        parameters: The policy's resolved parameters.

    Raises:
        OutputError: it can't be written.
    """
    statistics = result.statistics
    data = statistics.as_dict(parameters)
    quality = compare_videos(result.frames, reference.frames)
    ratio = result.speedup_over(reference)
    rows: list[list[Any]] = [
        ["steps", statistics.steps],
        ["computed steps, mean of branches", f"{statistics.computed_steps:g}"],
        ["ideal speedup", f"{statistics.ideal_speedup:.2f}"],
        ["measured speedup of the denoise loop", f"{ratio:.2f}"],
        ["PSNR against uncached", "equal" if quality.psnr is None else f"{quality.psnr:.1f} dB"],
        ["SSIM against uncached", f"{quality.ssim:.4f}"],
        *([n, v] for n, v in result.resolved.items() if n != "steps"),
    ]
    threshold = parameters.get("threshold")
    sections = [
        _Section("Summary", rows=rows, columns=("", statistics.policy)),
        _Section(
            "Decisions", "One row per branch: blue steps ran the body, gray ones reused residuals, "
            "empty ones were not run.",
            pictures=[_timeline(data["branches"])],
        ),
        *_distance_section(data["branches"], threshold),
        _Section(
            "Residual change per step",
            "mean|r − r before| / mean|r before|, of what was computed or reused.",
            pictures=[_lines(recorder.changes, "relative change")],
        ),
        _Section(
            "Seconds by segment", pictures=[_bars(statistics.seconds, "seconds in the run")]
        ),
        _Section(
            "Frames",
            "Uncached, cached, and their difference enlarged eightfold.",
            pictures=[_frames(reference.frames, result.frames)],
        ),
    ]  # fmt: skip
    _write(path, f"{statistics.policy}: {prompt}", "One run, beside the uncached run of its seed.",
           data["warnings"], sections)  # fmt: skip


def write_bench_report(path: Path, report: BenchReport) -> None:
    """Write the page of a bench.

    Args:
        path: The HTML file.
        report: Its table and pictures.

    Raises:
        OutputError: it can't be written.
    """
    cells = [["–" if c is None else _number(c) for c in row] for row in report.rows()]
    (_, reference), *others = report.pictures.items()
    sections = [
        _Section("Table", columns=report.columns, rows=cells),
        _Section(
            "Speed against quality",
            "Mean PSNR against the uncached run. Bars reach down to the worst pair, and from the "
            "slowest to the fastest round.",
            pictures=[_pareto(report.entries)],
        ),
        *(
            _Section(
                f"Frames: {name}",
                "Uncached, this setting, and their difference enlarged eightfold.",
                pictures=[_frames(reference, frames)],
            )
            for name, frames in others
        ),
    ]
    subtitle = (
        f"{report.steps} steps, {report.backend}, {report.precision}, {report.pairs} prompt and seed "
        f"pairs, {report.rounds} interleaved rounds of one pair each."
    )
    _write(path, "Speed and quality of cache settings", subtitle, [], sections)


def _distance_section(branches: Mapping[str, Any], threshold: Any) -> Iterable[_Section]:
    distances = {
        n: [math.nan if d is None else d for d in b["distance"]]
        for n, b in branches.items()
        if any(d is not None for d in b["distance"])
    }
    if distances:
        bound = threshold if isinstance(threshold, int | float) else None
        text = "Accumulated distance after each decision; a step that reaches the red line is computed."
        yield _Section("Distance", text, pictures=[_lines(distances, "distance", bound=bound)])


def _timeline(branches: Mapping[str, Any]) -> _Picture:
    figure = Figure(figsize=(9, 0.5 + 0.35 * len(branches)))
    axes = figure.subplots()
    for row, branch in enumerate(branches.values()):
        for step, computed in enumerate(branch["computed"]):
            if computed is None:
                continue
            axes.add_patch(
                mpl.patches.Rectangle((step + 0.05, row + 0.1), 0.9, 0.8, color=COMPUTED if computed else REUSED)
            )  # fmt: skip
    axes.set_xlim(0, max(len(b["computed"]) for b in branches.values()))
    axes.set_ylim(len(branches), 0)
    axes.set_yticks(np.arange(len(branches)) + 0.5, list(branches))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    return _svg(figure, "decisions per branch and step")


def _lines(
    values: Mapping[str, Sequence[float]], label: str, *, bound: float | None = None
) -> _Picture:
    """Draw a line per branch over the steps, with a gap where a value is NaN."""
    figure = Figure(figsize=(9, 2.4))
    axes = figure.subplots()
    for (name, line), style in zip(values.items(), ("-o", "--s", ":^"), strict=False):
        axes.plot(np.arange(len(line)), line, style, ms=3, lw=1, label=name)
    if bound is not None:
        axes.axhline(bound, color=ACCENT, lw=1, label="threshold")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    # Above the axes: inside it would cover lines.
    axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
    return _svg(figure, f"{label} per step")


def _bars(values: Mapping[str, float], label: str) -> _Picture:
    figure = Figure(figsize=(9, 0.6 + 0.28 * len(values)))
    axes = figure.subplots()
    names = sorted(values, key=lambda n: values[n])
    bars = axes.barh(names, [values[n] for n in names], color=COMPUTED)
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.margins(x=0.1)  # room for the longest bar's label
    axes.set_xlabel(label)
    return _svg(figure, label)


def _pareto(entries: Sequence[Mapping[str, Any]]) -> _Picture:
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    for entry in entries:
        mean, worst = entry["psnr_mean"], entry["psnr_worst"]
        if mean is None:
            continue
        speedup = entry["speedup"]
        least, most = entry["speedup_spread"] or (speedup, speedup)
        axes.errorbar(
            speedup, mean, xerr=[[speedup - least], [most - speedup]], yerr=[[mean - worst], [0]],
            fmt="o", color=COMPUTED, lw=1,
        )  # fmt: skip
        axes.annotate(
            entry["name"], (entry["speedup"], mean), xytext=(5, 4), textcoords="offset points"
        )
    axes.set_xlabel("measured speedup over uncached")
    axes.set_ylabel("PSNR, dB")
    axes.margins(x=0.2)
    return _svg(figure, "PSNR against speedup")


def _frames(reference: Frames, frames: Frames) -> _Picture:
    """Draw uncached, cached and their difference as three rows of a few frames."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, SHOWN_FRAMES).round().astype(int))
    difference = np.abs(frames.astype(np.int16) - reference) * 8
    rows = (reference, frames, difference.clip(0, 255).astype(np.uint8))
    sheet = np.concatenate([np.concatenate(list(r[chosen]), axis=1) for r in rows], axis=0)
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, "PNG")
    return _Picture("frames", _data_uri("image/png", stream.getvalue()), "frames")


def _svg(figure: Figure, alt: str) -> _Picture:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    return _Picture(alt, _data_uri("image/svg+xml", stream.getvalue().encode()))


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(
    path: Path, title: str, subtitle: str, warnings: Sequence[str], sections: Sequence[_Section]
) -> None:
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        template
    )
    text = page.render(title=title, subtitle=subtitle, warnings=warnings, sections=sections)
    write_text(path, text, "choose another --report")
