# SPDX-License-Identifier: Apache-2.0

from types import SimpleNamespace

from freewheel.engines.tensorrt_build import _profiles, known_capabilities


def test_capabilities_are_spelled_with_a_dot_in_rising_order():
    members = dict.fromkeys(["NONE", "CURRENT", "SM120", "SM75", "SM89"])
    trt = SimpleNamespace(ComputeCapability=SimpleNamespace(__members__=members))
    assert known_capabilities(trt) == ["7.5", "8.9", "12.0"]


def test_a_range_becomes_two_profiles_and_one_size_one():
    wide = {"x": ((1, 4), (2, 4), (3, 4)), "y": ((4,), (4,), (4,))}
    usual = {"x": ((2, 4),) * 3, "y": ((4,),) * 3}
    assert _profiles(wide, chooses_kernels=True) == [wide, usual]
    assert _profiles(wide, chooses_kernels=False) == [wide]
    assert _profiles(usual, chooses_kernels=True) == [usual]
    assert _profiles({}, chooses_kernels=True) == []
