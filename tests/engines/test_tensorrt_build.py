# SPDX-License-Identifier: Apache-2.0

import subprocess
import sys
from types import SimpleNamespace

import pytest

from freewheel.engines.tensorrt_build import Journal, known_capabilities

LAYERS = """Layers:
Name: s_0, LayerType: shape_call, Inputs: [], Outputs: [], TacticName: , StreamId: 0, Metadata: 
Name: up_1, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,64] }], Constants: [], Outputs: [], TacticName: cask, StreamId: 0, Metadata: [ONNX Layer: up]
Name: w_2, LayerType: signal, Inputs: [], Outputs: [], TacticName: , StreamId: 0, EventId: 1, Metadata: 
Name: g_3, LayerType: kgen, Inputs: [], Outputs: [], TacticName: gelu_vec, StreamId: 0, Metadata: [ONNX Layer: gelu][ONNX Layer: down]
"""  # noqa: E501, W291


def journal() -> Journal:
    found = Journal()
    found.errors, found.layers, found.activation_bytes = [], [], None
    return found


def test_layers_are_read_from_the_log_without_housekeeping():
    found = journal()
    found.note("VERBOSE", LAYERS)
    assert found.layers == [
        {"name": "up_1", "type": "gemm", "kernel": "cask", "nodes": ["up"]},
        {"name": "g_3", "type": "kgen", "kernel": "gelu_vec", "nodes": ["gelu", "down"]},
    ]


def test_activation_memory_is_read_from_the_log():
    found = journal()
    found.note("INFO", "Total Activation Memory: 3354624000 bytes")
    assert found.activation_bytes == 3_354_624_000


def test_the_first_error_is_told_in_one_line():
    found = journal()
    assert "no reason" in found.fault()
    found.note("ERROR", "Error Code 1:\n  Myelin (bad)")
    found.note("ERROR", "follow-up")
    assert found.fault() == "Error Code 1: Myelin (bad)"


def test_capabilities_are_spelled_with_a_dot_in_rising_order():
    members = dict.fromkeys(["NONE", "CURRENT", "SM120", "SM75", "SM89"])
    trt = SimpleNamespace(ComputeCapability=SimpleNamespace(__members__=members))
    assert known_capabilities(trt) == ["7.5", "8.9", "12.0"]


@pytest.mark.tensorrt
def test_a_process_that_compiled_with_the_other_package_is_refused():
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    code = """
import polygraphy.config
polygraphy.config.USE_TENSORRT_RTX = False
import polygraphy.backend.trt
import tensorrt_rtx
from freewheel.engines.tensorrt_build import _create_config
from freewheel.configs.errors import BuildError
try:
    _create_config(tensorrt_rtx, None, None, {}, {}, capabilities=(), timing_cache=None,
                   monitor=None)
except BuildError as fault:
    assert "has compiled with tensorrt before" in str(fault), fault
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
