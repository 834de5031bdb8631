# SPDX-License-Identifier: Apache-2.0
"""Shared by the compiler tests: a tiny cut and its block template, traced once per session."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import WanTransformer3DModel

from freewheel.bundle.manifest import GraphEntry
from freewheel.bundle.reader import Bundle
from freewheel.bundle.store import Store
from freewheel.compiler.cut.declared import Cut
from freewheel.compiler.cut.models import family_of
from freewheel.compiler.cut.row import Row
from freewheel.compiler.cut.transformer import cut_transformer
from freewheel.compiler.engines import STORE
from freewheel.compiler.graphs.write import write_graphs
from freewheel.core.dtypes import Precision
from freewheel.core.progress import Silent

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def shared_cut(build_cache: Path) -> Callable[..., Cut]:
    """Return a function that cuts what a config describes, once for all tests and all builds."""
    store = Store(build_cache / STORE)

    def cut(
        row: Row,
        config: Mapping[str, Any],
        precision: Precision = "float32",
        stored: str = "float32",
    ) -> Cut:
        return cut_transformer(row, config, precision, lambda name: stored, store)

    return cut


@pytest.fixture(scope="session")
def cut_model(shared_cut: Callable[..., Cut]) -> Callable[..., Cut]:
    """Return a function that cuts a Wan transformer as if its checkpoint were float32."""
    family = family_of("WanTransformer3DModel", "config.json")

    def cut(
        model: WanTransformer3DModel, precision: Precision = "float32", stored: str = "float32"
    ) -> Cut:
        return shared_cut(family, model.config, precision, stored)

    return cut


@pytest.fixture(scope="session")
def wide_config() -> dict[str, int]:
    """A geometry whose weights dwarf its graph: 1,024 channels, 17 M parameters a block."""
    return {"num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 4096, "num_layers": 2}


@pytest.fixture(scope="session")
def bfloat16_cut(cut_model: Callable[..., Cut], wide_config: dict[str, int]) -> Cut:
    with torch.device("meta"):
        model = WanTransformer3DModel(
            **wide_config,
            in_channels=4,
            out_channels=4,
            text_dim=24,
            freq_dim=32,
            rope_max_seq_len=64,
        )
    return cut_model(model, "bfloat16")


@pytest.fixture(scope="session")
def bfloat16_graphs(
    bfloat16_cut: Cut, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, GraphEntry]]:
    """Folder and manifest entries of the bfloat16 block template, tapped and not."""
    folder = tmp_path_factory.mktemp("graphs")
    (folder / "graphs").mkdir()
    segments = [s for s in bfloat16_cut.segments if s.name in ("block", "block_tapped")]
    return folder, write_graphs(segments, bfloat16_cut.example_dims, folder, Silent())


@pytest.fixture(scope="session")
def bfloat16_block(bfloat16_graphs: tuple[Path, dict[str, GraphEntry]]) -> onnx.ModelProto:
    return onnx.load(bfloat16_graphs[0] / "graphs" / "block.onnx")


@pytest.fixture(scope="session")
def traced(tiny_bundle: Bundle, build_cache: Path) -> Path:
    """The cache in which the graphs of the tiny checkpoint lie."""
    return build_cache
