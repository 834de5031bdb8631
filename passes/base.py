# SPDX-License-Identifier: Apache-2.0
"""The contract of a graph pass, and the runner that holds passes to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from ..core.errors import PassError

__all__ = ["Pass", "PassResult", "run_passes"]


@dataclass(frozen=True)
class PassResult:
    """What a pass returns.

    Attributes:
        model: The rewritten model; the same object for an in-place pass.
        changed: Whether anything was rewritten.
    """

    model: ir.Model
    changed: bool


class Pass:
    """One rewrite of one ONNX graph.

    Idempotent: a second run reports ``changed == False``. ``in_place`` says whether `run` edits the
    model it is given or returns another; the runner checks it.
    """

    in_place: ClassVar[bool] = True

    def requires(self, model: ir.Model) -> None:
        """Raise `PassError` where the model is not what this pass can work on."""

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite the model."""
        raise NotImplementedError

    def ensures(self, model: ir.Model) -> None:
        """Raise `PassError` where the rewritten model is not what this pass promises."""


def run_passes(
    model: ir.Model, passes: Sequence[Pass], dump: Path | None = None
) -> tuple[ir.Model, list[str]]:
    """Run ``passes`` in order.

    Args:
        model: Edited in place or replaced; use the returned one.
        passes: A pipeline of `freewheel.passes`.
        dump: Folder that gets the model after each pass as ONNX text, for debugging.

    Returns:
        The model and the names of the passes that changed it.

    Raises:
        PassError: a pass's requirement or promise does not hold.
    """
    changed = []
    for index, graph_pass in enumerate(passes):
        name = type(graph_pass).__name__
        graph_pass.requires(model)
        result = graph_pass.run(model)
        if graph_pass.in_place != (result.model is model):
            raise PassError(
                f"pass '{name}'", f"declares in_place={graph_pass.in_place} but did otherwise"
            )
        model = result.model
        graph_pass.ensures(model)
        if result.changed:
            changed.append(name)
        if dump is not None:
            dump.mkdir(parents=True, exist_ok=True)
            (dump / f"{index:02d}_{name}.txt").write_text(str(model))
    return model, changed
