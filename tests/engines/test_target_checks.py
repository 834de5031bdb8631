# SPDX-License-Identifier: Apache-2.0

import pytest

from freewheel.core.errors import BuildError
from freewheel.engines import Target, TensorSpec
from freewheel.engines.target_checks import check_options, check_precision, check_profile

INPUTS = {
    "hidden": TensorSpec("float32", ("batch", "tokens", 8)),
    "rope": TensorSpec("float32", (1, "tokens", 4)),
    "weight": TensorSpec("float32", (8, 8)),
}
FITTING = {
    "hidden": ((1, 4, 8), (1, 6, 8), (2, 9, 8)),
    "rope": ((1, 4, 4), (1, 6, 4), (1, 9, 4)),
}


def test_profiles_of_dynamic_inputs_are_picked_and_others_left():
    target = Target(profiles={**FITTING, "latents": ((1,), (1,), (1,))})
    assert check_profile(target, INPUTS, "g") == FITTING


@pytest.mark.parametrize(
    ("rope", "what"),
    [
        (None, "[1, tokens, 4] is dynamic but has no optimization profile"),
        (((4, 4), (6, 4), (9, 4)), "has not the input's 3 dimensions"),
        (((1, 4, 4), (1, 6, 5), (1, 9, 4)), "(4, 5, 4) where the graph is fixed at 4"),
        (((1, 0, 4), (1, 6, 4), (1, 9, 4)), "'tokens' is (0, 6, 9)"),
        (((1, 4, 4), (1, 7, 4), (1, 9, 4)), "(4, 7, 9), but (4, 6, 9) for input 'hidden'"),
    ],
)
def test_profiles_that_do_not_fit_are_named(rope, what):
    profiles = {**FITTING, "rope": rope} if rope else {"hidden": FITTING["hidden"]}
    with pytest.raises(BuildError) as caught:
        check_profile(Target(profiles=profiles), INPUTS, "g.onnx")
    assert caught.value.where == "g.onnx, input 'rope'"
    assert what in caught.value.what
    assert caught.value.hint.startswith("give")


def test_unknown_options_get_the_nearest_or_none():
    target = Target(options={"workspace": 1})
    with pytest.raises(BuildError, match="did you mean 'workspace_bytes'"):
        check_options(target, ("workspace_bytes",), "g")
    with pytest.raises(BuildError, match="this backend has none"):
        check_options(target, (), "g")
    assert check_options(Target(options={"a": 1}), ("a",), "g") == {"a": 1}


def test_unknown_precisions_are_refused():
    check_precision(Target("float32"), ("float32",), "g", "hint")
    with pytest.raises(BuildError, match=r"g: precision float64 is not among.*: float32; hint"):
        check_precision(Target("float64"), ("float32",), "g", "hint")
