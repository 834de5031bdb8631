"""Rounds counted, their spread told, and figures that can't be right doubted; nothing is timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from freewheel.bundle.reader import Bundle
from freewheel.core.errors import OutputError, RequestError
from freewheel.core.progress import Silent
from freewheel.tuning import bench
from freewheel.tuning.bench import (
    BenchReport,
    BenchRequest,
    BenchRow,
    bench_bundle,
    short_names,
)


def row(speedup: list[float], ideal: float = 2.0) -> BenchRow:
    count = len(speedup)
    return BenchRow("teacache", [10.0] * count, [1.0] * count, speedup, [ideal] * count)


def test_the_spread_goes_from_the_least_to_the_greatest_round() -> None:
    entry = row([1.5, 1.4, 1.7]).as_dict()
    assert entry["speedup"] == 1.5
    assert entry["speedup_spread"] == [1.4, 1.7]
    assert row([1.5]).as_dict()["speedup_spread"] is None, "one round has no spread"


def test_the_table_shows_the_spread() -> None:
    report = BenchReport(20, 3, 1, "openvino", "float32", [row([1.5, 1.4, 1.7]).as_dict()])
    cells = dict(zip(report.columns, report.rows()[0], strict=False))
    assert cells["spread"] == "1.40–1.70"
    assert "| 1.50 | 1.40–1.70 | 2.00 |" in report.markdown()


@pytest.mark.parametrize(
    ("speedup", "ideal", "says"),
    [
        ([1.5, 1.45, 1.55], 2.0, []),
        ([2.05, 1.95, 2.15], 2.0, []),  # above the ideal, within the spread
        ([2.3, 2.25, 2.35], 2.0, ["2.30 exceeds the ideal 2.00 by more than the spread of 0.10"]),
        ([2.3], 2.0, ["exceeds the ideal 2.00 by more than one round explains"]),
        ([1.0, 1.5, 1.9], 2.0, ["rounds disagree, from 1.00 to 1.90 times; measure again"]),
    ],
)
def test_figures_that_can_not_be_right_are_doubted(
    speedup: list[float], ideal: float, says: list[str]
) -> None:
    found = row(speedup, ideal).doubts()
    assert len(found) == len(says)
    assert all(part in text for part, text in zip(says, found, strict=True))
    assert all("--rounds" in text for text in found)


@pytest.mark.parametrize(
    ("prompts", "seeds", "rounds", "expected"),
    [(1, 1, 3, 3), (2, 1, 3, 4), (2, 2, 3, 4), (3, 1, 3, 3), (2, 2, 5, 8), (1, 1, 1, 1)],
)
def test_every_pair_is_run_equally_often(
    prompts: int, seeds: int, rounds: int, expected: int
) -> None:
    request = BenchRequest(["a"] * prompts, range(seeds), rounds=rounds)
    assert request.round_count() == expected
    assert request.round_count() % len(request.pairs()) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompts": []}, "bench: has no prompt; give --prompt"),
        ({"seeds": []}, "--seeds: asks for no seed"),
        ({"rounds": 0}, "--rounds 0: is below 1"),
        ({"steps": 0}, "--steps 0"),
        ({"seeds": [2**64]}, "--seed"),
        ({"image": Path("no.png")}, "--image 'no.png': can't be read"),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_loaded(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(bench, "Generator", None)  # calling it would be another error
    request = BenchRequest(**{"prompts": ["a ring"], "seeds": [0], **options})
    with pytest.raises(RequestError, match=says):
        bench_bundle(tiny_bundle, request, Silent(), lambda text: None)


def test_an_output_folder_that_is_a_file_is_refused_before_anything_is_loaded(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(bench, "Generator", None)
    request = BenchRequest(["a ring"], [0], out=tmp_path / "file")
    with pytest.raises(
        OutputError, match=r"file: is a file, expected a folder; choose another --out"
    ):
        bench_bundle(tiny_bundle, request, Silent(), lambda text: None)


@pytest.mark.parametrize(
    ("caches", "names"),
    [
        (["teacache", "custom"], ["teacache", "custom"]),
        (["/a/cal.json#solved_2x", "b/mine.json"], ["solved_2x", "mine"]),
        (["a/cal.json#solved", "b/other.json#solved"], ["cal#solved", "other#solved"]),
        (["a/cal.json#solved", "b/cal.json#solved"], ["a/cal.json#solved", "b/cal.json#solved"]),
        (["custom", "a/custom.json"], ["custom", "a/custom.json"]),
        (["custom", "custom"], ["custom"]),
    ],
)
def test_a_setting_is_called_by_the_shortest_name_that_tells_it_apart(
    caches: list[str], names: list[str]
) -> None:
    found = short_names(caches)
    assert list(found) == names
    assert list(found.values()) == list(dict.fromkeys(caches))


def test_a_setting_named_by_a_path_writes_its_video_into_the_asked_for_folder(
    demo_bundle: Bundle, repository: Path, tmp_path: Path
) -> None:
    config = repository / "configs" / "demo" / "shapes_wan_taylorseer.json"
    named: list[str] = []
    for folder in ("one", "other"):
        copy = tmp_path / folder / "tea.json"
        copy.parent.mkdir()
        copy.write_bytes(config.read_bytes())
        named.append(str(copy))
    out = tmp_path / "out"
    request = BenchRequest(["a ring"], [0], caches=named, rounds=1, steps=2, out=out)
    bench_bundle(demo_bundle, request, Silent(), lambda text: None)
    videos = list(tmp_path.rglob("*.mp4"))
    assert len(videos) == 3
    assert {path.parent for path in videos} == {out}
