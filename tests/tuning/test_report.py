"""Report pages: whole, self-contained, and true to what ran."""

from __future__ import annotations

import base64
import io
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from freewheel.core.errors import OutputError
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.pipeline.generate import Generation, Generator
from freewheel.tuning.bench import BenchReport
from freewheel.tuning.report import ChangeRecorder, write_bench_report, write_run_report

STEPS = 10


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Pictures(HTMLParser):
    """Collects images, and whatever would be fetched from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: dict[str, str] = {}
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        for name in ("src", "href"):
            if given.get(name) and not str(given[name]).startswith("data:"):
                self.fetched.append(str(given[name]))
        if tag == "img":
            self.images[str(given["alt"])] = str(given["src"])


@pytest.fixture(scope="module")
def runs(generator: Generator, request_of: Any) -> tuple[Generation, Generation, ChangeRecorder]:
    setting = CacheSetting(policy="teacache", parameters={"threshold": 0.5})
    recorder = ChangeRecorder()
    cached = generator.generate(request_of(setting, steps=STEPS), recorder=recorder)
    return cached, generator.generate(request_of(CacheSetting(), steps=STEPS)), recorder


@pytest.fixture(scope="module")
def page(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    cached, reference, recorder = runs
    path = tmp_path_factory.mktemp("report") / "new" / "run.html"
    write_run_report(
        path, prompt="a <red> circle", result=cached, reference=reference, recorder=recorder,
        parameters={"threshold": 0.5},
    )  # fmt: skip
    return path.read_text(encoding="utf-8")


def test_page_fetches_nothing_and_runs_nothing(page: str) -> None:
    assert Pictures(page).fetched == []
    assert "<script" not in page
    assert "http://" not in re.sub(r"data:[^\"]*", "", page)


def test_prompt_is_text_and_not_markup(page: str) -> None:
    assert "a &lt;red&gt; circle" in page


def test_every_section_has_its_picture(page: str) -> None:
    assert set(Pictures(page).images) == {
        "decisions per branch and step", "distance per step", "relative change per step",
        "seconds in the run", "frames",
    }  # fmt: skip


def test_timeline_shows_one_cell_per_branch_and_step(page: str, runs: Any) -> None:
    source = Pictures(page).images["decisions per branch and step"]
    svg = base64.b64decode(source.split(",", 1)[1]).decode()
    computed = sum(b.computed_steps for b in runs[0].statistics.branches.values())
    assert svg.count("fill: #1f6feb") == computed
    assert svg.count("fill: #d0d7de") == 2 * STEPS - computed


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [500, 1200])
def test_browser_shows_the_whole_page_at_phone_and_desk_width(
    page: str, tmp_path: Path, width: int
) -> None:
    source, shot = tmp_path / "page.html", tmp_path / "page.png"
    source.write_text(page, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},2600"]
    command = [str(CHROMIUM), *options, f"--screenshot={shot}", source.as_uri()]
    subprocess.run(command, check=True, capture_output=True)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape[1] == width
    blue = (np.abs(pixels - (31, 111, 235)).sum(axis=-1) < 12).sum()
    assert blue > 0.001 * width * width, "the timeline's computed steps are to be seen"
    # Nothing reaches into the right margin: no picture or table is wider than the page.
    assert (pixels[:, -4:] == pixels[0, 0]).all() or width > 600


def test_frames_stand_above_their_difference(page: str, runs: Any) -> None:
    source = Pictures(page).images["frames"]
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))))
    cached, reference, _ = runs
    height, width = cached.frames.shape[1:3]
    assert sheet.shape == (3 * height, 5 * width, 3)
    np.testing.assert_array_equal(sheet[:height, :width], reference.frames[0])
    np.testing.assert_array_equal(sheet[height : 2 * height, :width], cached.frames[0])


def test_changes_are_recorded_for_reused_steps_too(runs: Any) -> None:
    cached, _, recorder = runs
    computed = cached.statistics.branches["cond"].computed
    changes = recorder.changes["cond"]
    assert len(changes) == STEPS
    assert math.isnan(changes[0])
    held = [c for c, was in zip(changes, computed, strict=True) if not was]
    assert held
    assert max(held) < 1e-6, "TeaCache holds"


def test_bench_page_has_the_table_and_the_plot(tmp_path: Path, runs: Any) -> None:
    entry = {
        "name": "teacache", "computed_steps": 5.0, "seconds": 1.0, "speedup": 1.9,
        "speedup_spread": [1.8, 2.0],
        "ideal_speedup": 2.0, "efficiency": 0.95, "psnr_mean": 41.25, "psnr_worst": 39.0,
        "ssim_mean": 0.99, "ssim_worst": 0.98,
    }  # fmt: skip
    none = {"psnr_mean": None, "psnr_worst": None, "speedup_spread": None}
    plain = {**entry, "name": "uncached", **none}
    pictures = {"uncached": runs[1].frames, "teacache": runs[0].frames}
    report = BenchReport(STEPS, 3, 1, "onnxruntime", "float32", [plain, entry], pictures)
    path = tmp_path / "bench.html"
    write_bench_report(path, report)
    text = path.read_text()
    assert set(Pictures(text).images) == {"PSNR against speedup", "frames"}
    assert "<td>41.2</td>" in text
    assert "Frames: teacache" in text


def test_unwritable_page_is_one_error(runs: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report = BenchReport(1, 1, 1, "onnxruntime", "float32", [], {"uncached": runs[1].frames})
    with pytest.raises(OutputError, match="choose another --report"):
        write_bench_report(tmp_path / "file" / "x.html", report)
