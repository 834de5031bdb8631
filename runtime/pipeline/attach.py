# SPDX-License-Identifier: Apache-2.0
"""The diffusers drop-in: put a bundle where a pipeline's transformer was."""

from __future__ import annotations

import copy
import inspect
import json
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import make_dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.outputs import BaseOutput
from torch import Tensor
from torch.utils import _pytree as pytree

from ...bundle.dims import derive_dims, match_dims, shape_of
from ...bundle.manifest import InputEntry
from ...bundle.reader import Bundle
from ...bundle.streams import LATENTS, beside, check_samples_one
from ...core.errors import RequestError
from ...policies.setting import CacheSetting
from ..distributed.guidance import ExchangeCounts, GuidanceOverRanks
from ..distributed.ranks import Ranks, facts_of
from ..lora import LoraFile, load_lora, parse_lora
from ..model import DeviceOptions, LoadedModel
from ..session import Recorder, Session
from ..settings import choose_setting, other_size
from ..statistics import RunStatistics
from ..summary import counts, summary
from .adapters import Adapters, check_transformer

__all__ = ["FreewheelTransformer", "attach", "attached"]

PLACE_HINT = (
    "name the branch with transformer.cache_context('cond') or ('uncond'), set the timesteps of "
    "the calling pipeline's scheduler before the run and leave them, or attach to this pipeline"
)


