# SPDX-License-Identifier: Apache-2.0
"""Solved: follow one of several schedules, each with mixes, that were computed offline from runs."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, Tag, model_validator
from torch import Tensor

from .base import Decision, Mix, Mixed, Policy, Step, hold
from .config import ALL, BRANCHES, PER_BRANCH, CachingConfig
from .deadline import NO_DEADLINE
from .promise import FEWEST_RUNS, Promise, promised_psnr
from .setting import CacheSetting
from .spec import MAX_SMALL_ELEMENTS, HistorySpec, ParameterSpec, PolicySpec, StateSpec, Value

__all__ = [
    "HISTORY",
    "MAXIMUM_FACTORS",
    "MAXIMUM_SCHEDULES",
    "MAXIMUM_STEPS",
    "Solved",
    "SolvedConfig",
    "SolvedSchedule",
    "between",
]

HISTORY = 6
"""Residuals that a mix may use."""

MAXIMUM_STEPS = 200
"""Steps that a schedule may have."""

MAXIMUM_SCHEDULES = 128
"""Schedules that the tables hold."""

MAXIMUM_FACTORS = MAX_SMALL_ELEMENTS
"""Factors of all mixes: every schedule of 148 steps with six residuals each, or of 200 with three."""


PARAMETERS = {
    "computed_steps": ParameterSpec(
        default=MAXIMUM_STEPS,  # without tables every step is computed
        dtype="int64",
        minimum=1,
        maximum=MAXIMUM_STEPS,
        listed_in="budgets",
        meaning="steps to compute: the schedule of so many is followed; one of 'budgets'",
    ),
    "steps": ParameterSpec(
        default=MAXIMUM_STEPS,
        dtype="int64",
        minimum=1,
        maximum=MAXIMUM_STEPS,
        meaning=f"steps the schedules were made for, 1 to {MAXIMUM_STEPS}",
    ),
    "sigmas": ParameterSpec(
        default=[0.0],
        shape=[MAXIMUM_STEPS],
        minimum=0.0,
        meaning="noise level of each of 'steps': a run begins at the one nearest to its first; where "
        "all are equal, at the first",
    ),
    "budgets": ParameterSpec(
        default=[MAXIMUM_STEPS],
        dtype="int64",
        shape=[MAXIMUM_SCHEDULES],
        minimum=1,
        maximum=MAXIMUM_STEPS,
        meaning="computed steps of each schedule, ascending",
    ),
    "computed": ParameterSpec(
        default=[1],
        dtype="int64",
        shape=[MAXIMUM_SCHEDULES * MAXIMUM_STEPS],
        minimum=0,
        maximum=1,
        meaning=f"{MAXIMUM_STEPS} marks a schedule: 1 for each step that it computes, else 0",
    ),
    "mix": ParameterSpec(
        default=[1.0],
        shape=[MAXIMUM_FACTORS],
        meaning="'history' factors of past residuals, newest first, for each step that a schedule "
        "reuses, schedule after schedule",
    ),
    "history": ParameterSpec(
        default=HISTORY,
        dtype="int64",
        minimum=1,
        maximum=HISTORY,
        meaning=f"residuals that the mixes use, 1 to {HISTORY}",
    ),
}


MixRow = Annotated[list[float], Field(min_length=1, max_length=HISTORY)]
MixTable = list[MixRow]


class SolvedSchedule(BaseModel):
    """One schedule of a solved config.

    Attributes:
        computed: Indices of the steps to compute, ascending, the first one 0.
        mix: For each other step up to 6 factors of past residuals, newest first. One table per
            branch, or one for all.
        psnr: Of runs that nothing was fitted on, dB against the uncached ones; the same runs in the
            same order in all schedules.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    computed: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    mix: Annotated[
        Annotated[MixTable, Tag(ALL)] | Annotated[dict[str, MixTable], Tag(BRANCHES)], PER_BRANCH
    ]
    psnr: list[float] | None = None

    @property
    def tables(self) -> dict[str, MixTable]:
        """Return the mixes by branch; of all branches by the empty name."""
        return self.mix if isinstance(self.mix, dict) else {"": self.mix}


