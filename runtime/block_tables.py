# SPDX-License-Identifier: Apache-2.0
"""Tables that blocks make of the timesteps with weights of their own, once per run for all steps."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ..bundle.manifest import StageEntry
from .buffers import allocate
from .model import Model

__all__ = ["BlockTables"]


class BlockTables:
    """What the stages' ``modulation`` graphs make, and the current step's row of it.

    A graph that reads the timesteps' tables alone makes the same in each branch: one object serves
    all. Where it reads the prompt too, each branch has an object, and a table a row for each step and
    element of the batch.

    Attributes:
        rows: Index of a stage and block → input of the block's graph → the row that it reads.
    """

    def __init__(self, model: Model, dims: Mapping[str, int], *, by_prompt: bool) -> None:
        """Allocate the rows.

        Args:
            model: Engines.
            dims: Sizes of the rows' named dimensions.
            by_prompt: Whether to serve the graphs that read the prompt, or those that do not.
        """
        manifest = model.manifest
        self._model, self._batch = model, dims.get("batch", 1) if by_prompt else 1
        self._stages: dict[int, tuple[str, StageEntry]] = {
            index: (stage.modulation, stage)
            for index, stage in enumerate(manifest.stages)
            if stage.modulation and manifest.reads_prompt(stage.modulation) == by_prompt
        }
        self.rows: dict[tuple[int, int], dict[str, Tensor]] = {}
        for index, (graph, stage) in self._stages.items():
            read = manifest.graphs[stage.block].inputs
            entries = {name: read[name] for name in manifest.graphs[graph].outputs}
            for block in range(stage.first, stage.first + stage.count):
                self.rows[index, block] = allocate(entries, dims, model.device)
        self._tables: dict[tuple[int, int], dict[str, Tensor]] = {}

    def compute(
        self,
        tables: Mapping[str, Tensor],
        steps: int,
        prompt: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Run every block's graph with all steps in one batch.

        Args:
            tables: The run's tables, [steps, …].
            steps: Of the run.
            prompt: The prompt's inputs and what ``prompt`` made of them, [batch, …].
        """
        self._tables.clear()
        whole: dict[str, Tensor] = {}  # each value as the graphs take it, [steps · batch, …]
        graphs, device = self._model.manifest.graphs, self._model.device
        for index, (graph, stage) in self._stages.items():
            for block in range(stage.first, stage.first + stage.count):
                own = {n: read[block - stage.first] for n, read in stage.reads.items()}
                named = {n: own.get(n, n) for n in graphs[graph].inputs}
                for value in set(named.values()) - whole.keys():
                    whole[value] = (
                        tables[value].repeat_interleave(self._batch, dim=0)
                        if value in tables
                        else torch.cat([prompt[value]] * steps)
                    )
                given = {name: whole[value] for name, value in named.items()}
                rows = len(next(iter(given.values())))
                made = allocate(graphs[graph].outputs, {"steps": rows}, device)
                self._model.bind(graph, {**given, **made}, block).run()
                self._tables[index, block] = {n: table.view(steps, -1) for n, table in made.items()}
        self._model.backend.synchronize()

    def select(self, step_index: int) -> None:
        """Put a step's rows where the bound calls read them."""
        for place, tables in self._tables.items():
            for name, row in self.rows[place].items():
                row.copy_(tables[name][step_index].view(row.shape))
