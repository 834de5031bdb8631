# SPDX-License-Identifier: Apache-2.0
"""The table in ``engines/__init__.py``."""

import subprocess
import sys

import pytest

from freewheel.core.errors import BackendUnavailable, ConfigError
from freewheel.engines import BACKENDS, Availability, auto_backend, backend, backend_class


def test_every_row_resolves_to_a_class_of_that_name():
    for name in BACKENDS:
        found = backend_class(name)
        assert found.name == name
        assert isinstance(found.probe(), Availability)
        assert "float32" in found.precisions


def test_importing_the_package_and_probing_need_no_vendor_package():
    code = """
import sys
for name in ("tensorrt", "tensorrt_rtx", "openvino", "onnxruntime", "polygraphy"):
    sys.modules[name] = None
    import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if sys.modules.get(name, 1) is None else real(name)
from freewheel.engines import BACKENDS, backend_class
for name in BACKENDS:
    state = backend_class(name).probe()
    assert not state.available and not state.can_build and state.install, (name, state)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError) as caught:
        backend("openvin")
    assert "did you mean 'openvino'" in caught.value.hint
    assert "tensorrt-rtx" in caught.value.hint


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    state = Availability(False, "no GPU here", "buy one", builds_elsewhere=True)
    monkeypatch.setattr(backend_class("tensorrt-rtx"), "probe", classmethod(lambda cls: state))
    with pytest.raises(BackendUnavailable, match="'tensorrt-rtx': no GPU here; buy one"):
        backend("tensorrt-rtx")
    assert backend("tensorrt-rtx", to_build=True).name == "tensorrt-rtx"


def pretend(monkeypatch, available):
    for name in BACKENDS:
        state = Availability(name in available, f"because {name}", builds_elsewhere=True)
        cls = backend_class(name)
        monkeypatch.setattr(cls, "probe", classmethod(lambda cls, state=state: state))


@pytest.mark.parametrize(
    ("available", "precision", "taken"),
    [
        ({"openvino", "onnxruntime"}, "float32", "openvino"),
        ({"tensorrt-rtx", "openvino"}, "bfloat16", "tensorrt-rtx"),
        ({"onnxruntime"}, "float32", "onnxruntime"),
    ],
)
def test_auto_takes_the_first_that_runs_here(monkeypatch, available, precision, taken):
    pretend(monkeypatch, available)
    found, reasons = auto_backend(precision)
    assert found.name == taken
    assert list(reasons) == list(BACKENDS)[: list(BACKENDS).index(taken) + 1]
    assert reasons[taken] == f"because {taken}"


def test_auto_passes_over_a_backend_that_yields_to_one_that_runs(monkeypatch):
    pretend(monkeypatch, {"onnxruntime"})
    slower = Availability(True, "old CPU", yields_to="onnxruntime")
    monkeypatch.setattr(backend_class("openvino"), "probe", classmethod(lambda cls: slower))
    found, reasons = auto_backend()
    assert found.name == "onnxruntime"
    assert reasons["openvino"] == "slower than onnxruntime on this machine (old CPU)"
    assert auto_backend("bfloat16")[0].name == "openvino"  # the other has no kernels


def test_auto_skips_a_backend_without_the_precision_and_says_so(monkeypatch):
    pretend(monkeypatch, {"onnxruntime"})
    with pytest.raises(BackendUnavailable, match="onnxruntime: has no bfloat16 kernels"):
        auto_backend("bfloat16")
