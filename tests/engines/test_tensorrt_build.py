# SPDX-License-Identifier: Apache-2.0

import subprocess
import sys
from types import SimpleNamespace

import pytest

from freewheel.engines.tensorrt_build import known_capabilities


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
