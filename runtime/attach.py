# SPDX-License-Identifier: Apache-2.0
"""The diffusers drop-in: put a bundle where a pipeline's transformer was."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from ..bundle.manifest import InputEntry
from ..bundle.reader import Bundle
from ..configs.errors import RequestError
from ..configs.setting import CacheSetting
from .lora import Lora, lora_from_state_dict, read_lora
from .model import DeviceOptions, LoadedModel
from .session import Recorder, Session
from .settings import choose_setting, other_size
from .statistics import RunStatistics

__all__ = ["FreewheelTransformer", "attach"]


def attach(
    pipe: Any,
    bundle: Bundle | Path | str,
    cache: CacheSetting | str | Path | None = None,
    *,
    backend: str | None = None,
    loras: Sequence[Lora | str] = (),
    options: DeviceOptions | None = None,
) -> FreewheelTransformer:
    """Replace ``pipe.transformer`` by the engines of a bundle.

    Schedulers, callbacks, guidance, VAE and `load_lora_weights` of the pipeline keep working. A
    bundle with two experts replaces both transformers; each keeps a cache and statistics of its own
    over the timesteps that it denoises.

    Args:
        pipe: A diffusers pipeline of the bundle's family.
        bundle: What `build` wrote.
        cache: A config name or file, a policy name, or a resolved setting; None takes the
            bundle's default config. Change it between runs with `FreewheelTransformer.use`.
        backend: Name of a backend the bundle has engines for; None takes its first.
        loras: ``FILE[:scale]`` or LoRAs read already.
        options: How engines are driven: weights kept in host memory, CUDA graphs.

    Returns:
        The new transformer; its ``statistics`` tell what the last run did. Of two experts it is the
        one of the high noise levels.

    Raises:
        BundleError, BackendUnavailable, ConfigError, RequestError: as their classes say.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    read = [read_lora(lora) if isinstance(lora, str) else lora for lora in loras]
    _check_boundary(pipe, opened)
    transformer = FreewheelTransformer(LoadedModel(opened, backend, read, options), pipe)
    transformer.use(cache)
    pipe.transformer = transformer
    for index, expert in enumerate(opened.manifest.experts[1:], start=1):
        # Given LoRAs are the first expert's; the pipeline loads others for each by itself.
        other = FreewheelTransformer(LoadedModel(opened, backend, (), options, index), pipe)
        other.use(transformer.setting)
        setattr(pipe, expert.part, other)
    return transformer


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