def attach(
    pipe: Any,
    bundle: Bundle | Path | str,
    cache: CacheSetting | str | Path | None = None,
    *,
    backend: str | None = None,
    loras: Sequence[str] = (),
    options: DeviceOptions | None = None,
    ranks: Ranks | None = None,
) -> FreewheelTransformer:
    """Replace ``pipe.transformer`` by the engines of a bundle.

    Schedulers, callbacks, guidance, VAE and every verb of the pipeline's LoRA interface keep
    working; adapters that are loaded already are taken over. Pipelines made of this one
    (``from_pipe``, ``components``, ``copy.deepcopy``) run on the engines too. A bundle with two
    experts replaces both transformers; each keeps a cache and statistics of its own over the
    timesteps that it denoises.

    Args:
        pipe: A diffusers pipeline of the bundle's family, with the weights that the bundle was
            built from.
        bundle: What `build` wrote.
        cache: A config name or file, a policy name, or a resolved setting; None takes the
            bundle's default config. Change it between runs with `FreewheelTransformer.use`.
        backend: Name of a backend the bundle has engines for; None takes its first.
        loras: ``FILE[:scale]``, fused into the first expert's weights: they stay whatever the
            pipeline loads and unloads later.
        options: How engines are driven: weights kept in host memory, CUDA graphs.
        ranks: Of `join_ranks`: the branches of guidance are shared out over two processes, each of
            which runs this same script. None runs them all here.

    Returns:
        What chooses the cache, of two experts for both, and tells what the last run did. Of two
        experts it tells of that of the high noise levels; ``pipe.transformer.freewheel`` is the
        same, and ``pipe.transformer_2.freewheel`` chooses and tells for the other alone.

    Raises:
        BundleError, BackendUnavailable, ConfigError: as their classes say.
        RequestError: the pipeline's transformer is not the bundle's, a LoRA can't be applied, or ranks
            are to share a model that samples several things at once.
        RankError: another rank attaches something else, or is lost.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    files = [parse_lora(lora) for lora in loras]
    if ranks is not None:
        check_samples_one(
            opened.manifest.latents, f"bundle '{opened.folder}'", "ranks trade one output a branch"
        )
        ranks.compare(facts_of(opened, backend))
    _check_boundary(pipe, opened)
    _check_timesteps(pipe)
    experts = opened.manifest.experts
    parts = [expert.part for expert in experts] or ["transformer"]
    made: dict[str, FreewheelTransformer] = {}
    for index, part in enumerate(parts):
        model = LoadedModel(opened, backend, options, index)
        standing = getattr(pipe, part, None)
        known = getattr(standing, "freewheel", None)
        if known is not None and known.is_fused:
            raise RequestError(
                f"pipeline, '{part}'", "has adapters fused into it",
                "call pipe.unfuse_lora() before attach, or attach to a pipeline loaded anew",
            )  # fmt: skip
        if standing is not None and known is None:
            check_transformer(opened, model.prefix, standing)
        made[part] = FreewheelTransformer(
            model, pipe, Adapters(opened, model.prefix, standing), ranks
        )
    first = made[parts[0]]
    first.experts = list(made.values())
    first.use(cache)
    before = {part: getattr(pipe, part, None) for part in parts}
    first.remember(before)
    try:
        for part, transformer in made.items():
            setattr(pipe, part, transformer.module)
        first.fuse(pipe, files)
    except BaseException:
        for part, standing in before.items():
            setattr(pipe, part, standing)
        raise
    return first


@contextmanager
def attached(
    pipe: Any,
    bundle: Bundle | Path | str,
    cache: CacheSetting | str | Path | None = None,
    *,
    backend: str | None = None,
    loras: Sequence[str] = (),
    options: DeviceOptions | None = None,
    ranks: Ranks | None = None,
) -> Iterator[FreewheelTransformer]:
    """Attach for the length of a ``with`` block; keeps the pipeline's own transformers in memory.

    Args and raises: as `attach`.
    """
    parts = ("transformer", "transformer_2")
    before = {part: getattr(pipe, part) for part in parts if hasattr(pipe, part)}
    try:
        yield attach(
            pipe, bundle, cache, backend=backend, loras=loras, options=options, ranks=ranks
        )
    finally:
        for part, standing in before.items():
            setattr(pipe, part, standing)


def _check_boundary(pipe: Any, bundle: Bundle) -> None:
    """Raise `RequestError` where the pipeline would switch experts elsewhere than the bundle."""
    experts = bundle.manifest.experts
    ratio = pipe.config.get("boundary_ratio")
    found = None if ratio is None else ratio * pipe.scheduler.config.num_train_timesteps
    wanted = experts[0].from_timestep if experts else None
    if found != wanted:
        raise RequestError(
            "pipeline, 'boundary_ratio'",
            f"switches transformers at timestep {found}, the bundle at {wanted}",
            "attach to the pipeline that the bundle was built from",
        )


def _check_timesteps(pipe: Any) -> None:
    """Raise `RequestError` where the pipeline would give tokens timesteps of their own.

    Wan 2.2 TI2V's text-to-video gives every token the step's one, which is the same as none.
    """
    takes_image = "image" in inspect.signature(type(pipe).__call__).parameters
    if pipe.config.get("expand_timesteps") and takes_image:
        raise RequestError(
            "pipeline, 'expand_timesteps'",
            "gives the first frame's tokens a timestep of their own, and a cut model has one per step",
            "attach to the text-to-video pipeline of this checkpoint",
        )


class FreewheelTransformer:
    """Answers a diffusers pipeline as its transformer would, out of a `Session`.

    The pipeline holds ``module``, a transformer of the class that it expects, without weights. A
    call belongs to the pipeline that makes it: a run begins at the timestep of its first call and
    goes on over that pipeline's scheduler's. The branch is diffusers' cache context; without one,
    calls of equal prompts are one branch. State never survives a run, nor a failure.

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
        self, model: LoadedModel, pipe: Any, adapters: Adapters, ranks: Ranks | None = None
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: Engines and weights.
            pipe: The pipeline it serves where no other one calls.
            adapters: What stands in the pipeline, with its adapters.
            ranks: Processes that share the branches of its runs; None runs them all here.
        """
        self._model = model
        self._ranks = ranks
        self._guidance = None if ranks is None else GuidanceOverRanks(ranks, self._warn_at_end)
        self._pipe = weakref.ref(pipe)
        self._stand(adapters)
        self.setting = CacheSetting()
        self.recorder: Recorder | None = None
        self.on_call: Callable[[Session, int], None] | None = None
        self.warn: Callable[[str], None] = _warn
        self.experts: list[FreewheelTransformer] = [self]
        self._warned: set[str] = set()
        self._replaced: dict[str, weakref.ref[Any] | None] = {}
        self._load_session()
        runs = {n: i for n, i in model.manifest.inputs.items() if i.runs == "run"}
        self._timestep = next(i for i in runs.values() if LATENTS in i.of)
        self._other_timesteps = {n: i for n, i in runs.items() if i is not self._timestep}
        self._latents = {n: model.manifest.inputs[n].argument for n in model.manifest.latents}

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
        self._abandon()
        self._state = self._adapters.state()
        self.session = Session(self._model.with_weights(self._adapters.merged()))

    def _abandon(self) -> None:
        """Forget where the run stands: the next call begins one."""
        self._context: dict[str, Any] = {}
        self._scheduler: Any = None
        self._source: Any = None  # the scheduler's timesteps when the run began
        self._offset = 0  # what diffusers calls the run's first step
        self._steps = torch.zeros(0, 1)  # the timesteps of each step
        self._done: dict[str, int] = {}  # branch → its last step
        self._last = -1  # step of any branch
        self._unnamed: dict[str, dict[str, Tensor]] = {}  # branch without a context → its prompt

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
        """Bytes that the last run sent to other ranks; None where it ran in one process."""
        return None if self._guidance is None else self._guidance.counts

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
        return f"<FreewheelTransformer {where}, {self.setting.policy}, {counts(self.statistics)}>"

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
                "detach", "this is not what stands in the pipeline",
                "call it on what `attach` returned, once, while the pipeline is there",
            )  # fmt: skip
        for part, standing in before.items():
            if standing is None and self._replaced[part] is not None:
                raise RequestError(
                    f"detach, pipeline's '{part}'", "the one that stood there before was freed",
                    "hold it while attached, use `with freewheel.attached(...)`, or load it again",
                )  # fmt: skip
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
        before, self._context = self._context, {"name": name, **where}
        try:
            yield
        finally:
            self._context = before

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
                can't be placed in a run, or something is given that the bundle takes no account of.
        """
        attention = {**(attention_kwargs or {}), **(joint_attention_kwargs or {})}
        samples: tuple[Tensor | list[Tensor], ...]
        try:
            self._take_what_is_same(named_states, timestep)
            self._take_what_is_fixed(named_states)
            others = self._take_other_timesteps(named_states)
            latents = self._take_latents(hidden_states, named_states)
            if isinstance(hidden_states, list):
                answers = [
                    self._call(
                        {n: _sample(s, i) for n, s in latents.items()}, timestep, others,
                        [_sample(s, i) for s in states],
                        {n: _sample(s, i) for n, s in named_states.items()}, dict(attention),
                    )
                    for i in range(len(hidden_states))
                ]  # fmt: skip
                samples = tuple([one[0] for one in made] for made in zip(*answers, strict=True))
            else:
                samples = self._call(latents, timestep, others, states, named_states, attention)
        except BaseException as error:
            self._abandon()
            if self._guidance is not None and isinstance(error, Exception):
                self._guidance.fail(error)
            raise
        return self._named(samples) if return_dict else samples

    def _named(self, samples: Sequence[Any]) -> BaseOutput:
        """Return samples as diffusers' outputs have them: ``sample``, and ``audio_sample`` beside it."""
        if len(samples) == 1:
            return Transformer2DModelOutput(sample=samples[0])
        names = [beside(latents, LATENTS, "sample") for latents in self._latents]
        made: BaseOutput = _outputs_of(*names)(*samples)
        return made

    def _take_latents(self, first: Any, named: dict[str, Any]) -> dict[str, Any]:
        """Take the latents out that come by keyword, and return all by the bundle's names."""
        others = {n: argument for n, argument in self._latents.items() if n != LATENTS}
        missing = [argument for argument in others.values() if named.get(argument) is None]
        if missing:
            raise RequestError(
                f"transformer argument '{missing[0]}'", "is missing",
                f"the bundle's model samples {', '.join(self._latents)} at once",
            )  # fmt: skip
        return {LATENTS: first, **{n: named.pop(argument) for n, argument in others.items()}}

    def _take_what_is_fixed(self, named: dict[str, Any]) -> None:
        """Take arguments out that the bundle's model was cut with one value of, or that change nothing."""
        for name, wanted in self._model.manifest.arguments.items():
            given = named.pop(name, wanted)
            if wanted is not None and given is not None and given != wanted:
                raise RequestError(
                    f"transformer argument '{name}'", f"is {given}, the bundle's model has {wanted}",
                    f"leave it out, or make the pipeline give {wanted}",
                )  # fmt: skip

    def _call(
        self,
        latents: Mapping[str, Tensor],
        timestep: Tensor,
        others: Mapping[str, Tensor],
        states: Sequence[Any],
        named_states: Mapping[str, Any],
        attention: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        prompt = self._prompt_inputs(states, named_states, attention)
        branch, step_index = self._place(prompt, timestep)
        prompt = self._with_own_indices(prompt, timestep, step_index)
        self._check_other_timesteps(others, step_index)
        samples = self._answer(branch, step_index, prompt, latents)
        self._done[branch] = self._last = step_index
        if self.on_call is not None:
            self.on_call(self.session, step_index)
        if self._guidance is None:
            self._warn_at_end()
        return samples

    def _take_what_is_same(self, named: dict[str, Any], timestep: Tensor) -> None:
        """Take arguments out that the bundle's model is given the timestep as, too."""
        for name in self._timestep.same:
            other = named.pop(name, timestep)
            if not torch.equal(torch.as_tensor(other).to(timestep), timestep):
                raise RequestError(
                    f"transformer argument '{name}'", "is not the timestep",
                    f"the bundle is of a model whose pipeline gives '{name}' the timestep itself",
                )  # fmt: skip

    def _take_other_timesteps(self, named: dict[str, Any]) -> dict[str, Tensor]:
        """Take timesteps out beside the first, and return them by the bundle's names."""
        found: dict[str, Tensor] = {}
        for name, one in self._other_timesteps.items():
            given = named.pop(one.argument, None)
            if given is None:
                raise RequestError(
                    f"transformer argument '{one.argument}'", "is missing",
                    "the bundle's model takes it beside the timestep",
                )  # fmt: skip
            found[name] = _timestep_of(given, one)
        return found

    def _check_other_timesteps(self, given: Mapping[str, Tensor], step_index: int) -> None:
        """Raise `RequestError` where a timestep is not the one that the step's row was made for."""
        for name, timestep in given.items():
            wanted = self.session.timestep_inputs[name][step_index]
            if not self._is_at(wanted, timestep):
                one = self._other_timesteps[name]
                raise RequestError(
                    f"transformer argument '{one.argument}', step {step_index}",
                    f"is {float(timestep[0]):g}, and the {' and '.join(one.of)} timestep {float(wanted):g}",
                    "give the scheduler's, as the bundle's model is made for",
                )  # fmt: skip

    def _answer(
        self,
        branch: str,
        step_index: int,
        prompt: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
    ) -> tuple[Tensor, ...]:
        """Run a branch's step here, or promise what the rank that runs it makes."""
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

    def _prompt_inputs(
        self, states: Sequence[Any], named: Mapping[str, Any], attention: dict[str, Any]
    ) -> dict[str, Tensor]:
        scale = attention.pop("scale", 1.0)
        if scale != 1.0:
            raise RequestError(
                "attention_kwargs 'scale'", f"is {scale}; adapters are merged once per run",
                f"call pipe.set_adapters(NAME, {scale}) before the run",
            )  # fmt: skip
        inputs = self._model.manifest.inputs
        wanted = {n: i for n, i in inputs.items() if i.runs == "prompt"}
        paths = {n: _of_attention(i.argument) for n, i in wanted.items()}
        prompt_arguments = list(dict.fromkeys(path.split(".")[0] for path in paths.values()))
        if len(states) > len(prompt_arguments):
            raise RequestError(
                "transformer", f"is given {len(states)} prompt inputs",
                f"give {', '.join(prompt_arguments)}",
            )  # fmt: skip
        given = {**dict(zip(prompt_arguments, states, strict=False)), **named}
        given = {n: value for n, value in {**given, **attention}.items() if not _is_absent(value)}
        unknown = sorted(given.keys() - set(prompt_arguments))
        if unknown:
            raise RequestError(
                f"transformer argument '{unknown[0]}'", "is nothing that the bundle's model takes",
                f"leave it out; it takes {', '.join(prompt_arguments)}",
            )  # fmt: skip
        found = {
            n: _as_tensor(_leaf(given, paths[n]), i)
            for n, i in wanted.items()
            if paths[n].split(".")[0] in given
        }
        absent = {n: i for n, i in wanted.items() if i.absent == "ones" and n not in found}
        sizes = {
            dim: size
            for name, tensor in (found.items() if absent else ())
            for dim, size in match_dims(name, wanted[name], tensor.shape).items()
        }
        sizes = derive_dims(self._model.manifest, sizes)
        return found | {n: torch.ones(shape_of(i, sizes)) for n, i in absent.items()}

    def _place(self, prompt: Mapping[str, Tensor], timestep: Tensor) -> tuple[str, int]:
        """Return the branch and step that this call is, beginning a run where one begins."""
        timestep = _timestep_of(timestep, self._timestep)
        pipe = self._calling_pipeline()
        scheduler = pipe.scheduler
        if scheduler is self._scheduler and scheduler.timesteps is self._source:
            branch = self._branch(prompt, timestep)
            step_index = self._continued(branch, timestep)
            if step_index is not None:
                return branch, step_index
        self._begin(pipe, timestep)
        return self._branch(prompt, timestep), 0

    def _branch(self, prompt: Mapping[str, Tensor], timestep: Tensor) -> str:
        """Return the branch of a call: its cache context's, else the run's one of the same prompt.

        A prompt that no branch has is the first branch's that has not run this step yet (a prompt
        may change during a run), else a new branch's.
        """
        if "name" in self._context:
            return str(self._context["name"])
        for name, known in self._unnamed.items():
            if known.keys() == prompt.keys() and all(
                _is_same(known[n], tensor) for n, tensor in prompt.items()
            ):
                return name
        goes_on = self._last >= 0 and self._is_at(self._steps[self._last], timestep)
        step_index = self._last if goes_on else self._last + 1
        waiting = [n for n in self._unnamed if self._done.get(n, -1) < step_index]
        count = len(self._unnamed)
        new = ("cond", "uncond")[count] if count < 2 else f"branch_{count}"
        name = waiting[0] if waiting else new
        self._unnamed[name] = {n: tensor.clone() for n, tensor in prompt.items()}
        return name

    def _continued(self, branch: str, timestep: Tensor) -> int | None:
        """Return the step of a call that goes on with the run; None if it begins another."""
        done, table = self._done.get(branch, -1), self._steps
        for step_index in (self._last, self._last + 1):
            if done < step_index < len(table) and self._is_at(table[step_index], timestep):
                self._check_adapters()
                said = self._context.get("step_index")
                if said is not None and said != step_index + self._offset:
                    raise self._unplaced(timestep)
                return step_index
        if (
            self._last > 0
            and "name" not in self._context
            and self._is_at(table[self._last], timestep)
        ):
            raise self._unplaced(timestep)  # two branches of one prompt
        return None

    def _is_at(self, wanted: Tensor, timestep: Tensor) -> bool:
        """Tell whether a step's timesteps are the ones given, which may have been divided before."""
        return bool(self._are_close(wanted, timestep).any(0).all())

    def _are_close(self, wanted: Tensor, timestep: Tensor) -> Tensor:
        """Compare each timestep of a step with each given, bool [wanted, given].

        What was subtracted from another number lost digits of its own.
        """
        lost = 1e-8 + 1e-7 * abs(self._timestep.offset)
        given = timestep.to(wanted.device)
        return torch.isclose(wanted.reshape(-1, 1), given.reshape(1, -1), rtol=1e-6, atol=lost)

    def _with_own_indices(
        self, prompt: dict[str, Tensor], timestep: Tensor, step_index: int
    ) -> dict[str, Tensor]:
        """Return which of the step's timesteps each token has; the call counts those it gives."""
        inputs = self._model.manifest.inputs
        name = next((n for n, i in inputs.items() if i.argument == self._timestep.indices), None)
        if name is None:
            return prompt
        given = _timestep_of(timestep, self._timestep)
        own = self._are_close(self._steps[step_index], given).int().argmax(0)
        return {**prompt, name: own[prompt[name].to(own.device)]}

    def _calling_pipeline(self) -> Any:
        """Return the pipeline that calls, else the one attached to."""
        frame = sys._getframe(1)
        while frame is not None:
            if "self" in frame.f_code.co_varnames[: frame.f_code.co_argcount]:
                caller = frame.f_locals.get("self")
                if isinstance(caller, DiffusionPipeline) and hasattr(caller, "scheduler"):
                    return caller
            frame = frame.f_back  # type: ignore[assignment]  # the outermost frame's is None
        pipe = self._pipe()
        if pipe is None:
            raise RequestError(
                "transformer",
                "is called by no pipeline, and the one that it was attached to is gone",
                PLACE_HINT,
            )
        return pipe

    def _begin(self, pipe: Any, timestep: Tensor) -> None:
        """Begin a run over the scheduler's timesteps from this one on, as far as they are ours."""
        self._settle_adapters()
        scheduler = pipe.scheduler
        timesteps = torch.as_tensor(scheduler.timesteps).float()
        table = torch.stack([self._timesteps_of(pipe, of) for of in self._timestep.of], dim=1)
        found = [i for i, wanted in enumerate(table) if self._is_at(wanted, timestep)]
        said = self._context.get("step_index")
        # A pipeline's own count begins at 0, but for an expert that takes over.
        if not found or (said and not self._model.expert):
            raise self._unplaced(timestep)
        rest = timesteps[found[0] :]
        is_mine = self._model.serves(rest)
        mine = rest[is_mine]
        steps = table[found[0] :][is_mine]
        if not len(steps) or not self._is_at(steps[0], timestep):
            raise self._unplaced(timestep)
        sigmas = getattr(scheduler, "sigmas", None)  # diffusers' end in one more, the last level
        if sigmas is not None:
            sigmas = torch.as_tensor(sigmas)[found[0] : len(timesteps)].to(rest)[is_mine]
        others = dict(zip(self._timestep.of, steps.unbind(1), strict=True))
        others.pop(LATENTS)
        self.session.begin(mine, self.setting, self.recorder, sigmas=sigmas, beside=others)
        self._steps = steps
        self._scheduler, self._source = scheduler, scheduler.timesteps
        self._offset, self._done, self._last, self._unnamed = said or 0, {}, -1, {}
        if self._guidance is not None:
            self._guidance.begin(self.session)

    def _timesteps_of(self, pipe: Any, latents: str) -> Tensor:
        """Return the timesteps of some latents: of their own scheduler, beside the first's."""
        scheduler = getattr(pipe, beside(latents, LATENTS, "scheduler"), None)
        if scheduler is None:
            raise RequestError(
                f"pipeline, '{beside(latents, LATENTS, 'scheduler')}'", "is missing",
                "attach to a pipeline of the bundle's model",
            )  # fmt: skip
        return torch.as_tensor(scheduler.timesteps).float()

    def _unplaced(self, timestep: Tensor) -> RequestError:
        return RequestError(
            f"transformer call at timestep {float(timestep[0]):g}",
            f"can't be placed: no run of the scheduler's timesteps has a step of branch "
            f"'{self._context.get('name', 'cond')}' there after step {self._last}",
            PLACE_HINT,
        )

    def _check_adapters(self) -> None:
        if self._adapters.has_adapters and self._adapters.state() != self._state:
            raise RequestError(
                "transformer", "has other adapters than when the run began",
                "change adapters between runs",
            )  # fmt: skip

    def _settle_adapters(self) -> None:
        """Merge anew where adapters are no longer what they were."""
        if self._adapters.state() != self._state:
            context = self._context
            self._load_session()
            self._context = context

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
                "attach, 'loras'", f"are given beside the loaded adapter '{next(iter(others))}'",
                "load them all with pipe.load_lora_weights(FILE) after attach",
            )  # fmt: skip
        names = [f"attached_{index}" for index in range(len(files))]
        for name, file in zip(names, files, strict=True):
            load_lora(pipe, file, name)
        self.module.set_adapters(names, [file.scale for file in files])
        self._adapters.fuse_for_good()

    def _warn_at_end(self) -> None:
        """Warn of what the CLI warns of, once the last step's last branch has run; one rank does."""
        if self._ranks is not None and not self._ranks.leads:
            return
        steps = self.session.steps
        ending = [step for step in self._done.values() if step >= steps - 2]
        if not ending or min(ending) < steps - 1:
            return
        found = self.statistics.warnings(self.session.resolved.parameters)
        for text in [*found, *self.rank_warnings()]:
            if text not in self._warned:
                self._warned.add(text)
                self.warn(text)


