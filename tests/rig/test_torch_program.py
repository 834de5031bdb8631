# SPDX-License-Identifier: Apache-2.0
"""The torch operations that stand in for kernels on a GPU, against ONNX Runtime on this CPU."""

from __future__ import annotations

import onnx
import pytest
import torch
from host_device import OnnxProgram
from stand_in import DTYPE_NAMES
from torch_program import TorchProgram

from freewheel.bundle.reader import Bundle

SIZES = {"tokens_per_frame": 6, "frames": 3, "tokens": 18, "height": 4, "width": 6, "rows": 18}


def test_every_graph_gives_what_onnxruntime_gives(tiny_bundle: Bundle) -> None:
    generator = torch.Generator().manual_seed(0)
    engines = tiny_bundle.engines("onnxruntime")
    assert engines is not None
    wrong: dict[str, float] = {}
    for graph, place in engines.files.items():
        model = onnx.load(tiny_bundle.path(place) / "graph.onnx")
        found, expected = outputs(model, generator)
        for name, tensor in found.items():
            error = (tensor.double() - expected[name].double()).nan_to_num().norm()
            relative = float(error / expected[name].double().nan_to_num().norm().clamp_min(1e-6))
            if relative > 1e-4:
                wrong[f"{graph}, {name}"] = relative
    assert not wrong


def outputs(
    model: onnx.ModelProto, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    host, theirs = TorchProgram(model, torch.device("cpu")), OnnxProgram(model)
    given = {n: example(n, kind, generator) for n, kind in host._inputs.items()}
    shapes = theirs.output_shapes({n: tuple(t.shape) for n, t in given.items()})
    made = [
        {
            n: torch.zeros(shapes[n], dtype=getattr(torch, DTYPE_NAMES[k.elem_type]))
            for n, k in host._outputs.items()
        }
        for _ in range(2)
    ]
    for program, answers in zip((host, theirs), made, strict=True):
        program.run({n: (t.data_ptr(), tuple(t.shape)) for n, t in {**given, **answers}.items()})
    return made[0], made[1]


def example(name: str, kind: object, generator: torch.Generator) -> torch.Tensor:
    shape = [
        d.dim_value or SIZES.get(d.dim_param, 1 if d.dim_param == "batch" else 2)
        for d in kind.shape.dim
    ]
    dtype = getattr(torch, DTYPE_NAMES[kind.elem_type])
    if dtype.is_floating_point:
        scale = 100.0 if name == "timesteps" else 1.0
        return (torch.rand(shape, generator=generator) * scale).to(dtype)
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_others_is_viewed_in_place(dtype: str) -> None:
    from torch_program import tensor_at

    mine = torch.zeros(3, 5, dtype=getattr(torch, dtype))
    tensor_at(mine.data_ptr(), (3, 5), mine.dtype, torch.device("cpu")).fill_(2.0)
    assert bool((mine == 2).all())