class SolvedConfig(CachingConfig):
    """Keys of solved configs, as `freewheel calibrate` writes them.

    Attributes:
        infer_steps: Steps the schedules were made for; needed.
        sigmas: Noise level that each of these steps starts from, so that a run that begins in their
            midst begins there in the schedules too; None has every run begin at their first step.
        computed_steps: Steps to compute, one schedule's number; None takes the most.
        schedules: One per number of computed steps, fewest first.
        solved_from: What the schedules were made from, for the reader: runs, guidance, errors.
    """

    policy: ClassVar[str] = "solved"

    feature_caching: Literal["Solved"] = "Solved"
    computed_steps: Annotated[int, PARAMETERS["computed_steps"].check] | None = None
    sigmas: Annotated[list[float], PARAMETERS["sigmas"].length] | None = None
    schedules: Annotated[list[SolvedSchedule], Field(min_length=1, max_length=MAXIMUM_SCHEDULES)]
    solved_from: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        steps = self.infer_steps
        if steps is None or steps > MAXIMUM_STEPS:
            raise ValueError(f"'infer_steps' of 1 to {MAXIMUM_STEPS}, not {steps}")
        if self.sigmas is not None and len(self.sigmas) != steps:
            raise ValueError(
                f"{steps} numbers in 'sigmas', one for each step, not {len(self.sigmas)}"
            )
        for index, schedule in enumerate(self.schedules):
            where = f"'schedules[{index}]"
            computed = schedule.computed
            if (
                computed[0] != 0
                or computed[-1] >= steps
                or any(b <= a for a, b in pairwise(computed))
            ):
                raise ValueError(
                    f"ascending steps from 0 to below {steps} in {where}.computed', not {computed}"
                )
            for name, rows in schedule.tables.items():
                if len(rows) != steps - len(computed):
                    raise ValueError(
                        f"{steps - len(computed)} rows, one for each reused step, in "
                        f"{where}.mix{'.' if name else ''}{name}', not {len(rows)}"
                    )
                held = [
                    sum(c < step for c in computed) for step in range(steps) if step not in computed
                ]
                if any(len(row) > count for row, count in zip(rows, held, strict=True)):
                    raise ValueError(
                        f"no more factors in a row of {where}.mix{'.' if name else ''}{name}' than "
                        "steps were computed before"
                    )
        if len({frozenset(s.tables) for s in self.schedules}) > 1:
            raise ValueError("the same branches in 'mix' of all 'schedules'")
        counts = {len(schedule.psnr or ()) for schedule in self.schedules}
        if len(counts) > 1 or 0 < min(counts) < FEWEST_RUNS:
            raise ValueError(
                f"'psnr' of the same {FEWEST_RUNS} runs or more in all 'schedules', or in none, not "
                f"of {' and '.join(map(str, sorted(counts)))}"
            )
        budgets = [len(schedule.computed) for schedule in self.schedules]
        if any(b <= a for a, b in pairwise(budgets)):
            raise ValueError(f"'schedules' of ever more computed steps, not of {budgets}")
        if self.computed_steps not in {None, *budgets}:
            raise ValueError(
                f"'computed_steps' of one of 'schedules', not {self.computed_steps}: "
                f"{', '.join(map(str, budgets))}"
            )
        factors = sum(steps - budget for budget in budgets) * self._history
        if factors > MAXIMUM_FACTORS:
            raise ValueError(
                f"at most {MAXIMUM_FACTORS} factors in the mixes of all 'schedules', not {factors}: "
                "leave schedules out, or mix fewer residuals"
            )
        return self

    def setting(self) -> CacheSetting:
        """Resolve to what a runtime is told to do, with what the schedules promise."""
        setting = super().setting()
        scores = [schedule.psnr for schedule in self.schedules if schedule.psnr]
        if not scores:
            return setting
        promise = Promise(runs=len(scores[0]), psnr=promised_psnr(scores))
        return setting.model_copy(update={"promise": promise})

    @property
    def _history(self) -> int:
        """Return how many residuals the longest row mixes."""
        tables = [rows for s in self.schedules for rows in s.tables.values()]
        return max((len(row) for rows in tables for row in rows), default=1)

    def _parameters(self) -> dict[str, Value]:
        assert self.infer_steps is not None, "validated"
        budgets = [len(s.computed) for s in self.schedules]
        marks = [int(step in s.computed) for s in self.schedules for step in range(MAXIMUM_STEPS)]
        return {
            "computed_steps": budgets[-1] if self.computed_steps is None else self.computed_steps,
            "steps": self.infer_steps,
            **({} if self.sigmas is None else {"sigmas": self.sigmas}),
            "budgets": list(budgets),
            "computed": marks,
            "history": self._history,
            **(self._mixes().get("") or {}),
        }

    def _branches(self) -> dict[str, dict[str, Value]]:
        return {name: own for name, own in self._mixes().items() if name}

    def _mixes(self) -> dict[str, dict[str, Value]]:
        """Return the parameter ``mix`` by branch."""
        size = self._history
        found: dict[str, dict[str, Value]] = {}
        for name in self.schedules[0].tables:
            rows = [row for s in self.schedules for row in s.tables[name]]
            filled = [[*row, *[0.0] * size][:size] for row in rows] or [[1.0]]
            found[name] = {"mix": [factor for row in filled for factor in row]}
        return found


