# SPDX-License-Identifier: Apache-2.0
"""Replicas of the server on Kubernetes: one manifest, over a model repository on a shared volume."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..core.errors import RequestError
from ..core.output import write_text

__all__ = ["IMAGE", "MANIFEST", "QUEUE_METRIC", "replica_manifest", "write_replicas"]

MANIFEST = "kubernetes.json"
IMAGE = "nvcr.io/nvidia/tritonserver:25.04-py3"

QUEUE_METRIC = "freewheel_queue_seconds"
"""Mean seconds that a request waits; a metrics adapter makes it of Triton's own counters."""

QUEUE_SECONDS = 5
"""Waiting beyond which replicas are added."""

MOST_TIMES = 4
"""Replicas at most, for each that is asked for."""

ROOT, POLL_SECONDS, LOAD_SECONDS, SPARE = "/repository", 30, 1800, 3
PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}


def write_replicas(
    repository: Path, model: str, *, replicas: int, backend: str, image: str, size_bytes: int
) -> Path:
    """Write the manifest beside the models of a repository, and return its path.

    Args:
        repository: The model repository.
        model: Name of the model that was written.
        replicas: Servers at least.
        backend: That the model is served with; TensorRT's take a GPU each.
        image: Container image of the server.
        size_bytes: Bytes of the bundle.

    Raises:
        RequestError: fewer than one replica.
        OutputError: it can't be written.
    """
    if replicas < 1:
        raise RequestError(f"--replicas {replicas}", "is below 1", "give --replicas 2")
    path = repository.parent / f"{repository.name}-{MANIFEST}"
    manifest = replica_manifest(
        model, replicas=replicas, backend=backend, image=image, size_bytes=size_bytes
    )
    write_text(path, json.dumps(manifest, indent=1) + "\n", "choose another --out")
    return path


def replica_manifest(
    model: str, *, replicas: int, backend: str, image: str, size_bytes: int
) -> dict[str, Any]:
    """Return claim, deployment, service and autoscaler as one list; see `write_replicas`."""
    name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")[:50] or "model"
    name = f"freewheel-{name}"
    labels = {"app.kubernetes.io/name": name}
    metadata = {"name": name, "labels": labels}
    gibibytes = 1 + SPARE * size_bytes // (1 << 30)
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata,
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": f"{gibibytes}Gi"}},
        },
    }
    pod = {
        "terminationGracePeriodSeconds": LOAD_SECONDS,  # requests that run may end
        "containers": [_server(backend, image)],
        "volumes": [{"name": "repository", "persistentVolumeClaim": {"claimName": name}}],
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0}},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    ports = [{"name": kind, "port": number, "targetPort": kind} for kind, number in PORTS.items()]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {"selector": labels, "ports": ports},
    }
    target = {"type": "AverageValue", "averageValue": str(QUEUE_SECONDS)}
    autoscaler = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": metadata,
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
            "minReplicas": replicas,
            "maxReplicas": MOST_TIMES * replicas,
            "metrics": [
                {"type": "Pods", "pods": {"metric": {"name": QUEUE_METRIC}, "target": target}}
            ],
        },
    }
    items = [claim, deployment, service, autoscaler]
    return {"apiVersion": "v1", "kind": "List", "items": items}


def _server(backend: str, image: str) -> dict[str, Any]:
    """Return the container: the server on the mounted repository, ready once its models are."""

    def probe(path: str, **times: int) -> dict[str, Any]:
        return {"httpGet": {"path": f"/v2/health/{path}", "port": "http"}, **times}

    container: dict[str, Any] = {
        "name": "triton",
        "image": image,
        "command": ["tritonserver"],
        "args": [
            f"--model-repository={ROOT}/models",
            f"--backend-directory={ROOT}/backends",
            "--model-control-mode=poll",
            f"--repository-poll-secs={POLL_SECONDS}",
        ],
        "ports": [{"name": n, "containerPort": number} for n, number in PORTS.items()],
        "startupProbe": probe("ready", periodSeconds=10, failureThreshold=LOAD_SECONDS // 10),
        "readinessProbe": probe("ready", periodSeconds=5),
        "livenessProbe": probe("live", periodSeconds=10, failureThreshold=6),
        "volumeMounts": [{"name": "repository", "mountPath": ROOT, "readOnly": True}],
    }
    if backend.startswith("tensorrt"):
        container["resources"] = {"limits": {"nvidia.com/gpu": "1"}}
    return container
