# SPDX-License-Identifier: Apache-2.0
"""Graph passes and the ordered pipelines the compiler runs them in."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..core.tensor_spec import TensorSpec
from .base import Pass, PassResult, run_passes
from .declare_interface import DeclareInterface
from .decompose_rotary_embedding import DecomposeRotaryEmbedding
from .dequantize_float8 import DequantizeFloat8
from .distinct_attention_scales import DistinctAttentionScales
from .expand_attention_masks import ExpandAttentionMasks
from .keep_sums_before_products import KeepSumsBeforeProducts
from .mix_by_reduction import MixByReduction
from .multi_head_attention import MultiHeadAttention
from .optimize_graph import OptimizeGraph
from .remove_no_op_casts import RemoveNoOpCasts
from .static_reshapes import StaticReshapes
from .strip_trace_metadata import StripTraceMetadata
from .sum_rows_by_product import SumRowsByProduct
from .weights_as_inputs import WeightsAsInputs

__all__ = ["PASSES", "Pass", "PassResult", "backend_pipeline", "run_passes", "template_pipeline"]

PASSES: tuple[type[Pass], ...] = (
    WeightsAsInputs,
    StripTraceMetadata,
    OptimizeGraph,
    RemoveNoOpCasts,
    StaticReshapes,
    DeclareInterface,
    DecomposeRotaryEmbedding,
    KeepSumsBeforeProducts,
    MultiHeadAttention,
    ExpandAttentionMasks,
    MixByReduction,
    DistinctAttentionScales,
    DequantizeFloat8,
    SumRowsByProduct,
)


def template_pipeline(
    weights: Collection[str], inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]
) -> list[Pass]:
    """Return the pipeline for a graph whose weights are inputs.

    Args:
        weights: Initializer names that become inputs.
        inputs: Declared inputs (weights excluded).
        outputs: Declared outputs; others are dropped with what only they need.
    """
    return [
        WeightsAsInputs(weights),
        OptimizeGraph(),
        RemoveNoOpCasts(),
        StaticReshapes(),
        StripTraceMetadata(),
        DeclareInterface(inputs, outputs),
    ]


def backend_pipeline(backend: str) -> list[Pass]:
    """Return what a portable graph goes through before ``backend`` compiles it."""
    tensorrt: list[Pass] = [
        MixByReduction(),
        DistinctAttentionScales(),
        DequantizeFloat8(),
        SumRowsByProduct(),
    ]
    pipelines: dict[str, list[Pass]] = {
        "onnxruntime": [MultiHeadAttention(), ExpandAttentionMasks()],
        "openvino": [DecomposeRotaryEmbedding(), KeepSumsBeforeProducts()],
        "tensorrt": tensorrt,
        "tensorrt-rtx": tensorrt,
    }
    return pipelines.get(backend, [])
