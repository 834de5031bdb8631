# SPDX-License-Identifier: Apache-2.0
"""A tokenizer as a graph of OpenVINO's, for programs without Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["write_tokenizer"]

NO_LIMIT = 2**30
"""Tokens after which the graph would cut a text; what takes its ids has a limit and a message."""


def write_tokenizer(tokenizer: Any, file: Path) -> Callable[[str], list[int]]:
    """Write what a tokenizer computes as an OpenVINO model: ``file`` (.xml) and a .bin beside it.

    Args:
        tokenizer: A fast tokenizer of transformers; its ``model_max_length`` is changed.
        file: Written by this.

    Returns:
        What the written model makes of a text: its token ids, end token included.

    Raises:
        ImportError: the package openvino-tokenizers is missing.
        Exception: it can't convert this tokenizer; of any class.
    """
    import openvino
    import openvino_tokenizers

    tokenizer.model_max_length = NO_LIMIT
    model = openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=False)
    openvino.save_model(model, str(file), compress_to_fp16=False)
    compiled = openvino.Core().compile_model(str(file), "CPU")

    def ids_of(text: str) -> list[int]:
        return [int(i) for i in compiled([text])["input_ids"][0]]

    return ids_of