class FreewheelTransformer(torch.nn.Module):
    """Answers a diffusers pipeline as its transformer would, out of a `Session`.

    Branch, step and step count come from the pipeline's cache contexts where it gives them, else
    from the scheduler's timesteps. A run starts at the first step of the first branch; state never
    survives it.
    """

    def __init__(self, model: LoadedModel, pipe: Any) -> None:
        """Wrap a loaded model.

        Args:
            model: Engines and weights.
            pipe: The pipeline it serves; its scheduler's timesteps tell the run ahead.
        """
        super().__init__()
        self.config = FrozenDict(model.manifest.checkpoint.config)
        self.session = Session(model)
        self.setting = CacheSetting()
        self.recorder: Recorder | None = None
        self._pipe = weakref.ref(pipe)
        self._context: dict[str, Any] = {}
        self._positions: dict[str, int] = {}
        self._first = 0
        self._loras: dict[str, Lora] = {}
        inputs = model.manifest.inputs.values()
        self._timestep_scale = next(i.scale for i in inputs if i.runs == "run")
        # Tells diffusers the device and dtype it casts latents to.
        self.register_buffer("_anchor", torch.zeros(0, device=model.device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the pipeline hands latents over; the engines' own."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Device of the engines."""
        return self.session.model.device

    @property
    def statistics(self) -> RunStatistics:
        """What the last (or current) run did."""
        return self.session.statistics

    def use(self, cache: CacheSetting | str | Path | None) -> CacheSetting:
        """Choose the cache setting of the runs to come; returns it resolved.

        Raises:
            ConfigError: no such config or policy, or a bad parameter.
        """
        bundle = self.session.model.bundle
        chosen = choose_setting(bundle, cache, {}, warnings.warn)
        found = other_size(bundle.manifest, chosen.generation)
        if found is not None:
            warnings.warn(
                f"config '{cache}' {found}: its thresholds and tables are untried there",
                stacklevel=2,
            )
        self.setting = chosen.cache
        self.session.resolve(self.setting)
        return self.setting

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Take what diffusers says about the call inside: branch, and in newer versions the step."""
        self._context = {"name": name, **where}
        try:
            yield
        finally:
            self._context = {}

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        *states: Tensor,
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        **named_states: Any,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Run one branch of one step.

        Args:
            hidden_states: Latents, as the bundle declares them.
            timestep: [batch], equal values.
            states: Prompt inputs in the order of the diffusers transformer.
            return_dict: As in diffusers.
            attention_kwargs: Only ``scale`` 1 of LoRA loaders is accepted.
            joint_attention_kwargs: The same by the name that some families have for it.
            named_states: Prompt inputs by diffusers' keywords.

        Raises:
            RequestError: shapes don't fit the bundle, timesteps differ within the batch, or
                something is given that the bundle takes no account of.
        """
        attention = {**(attention_kwargs or {}), **(joint_attention_kwargs or {})}
        scale = attention.pop("scale", 1.0)
        if scale != 1.0:
            raise RequestError(
                "attention_kwargs 'scale'", f"is {scale}; weights are merged once per attach",
                "give the scale with the LoRA: attach(..., loras=['FILE:0.8'])",
            )  # fmt: skip
        inputs = self.session.manifest.inputs
        prompt_arguments = [i.argument for i in inputs.values() if i.runs == "prompt"]
        given = {**dict(zip(prompt_arguments, states, strict=False)), **named_states}
        given = {n: value for n, value in {**given, **attention}.items() if value is not None}
        unknown = sorted(given.keys() - set(prompt_arguments))
        if unknown:
            raise RequestError(
                f"transformer argument '{unknown[0]}'", "is nothing that the bundle's model takes",
                f"leave it out; it takes {', '.join(prompt_arguments)}",
            )  # fmt: skip
        prompt = {
            n: _as_tensor(given[i.argument], i)
            for n, i in inputs.items()
            if i.runs == "prompt" and i.argument in given
        }
        branch = str(self._context.get("name", "cond"))
        step_index = self._advance(branch, timestep)
        self.session.set_prompt(branch, prompt)
        output = self.session.step(branch, step_index, {"latents": hidden_states})
        # The pipeline may keep it past this branch's next step.
        sample = output.clone()
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _advance(self, branch: str, timestep: Tensor) -> int:
        """Return the step that this call is, beginning a run where one begins."""
        timestep = timestep.reshape(-1).float() * self._timestep_scale
        if not bool((timestep == timestep[0]).all()):
            raise RequestError(
                "timestep",
                "differs within the batch",
                "this model is conditioned on one timestep per step",
            )
        known = self._positions.get(branch, self._first - 1)
        said = self._context.get("step_index")
        # A scheduler that was set anew, or a timestep not ahead of the last, starts a run.
        follows = self._continues(known, timestep) if said is None else said == known + 1
        if not self._positions or not follows:
            self._begin()
            known = self._first - 1
        self._positions[branch] = known + 1 if said is None else said
        step_index = self._positions[branch] - self._first
        self._check_timestep(step_index, timestep)
        return int(step_index)

    def _continues(self, known: int, timestep: Tensor) -> bool:
        table, index = self.session.timesteps, known + 1 - self._first
        return 0 <= index < len(table) and _is_at(table[index], timestep)

    def _begin(self) -> None:
        """Begin a run over the scheduler's timesteps, or those of them that are this expert's."""
        self._positions.clear()
        pipe = self._pipe()
        assert pipe is not None, "the pipeline that calls is alive"
        timesteps = torch.as_tensor(pipe.scheduler.timesteps).float()
        timesteps = timesteps[: self._context.get("num_inference_steps")]
        mine = self.session.model.serves(timesteps)
        self._first = int(mine.long().argmax())
        self.session.begin(timesteps[mine], self.setting, self.recorder)

    def _check_timestep(self, step_index: int, timestep: Tensor) -> None:
        table = self.session.timesteps
        if step_index >= len(table) or not _is_at(table[step_index], timestep):
            raise RequestError(
                f"step {step_index}", f"is at timestep {float(timestep[0])}, the scheduler has "
                f"{[float(t) for t in table[step_index : step_index + 1]]} there",
                "set the scheduler's timesteps before the run, and don't change them in callbacks",
            )  # fmt: skip

    def load_lora_adapter(
        self, pretrained_model_name_or_path_or_dict: Mapping[str, Tensor], prefix: str | None = "transformer",
        adapter_name: str | None = None, **_: Any,
    ) -> None:  # fmt: skip
        """Merge what diffusers' ``pipe.load_lora_weights`` read into the session's weights.

        Raises:
            RequestError: the LoRA does not fit, or the bundle's weights are baked.
        """
        state = dict(pretrained_model_name_or_path_or_dict)
        if prefix is not None:
            state = {k: v for k, v in state.items() if k.startswith(f"{prefix}.")}
        name = adapter_name or f"default_{len(self._loras)}"
        loras = {**self._loras, name: lora_from_state_dict(name, state)}
        model = self.session.model
        self.session = Session(
            LoadedModel(
                model.bundle, model.backend.name, list(loras.values()), model.options, model.expert
            )
        )
        self._loras = loras
        self._positions.clear()


def _as_tensor(value: Any, entry: InputEntry) -> Tensor:
    """Turn what a pipeline gives into a tensor: a count into its indices, numbers into a row."""
    if isinstance(value, int) and len(entry.shape) == 1:
        return torch.arange(value)
    return torch.as_tensor(value)


def _is_at(wanted: Tensor, timestep: Tensor) -> bool:
    """Tell whether the scheduler's timestep is the one given, which may have been divided before."""
    return bool(torch.isclose(wanted, timestep[0].to(wanted.device), rtol=1e-6))
