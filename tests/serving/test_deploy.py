"""The container files: what they copy is there, what they install is what CI installs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml


@pytest.fixture(scope="module")
def deploy(repository: Path) -> Path:
    return repository / "deploy"


def instructions(dockerfile: Path) -> list[str]:
    """Return a Dockerfile's instructions, each on one line, without comments."""
    lines = [n for n in dockerfile.read_text().splitlines() if not n.startswith("#")]
    return [n for n in "\n".join(lines).replace("\\\n", " ").splitlines() if n]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.triton"])
def test_what_is_copied_is_there(deploy: Path, name: str) -> None:
    copies = [n.split()[1:-1] for n in instructions(deploy / name) if n.startswith("COPY ")]
    own = [path for names in copies if not names[0].startswith("--") for path in names]
    assert own
    assert all((deploy.parent / path).exists() for path in own)


def test_the_tests_image_installs_what_ci_installs(deploy: Path, repository: Path) -> None:
    (listed,) = re.findall(r"packages=\((.*?)\)", (repository / ".ci/run").read_text())
    (install,) = [n for n in instructions(deploy / "Dockerfile") if "clang-format" in n]
    assert set(listed.split()) <= set(install.split())


def test_torch_is_the_pinned_one(deploy: Path, repository: Path) -> None:
    (pinned,) = re.findall(r"^torch==.*$", (repository / "constraints.txt").read_text(), re.M)
    text = (deploy / "Dockerfile").read_text()
    assert re.findall(r"torch==[0-9.]+", text) == [pinned] * 2
    assert text.count("download.pytorch.org/whl/cpu") == 2


def test_services_mount_files_that_are_there(deploy: Path) -> None:
    services = yaml.safe_load((deploy / "compose.yaml").read_text())["services"]
    mounted = [v for s in services.values() for v in s["volumes"] if v.startswith("./")]
    assert len(mounted) == 3
    assert all((deploy / path.split(":")[0]).exists() for path in mounted)
    assert (deploy / services["server"]["build"]["dockerfile"].removeprefix("deploy/")).is_file()
    scraped = yaml.safe_load((deploy / "prometheus.yml").read_text())["scrape_configs"]
    assert scraped[0]["static_configs"] == [{"targets": ["server:8002"]}]


def test_the_dashboard_asks_the_provisioned_source(deploy: Path) -> None:
    board = json.loads((deploy / "grafana/dashboard.json").read_text())
    source = deploy / "grafana/provisioning/datasources/prometheus.yaml"
    (provisioned,) = yaml.safe_load(source.read_text())["datasources"]
    targets = [target for panel in board["panels"] for target in panel["targets"]]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"]) == 6
    assert {target["datasource"]["uid"] for target in targets} == {provisioned["uid"]}
    assert provisioned["url"] == "http://prometheus:9090"