def _of_attention(path: str) -> str:
    """Return the place of an argument; what attention is given lies beside the others."""
    return re.sub(r"^(joint_)?attention_kwargs\.", "", path)


def _timestep_of(value: Tensor, entry: InputEntry) -> Tensor:
    """Return a timestep as the scheduler has it, [batch, …] in one dimension.

    Raises:
        RequestError: its values differ, and are no vector of timesteps.
    """
    timestep = value.reshape(-1).float() * entry.scale + entry.offset
    if len(entry.of) == 1 and not bool((timestep == timestep[0]).all()):
        raise RequestError(
            entry.argument,
            "differs within the batch, or from frame to frame",
            "this model is conditioned on one timestep per step",
        )
    return timestep


def _signed_as(model: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    """Return what answers in a model's place, with its signature: some pipelines give what that names."""

    @wraps(model)
    def forward(*given: Any, **named: Any) -> Any:
        return answer(*given, **named)

    return forward


def _leaf(given: Mapping[str, Any], path: str) -> Any:
    """Return a leaf of a nested argument: ``img_shapes.0.0.1``, ``added_cond_kwargs.resolution``."""
    name, *keys = path.split(".")
    value = given[name]
    for key in keys:
        value = value[key] if isinstance(value, Mapping) else value[int(key)]
    return value


def _is_absent(value: Any) -> bool:
    """Tell whether an argument is None, or a nesting of nothing else."""
    return all(leaf is None for leaf in pytree.tree_leaves(value))


def _as_tensor(value: Any, entry: InputEntry) -> Tensor:
    """Turn what a pipeline gives into a tensor: a count into its indices, a list into rows."""
    if isinstance(value, int) and len(entry.shape) == 1:
        return torch.arange(value)
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return torch.stack(value)
    return torch.as_tensor(value)


@cache
def _outputs_of(*names: str) -> type[Any]:
    """Return the class of outputs of these names: diffusers keeps every such class for good."""
    return make_dataclass("ModelOutputs", names, bases=(BaseOutput,))


def _sample(value: Any, index: int) -> Any:
    """Return one sample's part of a prompt input, with the axis of the batch; else the value."""
    is_listed = isinstance(value, list) and all(isinstance(one, Tensor) for one in value)
    return value[index].unsqueeze(0) if is_listed else value


def _is_same(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors are equal, dtype and device included."""
    alike = first.dtype == second.dtype and first.device == second.device
    return alike and torch.equal(first, second)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)
