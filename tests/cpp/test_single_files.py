"""C++ reads a weight that is a part of a fused one by its place: bundles of single-file checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cases import case
from loop import Loop, are_equal, check_equal
from safetensors.torch import save_file
from test_bundles import inputs_at

from freewheel.bundle.reader import Bundle
from freewheel.bundle.safetensors_header import read_header
from freewheel.compiler.cut.row import SIZES
from freewheel.policies.setting import CacheSetting

sys.path.insert(0, str(Path(__file__).parent.parent / "compiler" / "checkpoints"))

import originals

pytestmark = [pytest.mark.openvino, pytest.mark.slow]


def parts_of_fused(bundle: Bundle) -> int:
    """Count the weights that begin within a tensor of their file, and not with it."""
    begins: dict[str, set[int]] = {}
    for tensor in bundle.manifest.tensors.values():
        if tensor.file not in begins:
            header = read_header(bundle.path(tensor.file))
            begins[tensor.file] = {stored.offset for stored in header.values()}
    return sum(t.offset not in begins[t.file] for t in bundle.manifest.tensors.values())


def test_parts_of_fused_weights_are_read_where_they_lie(
    build_bundle: Callable[..., Bundle], cpp_build: Path, tmp_path: Path
) -> None:
    """Of Stable Diffusion 3.5, whose file has query, key and value in one."""
    one = case("sd35")
    one.model.save_pretrained(tmp_path / "plain")
    single = tmp_path / "single" / "model.safetensors"
    single.parent.mkdir()
    one.model.save_config(single.parent)
    state = {
        n: t.clone().contiguous() for n, t in originals.sd3(dict(one.model.state_dict())).items()
    }
    save_file(state, single)
    plain, bundle = (build_bundle(p, ("openvino",)) for p in (tmp_path / "plain", single))
    assert parts_of_fused(plain) == 0
    assert parts_of_fused(bundle) > 4
    inputs, _ = inputs_at(one, bundle, SIZES)
    prompt = {n: inputs[n].numpy() for n, i in bundle.manifest.inputs.items() if i.runs == "prompt"}
    loops = [Loop(b, inputs["latents"].numpy(), {"cond": prompt}, 3, 1.0) for b in (bundle, plain)]
    check_equal(loops[0], cpp_build, CacheSetting(), tmp_path)
    (ours, _), (expected, _) = (loop.in_python(CacheSetting()) for loop in loops)
    assert are_equal(ours, expected)


def test_weights_in_float8_are_read_as_they_lie(
    float8_bundle: Bundle, cpp_build: Path, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    latents = random.standard_normal((1, 4, 3, 4, 6)).astype(np.float32)
    prompt = {"text_states": random.standard_normal((1, 5, 24)).astype(np.float32)}
    loop = Loop(float8_bundle, latents, {"cond": prompt}, 3, 1.0)
    check_equal(loop, cpp_build, CacheSetting(), tmp_path)
    expected, _ = loop.in_python(CacheSetting())
    options = ("--backend", "openvino", "--offload")
    found, _ = loop.in_cpp(cpp_build, CacheSetting(), tmp_path, options=options)
    assert are_equal(found, expected)
