# SPDX-License-Identifier: Apache-2.0
"""A manifest reads back as it was written, and nothing it does not know gets by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from freewheel.bundle.manifest import SCHEMA_VERSION, Manifest, TensorEntry
from freewheel.bundle.reader import Bundle

Path = tuple[str | int, ...]

# Objects of the manifest that are records; the others are tables whose keys are free.
RECORDS: tuple[Path, ...] = (
    (),
    ("checkpoint",),
    ("pipeline",),
    ("inputs", "latents"),
    ("graphs", "block"),
    ("graphs", "block", "inputs", "hidden"),
    ("stages", 0),
    ("signals", "temb"),
    ("policies", "teacache"),
    ("policies", "teacache", "spec"),
    ("policies", "teacache", "spec", "history"),
    ("policies", "teacache", "spec", "parameters", "threshold"),
    ("configs", "off"),
    ("configs", "off", "cache"),
    ("configs", "off", "cache", "guard"),
    ("configs", "off", "generation"),
    ("tensors", "patch_embedding.weight"),
    ("engines", 0),
    ("samplers", 0),
    ("files", "graphs/block.onnx"),
)


@pytest.fixture(scope="session")
def manifest(tiny_bundle: Bundle) -> Manifest:
    return tiny_bundle.manifest


@pytest.fixture
def data(manifest: Manifest) -> Any:
    return json.loads(manifest.model_dump_json())


def leaves(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(child, (*path, key))
    else:
        yield path, node


def at(node: Any, path: Path) -> Any:
    for key in path:
        node = node[key]
    return node


def replaced(data: Any, path: Path, value: Any) -> Any:
    copy = json.loads(json.dumps(data))
    at(copy, path[:-1])[path[-1]] = value
    return copy


def alike(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same type."""
    kinds: dict[type, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(0, 2**62),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.text(max_size=8),
    }
    return kinds.get(type(value), st.none())


def test_a_real_manifest_round_trips(manifest: Manifest) -> None:
    text = manifest.model_dump_json(indent=1)
    again = Manifest.model_validate_json(text)
    assert again == manifest
    assert again.model_dump_json(indent=1) == text


@given(draw=st.data())
@settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=150)
def test_a_changed_field_is_refused_or_round_trips(manifest: Manifest, draw: Any) -> None:
    data = json.loads(manifest.model_dump_json())
    path, value = draw.draw(st.sampled_from(list(leaves(data))), label="field")
    changed = replaced(data, path, draw.draw(alike(value), label="value"))
    try:
        read = Manifest.model_validate(changed)
    except ValidationError:
        return
    assert json.loads(read.model_dump_json()) == changed
    assert Manifest.model_validate_json(read.model_dump_json()) == read


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: ".".join(map(str, p)) or "top")
def test_an_unknown_field_is_refused_where_it_stands(data: Any, path: Path) -> None:
    at(data, path)["surprise"] = 1
    with pytest.raises(ValidationError) as caught:
        Manifest.model_validate(data)
    found = caught.value.errors()
    assert [(e["type"], e["loc"]) for e in found] == [("extra_forbidden", (*path, "surprise"))]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), SCHEMA_VERSION + 1),
        (("schema_version",), None),
        (("precision",), "float8"),
        (("weights",), "auto"),
        (("feature_block",), -1),
        (("stages", 0, "count"), 0),
        (("dims", "tokens"), [["frames", 0]]),
        (("files", "graphs/block.onnx", "bytes"), -1),
        (("files", "graphs/block.onnx", "sha256"), "0" * 63),
        (("files", "graphs/block.onnx", "sha256"), "G" * 64),
        (("tensors", "patch_embedding.weight", "offset"), -1),
        (("tensors", "patch_embedding.weight", "dtype"), "float7"),
        (("tensors", "patch_embedding.weight", "dtype"), "nn"),
        (("graphs", "block", "inputs", "hidden", "shape"), [-1]),
        (("signals", "temb", "known"), "never"),
        (("configs", "off", "cache", "guard", "first_exact"), -1),
    ],
)
def test_a_value_out_of_range_is_refused_where_it_stands(data: Any, path: Path, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        Manifest.model_validate(replaced(data, path, value))
    assert {e["loc"][: len(path)] for e in caught.value.errors()} == {path}


def test_all_faults_are_reported_at_once(data: Any) -> None:
    data["feature_block"], data["weights"] = -1, "auto"
    del data["family"]
    with pytest.raises(ValidationError) as caught:
        Manifest.model_validate(data)
    assert caught.value.error_count() == 3


def test_entries_cannot_be_changed(manifest: Manifest) -> None:
    entry = TensorEntry(file="x", dtype="float32", shape=[1], offset=0, bytes=4)
    with pytest.raises(ValidationError, match="frozen"):
        entry.offset = 5
    with pytest.raises(ValidationError, match="frozen"):
        manifest.family = "other"
