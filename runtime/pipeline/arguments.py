# SPDX-License-Identifier: Apache-2.0
"""Read what a pipeline calls its transformer with, by the names of a bundle's inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import make_dataclass
from functools import cache
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.outputs import BaseOutput
from torch import Tensor
from torch.utils import _pytree as pytree

from ...bundle.dims import derive_dims, match_dims, shape_of
from ...bundle.manifest import InputEntry, Manifest
from ...bundle.streams import LATENTS, beside
from ...core.errors import RequestError

__all__ = ["Arguments", "sample_of", "timestep_of"]


class Arguments:
    """Reads the calls of one bundle's transformer.

    Attributes:
        timestep: The input that is the step's own timestep.
        other_timesteps: Inputs that are timesteps beside it.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Read a bundle's declarations."""
        self._manifest = manifest
        runs = {n: i for n, i in manifest.inputs.items() if i.runs == "run"}
        self.timestep = next(i for i in runs.values() if LATENTS in i.of)
        self.other_timesteps = {n: i for n, i in runs.items() if i is not self.timestep}
        self._latents = {n: manifest.inputs[n].argument for n in manifest.latents}

    def take(
        self, hidden_states: Any, timestep: Tensor, named: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Take out of the keywords what is no prompt input.

        Args:
            hidden_states: The first latents, or a list with each sample's.
            timestep: The step's own.
            named: Keywords of the call; those that are left are prompt inputs.

        Returns:
            Latents and timesteps beside the step's own, by the bundle's names.

        Raises:
            RequestError: one is missing, or differs from what the bundle was made with.
        """
        self._take_what_is_same(named, timestep)
        self._take_what_is_fixed(named)
        others = self._take_other_timesteps(named)
        return self._take_latents(hidden_states, named), others

    def prompt(
        self, states: Sequence[Any], named: Mapping[str, Any], attention: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return prompt inputs by the bundle's names.

        Args:
            states: In the order of the diffusers transformer.
            named: By diffusers' keywords.
            attention: What the call gives attention.

        Raises:
            RequestError: something that the bundle's model takes no account of.
        """
        scale = attention.pop("scale", 1.0)
        if scale != 1.0:
            raise RequestError(
                "attention_kwargs 'scale'",
                f"is {scale}; adapters are merged once per run",
                f"call pipe.set_adapters(NAME, {scale}) before the run",
            )
        inputs = self._manifest.inputs
        wanted = {n: i for n, i in inputs.items() if i.runs == "prompt"}
        paths = {n: _of_attention(i.argument) for n, i in wanted.items()}
        prompt_arguments = list(dict.fromkeys(path.split(".")[0] for path in paths.values()))
        if len(states) > len(prompt_arguments):
            raise RequestError(
                "transformer",
                f"is given {len(states)} prompt inputs",
                f"give {', '.join(prompt_arguments)}",
            )
        given = {**dict(zip(prompt_arguments, states, strict=False)), **named}
        given = {n: value for n, value in {**given, **attention}.items() if not _is_absent(value)}
        unknown = sorted(given.keys() - set(prompt_arguments))
        if unknown:
            raise RequestError(
                f"transformer argument '{unknown[0]}'",
                "is nothing that the bundle's model takes",
                f"leave it out; it takes {', '.join(prompt_arguments)}",
            )
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
        sizes = derive_dims(self._manifest, sizes)
        return found | {n: torch.ones(shape_of(i, sizes)) for n, i in absent.items()}

    def outputs(self, samples: Sequence[Any]) -> BaseOutput:
        """Return samples as diffusers' outputs have them: ``sample``, and ``audio_sample`` beside it."""
        if len(samples) == 1:
            return Transformer2DModelOutput(sample=samples[0])
        names = [beside(latents, LATENTS, "sample") for latents in self._latents]
        made: BaseOutput = _outputs_of(*names)(*samples)
        return made

    def _take_what_is_same(self, named: dict[str, Any], timestep: Tensor) -> None:
        """Take arguments out that the bundle's model is given the timestep as, too."""
        for name in self.timestep.same:
            other = named.pop(name, timestep)
            if not torch.equal(torch.as_tensor(other).to(timestep), timestep):
                raise RequestError(
                    f"transformer argument '{name}'",
                    "is not the timestep",
                    f"the bundle is of a model whose pipeline gives '{name}' the timestep itself",
                )

    def _take_what_is_fixed(self, named: dict[str, Any]) -> None:
        """Take arguments out that the bundle's model was cut with one value of, or that change nothing."""
        for name, wanted in self._manifest.arguments.items():
            given = _take(named, name, wanted)
            if wanted is not None and given is not None and given != wanted:
                raise RequestError(
                    f"transformer argument '{name}'",
                    f"is {given}, the bundle's model has {wanted}",
                    f"make the pipeline give {wanted}",
                )

    def _take_other_timesteps(self, named: dict[str, Any]) -> dict[str, Tensor]:
        """Take timesteps out beside the first, and return them by the bundle's names."""
        found: dict[str, Tensor] = {}
        for name, one in self.other_timesteps.items():
            given = named.pop(one.argument, None)
            if given is None:
                raise RequestError(
                    f"transformer argument '{one.argument}'",
                    "is missing",
                    "the bundle's model takes it beside the timestep",
                )
            found[name] = timestep_of(given, one)
        return found

    def _take_latents(self, first: Any, named: dict[str, Any]) -> dict[str, Any]:
        """Take the latents out that come by keyword, and return all by the bundle's names."""
        others = {n: argument for n, argument in self._latents.items() if n != LATENTS}
        missing = [argument for argument in others.values() if named.get(argument) is None]
        if missing:
            raise RequestError(
                f"transformer argument '{missing[0]}'",
                "is missing",
                f"the bundle's model samples {', '.join(self._latents)} at once",
            )
        return {LATENTS: first, **{n: named.pop(argument) for n, argument in others.items()}}


def timestep_of(value: Tensor, entry: InputEntry) -> Tensor:
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


def sample_of(value: Any, index: int) -> Any:
    """Return one sample's part of a prompt input, with the axis of the batch; else the value."""
    is_listed = isinstance(value, list) and all(isinstance(one, Tensor) for one in value)
    return value[index].unsqueeze(0) if is_listed else value


def _of_attention(path: str) -> str:
    """Return the place of an argument; what attention is given lies beside the others."""
    return re.sub(r"^(joint_)?attention_kwargs\.", "", path)


def _leaf(given: Mapping[str, Any], path: str) -> Any:
    """Return a leaf of a nested argument: ``img_shapes.0.0.1``, ``added_cond_kwargs.resolution``."""
    name, *keys = path.split(".")
    value = given[name]
    for key in keys:
        value = value[key] if isinstance(value, Mapping) else value[int(key)]
    return value


def _take(given: dict[str, Any], path: str, missing: Any) -> Any:
    """Take an argument out; what is missing inside of one is 'left out', of which there is no default."""
    name, _, key = path.partition(".")
    if not key:
        return given.pop(name, missing)
    inside = dict(given.get(name) or {})
    found = inside.pop(key, "left out")
    given[name] = inside
    return found


def _is_absent(value: Any) -> bool:
    """Tell whether an argument is None, or a nesting of nothing else."""
    return all(leaf is None for leaf in pytree.tree_leaves(value))


def _as_tensor(value: Any, entry: InputEntry) -> Tensor:
    """Turn what a pipeline gives into a tensor: a count into its indices, a list into rows.

    Complex numbers become pairs of real ones.
    """
    if isinstance(value, int) and len(entry.shape) == 1:
        return torch.arange(value)
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return torch.stack(value)
    tensor = torch.as_tensor(value)
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@cache
def _outputs_of(*names: str) -> type[Any]:
    """Return the class of outputs of these names: diffusers keeps every such class for good."""
    return make_dataclass("ModelOutputs", names, bases=(BaseOutput,))
