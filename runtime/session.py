# SPDX-License-Identifier: Apache-2.0
"""One loaded bundle with its buffers: what happens inside a step of the denoise loop.

Every buffer is allocated and every binding made when the shapes are known, before step 0. A step
is then a handful of engine calls; nothing hidden-sized is copied or allocated between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import MappingProxyType
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..bundle.dims import match_dims, shape_of
from ..bundle.manifest import InputEntry
from ..bundle.sections import divide
from ..bundle.streams import HIDDEN, LATENTS, MODEL_OUTPUT, beside, check_samples_one
from ..core.errors import NotFiniteError, RequestError
from ..engines.base import BoundCall
from ..policies import form_of
from ..policies.deadline import Pace
from ..policies.decision_loop import DecisionRecord
from ..policies.schedule import Schedule
from ..policies.setting import CacheSetting
from ..policies.stretch import stretch_of
from .block_tables import BlockTables
from .body import Body
from .branch_cache import BranchCache
from .buffers import allocate
from .finite import is_finite
from .model import Model
from .pacer import Pacer
from .resolved_setting import ResolvedSetting, resolve
from .statistics import BranchStatistics, RunStatistics
from .step_record import OpenStep, Recorder, StepRecord
from .timesteps import timestep_inputs

__all__ = ["Session"]

Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def _on_stream(
    method: Callable[Concatenate[Any, Given], Answer],
) -> Callable[Concatenate[Any, Given], Answer]:
    """Run a method on the engines' stream: the caller's is joined once before and once after."""

    @wraps(method)
    def run(self: Any, /, *given: Given.args, **named: Given.kwargs) -> Answer:
        with self.model.on_stream():
            return method(self, *given, **named)

    return run


@dataclass
class _Branch:
    body: Body
    outputs: dict[str, Tensor]
    head: BoundCall
    finish: BoundCall
    cache: BranchCache | None = None
    last_step: int = -1

    @property
    def model_output(self) -> Tensor:
        """What the model gives for the first of its latents."""
        return self.outputs[MODEL_OUTPUT]


class Session:
    """Runs the model calls of a denoise loop over one set of buffers.

    Order of use: `begin` once per run, `set_prompt` per branch, then `step` for every branch of
    every step. A run resets all state, so what ran before can't show.
    """

    def __init__(self, model: Model, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """Allocate what does not depend on a shape; the rest follows at the first step.

        Args:
            model: Engines.
            clock: Tells seconds; deadlines are kept by it.
        """
        self.model, self.manifest = model, model.manifest
        self._clock, self._pacer, self._pace = clock, Pacer(), Pace()
        self.statistics = RunStatistics("off", True, 0)
        self._resolved = self.resolve(CacheSetting())
        self._recorder: Recorder | None = None
        self._shared_decision: tuple[int, DecisionRecord] | None = None
        self.on_decision: Callable[[int, DecisionRecord], None] = lambda step_index, decision: None
        self._timesteps = torch.zeros(0)
        self._timestep_inputs: dict[str, Tensor] = {}
        self._schedule = Schedule.of(())
        self._tables: dict[str, Tensor] = {}
        self._rows = self._allocate_rows()
        self._block_tables = BlockTables(model, {}, by_prompt=False)
        self._row = -1
        self._last_step = -1  # of any branch
        self._has_failed = False
        self._dims: dict[str, int] = {}
        self._shared: dict[str, Tensor] = {}
        self._prompts: dict[str, dict[str, Tensor]] = {}
        self._branches: dict[str, _Branch] = {}

    @_on_stream
    def begin(
        self,
        timesteps: Tensor,
        setting: CacheSetting | None = None,
        recorder: Recorder | None = None,
        *,
        sigmas: Tensor | None = None,
        beside: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Start a run: forget all state, compute what depends on timesteps alone.

        Args:
            timesteps: [steps], the values the model is conditioned on, in order.
            setting: Policy, parameters and guard; None is ``off``.
            recorder: Gets signals, features and residuals as they arise.
            sigmas: [steps], noise level that each step starts from; None takes a flow model's,
                ``timesteps / 1000``.
            beside: Latents beside the first → [steps], their timesteps, where those are others.

        Raises:
            ConfigError: unknown policy, parameter or signal, or a bound that other steps keep.
            RequestError: no timesteps, not as many sigmas or of others, or they are not finite.
        """
        if timesteps.ndim != 1 or not len(timesteps) or not bool(torch.isfinite(timesteps).all()):
            raise RequestError(
                "timesteps",
                f"are {tuple(timesteps.shape)}, expected [steps] finite values",
                "call scheduler.set_timesteps() first",
            )
        others = {} if sigmas is None else {"sigmas": sigmas}
        others |= {f"timesteps of '{latents}'": values for latents, values in beside.items()}
        for name, values in others.items():
            if values.shape != timesteps.shape or not bool(torch.isfinite(values).all()):
                raise RequestError(
                    name,
                    f"are {tuple(values.shape)}, expected [{len(timesteps)}] finite values",
                    "give the scheduler's, one per step, or leave them out",
                )
        resolved = self.resolve(setting or CacheSetting())
        schedule = Schedule.of(
            timesteps.float().tolist(), None if sigmas is None else sigmas.float().tolist()
        )
        stretch = stretch_of(resolved.setting, schedule)
        resolved.check_whole(stretch)
        self.model.decide_graph(resolved)  # which refuses what the model can't decide by
        self._pacer.begin(resolved.setting.deadline, self._clock())
        self._has_failed = True  # until the run is set up
        if resolved != self._resolved or (recorder is None) != (self._recorder is None):
            for branch in self._branches.values():
                branch.cache = None
        self._resolved, self._recorder, self._row = resolved, recorder, -1
        self._shared_decision = None
        self._last_step = -1
        self.statistics = RunStatistics(
            resolved.policy.spec.name,
            resolved.is_folded,
            len(timesteps),
            form=form_of(resolved.policy.spec.name, resolved.parameters),
            deadline=resolved.setting.deadline,
            always_run=resolved.always_run,
            foreseen=[] if stretch is None else stretch.warnings(),
        )
        self._compute_tables(timesteps, beside)
        self._schedule = schedule
        for branch in self._branches.values():
            branch.last_step = -1
            if branch.cache is not None:
                branch.cache.reset(self._tables, self._schedule)
        if recorder is not None:
            signals = {signal.value for signal in self.manifest.signals.values()}
            seen = {name: table for name, table in self._tables.items() if name in signals}
            recorder.on_run(seen, self._schedule)
        self._has_failed = False

    @property
    def steps(self) -> int:
        """Steps of the current run."""
        return len(self._timesteps)

    @property
    def timesteps(self) -> Tensor:
        """float32 [steps] of the current run."""
        return self._timesteps

    @property
    def timestep_inputs(self) -> Mapping[str, Tensor]:
        """Each input that is a timestep, of the current run, as `timestep_inputs` gives it."""
        return self._timestep_inputs

    def last_step(self, branch: str) -> int:
        """Return the step that ``branch`` ran last in this run, or -1."""
        known = self._branches.get(branch)
        return -1 if known is None else known.last_step

    @property
    def resolved(self) -> ResolvedSetting:
        """The current run's policy, parameters and guard."""
        return self._resolved

    @_on_stream
    def set_prompt(self, branch: str, states: Mapping[str, Tensor]) -> None:
        """Give a branch its prompt; its context is computed unless the prompt is the same.

        Args:
            branch: ``cond``, ``uncond``, …
            states: Per-prompt inputs by name (``text_states``, …), any float dtype.

        Raises:
            RequestError: an input is missing, misshapen or not finite.
        """
        wanted = {n: e for n, e in self.manifest.inputs.items() if e.runs == "prompt"}
        known = self._prompts.get(branch, {})
        given: dict[str, Tensor] = {}
        for name, entry in wanted.items():
            tensor = states.get(name)
            if tensor is None:
                raise RequestError(
                    f"branch '{branch}', input '{name}'", "is missing", f"give {', '.join(wanted)}"
                )
            match_dims(name, entry, tensor.shape)
            given[name] = (
                tensor.detach().to(self.model.device, getattr(torch, entry.dtype)).contiguous()
            )
        if known and all(torch.equal(known[n], t) for n, t in given.items()):
            return
        for name, tensor in given.items():
            self._check_input(f"branch '{branch}'", name, tensor, "encode the prompt again")
        self._prompts[branch] = {n: t.clone() for n, t in given.items()}
        existing = self._branches.get(branch)
        if existing is not None and existing.body.fits(given):
            with self._timed("prompt"):
                existing.body.set_prompt(given)
        else:
            self._branches.pop(branch, None)

    @_on_stream
    def step(self, branch: str, step_index: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run one step of one branch.

        Args:
            branch: A branch whose prompt was set.
            step_index: 0-based, rising. A branch may leave steps out, as guidance intervals do:
                it computes on its return, and caches from there.
            inputs: Per-step inputs by name: ``latents`` [batch, channels, frames, height, width].

        Returns:
            The model output for ``latents``, [batch, out channels, frames, height, width],
            float32: a buffer that the branch's next step overwrites. `outputs` has those for
            others.

        Raises:
            RequestError: shapes don't fit, no prompt was set, steps are out of order, an input is
                not finite, or a step of this run failed before.
            NotFiniteError: the step made values that are not finite; they are not kept.
        """
        if self._has_failed:
            raise RequestError(
                f"branch '{branch}', step {step_index}",
                "follows a step that failed",
                "call begin() to start another run",
            )
        done, last = self.last_step(branch), self._last_step
        if not done < step_index < self.steps or step_index not in (last, last + 1):
            raise RequestError(
                f"branch '{branch}', step {step_index}",
                f"does not follow step {max(done, last)} of {self.steps}",
                "call begin() at the start of a run, and steps in order",
            )
        self._place(inputs, f"branch '{branch}', step {step_index}")
        state = self._branch(branch)
        cache = state.cache
        assert cache is not None, "_branch() makes one"
        began = time.perf_counter()
        if step_index > last:
            prepared = sum(self.statistics.seconds.get(n, 0.0) for n in ("prepare", "prompt"))
            self._pace = self._pacer.begin_step(self._clock(), prepared)
        self._has_failed = True  # until the step has ended well
        if step_index > state.last_step + 1:
            cache.rejoin(step_index)
        self._select_row(state, step_index)
        with self._timed("head"):
            state.head.run()
        with self._timed("decide"):
            decision = self._decide(cache, step_index)
            self.model.agree(branch, step_index, decision)
        self._pacer.note(decision.compute)
        with self._timed("body" if decision.compute else "reuse"):
            if decision.compute:
                cache.compute(step_index)
            else:
                cache.reuse(decision)
        with self._timed("finish"):
            state.finish.run()
            self.model.backend.synchronize()
        if self.model.options.check_finite:
            with self._timed("check"):
                self._check_step(branch, step_index, computed=decision.compute)
        if decision.compute:
            cache.keep(step_index)
            cache.keep_output(state.model_output)
        self._has_failed = False
        state.last_step = self._last_step = step_index
        self.statistics.branches.setdefault(branch, BranchStatistics(self.steps)).add(
            step_index,
            decision.compute,
            decision.distance,
            decision.mix[: cache.depth],
            time.perf_counter() - began,
        )
        self.statistics.loop_seconds = self._pacer.taken(self._clock())
        if self._recorder is not None:
            self._record(branch, step_index, decision.compute, cache.recorded(decision))
        return state.model_output

    def outputs(self, branch: str) -> dict[str, Tensor]:
        """Return what the branch's last step gave: latents → model output, ``latents`` first.

        The tensors are buffers that the branch's next step overwrites.
        """
        made = self._branches[branch].outputs
        return {n: made[beside(n, LATENTS, MODEL_OUTPUT)] for n in self.manifest.latents}

    @property
    def decides_once(self) -> bool:
        """Whether the branch that runs a step first decides for all."""
        return self._resolved.policy.spec.one_decision

    def has_decided(self, step_index: int) -> bool:
        """Tell whether the decision for all branches of a step is known."""
        return self._shared_decision is not None and self._shared_decision[0] == step_index

    def follow(self, step_index: int, decision: DecisionRecord | None = None) -> None:
        """Note that another process runs a branch of a step.

        Args:
            step_index: 0-based, rising.
            decision: What that branch decided for all, where `decides_once`.
        """
        self._last_step = step_index
        if decision is not None:
            self._shared_decision = step_index, decision

    def output_shape(self, inputs: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Return the shape of the model output that per-step inputs lead to.

        Raises:
            RequestError: an input is missing or does not fit.
        """
        dims = self.model.dims_of(self._sizes(inputs))
        return shape_of(self.manifest.graphs["finish"].outputs["model_output"], dims)

    @_on_stream
    def open_step(self, branch: str, step_index: int, inputs: Mapping[str, Tensor]) -> OpenStep:
        """Run ``head`` for any step of the run, and leave what follows to the caller.

        No policy is asked, no history kept and nothing counted.

        Args:
            branch: A branch whose prompt was set.
            step_index: 0-based, in any order.
            inputs: As for `step`.

        Raises:
            RequestError: the model samples several things at once, or as for `step`.
        """
        where = f"bundle '{self.model.bundle.folder}'"
        check_samples_one(self.manifest.latents, where, "schedules are fitted to one")
        self._place(inputs, f"branch '{branch}', step {step_index}")
        state = self._branch(branch)
        self._select_row(state, step_index)
        state.head.run()
        self.model.backend.synchronize()
        return OpenStep(self._shared[HIDDEN], state.body, state.finish, state.model_output)

    def _decide(self, cache: BranchCache, step_index: int) -> DecisionRecord:
        """Ask a branch's policy, or take what another branch decided about the step."""
        if not self.decides_once:
            return cache.decide(step_index, self._pace)
        if self._shared_decision is None or self._shared_decision[0] != step_index:
            self._shared_decision = step_index, cache.decide(step_index, self._pace)
            self.on_decision(*self._shared_decision)
        return cache.affordable(self._shared_decision[1])

    def _check_input(self, place: str, name: str, tensor: Tensor, hint: str) -> None:
        if self.model.options.check_finite and tensor.is_floating_point() and not is_finite(tensor):
            raise RequestError(f"{place}, input '{name}'", "holds values that are not finite", hint)

    def _check_step(self, name: str, step_index: int, *, computed: bool) -> None:
        """Raise `NotFiniteError` naming the segment that first made such values in this step."""
        branch = self._branches[name]
        assert branch.cache is not None, "the step has run"
        residuals = branch.cache.computed_residuals if computed else []
        kept = all(map(is_finite, residuals))
        if kept and all(map(is_finite, branch.outputs.values())):
            return
        # What ran before still lies in its buffers.
        segment = "finish"
        if not all(is_finite(self._shared[stream]) for stream in self.manifest.cached):
            segment = "head"
        elif not kept or not all(map(is_finite, branch.body.results.values())):
            segment = "body" if computed else "reuse"
        can_rerun = segment == "body" and self.model.runs_alone
        place = branch.body.first_not_finite() if can_rerun else None
        hint = "compare with --cache off"
        if segment != "reuse":
            hint = "run `verify`; a body of lower precision may have to be built as float32"
        raise NotFiniteError(
            f"branch '{name}', step {step_index}, segment '{segment}'",
            "made values that are not finite" + (f", first in {place}" if place else ""),
            hint,
        )

    def resolve(self, setting: CacheSetting) -> ResolvedSetting:
        """Check a setting against the bundle and fill its defaults in.

        Raises:
            ConfigError: unknown policy, parameter or signal.
        """
        return resolve(self.manifest, setting)

    def _allocate_rows(self) -> dict[str, Tensor]:
        """Allocate the current row of each per-run table, shaped as step graphs take it."""
        graphs = self.manifest.graphs.values()
        rows: dict[str, Tensor] = {}
        for name in (n for g in graphs if g.runs == "run" for n in g.outputs):
            entry = self.manifest.row_of(name)
            if entry is not None:  # else policies alone look at it, in its table
                rows |= allocate({name: entry}, {}, self.model.device)
        return rows

    def _compute_tables(self, timesteps: Tensor, beside: Mapping[str, Tensor]) -> None:
        first, *others = (
            values.detach().to(self.model.device, torch.float32, copy=True)
            for values in (timesteps, *beside.values())
        )
        given = timestep_inputs(self.manifest.inputs, first, dict(zip(beside, others, strict=True)))
        known, self._timestep_inputs = self._timestep_inputs, {}  # until all tables are there
        if known and all(torch.equal(known[n], values) for n, values in given.items()):
            self._timestep_inputs = known
            return
        with self._timed("prepare"):
            self._timesteps = first
            for name, graph in self.manifest.graphs.items():
                if graph.runs != "run":
                    continue
                steps = len(given[next(iter(graph.inputs))])
                tables = allocate(graph.outputs, {"steps": steps}, self.model.device)
                self.model.bind(name, {**given, **tables}).run()
                self._tables |= tables
            self._block_tables.compute(self._tables, self.steps)
            for branch in self._branches.values():
                branch.body.forget_tables()
        self._timestep_inputs = given

    def _select_row(self, branch: _Branch, step_index: int) -> None:
        """Put this step's rows where the bound calls read them; small copies, not hidden-sized."""
        branch.body.select_row(step_index)
        if step_index != self._row:
            for name, row in self._rows.items():
                row.copy_(self._tables[name].view(self.steps, -1)[step_index].view(row.shape))
            self._block_tables.select(step_index)
            self._row = step_index

    def _place(self, inputs: Mapping[str, Tensor], place: str) -> None:
        """Put per-step inputs into their buffers; a new shape makes new buffers."""
        sizes = self._sizes(inputs)
        if any(self._dims.get(d) != s for d, s in sizes.items()):
            with self._timed("prepare"):
                self._allocate(self.model.dims_of(sizes))
        for name in self._step_inputs():
            self._shared[name].copy_(inputs[name])
            self._check_input(
                place, name, self._shared[name], "look at the step before, and at callbacks"
            )

    def _step_inputs(self) -> dict[str, InputEntry]:
        return {n: e for n, e in self.manifest.inputs.items() if e.runs == "step"}

    def _sizes(self, inputs: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the sizes that per-step inputs name."""
        wanted = self._step_inputs()
        sizes: dict[str, int] = {}
        for name, entry in wanted.items():
            if name not in inputs:
                raise RequestError(f"input '{name}'", "is missing", f"give {', '.join(wanted)}")
            sizes |= match_dims(name, entry, inputs[name].shape)
        return sizes

    def _allocate(self, dims: dict[str, int]) -> None:
        graphs, device = self.manifest.graphs, self.model.device
        self._branches.clear()
        self._pacer.forget()
        self._dims = dims
        shared = {**self._rows, **allocate(self._step_inputs(), dims, device)}
        for graph in graphs.values():
            if graph.runs == "shape":
                shared |= allocate(graph.outputs, dims, device)
        for stream in self.manifest.cached:
            begun = graphs["head"].outputs[stream]
            names = (stream, f"{stream}_even", f"{stream}_odd")
            shared |= allocate(dict.fromkeys(names, begun), dims, device)
        for name, graph in graphs.items():
            if graph.runs == "shape":
                self.model.bind(name, shared).run()
        self._shared = shared

    def _branch(self, name: str) -> _Branch:
        """Return a branch ready to run, allocating and binding what it lacks."""
        if name not in self._prompts:
            raise RequestError(f"branch '{name}'", "has no prompt", "call set_prompt() first")
        if name not in self._branches:
            with self._timed("prepare"):
                self._branches[name] = self._make_branch(name)
        branch = self._branches[name]
        if branch.cache is None:
            with self._timed("prepare"):
                resolved = self.resolve(self._resolved.setting.for_branch(name))
                branch.cache = BranchCache(
                    self.model,
                    resolved,
                    branch.body,
                    self._shared,
                    record=self._recorder is not None,
                )
                branch.cache.reset(self._tables, self._schedule)
        with self._timed("prepare"):
            branch.body.modulate(self._tables, self.steps)
        return branch

    def _make_branch(self, name: str) -> _Branch:
        body = Body(
            self.model, name, self._shared, self._prompts[name], self._dims, self._block_tables
        )
        outputs = allocate(self.manifest.graphs["finish"].outputs, body.dims, self.model.device)
        results = {f"{stream}_out": result for stream, result in body.results.items()}
        values = {**self._shared, **body.context, **results, **outputs}
        return _Branch(
            body, outputs, self.model.bind("head", values), self.model.bind("finish", values)
        )

    def _record(
        self, branch: str, step_index: int, computed: bool, kept: tuple[Tensor, Tensor | None]
    ) -> None:
        assert self._recorder is not None, "called when recording"
        state = self._branches[branch]
        buffers = {**self._shared, **state.body.context, **state.body.first}
        signals: dict[str, Tensor] = {}
        for name, graph in self.manifest.graphs.items() if self._recorder.wants_signals else ():
            if graph.runs not in ("signal", "probe"):
                continue
            values = dict(buffers)
            if graph.runs == "probe":
                values["hidden_out"] = self._run_first(state)
            made = allocate(graph.outputs, state.body.dims, self.model.device)
            self.model.bind(name, {**values, **made}).run()
            signals |= made
        sections = state.body.sections if self._recorder.wants_signals else None
        record = StepRecord(
            branch, step_index, computed, *kept, signals, state.model_output, buffers, sections
        )
        self._recorder.on_step(record, state.body.dims)

    def _run_first(self, branch: _Branch) -> Tensor:
        """Run the policy's first blocks, one where it has none, and return what they give."""
        assert branch.cache is not None, "the step has run"
        given = self.manifest.stages, self.manifest.graphs, self.manifest.cached
        branch.body.divide(branch.cache.sections or divide(*given, 1, 0))
        branch.body.run_first()
        return branch.body.before[HIDDEN]

    @contextmanager
    def _timed(self, segment: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.statistics.seconds
            seconds[segment] = seconds.get(segment, 0.0) + time.perf_counter() - began
