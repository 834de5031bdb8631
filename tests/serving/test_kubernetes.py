# SPDX-License-Identifier: Apache-2.0
"""The manifest of replicas is what Kubernetes takes, and asks the server what it answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from freewheel.core.errors import RequestError
from freewheel.serving.kubernetes import IMAGE, QUEUE_METRIC, replica_manifest, write_replicas


def items(model: str = "wan", backend: str = "tensorrt", replicas: int = 2) -> dict[str, Any]:
    made = replica_manifest(
        model, replicas=replicas, backend=backend, image=IMAGE, size_bytes=28 << 30
    )
    return {item["kind"]: item for item in made["items"]}


@pytest.mark.parametrize("backend", ["tensorrt", "openvino"])
@pytest.mark.parametrize("version", ["1.37", "1.30"])
def test_kubernetes_own_schemas_take_every_part(backend: str, version: str) -> None:
    validator = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    for item in items(backend=backend).values():
        validator.validate(item, version, strict=True)


def test_the_schemas_refuse_what_is_no_part_of_it() -> None:
    validator = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    deployment = items()["Deployment"]
    deployment["spec"]["replica"] = 2
    with pytest.raises(validator.ValidationError):
        validator.validate(deployment, "1.37", strict=True)


def test_parts_find_each_other() -> None:
    found = items()
    assert sorted(found) == [
        "Deployment",
        "HorizontalPodAutoscaler",
        "PersistentVolumeClaim",
        "Service",
    ]
    template = found["Deployment"]["spec"]["template"]
    selected = found["Service"]["spec"]["selector"]
    assert selected == template["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == selected
    (volume,) = template["spec"]["volumes"]
    claim = volume["persistentVolumeClaim"]["claimName"]
    assert claim == found["PersistentVolumeClaim"]["metadata"]["name"]
    target = found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target["name"] == found["Deployment"]["metadata"]["name"]


def test_a_replica_is_ready_when_its_models_are_and_waiting_adds_replicas() -> None:
    found = items(replicas=3)
    (container,) = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/v2/health/ready", "port": "http"}
    assert found["Deployment"]["spec"]["replicas"] == 3
    scaling = found["HorizontalPodAutoscaler"]["spec"]
    assert (scaling["minReplicas"], scaling["maxReplicas"]) == (3, 12)
    assert scaling["metrics"][0]["pods"]["metric"]["name"] == QUEUE_METRIC


def test_engines_for_gpus_take_one_each() -> None:
    def limits(backend: str) -> Any:
        (container,) = items(backend=backend)["Deployment"]["spec"]["template"]["spec"][
            "containers"
        ]
        return container.get("resources")

    assert limits("tensorrt-rtx") == {"limits": {"nvidia.com/gpu": "1"}}
    assert limits("openvino") is None


@pytest.mark.parametrize("model", ["Wan_2.1", "x" * 200, "..."])
def test_any_model_name_gives_a_name_that_kubernetes_takes(model: str) -> None:
    name = items(model)["Service"]["metadata"]["name"]
    assert len(name) <= 63
    assert name == name.lower().strip("-")
    assert name.replace("-", "").isalnum()


def test_the_file_lies_beside_the_repository_not_in_it(tmp_path: Path) -> None:
    """Triton takes everything in a repository for a model."""
    options: dict[str, Any] = {"backend": "openvino", "image": IMAGE, "size_bytes": 1}
    path = write_replicas(tmp_path / "models", "wan", replicas=2, **options)
    assert path == tmp_path / "models-kubernetes.json"
    assert json.loads(path.read_text())["kind"] == "List"
    with pytest.raises(RequestError, match="--replicas 0: is below 1"):
        write_replicas(tmp_path / "models", "wan", replicas=0, **options)
