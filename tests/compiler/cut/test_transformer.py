# SPDX-License-Identifier: Apache-2.0
"""A transformer is cut once, and the cut is kept by everything it is made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cases import Case
from diffusers import WanTransformer3DModel

from freewheel.bundle.store import Store
from freewheel.compiler.cut import declare as declaring
from freewheel.compiler.cut.cut import cut_model
from freewheel.compiler.cut.row import Row
from freewheel.compiler.cut.transformer import cut_transformer, on_meta
from freewheel.core.errors import CheckpointError

CUTS: dict[tuple[str, str], Any] = {}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count what is traced; an equal model is traced once for all tests of this file."""
    found: list[str] = []

    def count(row: Row, model_class: Any, config: Any, **options: Any) -> Any:
        found.append(row.model)
        key = (row.model, json.dumps(config, sort_keys=True))
        if key not in CUTS:
            CUTS[key] = cut_model(row, model_class, config, **options)
        return CUTS[key]

    monkeypatch.setattr(declaring, "cut_model", count)
    declaring.cut_once.cache_clear()
    return found


def test_an_equal_model_is_traced_once(traced: list[str], tmp_path: Path, wan: Case) -> None:
    store = Store(tmp_path)
    config: Any = wan.model.config

    def cut(precision: Any = "float32", stored: str = "float32", **changed: Any) -> Any:
        declaring.cut_once.cache_clear()  # as in another process
        return cut_transformer(
            wan.row, {**config, **changed}, precision, lambda name: stored, store
        )

    one, again = cut(), cut()
    assert len(traced) == 1
    assert again.weights() == one.weights()
    assert [s.name for s in again.segments] == [s.name for s in one.segments]
    assert {dtype for dtype, _ in cut(stored="bfloat16").weights().values()} == {
        "bfloat16",
        "float32",
    }
    assert cut("float16").segments[-2].precision == "float16"
    assert cut(num_layers=3).stages[0].count == 3
    assert len(traced) == 4


def test_without_a_store_nothing_is_kept(traced: list[str], wan: Case) -> None:
    config: Any = wan.model.config
    cut = cut_transformer(wan.row, config, "float32", lambda name: "float32")
    assert traced == ["WanTransformer3DModel"]
    assert not cut.unread
    assert all(p.device.type == "meta" for s in cut.segments for p in s.module.parameters())


def test_a_model_on_meta_costs_no_memory() -> None:
    model = on_meta(WanTransformer3DModel, {"num_layers": 1})
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_layers": 1, "no_such_key": 3}, "no_such_key"),
        ({"num_layers": 1, "patch_size": 2}, "can't be made of"),
    ],
)
def test_a_config_of_another_model_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        on_meta(WanTransformer3DModel, config)
    assert caught.value.where.startswith("transformer/config.json")


def test_a_model_of_a_kind_that_its_row_refuses_is_refused_by_name(wan: Case) -> None:
    config: Any = wan.model.config
    with pytest.raises(CheckpointError, match="first-and-last-frame") as caught:
        cut_transformer(
            wan.row, {**config, "pos_embed_seq_len": 514}, "float32", lambda name: "float32"
        )
    assert caught.value.where == "transformer/config.json, 'pos_embed_seq_len'"
