# SPDX-License-Identifier: Apache-2.0
"""Dtypes are spelled as torch and safetensors spell them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save

from freewheel.core.dtypes import ITEM_BYTES, PRECISIONS, SAFETENSORS_DTYPES


def test_every_dtype_is_torchs_and_has_its_size() -> None:
    assert {name: getattr(torch, name).itemsize for name in ITEM_BYTES} == ITEM_BYTES
    assert set(SAFETENSORS_DTYPES.values()) == set(ITEM_BYTES)
    assert set(PRECISIONS) <= set(ITEM_BYTES)


@pytest.mark.parametrize(("theirs", "ours"), SAFETENSORS_DTYPES.items())
def test_safetensors_spells_them_so(theirs: str, ours: str) -> None:
    content = save({"x": torch.zeros(2, dtype=getattr(torch, ours))})
    length = int.from_bytes(content[:8], "little")
    assert json.loads(content[8 : 8 + length])["x"]["dtype"] == theirs
