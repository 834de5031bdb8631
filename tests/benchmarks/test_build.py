"""Cut checkpoints share their shards with the whole one, and hold no more blocks than asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from synthetic import write_transformer

from freewheel.compiler.checkpoints.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def benchmark(repository: Path) -> ModuleType:
    """The script; by path, since a package of its name may be installed."""
    spec = importlib.util.spec_from_file_location("bench_build", repository / "benchmarks/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_cut_links_what_it_needs(benchmark: ModuleType, tmp_path: Path) -> None:
    write_transformer({"num_layers": 4, "num_attention_heads": 1, "ffn_dim": 8}, tmp_path / "whole")
    benchmark.cut_checkpoint(tmp_path / "whole", tmp_path / "cut", 2)
    cut = open_checkpoint(str(tmp_path / "cut"))
    assert cut.config["num_layers"] == 2
    shards = {t.file for t in cut.tensors.values()}
    assert all(s.stat().st_nlink == 2 for s in shards)


def test_the_table_has_a_row_per_case(benchmark: ModuleType) -> None:
    case = {
        "layers": 2,
        "bundle_bytes": 2e9,
        "written_bytes": 3e6,
        "phase_seconds": {"plan": 0.1, "trace": 2.0},
        "phase_peak_bytes": {"plan": 5e8, "trace": 6e8},
        "seconds": 2.1,
        "processor_seconds": 2.0,
        "peak_bytes": 6e8,
    }
    data = {
        "geometry": "g",
        "dtype": "bfloat16",
        "precision": "bfloat16",
        "weights": "inputs",
        "backends": ["openvino"],
        "cases": [case, {**case, "layers": 40}],
    }
    few, whole = benchmark.table(data).rows
    assert few == [2, "2.00", "3.0", "0.1 (500)", "2.0 (600)", "2.1", "2.0", "600"]
    assert whole[0] == 40