class _Choice(NamedTuple):
    """The schedule that a step is taken from.

    Attributes:
        place: int64 [], of the schedule among all.
        first: int64 [], the schedule's step that the run begins at.
        row: int64 [], the schedule's step; `before` is that of the run's step before.
        before: int64 [], `first` - 1 at step 0.
        computed: bool [MAXIMUM_STEPS], the steps that it computes.
        first_row: int64 [], of its mixes in the table.
    """

    place: Tensor
    first: Tensor
    row: Tensor
    before: Tensor
    computed: Tensor
    first_row: Tensor


def _first_row(step: Step, state: dict[str, Tensor], parameters: dict[str, Tensor]) -> Tensor:
    """Return the schedule's step that the run begins at, int64 []."""
    apart = (parameters["sigmas"] - step.sigma).abs()
    nearest = torch.minimum(_first(apart == apart.min()), parameters["steps"] - 1)
    return torch.where(state["first"] < 0, nearest, state["first"])


def _row(step: Step, step_index: Tensor, first: Tensor, steps: Tensor) -> Tensor:
    """Return a schedule's step for a run's, int64 []; of step -1, the one before the first."""
    ahead = torch.div(step_index * (steps - first), step.step_count, rounding_mode="floor")
    return first + torch.where(step_index < 0, -1, ahead)


def _choose(step: Step, state: dict[str, Tensor], parameters: dict[str, Tensor]) -> _Choice:
    """Take the schedule of ``computed_steps``, or with a deadline the one that fits in it.

    That is looked for once a step was computed, or the schedule so far does not fit any more: of
    those of no more computed steps whose rest fits, those with the most steps left to compute; of
    these, the one that has computed most nearly the steps that the run has, of late above all.
    """
    steps, budgets = parameters["steps"], parameters["budgets"]
    is_there = torch.cat([budgets[:1] > 0, budgets[1:] > budgets[:-1]])
    first = _first_row(step, state, parameters)
    row = _row(step, step.step_index, first, steps)
    before = _row(step, step.step_index - 1, first, steps)
    marks = parameters["computed"].view(MAXIMUM_SCHEDULES, MAXIMUM_STEPS) == 1
    rows = torch.arange(MAXIMUM_STEPS)

    asked = _first(budgets == parameters["computed_steps"])
    is_ahead = (rows > before) & (rows < steps)
    ahead = (marks & is_ahead).sum(1)
    reused = (step.step_count - step.step_index - ahead).clamp(min=0)
    seconds = ahead * step.computed_seconds + reused * step.reused_seconds
    allowed = is_there & (budgets <= parameters["computed_steps"])
    fits = allowed & (seconds <= step.seconds_left)
    # Where nothing fits, what computes least: its seconds are guesses of a machine that is late.
    least = allowed & (ahead == torch.where(allowed, ahead, MAXIMUM_STEPS).min())
    wanted = fits | (least & ~fits.any())  # no Where: ONNX Runtime has none over booleans
    wanted = wanted & (ahead == torch.where(wanted, ahead, -1).max())
    age = (before - rows + 1).clamp(min=1)
    apart = (marks != (state["taken"] == 1)) & (rows >= first) & (rows <= before)
    distance = torch.where(wanted, (apart / age).sum(1), NO_DEADLINE)
    nearest = _first(distance == distance.min())

    standing = torch.where(state["schedule"] < 0, asked, state["schedule"])
    was_computed = step.computed_steps[0] == step.step_index - 1
    still_fits = fits.index_select(0, standing.reshape(1)).squeeze(0)
    stays = (step.seconds_left >= NO_DEADLINE) | (still_fits & ~was_computed)
    index = torch.where(stays, standing, nearest)
    computed = marks.index_select(0, index.reshape(1)).squeeze(0)
    earlier = torch.arange(MAXIMUM_SCHEDULES) < index
    first_row = torch.where(earlier, steps - budgets, 0).sum()
    return _Choice(index, first, row, before, computed, first_row)


