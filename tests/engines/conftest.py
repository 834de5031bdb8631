# SPDX-License-Identifier: Apache-2.0
"""Small graphs to compile, written as ONNX text."""

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.parser
import pytest
import torch

HEADER = '<ir_version: 10, opset_import: ["": 23]>'

TEXTS = {
    "matmul": "g (float[batch, tokens, 64] x, float[64, 64] w) => (float[batch, tokens, 64] out)"
    "{ out = MatMul(x, w) }",
    "matmul_bf16": "g (bfloat16[batch, tokens, 64] x, bfloat16[64, 64] w)"
    " => (bfloat16[batch, tokens, 64] out) { out = MatMul(x, w) }",
    "matmul_fp16": "g (float16[batch, tokens, 64] x, float16[64, 64] w)"
    " => (float16[batch, tokens, 64] out) { out = MatMul(x, w) }",
    "bf16_weight": "g (float[tokens, 64] x, bfloat16[64, 64] w) => (float[tokens, 64] out)"
    "{ wf = Cast<to = 1>(w)  out = MatMul(x, wf) }",
    "float8_weight": "g (float[tokens, 64] x, float8e4m3fn[64, 64] w, float[64, 1] s)"
    " => (float[tokens, 64] out) { wide = Cast<to = 1>(w)  scaled = Mul(wide, s)"
    "  out = MatMul(x, scaled) }",
    "read_float8": "g (bfloat16[tokens, 64] x, float8e4m3fn[64, 64] w, float[64, 1] s)"
    " => (bfloat16[tokens, 64] out) { one = Constant<value = float {1.0}>()"
    "  wide = DequantizeLinear(w, one)  scaled = Mul(wide, s)  low = Cast<to = 16>(scaled)"
    "  out = MatMul(x, low) }",
    "scalars": "g (int64 step, bool force, float[n, 4] x) => (int64 next, bool late, float mean)"
    "{ one = Constant<value = int64 {1}>()  next = Add(step, one)  after = Greater(step, one)"
    "  late = And(after, force)  mean = ReduceMean<keepdims = 0>(x) }",
    "doubled": "g (float[n] x) => (float[m] out) { out = Concat<axis = 0>(x, x) }",
    "wide": "g (float[tokens, 8] x, float[8, 4096] up, float[4096, 8] down)"
    " => (float[tokens, 8] out) { h = MatMul(x, up)  out = MatMul(h, down) }",
    "flattened": "g (float[frames, height, 4] x, float[tokens, 4] y) => (float[tokens, 4] out)"
    "{ shape = Constant<value = int64[2] {-1, 4}>()  flat = Reshape(x, shape)"
    "  out = Add(flat, y) }",
    "attention_bf16": "g (bfloat16[batch, 12, tokens, 128] q, bfloat16[batch, 12, tokens, 128] k,"
    " bfloat16[batch, 12, tokens, 128] v) => (bfloat16[batch, 12, tokens, 128] out)"
    "{ out = Attention(q, k, v) }",
    "attention": "g (float[batch, 12, tokens, 128] q, float[batch, 12, tokens, 128] k,"
    " float[batch, 12, tokens, 128] v) => (float[batch, 12, tokens, 128] out)"
    "{ out = Attention(q, k, v) }",
    "rotary": "g (bfloat16[batch, 12, tokens, 128] x, bfloat16[batch, tokens, 64] rope_cos,"
    " bfloat16[batch, tokens, 64] rope_sin) => (bfloat16[batch, 12, tokens, 128] out)"
    "{ out = RotaryEmbedding<interleaved = 1>(x, rope_cos, rope_sin) }",
    "thirds": "g (float[n] x) => (float[n] out)"
    "{ three = Constant<value = float {3.0}>()  out = Div(x, three) }",
    "unknown_op": "g (float[n, 4] x) => (float[n, 4] out) { [peculiar] out = Fourierise(x) }",
}


class Block(torch.nn.Module):
    """A transformer block in miniature whose weights are arguments."""

    def forward(self, hidden, shift, qkv, out, up, down):
        batch, tokens, channels = hidden.shape
        normed = torch.nn.functional.layer_norm(hidden, (channels,)) + shift
        heads = (normed @ qkv).view(batch, tokens, 3, 4, channels // 4).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        hidden = hidden + mixed.transpose(1, 2).reshape(batch, tokens, channels) @ out
        return hidden + torch.nn.functional.gelu(hidden @ up, approximate="tanh") @ down


@pytest.fixture
def graph(tmp_path: Path) -> Callable[[str], Path]:
    """Write the graph of a name in ``TEXTS`` and return its path."""

    def write(name: str) -> Path:
        path = tmp_path / f"{name}.onnx"
        onnx.save(onnx.parser.parse_model(HEADER + TEXTS[name]), path)
        return path

    return write


@pytest.fixture
def baked(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """Write a matmul whose weight lies in a file beside the graph."""
    weight = torch.randn(64, 64)
    folder = tmp_path / "baked"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(b"header  " + weight.numpy().tobytes())
    model = onnx.parser.parse_model(
        HEADER + "g (float[tokens, 64] x) => (float[tokens, 64] out) { out = MatMul(x, w) }"
    )
    tensor = model.graph.initializer.add()
    tensor.name, tensor.data_type = "w", onnx.TensorProto.FLOAT
    tensor.dims.extend([64, 64])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "8"), ("length", "16384")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    onnx.save(model, folder / "graph.onnx")
    return folder / "graph.onnx", weight


@pytest.fixture(scope="session")
def block(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Block]:
    """Export a small block, weights as inputs, batch and tokens dynamic."""
    path = tmp_path_factory.mktemp("block") / "block.onnx"
    example = block_inputs(batch=2, tokens=16)
    program = torch.onnx.export(
        Block().eval(),
        tuple(example.values()),
        dynamo=True,
        opset_version=23,
        input_names=list(example),
        output_names=["hidden_out"],
        dynamic_shapes=(
            {0: "batch", 1: "tokens"},
            {0: "batch"},
            {},
            {},
            {},
            {},
        ),
        verbose=False,
    )
    program.save(path)
    return path, Block()


@pytest.fixture
def inputs_of_block() -> Callable[..., dict[str, torch.Tensor]]:
    return block_inputs


def block_inputs(*, batch: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of `Block`, weights scaled so that activations stay near one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "hidden": (batch, tokens, 64),
        "shift": (batch, 1, 64),
        "qkv": (64, 192),
        "out": (64, 64),
        "up": (64, 256),
        "down": (256, 64),
    }
    scales = {"hidden": 1.0, "shift": 0.1, "qkv": 0.125, "out": 0.125, "up": 0.125, "down": 0.06}
    return {n: torch.randn(*s, generator=generator) * scales[n] for n, s in shapes.items()}
