"""Start-up, what the server says of a model, statistics, metrics, and a clean end."""

from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("tritonclient.grpc", reason="run by 'make test-triton'")

from client import ROOT, ask, until
from conftest import RunningServer, server_command

pytestmark = pytest.mark.triton


def test_models_are_ready_and_describe_themselves(server) -> None:
    assert server.is_ready()
    for model in ("tiny", "demo"):
        server.get(f"/v2/models/{model}/ready")
    tiny = json.loads(server.get("/v2/models/tiny"))
    assert {i["name"] for i in tiny["inputs"]} == {
        "text_states",
        "negative_text_states",
        "seed",
        "latents",
    }
    demo = json.loads(server.get("/v2/models/demo"))
    assert {
        "text_input",
        "negative_text_input",
        "token_ids",
        "negative_token_ids",
    } < {i["name"] for i in demo["inputs"]}
    assert {o["name"] for o in demo["outputs"]} == {"progress", "latents", "frames", "preview"}
    config = json.loads(server.get("/v2/models/tiny/config"))
    assert config["model_transaction_policy"]["decoupled"]
    assert config["instance_group"][0]["count"] == 2


def test_metrics_count_steps_runs_seconds_and_hits(server) -> None:
    def read(name: str, **labels: str) -> float:
        return server.metric(f"freewheel_{name}", model="tiny", **labels)

    def counts() -> tuple[float, ...]:
        return (
            read("steps_total", policy="taylorseer", decision="compute"),
            read("steps_total", policy="taylorseer", decision="reuse"),
            read("runs_total", policy="taylorseer", outcome="ok"),
            read("segment_seconds_total", segment="body"),
            read("segment_seconds_total", segment="reuse"),
        )

    before = counts()
    summary = ask(server.grpc, policy="taylorseer", interval=3).summary
    delta = [b - a for a, b in zip(before, counts(), strict=True)]
    computed = sum(b["computed_steps"] for b in summary["branches"].values())
    assert delta[:3] == [computed, 12 - computed, 1]
    assert delta[3] == pytest.approx(summary["seconds"]["body"], rel=1e-3)
    assert delta[4] == pytest.approx(summary["seconds"]["reuse"], rel=1e-3)
    done, reused = counts()[:2]
    assert read("hit_rate", policy="taylorseer") == pytest.approx(reused / (done + reused))
    assert read("hit_rate", policy="off") == 0


def test_batch_statistics_are_reported(server) -> None:
    def statistics() -> dict:
        return json.loads(server.get("/v2/models/tiny/stats"))["model_stats"][0]

    before = statistics()
    ask(server.grpc)
    # They are reported when the last response is out.
    until(lambda: statistics()["execution_count"] == before["execution_count"] + 1)
    after = statistics()
    assert after["inference_count"] == before["inference_count"] + 1
    assert after["batch_stats"][0]["batch_size"] == 1
    spent = [s["inference_stats"]["compute_infer"]["ns"] for s in (before, after)]
    assert spent[1] > spent[0]


def test_a_bundle_that_can_t_be_served_is_named_and_the_server_ends_cleanly(
    prepared: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "models"
    for name in ("tiny", "broken"):
        shutil.copytree(prepared / "models" / "tiny", repository / name, copy_function=os.link)
    config = repository / "broken" / "config.pbtxt"
    text = config.read_text().replace('name: "tiny"', 'name: "broken"')
    config.unlink()
    config.write_text(text)
    shutil.rmtree(next((repository / "broken" / "1" / "bundle" / "engines").iterdir()) / "reuse")
    command = server_command(repository) + " --exit-on-error=false"
    server = RunningServer(command, tmp_path / "log.txt")
    try:
        server.wait("live")
        assert "/reuse" in server.log.read_text()
        assert "build the bundle again" in server.log.read_text()
        assert ask(server.grpc).latents is not None
    finally:
        assert server.stop() == 0


def test_instances_share_weights_and_engines(server) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: ask(server.grpc, seed=seed), range(8)))  # both have run
    maps = Path(f"/proc/{server.process.pid}/maps").read_text().splitlines()
    # Address, permissions, offset, device, inode, path: a file that is mapped begins once.
    parts = [line.split(maxsplit=5) for line in maps]
    begun = [p[5] for p in parts if len(p) == 6 and "/models/tiny/" in p[5] and int(p[2], 16) == 0]
    assert any(path.endswith(".safetensors") for path in begun)
    assert any(path.endswith("/block/model.blob") for path in begun)
    assert len(begun) == len(set(begun))


def test_the_dashboard_shows_metrics_that_the_server_has(server) -> None:
    """`deploy/grafana/dashboard.json`, and every label that it sums by."""
    ask(server.grpc, policy="teacache")
    text = server.metrics_text()
    board = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text())
    asked = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
    names = {name for expr in asked for name in re.findall(r"(?:freewheel|nv)_\w+", expr)}
    assert len(names) == 7
    for name in names:
        assert re.search(rf"^{name}{{", text, re.M), name
    for expr in asked:
        for label in re.findall(r"by \((\w+)\)", expr):
            (metric, *_) = re.findall(r"freewheel_\w+", expr)
            assert re.search(rf'^{metric}{{.*{label}="', text, re.M), (metric, label)
