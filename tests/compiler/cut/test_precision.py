# SPDX-License-Identifier: Apache-2.0
"""Products of tokens are low, everything that the published models keep in float32 is float32."""

from __future__ import annotations

import operator

import torch
from cases import Case, traced
from torch import Tensor, fx, nn

from freewheel.compiler.cut.classes import classify
from freewheel.compiler.cut.extract import extract
from freewheel.compiler.cut.precision import typed
from freewheel.compiler.cut.row import run, step
from freewheel.compiler.cut.trace import Trace
from freewheel.compiler.cut.words import is_operation, operation


def graph_of(found: Trace) -> fx.GraphModule:
    nodes = [node for node in found.graph.nodes if is_operation(node)]
    return extract(found, classify(found), nodes, list(found.results), name="whole")[0]


def dtypes_of(module: fx.GraphModule, *given: Tensor) -> dict[str, torch.dtype]:
    """Return operation → dtype of its last result."""
    seen: dict[str, torch.dtype] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n.op == "call_function" and isinstance(result, Tensor):
                seen[operation(n)] = result.dtype
            return result

    Watch(module).run(*given)
    return seen


def lowered(module: fx.GraphModule, batch: set[object] = frozenset()) -> fx.GraphModule:  # type: ignore[assignment]
    given = {node.name: torch.float32 for node in module.graph.find_nodes(op="placeholder")}
    return typed(
        module,
        given,
        precision=torch.float16,
        stored=lambda name: "float32",
        batch=batch,  # type: ignore[arg-type]  # symbols
    )[0]


def test_tokens_products_are_low_norms_and_sums_with_the_stream_are_not() -> None:
    def forward(x: Tensor) -> Tensor:
        hidden = torch.nn.functional.layer_norm(x, (4,))
        low = torch.nn.functional.gelu(hidden @ torch.ones(4, 4))
        return x + low

    module = lowered(graph_of(traced(forward, x=step("batch tokens 4"))))
    seen = dtypes_of(module, torch.randn(2, 5, 4))
    assert seen["matmul"] == seen["gelu"] == torch.float16
    assert seen["layer_norm"] == seen["add"] == torch.float32


def test_rotary_embeddings_of_low_products_are_float32() -> None:
    """Their tables are, and ONNX knows no node of both."""

    def forward(x: Tensor, table: Tensor) -> Tensor:
        low = x @ torch.ones(4, 4)
        turned = torch.ops.onnx.RotaryEmbedding.opset23(low, table, table)
        return torch.nn.functional.scaled_dot_product_attention(turned, turned, turned)

    found = traced(forward, x=step("batch 1 tokens 4"), table=step("batch tokens 2"))
    module = lowered(graph_of(found))
    seen = dtypes_of(module, torch.randn(2, 1, 5, 4), torch.randn(2, 5, 2))
    assert seen["RotaryEmbedding"] == torch.float32
    assert seen["matmul"] == seen["scaled_dot_product_attention"] == torch.float16


def test_products_of_vectors_stay_float32() -> None:
    found = traced(lambda t: t.unsqueeze(1) @ torch.ones(1, 4), t=run())
    module = graph_of(found)
    assert dtypes_of(lowered(module, set(found.symbols)), torch.randn(3))["matmul"] == torch.float32


def test_tokens_may_be_of_one_number_a_vector_is_one() -> None:
    for shape, dtype in (("batch 5 4", torch.float16), ("batch 1 4", torch.float32)):
        found = traced(lambda x: x @ torch.ones(4, 4), x=step(shape))
        module = lowered(graph_of(found), set(found.symbols))
        assert dtypes_of(module, torch.randn(2, *map(int, shape.split()[1:])))["matmul"] == dtype


def test_a_number_is_written_where_it_is_read() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(2, 5)
    end = graph.call_function(operator.add, (1, 2))
    end.meta["val"] = 3
    taken = graph.call_function(torch.ops.aten.slice.Tensor, (x, 1, 1, end))
    taken.meta["val"] = torch.zeros(2, 2)
    graph.output((taken,))
    module = lowered(fx.GraphModule(nn.Module(), graph))
    assert module(torch.arange(10.0).view(2, 5))[0].tolist() == [[1, 2], [6, 7]]


def test_linear_attention_is_float32_and_attention_low() -> None:
    """Sums over tokens overflow float16, and a sum of none divides by an epsilon that it lacks."""

    def forward(x: Tensor) -> Tensor:
        low = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        return torch.bmm(low, low.transpose(1, 2))

    module = lowered(graph_of(traced(forward, x=step("batch tokens 4"))))
    seen = dtypes_of(module, torch.randn(2, 5, 4))
    assert seen["scaled_dot_product_attention"] == torch.float16
    assert seen["bmm"] == torch.float32


def test_rows_are_added_in_the_wider_dtype_of_both() -> None:
    def forward(x: Tensor) -> Tensor:
        low = x @ torch.ones(4, 4)
        places = torch.zeros(x.shape[0], dtype=torch.int64)
        return low.index_put((places,), x, accumulate=True)

    module = lowered(graph_of(traced(forward, x=step("tokens 4"))))
    seen = dtypes_of(module, torch.randn(5, 4))
    assert (seen["matmul"], seen["index_put"]) == (torch.float16, torch.float32)


def test_what_depends_on_nothing_is_a_constant() -> None:
    def forward(t: Tensor) -> Tensor:
        return t.unsqueeze(1) * torch.exp(torch.arange(4, dtype=torch.float32) * -2.3)

    module = lowered(graph_of(traced(forward, t=run())))
    names = {operation(n) for n in module.graph.nodes if n.op == "call_function"}
    assert not names & {"exp", "arange"}
    expected = torch.exp(torch.arange(4, dtype=torch.float32) * -2.3)
    assert any(torch.equal(b, expected) for b in module.buffers())
    assert not module.state_dict(), "no checkpoint holds it"


def test_a_whole_number_is_a_vectors_length(wan: Case) -> None:
    graph = fx.Graph()
    count = graph.placeholder("count")
    count.meta["val"] = 5
    graph.output((graph.call_function(torch.ops.aten.arange.default, (count,)),))
    module = lowered(fx.GraphModule(nn.Module(), graph))
    assert module(torch.zeros(3))[0].tolist() == [0, 1, 2]


def test_a_scaled_timestep_is_divided_where_it_comes_in() -> None:
    module = graph_of(traced(lambda t: t + 1, t=run()))
    (name,) = (node.name for node in module.graph.find_nodes(op="placeholder"))
    made, dtypes = typed(
        module,
        {name: torch.float32},
        precision=None,
        stored=lambda name: "float32",
        batch=set(),
        names={name: "timesteps"},
        scale=1000.0,
    )
    assert made(timesteps=torch.tensor([500.0]))[0].tolist() == [1.5]
    assert dtypes == [torch.float32]


def test_no_segment_hands_on_float64_and_no_block_computes_in_it() -> None:
    module = graph_of(traced(lambda x: x.double() * 2, x=step("batch tokens 4")))
    assert lowered(module)(torch.ones(2, 5, 4))[0].dtype == torch.float32
    assert "float64" not in lowered(module).code
    (name,) = (node.name for node in module.graph.find_nodes(op="placeholder"))
    given = {name: torch.float32}
    _, dtypes = typed(module, given, precision=None, stored=lambda name: name, batch=set())
    assert dtypes == [torch.float32]
