# SPDX-License-Identifier: Apache-2.0
"""Solved: follow a schedule and mixes that were computed offline from recorded runs."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, Tag, model_validator
from torch import Tensor

from .base import Decision, Mix, Mixed, Policy, Step, hold
from .config import ALL, BRANCHES, PER_BRANCH, CachingConfig
from .spec import HistorySpec, ParameterSpec, PolicySpec, Value

__all__ = ["HISTORY", "MAXIMUM_STEPS", "Solved", "SolvedConfig"]

HISTORY = 6
"""Residuals that a row of the mix table may use."""

MAXIMUM_STEPS = 200
"""Steps that the tables hold."""


PARAMETERS = {
    "steps": ParameterSpec(
        default=MAXIMUM_STEPS,  # without tables every step is computed
        dtype="int64",
        minimum=1,
        maximum=MAXIMUM_STEPS,
        meaning=f"steps the tables were made for, 1 to {MAXIMUM_STEPS}",
    ),
    "reuse": ParameterSpec(
        default=[0],
        dtype="int64",
        shape=[MAXIMUM_STEPS],
        minimum=0,
        maximum=1,
        meaning="1 for each step that is reused, 0 for each that is computed",
    ),
    "mix": ParameterSpec(
        default=[1.0] + [0.0] * (HISTORY - 1),
        shape=[MAXIMUM_STEPS * HISTORY],
        meaning=f"factors of the last {HISTORY} residuals, newest first, step after step",
    ),
    "history": ParameterSpec(
        default=HISTORY,
        dtype="int64",
        minimum=1,
        maximum=HISTORY,
        meaning=f"residuals that the mixes use, 1 to {HISTORY}",
    ),
}


MixRow = Annotated[list[float], Field(max_length=HISTORY)]
MixTable = Annotated[list[MixRow], PARAMETERS["reuse"].length]


class SolvedConfig(CachingConfig):
    """Keys of solved configs, as `freewheel calibrate` writes them.

    Attributes:
        infer_steps: Steps the tables were made for; needed.
        mix: One row per step: up to 6 factors of past residuals, newest first, and an empty row for
            a computed step. One table per branch, or one for all.
        solved_from: What the tables were made from, for the reader: traces, guidance, error.
    """

    policy: ClassVar[str] = "solved"

    feature_caching: Literal["Solved"] = "Solved"
    mix: Annotated[
        Annotated[MixTable, Tag(ALL)] | Annotated[dict[str, MixTable], Tag(BRANCHES)], PER_BRANCH
    ]
    solved_from: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        tables = self.mix if isinstance(self.mix, dict) else {"": self.mix}
        for name, rows in tables.items():
            where = f"'mix.{name}'" if name else "'mix'"
            if len(rows) != self.infer_steps:
                raise ValueError(
                    f"one row in {where} for each of 'infer_steps' {self.infer_steps}, "
                    f"not {len(rows)}"
                )
            if rows[0]:
                raise ValueError(f"an empty first row in {where}: nothing can be reused yet")
        return self

    def _parameters(self) -> dict[str, Value]:
        return _solved(self.mix) if isinstance(self.mix, list) else {}

    def _branches(self) -> dict[str, dict[str, Value]]:
        return {n: _solved(t) for n, t in self.mix.items()} if isinstance(self.mix, dict) else {}


def _solved(rows: list[list[float]]) -> dict[str, Value]:
    """Return the policy's tables: a whole row of factors for every step, 1 and zeros where computed."""
    rest = [0.0] * HISTORY
    filled = [[*(row or [1.0]), *rest][:HISTORY] for row in rows]
    return {
        "steps": len(rows),
        "reuse": [int(bool(row)) for row in rows],
        "mix": [factor for row in filled for factor in row],
        "history": max(1, *(len(row) for row in rows)),
    }


def _row(step_index: Tensor, step_count: Tensor, steps: Tensor) -> Tensor:
    """Return the table's row for a step, int64 []; -1 for step -1."""
    row = torch.div(step_index * steps, step_count, rounding_mode="floor")
    return torch.where(step_index < 0, -1, row)


def _looked_up(
    step: Step,
    signal: Tensor,
    kept: dict[str, Tensor],
    state: dict[str, Tensor],
    parameters: dict[str, Tensor],
) -> Mixed:
    row = _row(step.step_index, step.step_count, parameters["steps"])
    table = parameters["mix"].view(MAXIMUM_STEPS, HISTORY)
    mix = table.index_select(0, row.reshape(1)).squeeze(0)
    mix = torch.where(torch.arange(HISTORY) < parameters["history"], mix, 0.0)
    is_missing = ((step.computed_steps < 0) & (mix != 0)).any() | (mix == 0).all()
    return Mixed(torch.where(is_missing, hold(step), mix), {})


TABLE = Mix(
    law=_looked_up,
    history=HistorySpec(maximum=HISTORY, parameter="history"),
    parameters={name: PARAMETERS[name] for name in ("mix", "history")},
    bound="its factors were fitted for the computed steps of its own table",
)


class Solved(Policy):
    """Take decision and mix of every step from tables.

    The tables are made for a number of steps, ``steps``; a run of S steps takes at step t the row
    ``⌊t · steps / S⌋`` and computes where the rows since the last step hold a computed one. A run
    of as many steps as the tables were made for follows them exactly; others stretch them, which
    keeps the ratios of gaps that a mix depends on. A row of zeros, or one that asks for a residual
    that is not there, holds the newest.

    Reference: ALGORITHMS 7; tables come from least squares and dynamic programming over traces
        (`freewheel.tuning.solve`).
    """

    config = SolvedConfig
    mix = TABLE
    spec = PolicySpec(
        name="solved",
        summary="follows a schedule and mixes computed offline from recorded runs",
        history=TABLE.history,
        parameters=PARAMETERS,
    )

    def decide(
        self,
        step: Step,
        signal: Tensor,
        feature: Tensor,
        kept: dict[str, Tensor],
        state: dict[str, Tensor],
        parameters: dict[str, Tensor],
    ) -> Decision:
        """Look the step up; see `Policy.decide`."""
        row = _row(step.step_index, step.step_count, parameters["steps"])
        before = _row(step.step_index - 1, step.step_count, parameters["steps"])
        rows = torch.arange(MAXIMUM_STEPS)
        due = ((parameters["reuse"] == 0) & (rows > before) & (rows <= row)).any()
        return Decision(step.must_compute | due, {})
