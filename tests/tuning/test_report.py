"""Report pages: whole, self-contained, true to what ran, and alive in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from freewheel.core.errors import OutputError
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.pipeline.generate import Generation, Generator
from freewheel.tuning.bench import BenchReport
from freewheel.tuning.report import write_bench_report, write_run_report
from freewheel.tuning.run_recorder import RunRecorder

STEPS = 10
SETTING = CacheSetting(policy="teacache", parameters={"threshold": 0.5})
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")

Runs = tuple[Generation, Generation, RunRecorder, RunRecorder]


@pytest.fixture(scope="module")
def runs(generator: Generator, request_of: Any) -> Runs:
    cached, uncached = RunRecorder(), RunRecorder()
    result = generator.generate(request_of(SETTING, steps=STEPS), recorder=cached)
    reference = generator.generate(request_of(CacheSetting(), steps=STEPS), recorder=uncached)
    return result, reference, cached, uncached


@pytest.fixture(scope="module")
def page(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    result, reference, recorder, uncached = runs
    path = tmp_path_factory.mktemp("report") / "new" / "run.html"
    write_run_report(
        path,
        prompt="a <red> </script> circle",
        result=result,
        reference=reference,
        recorder=recorder,
        uncached=uncached,
        setting=SETTING,
        parameters={"threshold": 0.5},
        provenance=[["command", "freewheel run"]],
    )
    return path


def bench_report(runs: Runs) -> BenchReport:
    entry = {
        "name": "teacache",
        "computed_steps": 5.0,
        "seconds": 1.0,
        "speedup": 1.9,
        "speedup_spread": [1.8, 2.0],
        "ideal_speedup": 2.0,
        "efficiency": 0.95,
        "psnr_mean": 41.25,
        "psnr_worst": 39.0,
        "ssim_mean": 0.99,
        "ssim_worst": 0.98,
    }
    none = {"psnr_mean": None, "psnr_worst": None, "speedup_spread": None}
    slow = {**entry, "name": "slow", "speedup": 1.2, "psnr_mean": 40.0, "speedup_spread": None}
    frames = runs[0].frames
    return BenchReport(
        STEPS,
        3,
        1,
        "onnxruntime",
        "float32",
        [{**entry, "name": "uncached", **none}, entry, slow],
        {"uncached": runs[1].frames, "teacache": frames, "slow": frames},
        {
            "teacache": {"cond": [True, False], "uncond": [True, False]},
            "slow": {"cond": [True, True], "uncond": [True, None]},
        },
    )


def held(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def picture(uri: str) -> np.ndarray:
    kind, data = uri.split(",", 1)
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def drawn(page: Path, folder: Path, script: str = "") -> str:
    """Return the page as the browser has it after ``script``, with no network to be had."""
    copy = folder / "page.html"
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    command = [str(CHROMIUM), *options, "--window-size=1000,900", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return done.stdout.split("<main>")[1].split("</main>")[0]


def shown(text: str, name: str) -> str:
    found = re.search(rf'<output id="told-{name}">([^<]*)</output>', text)
    assert found is not None, name
    return found[1]


def test_page_holds_all_that_it_shows(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    whole = re.sub(r'"data:image/webp[^"]*"', '""', text)
    assert re.findall(r"""(?:src|href)\s*=\s*["']""", whole) == []
    assert set(re.findall(r"https?://[^\s\"']+", whole)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text, "the browser refuses whatever would be fetched"


def test_prompt_is_text_and_ends_no_element(page: Path) -> None:
    assert held(page)["title"] == "teacache: a <red> </script> circle"
    assert page.read_text(encoding="utf-8").count("</script>") == 2


def test_strips_and_lines_are_those_of_the_run(page: Path, runs: Runs) -> None:
    found, statistics = held(page), runs[0].statistics
    strips = {s["name"]: s["computed"] for s in found["strips"]}
    assert strips == {n: b.computed for n, b in statistics.branches.items()}
    assert found["seconds"]["cond, cached"] == statistics.branches["cond"].seconds
    for step, computed in enumerate(strips["cond"]):
        reached = found["distance"]["lines"]["cond"][step]
        assert computed == (reached is None or reached >= 0.5), "before the reset"
    assert found["distance"]["bound"] == 0.5
    assert found["changes"]["cond"][0] is None


def test_videos_stand_beside_their_difference_frame_by_frame(page: Path, runs: Runs) -> None:
    reference, cached = held(page)["videos"]
    result, uncached = runs[0].frames, runs[1].frames
    assert len(cached["frames"]) == len(cached["difference"]) == len(cached["psnr"]) == len(result)
    np.testing.assert_array_equal(picture(reference["frames"][2]), uncached[2])
    np.testing.assert_array_equal(picture(cached["frames"][2]), result[2])
    difference = np.abs(result[2].astype(int) - uncached[2]) * 8
    np.testing.assert_array_equal(picture(cached["difference"][2]), difference.clip(0, 255))


def test_wide_videos_are_narrowed(page: Path, runs: Runs, tmp_path: Path) -> None:
    wide = np.zeros((2, 20, 1280, 3), np.uint8)
    report = replace(bench_report(runs), pictures={"uncached": wide, "teacache": wide})
    write_bench_report(tmp_path / "wide.html", report)
    assert picture(held(tmp_path / "wide.html")["videos"][1]["frames"][0]).shape == (10, 640, 3)


def test_other_settings_are_foretold_with_this_run_first(page: Path, runs: Runs) -> None:
    found = held(page)
    own = found["what_if"][0]
    row = own["rows"][own["current"]]
    assert (own["policy"], own["values"][own["current"]], found["own_first"]) == (
        "teacache",
        0.5,
        True,
    )
    assert row["computed"]["cond"] == runs[0].statistics.branches["cond"].computed
    assert "taylorseer" in [p["policy"] for p in found["what_if"]]


def test_a_run_without_trace_says_why_there_is_no_panel(runs: Runs, tmp_path: Path) -> None:
    result, reference, *_ = runs
    path = tmp_path / "gaps.html"
    write_run_report(
        path,
        prompt="p",
        result=result,
        reference=reference,
        recorder=RunRecorder(),
        uncached=RunRecorder(),
        setting=SETTING,
        parameters={"threshold": 0.5},
    )
    found = held(path)
    assert found["what_if"] == []
    assert "two transformers" in found["what_if_text"]
    assert found["distance"]["text"].startswith("Accumulated distance after each decision")


def test_bench_page_has_table_front_strips_and_videos(runs: Runs, tmp_path: Path) -> None:
    path = tmp_path / "bench.html"
    write_bench_report(path, bench_report(runs), [["command", "freewheel bench"]])
    found = held(path)
    assert [(p["name"], p["front"]) for p in found["pareto"]] == [
        ("teacache", True),
        ("slow", False),
    ]
    assert found["pareto"][1]["spread"] == [1.2, 1.2]
    names = [s["name"] for s in found["strips"]]
    assert names == ["teacache, cond and uncond", "slow, cond", "slow, uncond"]
    assert [v["name"] for v in found["videos"]] == ["uncached", "teacache", "slow"]
    assert "41.20" in found["tables"][0]["rows"][1]
    assert found["provenance"] == [["command", "freewheel bench"]]


@in_a_browser
def test_browser_draws_every_part(page: Path, tmp_path: Path, runs: Runs) -> None:
    text = drawn(page, tmp_path)
    heads = re.findall(r"<h2>([^<]+)</h2>", text)
    assert heads == [
        "Summary",
        "Videos",
        "Decisions",
        "Distance",
        "What if",
        "Residual change per step",
        "Seconds per step",
        "Seconds by segment",
        "Provenance",
    ]
    computed = sum(b.computed_steps for b in runs[0].statistics.branches.values())
    assert text.count('class="computed"') == 2 * computed, "the run's strips, and the panel's"
    assert "a &lt;red&gt; &lt;/script&gt; circle" in text
    assert shown(text, "value") == "0.5 (this run)"


@in_a_browser
def test_moving_the_threshold_moves_decisions_error_and_speedup(page: Path, tmp_path: Path) -> None:
    own = held(page)["what_if"][0]
    move = (
        "const box = document.getElementById('value'); box.value = {};"
        "box.dispatchEvent(new Event('input'));"
    )
    least = drawn(page, tmp_path, move.format(0))
    assert (shown(least, "computed"), shown(least, "ideal")) == (f"{STEPS} of {STEPS}", "1.00")
    assert float(shown(least, "error")) == 0
    last = len(own["values"]) - 1
    most = drawn(page, tmp_path, move.format(last))
    count = sum(own["rows"][last]["computed"]["cond"])
    assert shown(most, "computed") == f"{count} of {STEPS}"
    assert float(shown(most, "error")) == pytest.approx(own["rows"][last]["error"], rel=1e-2)
    assert float(shown(most, "loop")) > float(shown(least, "loop"))
    assert least.count('class="reused"') < most.count('class="reused"')


@in_a_browser
def test_slider_moves_both_videos_and_their_difference(page: Path, tmp_path: Path) -> None:
    move = (
        "const at = document.getElementById('frame'); at.value = 3;"
        "at.dispatchEvent(new Event('input'));"
    )
    reference, cached = held(page)["videos"]
    text = drawn(page, tmp_path, move)
    sources = dict(re.findall(r'<img alt="(\w+)" class="small" src="([^"]+)">', text))
    assert sources == {
        "uncached": reference["frames"][3],
        "cached": cached["frames"][3],
        "difference": cached["difference"][3],
    }
    assert f"frame 3 of {len(cached['frames']) - 1}, PSNR" in text


@in_a_browser
def test_bench_page_shows_the_chosen_setting(runs: Runs, tmp_path: Path) -> None:
    path = tmp_path / "bench.html"
    write_bench_report(path, bench_report(runs))
    choose = (
        "const box = document.getElementById('setting'); box.selectedIndex = 1;"
        "box.dispatchEvent(new Event('change'));"
    )
    text = drawn(path, tmp_path, choose)
    assert "<figcaption>slow</figcaption>" in text
    assert text.count('class="front"') == 1


@in_a_browser
@pytest.mark.parametrize("width", [500, 1200])
@pytest.mark.parametrize(("theme", "paper"), [(1, (255, 255, 255)), (0, (18, 22, 28))])
def test_page_fits_a_phone_and_a_desk_by_day_and_by_night(
    page: Path, tmp_path: Path, width: int, theme: int, paper: tuple[int, int, int]
) -> None:
    shot = tmp_path / "page.png"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=2000",
        "--hide-scrollbars",
        f"--blink-settings=preferredColorScheme={theme}",
        f"--window-size={width},2600",
    ]
    command = [str(CHROMIUM), *options, f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape[1] == width
    assert tuple(pixels[2, 2]) == paper
    # Nothing reaches into the right margin: no picture or table is wider than the page.
    assert (pixels[:2000, -4:] == paper).all() or width > 600
    assert (np.abs(pixels - paper).sum(axis=-1) > 60).mean() > 0.01


def test_unwritable_page_is_one_error(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose another --report"):
        write_bench_report(tmp_path / "file" / "x.html", bench_report(runs))