def _first(marks: Tensor) -> Tensor:
    """Return the index of the first True, int64 []; of none, beyond the end."""
    return torch.where(marks, torch.arange(marks.shape[0]), marks.shape[0]).min()


def _looked_up(
    step: Step,
    signal: Tensor,
    kept: dict[str, Tensor],
    state: dict[str, Tensor],
    parameters: dict[str, Tensor],
) -> Mixed:
    steps, history = parameters["steps"], parameters["history"]
    chosen = _choose(step, state, parameters)
    rows, ages = torch.arange(MAXIMUM_STEPS), torch.arange(HISTORY)
    done = chosen.computed & (rows <= chosen.row)
    is_reused = (done & (rows == chosen.row)).sum() == 0
    place = (chosen.first_row + chosen.row - done.sum()) * history + ages
    factors = parameters["mix"].index_select(0, place.clamp(0, MAXIMUM_FACTORS - 1))
    factors = torch.where((ages < history) & is_reused, factors, 0.0)
    # The steps whose residuals the factors are for, as the run counts them; below 0 before it began.
    newest = torch.where(done, rows, -1).to(torch.float32).topk(HISTORY).values
    meant = torch.ceil((newest - chosen.first) * step.step_count / (steps - chosen.first))
    is_missing = ((newest < 0) & (factors != 0)).any() | (factors == 0).all()
    mix = factors @ between(meant, step.computed_steps)
    return Mixed(torch.where(is_missing, hold(step), mix), {})


def between(meant: Tensor, held: Tensor) -> Tensor:
    """Express residuals of some steps by those that are held: linearly between the two around.

    One that is newer than all held, or older, is the newest, or the oldest.

    Args:
        meant: float32 [HISTORY], steps.
        held: int64 [HISTORY], steps, newest first, -1 where none is held.

    Returns:
        float32 [meant, held]; a step that is held is that residual alone.
    """
    at = held.to(torch.float32)
    older = torch.cat([at[1:], at.new_full((1,), -1.0)])
    older = torch.where(older < 0, at - 1, older)
    newer = torch.cat([at[:1] + 1, torch.where(held[1:] >= 0, at[:-1], at[1:] + 1)])
    oldest = torch.where(held >= 0, at, at[0]).min()
    wanted = torch.minimum(torch.maximum(meant, oldest), at[0])[:, None]
    rising, falling = (wanted - older) / (at - older), (newer - wanted) / (newer - at)
    share = torch.minimum(rising, falling).clamp(0, 1)
    return torch.where(held >= 0, share, 0.0)


TABLE = Mix(
    law=_looked_up,
    history=HistorySpec(maximum=HISTORY, parameter="history"),
    parameters={name: PARAMETERS[name] for name in ("mix", "history")},
    bound="its factors were fitted for the computed steps of its own table",
)


class Solved(Policy):
    """Take decision and mix of every step from the schedule that computes ``computed_steps``.

    Schedules are made for a number of steps, ``steps``. A run of S steps begins at the row f whose
    noise level is nearest to its first, takes at step t the row ``f + ⌊t · (steps − f) / S⌋`` and
    computes where the rows since the last step hold a computed one. A run through the steps that
    they were made for, or through the last of them, follows them exactly. A factor whose residual is not
    held, as in a run of other length or where the guard computed more, goes to the two held
    around it. A run with a deadline goes from schedule to schedule, as the time left allows.

    Reference: docs/explanation/caching.md, solved schedules: least squares and dynamic programming
        over traces (`freewheel.tuning.solve`).
    """

    config = SolvedConfig
    mix = TABLE
    spec = PolicySpec(
        name="solved",
        summary="follows schedules and mixes computed offline from recorded runs",
        history=TABLE.history,
        state={
            "first": StateSpec(dtype="int64", initial=-1),
            "schedule": StateSpec(dtype="int64", initial=-1),
            "taken": StateSpec(dtype="int64", shape=[MAXIMUM_STEPS]),
        },
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
        chosen = _choose(step, state, parameters)
        rows = torch.arange(MAXIMUM_STEPS)
        due = (chosen.computed & (rows > chosen.before) & (rows <= chosen.row)).any()
        compute = step.must_compute | due
        taken = torch.where(compute & (rows == chosen.row), 1, state["taken"])
        return Decision(compute, {"first": chosen.first, "schedule": chosen.place, "taken": taken})
