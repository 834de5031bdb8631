# SPDX-License-Identifier: Apache-2.0

import pytest

from freewheel.engines.tensorrt_journal import Journal, fault_recorder

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


def test_errors_are_told_in_one_line_and_order():
    found = journal()
    assert "no reason" in found.fault()
    found.note("ERROR", "Error Code 1:\n  Myelin (bad)")
    found.note("ERROR", "follow-up")
    found.note("ERROR", "follow-up")
    assert found.fault() == "Error Code 1: Myelin (bad); follow-up"


@pytest.mark.tensorrt
def test_a_runtime_tells_its_recorder_and_asks_no_logger_of_ours():
    """TensorRT-RTX itself complains here: its threads must not wait for Python to log."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    runtime, faults = trt.Runtime(trt.Logger(trt.Logger.ERROR)), fault_recorder(trt)
    runtime.error_recorder = faults
    assert runtime.deserialize_cuda_engine(b"no plan" * 100) is None
    assert faults.get_num_errors() >= 1
    assert "Serialization assertion" in faults.get_error_desc(0)
    assert "Serialization assertion" in faults.take()
    assert "no reason" in faults.take()
