# SPDX-License-Identifier: Apache-2.0
"""A refusal names the transformer and what of it stands in the way."""

from __future__ import annotations

import pytest

from freewheel.compiler.cut.refusal import refuse
from freewheel.core.errors import ExportError


def test_a_refusal_names_class_fault_and_values() -> None:
    with pytest.raises(ExportError) as caught:
        refuse("SomeTransformer", "computes something between two blocks", ["bridge_1"])
    assert caught.value.where == "transformer 'SomeTransformer'"
    assert caught.value.what == "computes something between two blocks: bridge_1"
    with pytest.raises(ExportError, match="has no blocks; "):
        refuse("SomeTransformer", "has no blocks")
