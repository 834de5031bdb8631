# SPDX-License-Identifier: Apache-2.0
"""How dtypes are spelled everywhere: torch's own names, and what safetensors and ONNX call them."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["ITEM_BYTES", "PRECISIONS", "SAFETENSORS_DTYPES", "Precision"]

Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

ITEM_BYTES: dict[str, int] = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "int32": 4,
    "int64": 8,
    "float64": 8,
}

SAFETENSORS_DTYPES: dict[str, str] = {
    "BOOL": "bool",
    "I8": "int8",
    "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "I32": "int32",
    "I64": "int64",
    "F64": "float64",
}
"""dtype in a safetensors header → our spelling."""
