# SPDX-License-Identifier: Apache-2.0
"""What stands where a pipeline's transformer was, and answers its calls out of a session."""

from __future__ import annotations

import copy
import json
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from ...bundle.streams import LATENTS
from ...core.errors import RequestError
from ...policies.setting import CacheSetting
from ..distributed.counts import ExchangeCounts
from ..distributed.guidance import GuidanceOverRanks
from ..distributed.layout import Layout
from ..distributed.sequence import SharedModel
from ..distributed.shared_run import SharedRun
from ..lora import LoraFile, load_lora
from ..model import Model
from ..session import Session
from ..settings import choose_setting, other_size
from ..statistics import RunStatistics
from ..step_record import Recorder
from ..summary import counts, summary
from .adapters import Adapters
from .arguments import Arguments, sample_of, timestep_of
from .place import RunPlace, calling_pipeline

__all__ = ["FreewheelTransformer"]

GUIDING_HOOKS = ("diffusers.hooks.layer_skip", "diffusers.hooks.smoothed_energy_guidance_utils")
"""Modules of the hooks by which diffusers' guiders have a branch of another model."""


class FreewheelTransformer:
    """Answers a diffusers pipeline as its transformer would, out of a `Session`.

    The pipeline holds ``module``, a transformer of the class that it expects, without weights. A
    call belongs to the pipeline that makes it, and `RunPlace` tells which step and branch it is.
    State never survives a run, nor a failure.

    Attributes:
        module: What stands in the pipeline; its ``freewheel`` is this object.
        session: Engines and buffers of the runs.
        setting: Cache setting of the runs to come.
        recorder: Gets what a trace keeps, or None.
        on_call: Called after each answer with the session and the step's index, or None.
        warn: Told once of everything odd about a run.
        experts: Those that `use` chooses for: this one, and of what `attach` returned the others.
    """

    def __init__(
        self, model: Model, pipe: Any, adapters: Adapters, ranks: Layout | None = None
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: Engines and weights.
            pipe: The pipeline it serves where no other one calls.
            adapters: What stands in the pipeline, with its adapters.
            ranks: Processes that share its runs; None runs them here.
        """
        self._model = model
        self._ranks = ranks
        self._guidance: GuidanceOverRanks | None = None
        if ranks is not None and ranks.guidance is not None:
            self._guidance = GuidanceOverRanks(ranks.guidance, self._warn_at_end)
        self._sequence = SharedRun(model) if isinstance(model, SharedModel) else None
        self._pipe = weakref.ref(pipe)
        self._stand(adapters)
        self.setting = CacheSetting()
        self.recorder: Recorder | None = None
        self.on_call: Callable[[Session, int], None] | None = None
        self.warn: Callable[[str], None] = _warn
        self.experts: list[FreewheelTransformer] = [self]
        self._warned: set[str] = set()
        self._replaced: dict[str, weakref.ref[Any] | None] = {}
        self._arguments = Arguments(model.manifest)
        self._place = RunPlace(self._arguments.timestep, takes_over=model.expert > 0)
        self._load_session()

    def _stand(self, adapters: Adapters) -> None:
        self._adapters, module = adapters, adapters.module
        # Tells diffusers the device and dtype that it casts latents to.
        anchor = torch.nn.Parameter(torch.zeros(0, device=self._model.device), requires_grad=False)
        module._parameters = {"freewheel_anchor": anchor, **module._parameters}
        module.freewheel = self
        module.forward = _signed_as(type(module).forward, self.forward)
        module.cache_context = self.cache_context
        module._apply = self._stay
        module.__deepcopy__ = self._copy_module
        self.module = module

    def _stay(self, fn: Any, recurse: bool = True) -> Any:
        """Leave everything where it is when a pipeline is moved: engines have their device."""
        return self.module

    def _copy_module(self, memo: dict[int, Any]) -> Any:
        """Copy the module with its adapters; engines and weights are shared, caches are not."""
        other = FreewheelTransformer(
            self._model, self._pipe() or self, self._adapters.copied(), self._ranks
        )
        other.setting, other.warn = self.setting, self.warn
        memo[id(self)], memo[id(self.module)] = other, other.module
        other.experts += [copy.deepcopy(e.module, memo).freewheel for e in self.experts[1:]]
        return other.module

    def __deepcopy__(self, memo: dict[int, Any]) -> FreewheelTransformer:
        """Copy as the pipeline's transformer is copied."""
        copied: FreewheelTransformer = self._copy_module(memo).freewheel
        return copied

    def _load_session(self) -> None:
        """Make a session over the weights that adapters lead to now."""
        self._place.forget()
        self.session = Session(self._model)  # what was merged before is freed
        self.session = Session(self._model.with_weights(self._adapters.merged()))
        self._state = self._adapters.state()
        self._parts = dict(self.module.named_modules())

    @property
    def config(self) -> Any:
        """The transformer's config."""
        return self.module.config

    @property
    def device(self) -> torch.device:
        """Device of the engines."""
        return self._model.device

    @property
    def statistics(self) -> RunStatistics:
        """What the last (or current) run did."""
        return self.session.statistics

    @property
    def exchange(self) -> ExchangeCounts | None:
        """Bytes that the last run sent to other ranks; None where it ran in one process.

        Where ranks share both a sequence and the branches of guidance, those of the sequence.
        """
        return next(iter(self.exchanges.values()), None)

    @property
    def exchanges(self) -> dict[str, ExchangeCounts]:
        """Bytes that the last run sent for each of ``sequence`` and ``guidance`` that ranks share."""
        found = {}
        if self._sequence is not None:
            found["sequence"] = self._sequence.counts
        if self._guidance is not None:
            found["guidance"] = self._guidance.counts
        return found

    def rank_warnings(self) -> list[str]:
        """Return what was odd about the last run's share of the ranks."""
        return [] if self._guidance is None else self._guidance.warnings()

    @property
    def is_fused(self) -> bool:
        """Whether the pipeline fused adapters into the weights."""
        return self._adapters.is_fused

    def __repr__(self) -> str:
        """Say policy, backend, and what the last run computed."""
        model = self._model.manifest.checkpoint.transformer_class
        where = f"{model} on {self._model.backend.name}"
        ran = self.statistics
        by = f"by {ran.policy} " if ran.branches and ran.policy != self.setting.policy else ""
        return f"<FreewheelTransformer {where}, {self.setting.policy}, {by}{counts(ran)}>"

    def summary(self) -> str:
        """Return the last run in a few lines: policy, counts, speedups, a strip per branch."""
        return summary(self.statistics)

    def remember(self, before: Mapping[str, Any]) -> None:
        """Remember, by part of the pipeline, what `detach` puts back; keeps nothing alive."""
        self._replaced = {
            part: None if standing is None else weakref.ref(standing)
            for part, standing in before.items()
        }

    def detach(self) -> None:
        """Put back what stood in the pipeline before `attach`.

        Nothing here keeps the pipeline's own transformer in memory: hold it, or use `attached`.

        Raises:
            RequestError: it, or the pipeline, is gone, or something else was attached since.
        """
        pipe = self._pipe()
        before = {part: None if ref is None else ref() for part, ref in self._replaced.items()}
        if pipe is None or not before or getattr(pipe, next(iter(before)), None) is not self.module:
            raise RequestError(
                "detach",
                "this is not what stands in the pipeline",
                "call it on what `attach` returned, once, while the pipeline is there",
            )
        for part, standing in before.items():
            if standing is None and self._replaced[part] is not None:
                raise RequestError(
                    f"detach, pipeline's '{part}'",
                    "the one that stood there before was freed",
                    "hold it while attached, use `with freewheel.attached(...)`, or load it again",
                )
        for part, standing in before.items():
            setattr(pipe, part, standing)

    def use(self, cache: CacheSetting | str | Path | None, **overrides: Any) -> CacheSetting:
        """Choose the cache setting of the runs to come; returns it resolved.

        Args:
            cache: As `attach` takes it.
            overrides: Parameters of the policy, limits of the guard, ``exact_steps`` and
                ``signal``, as ``--set`` takes them: ``use("teacache", threshold=0.3)``.

        Raises:
            ConfigError: no such config or policy, or a bad parameter; the setting stays.
        """
        bundle = self._model.bundle
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in overrides.items()}
        chosen = choose_setting(bundle, cache, texts, warnings.warn)
        self.session.resolve(chosen.cache)
        for expert in self.experts:
            expert.setting = chosen.cache
        found = other_size(bundle.manifest, chosen.generation)
        if found is not None:
            _warn(f"config '{cache}' {found}: its thresholds and tables are untried there")
        return self.setting

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Take what diffusers says about the call inside: branch, and in newer versions the step."""
        before, self._place.context = self._place.context, {"name": name, **where}
        try:
            yield
        finally:
            self._place.context = before

    def forward(
        self,
        hidden_states: Tensor | list[Tensor],
        timestep: Tensor,
        *states: Any,
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        **named_states: Any,
    ) -> BaseOutput | tuple[Tensor | list[Tensor], ...]:
        """Run one branch of one step; of a list of samples, one branch for each.

        Args:
            hidden_states: Latents, as the bundle declares them, or a list with each sample's.
            timestep: [batch], equal values.
            states: Prompt inputs in the order of the diffusers transformer.
            return_dict: As in diffusers.
            attention_kwargs: Only ``scale`` 1 of LoRA loaders is accepted.
            joint_attention_kwargs: The same by the name that some families have for it.
            named_states: Prompt inputs by diffusers' keywords, and latents beside the first.

        Returns:
            The model output, or one for each of the latents where a model samples several at once.

        Raises:
            RequestError: shapes don't fit the bundle, timesteps differ within the batch, the call
                can't be placed in a run, or something is given, or hooked into the model's layers,
                that the bundle takes no account of.
        """
        attention = {**(attention_kwargs or {}), **(joint_attention_kwargs or {})}
        samples: tuple[Tensor | list[Tensor], ...]
        try:
            self._check_hooks()
            latents, others = self._arguments.take(hidden_states, timestep, named_states)
            if isinstance(hidden_states, list):
                answers = [
                    self._call(
                        {n: sample_of(s, i) for n, s in latents.items()},
                        timestep,
                        others,
                        [sample_of(s, i) for s in states],
                        {n: sample_of(s, i) for n, s in named_states.items()},
                        dict(attention),
                    )
                    for i in range(len(hidden_states))
                ]
                samples = tuple([one[0] for one in made] for made in zip(*answers, strict=True))
            else:
                samples = self._call(latents, timestep, others, states, named_states, attention)
        except BaseException as error:
            self._place.forget()
            shared = self._sequence or self._guidance
            if shared is not None and isinstance(error, Exception):
                shared.fail(error)
            raise
        return self._arguments.outputs(samples) if return_dict else samples

    def _call(
        self,
        latents: Mapping[str, Tensor],
        timestep: Tensor,
        others: Mapping[str, Tensor],
        states: Sequence[Any],
        named_states: Mapping[str, Any],
        attention: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        prompt = self._arguments.prompt(states, named_states, attention)
        timestep = timestep_of(timestep, self._arguments.timestep)
        branch, step_index = self._placed(prompt, timestep)
        prompt = self._with_own_indices(prompt, timestep, step_index)
        self._check_other_timesteps(others, step_index)
        samples = self._answer(branch, step_index, prompt, latents)
        self._place.end_step(branch, step_index)
        if self.on_call is not None:
            self.on_call(self.session, step_index)
        if self._guidance is None:
            self._warn_at_end()
        return samples

    def _placed(self, prompt: Mapping[str, Tensor], timestep: Tensor) -> tuple[str, int]:
        """Return the branch and step that a call is, beginning a run where one begins."""
        pipe = calling_pipeline(self._pipe())
        found = self._place.find(pipe.scheduler, prompt, timestep)
        if found is not None:
            self._check_adapters()
            return found
        self._settle_adapters()
        begun = self._place.begin(pipe, timestep, self._model.serves)
        self.session.begin(
            begun.timesteps, self.setting, self.recorder, sigmas=begun.sigmas, beside=begun.beside
        )
        for shared in (self._sequence, self._guidance):
            if shared is not None:
                shared.begin(self.session)
        return self._place.branch(prompt, timestep), 0

    def _with_own_indices(
        self, prompt: dict[str, Tensor], timestep: Tensor, step_index: int
    ) -> dict[str, Tensor]:
        """Return which of the step's timesteps each token has; the call counts those it gives."""
        inputs, indices = self._model.manifest.inputs, self._arguments.timestep.indices
        name = next((n for n, i in inputs.items() if i.argument == indices), None)
        if name is None:
            return prompt
        own = self._place.own_indices(step_index, timestep)
        return {**prompt, name: own[prompt[name].to(own.device)]}

    def _check_other_timesteps(self, given: Mapping[str, Tensor], step_index: int) -> None:
        """Raise `RequestError` where a timestep is not the one that the step's row was made for."""
        for name, timestep in given.items():
            wanted = self.session.timestep_inputs[name][step_index]
            if not self._place.is_at(wanted, timestep):
                one = self._arguments.other_timesteps[name]
                raise RequestError(
                    f"transformer argument '{one.argument}', step {step_index}",
                    f"is {float(timestep[0]):g}, and the {' and '.join(one.of)} timestep {float(wanted):g}",
                    "give the scheduler's, as the bundle's model is made for",
                )

    def _answer(
        self,
        branch: str,
        step_index: int,
        prompt: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
    ) -> tuple[Tensor, ...]:
        """Run a branch's step here, or promise what the rank that runs it makes."""
        if self._sequence is not None:
            self._sequence.call(inputs[LATENTS])
        if self._guidance is not None:
            self._guidance.call(step_index, inputs[LATENTS])
            if not self._guidance.is_mine(branch):
                return (self._guidance.expect(branch, step_index, inputs),)
        self.session.set_prompt(branch, prompt)
        self.session.step(branch, step_index, inputs)
        # The pipeline may keep them past this branch's next step.
        samples = tuple(made.clone() for made in self.session.outputs(branch).values())
        if self._guidance is None:
            return samples
        return (self._guidance.give(branch, step_index, samples[0]),)

    def _check_hooks(self) -> None:
        """Raise `RequestError` where a guider's hook would make layers compute otherwise."""
        for name, part in self._parts.items():
            if "_diffusers_hook" not in vars(part):
                continue
            for hook in part._diffusers_hook.hooks.values():
                if type(hook).__module__ in GUIDING_HOOKS:
                    raise RequestError(
                        f"transformer, '{name}'",
                        f"has a {type(hook).__name__}, which engines take no account of",
                        "take a guider that calls the model as it is: classifier-free guidance, CFG-Zero",
                    )

    def _check_adapters(self) -> None:
        if self._adapters.has_adapters and self._adapters.state() != self._state:
            raise RequestError(
                "transformer",
                "has other adapters than when the run began",
                "change adapters between runs",
            )

    def _settle_adapters(self) -> None:
        """Merge anew where adapters are no longer what they were."""
        if self._adapters.state() != self._state:
            context = self._place.context
            self._load_session()
            self._place.context = context

    def fuse(self, pipe: Any, files: Sequence[LoraFile]) -> None:
        """Load LoRA files through the pipeline and fuse them for good.

        Raises:
            RequestError: one can't be applied.
        """
        if not files:
            return
        others = getattr(self.module, "peft_config", None)
        if others:
            raise RequestError(
                "attach, 'loras'",
                f"are given beside the loaded adapter '{next(iter(others))}'",
                "load them all with pipe.load_lora_weights(FILE) after attach",
            )
        scales: dict[str, float] = {}
        for index, file in enumerate(files):
            name = f"attached_{index}"
            self._adapters.add(load_lora(pipe, file, name, self.module), file.scale)
            if name in getattr(self.module, "peft_config", ()):
                scales[name] = file.scale
        if scales:
            self.module.set_adapters([*scales], [*scales.values()])
        self._adapters.fuse_for_good()

    def _warn_at_end(self) -> None:
        """Warn of what the CLI warns of, once the last step's last branch has run; one rank does."""
        if self._ranks is not None and not self._ranks.job.leads:
            return
        steps = self.session.steps
        ending = [step for step in self._place.done.values() if step >= steps - 2]
        if not ending or min(ending) < steps - 1:
            return
        found = self.statistics.warnings(self.session.resolved.parameters)
        for text in [*found, *self.rank_warnings()]:
            if text not in self._warned:
                self._warned.add(text)
                self.warn(text)


def _signed_as(model: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    """Return what answers in a model's place, with its signature: some pipelines give what that names."""

    @wraps(model)
    def forward(*given: Any, **named: Any) -> Any:
        return answer(*given, **named)

    return forward


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)
