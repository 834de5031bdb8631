# SPDX-License-Identifier: Apache-2.0
"""What a cache policy declares about itself; policies hold one, manifests carry it verbatim.

A runtime needs nothing but this and the policy's compiled graph to run the policy.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import partial
from math import prod
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..core.errors import ConfigError, nearest

__all__ = [
    "GUARD_STATE",
    "MAX_SMALL_ELEMENTS",
    "HistorySpec",
    "Kept",
    "ParameterSpec",
    "PolicySpec",
    "StateSpec",
    "Value",
    "one_of",
]

Value = bool | int | float | str | list[float] | list[int]

Kept = Literal["previous_signal", "computed_signal", "older_signal", "previous_feature", "gram"]
"""Inputs of a decide graph that are of the past; see `PolicySpec`."""


MAX_HISTORY = 64
MAX_SMALL_ELEMENTS = 65_536
"""Limits of the bundle format, so that no number in a manifest decides what is allocated."""


def _few_elements(shape: list[int]) -> list[int]:
    if any(size < 0 for size in shape) or prod(shape) > MAX_SMALL_ELEMENTS:
        raise ValueError(f"should have at most {MAX_SMALL_ELEMENTS} elements")
    return shape


SmallShape = Annotated[list[int], Field(max_length=8), AfterValidator(_few_elements)]


def one_of(names: Sequence[str], value: str) -> str:
    """Return ``value`` if it is one of ``names``; else raise what pydantic takes for a fault."""
    if value not in names:
        raise ValueError(f"one of {', '.join(names)}")
    return value


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StateSpec(_Spec):
    """One small tensor that a policy carries from step to step.

    Attributes:
        shape: Static shape; ``[]`` is a scalar.
        dtype: ``float32``, ``int64`` or ``bool``.
        initial: Value of every element at the start of a run.
    """

    shape: SmallShape = []
    dtype: Literal["float32", "int64", "bool"] = "float32"
    initial: float = 0.0


class ParameterSpec(_Spec):
    """One runtime input of a policy graph; changes per request, never needs a rebuild.

    Attributes:
        default: Value used where a request gives none.
        dtype: ``float32``, ``int64`` or ``bool``.
        shape: ``[]`` for a scalar, ``[n]`` for a vector padded at ``pad`` to n elements.
        minimum: Least allowed value (inclusive) of each element.
        maximum: Greatest allowed value (inclusive) of each element.
        choices: Names of an enumeration; the graph input is the index of the chosen name.
        pad: Where a shorter vector is filled up: ``front`` with zeros (polynomials), or ``edge``
            by repeating its last element (tables).
        listed_in: Name of the policy's parameter that lists the values it may take, or None.
        meaning: One sentence with the unit and the range.
    """

    default: Value
    dtype: Literal["float32", "int64", "bool"] = "float32"
    shape: SmallShape = []
    minimum: float | None = None
    maximum: float | None = None
    choices: list[str] | None = None
    pad: Literal["front", "edge"] = "edge"
    listed_in: str | None = None
    meaning: str

    @property
    def check(self) -> Any:
        """Return what a config key's type is annotated with, so that the range stands here alone."""
        if self.choices is not None:
            return AfterValidator(partial(one_of, self.choices))
        return Field(ge=self.minimum, le=self.maximum)

    @property
    def length(self) -> Any:
        """Return the annotation of a config key's list: not empty, and no longer than the vector."""
        return Field(min_length=1, max_length=self.shape[0])

    @property
    def allowed(self) -> str:
        """Return the values that one element may take, in words."""
        if self.choices is not None:
            return " or ".join(self.choices)
        if self.dtype == "bool":
            return "true or false"
        kind = "any integer" if self.dtype == "int64" else "any number"
        low, high = (None if b is None else f"{b:g}" for b in (self.minimum, self.maximum))
        if low is not None and high is not None:
            return f"{low} to {high}"
        bounds = (f">= {low}" if low is not None else "", f"<= {high}" if high is not None else "")
        return "".join(bounds) or kind

    def tensor_values(self, name: str, value: Any) -> list[float] | float:
        """Check ``value`` and turn it into what the graph input holds.

        Args:
            name: The parameter's name, for the message.
            value: What a config or request gave.

        Returns:
            One number for a scalar, ``shape[0]`` numbers for a vector.

        Raises:
            ConfigError: wrong type, length, range or choice.
        """
        where = f"parameter '{name}'"
        if self.choices is not None:
            if value not in self.choices:
                raise ConfigError(
                    where, f"unknown choice {value!r}", nearest(str(value), self.choices)
                )
            return float(self.choices.index(value))
        if not self.shape:
            return self._number(where, value)
        if not isinstance(value, list | tuple) or not value:
            raise ConfigError(where, f"expected a list of numbers, found {value!r}", self.meaning)
        size = self.shape[0]
        if len(value) > size:
            raise ConfigError(where, f"has {len(value)} values, at most {size} fit", self.meaning)
        numbers = [self._number(f"{where}[{i}]", v) for i, v in enumerate(value)]
        missing = size - len(numbers)
        if self.pad == "front":
            return [0.0] * missing + numbers
        return numbers + [numbers[-1]] * missing

    def _number(self, where: str, value: Any) -> float:
        allowed = {"float32": (int, float), "int64": (int,), "bool": (bool,)}[self.dtype]
        is_bool_mixup = isinstance(value, bool) and self.dtype != "bool"
        if is_bool_mixup or not isinstance(value, allowed):
            kind = {"float32": "a number", "int64": "an integer", "bool": "true or false"}[
                self.dtype
            ]
            raise ConfigError(where, f"expected {kind}, found {value!r}", self.meaning)
        number = float(value)
        low, high = self.minimum, self.maximum
        # NOTE: written so that NaN fails every bound.
        if (low is not None and not number >= low) or (high is not None and not number <= high):
            bounds = f"[{'-inf' if low is None else low}, {'inf' if high is None else high}]"
            raise ConfigError(where, f"{value!r} is outside {bounds}", self.meaning)
        if number != number or number in (float("inf"), float("-inf")):
            raise ConfigError(where, f"{value!r} is not finite", self.meaning)
        return number


class HistorySpec(_Spec):
    """How many residuals of the past a policy mixes.

    Attributes:
        maximum: Length of the graph's ``mix`` output and ``computed_steps`` input; at least 1.
        depth: Residuals really kept, where no parameter decides; 0 keeps none.
        parameter: Name of the integer parameter that decides, if one does.
        offset: Depth is ``parameter + offset``.
    """

    maximum: Annotated[int, Field(ge=1, le=MAX_HISTORY)]
    depth: Annotated[int, Field(ge=0, le=MAX_HISTORY)] = 1
    parameter: str | None = None
    offset: Annotated[int, Field(ge=-MAX_HISTORY, le=MAX_HISTORY)] = 0

    def kept(self, parameters: Mapping[str, Any]) -> int:
        """Return the ring slots to allocate for these parameters."""
        if self.parameter is None:
            return self.depth
        return min(max(int(parameters[self.parameter]) + self.offset, 0), self.maximum)


class PolicySpec(_Spec):
    """The whole declaration of one policy.

    Attributes:
        name: Table key, as requests spell it.
        summary: One line for ``inspect``.
        signals: Signal kinds its graph may be given, the first being the default; empty for none.
        feature: Tensor of the last computed step that it looks at, or None: ``attention_output``,
            tapped inside ``body``, or ``model_output``, what ``finish`` gave.
        kept: Inputs of the past which the session keeps, most by rotating buffers:
            ``previous_signal`` (of the last step), ``computed_signal`` (of the last computed
            step), ``older_signal`` (of the computed step before that, which needs
            ``computed_signal``), ``previous_feature`` (of the last but one computed step); and
            ``gram``, the inner products of the residuals that it mixes, which needs all of
            ``history.maximum``.
        one_decision: Whether all branches follow the one that runs a step first.
        history: Residuals it mixes.
        first_blocks: Name of the integer parameter that says how many first blocks run at every
            step; None is one. Read where the signal is what they add, else every block is cached.
        last_blocks: Likewise of the last blocks; None is none.
        state: Small tensors carried from step to step.
        parameters: Runtime inputs.
        distance: Name of the state that reports the accumulated distance, if there is one.
        reference: Paper and arXiv id.
    """

    name: str
    summary: str
    signals: list[str] = []
    feature: Literal["attention_output", "model_output"] | None = None
    kept: list[Kept] = []
    one_decision: bool = False
    history: HistorySpec
    first_blocks: str | None = None
    last_blocks: str | None = None
    state: dict[str, StateSpec] = {}
    parameters: dict[str, ParameterSpec] = {}
    distance: str | None = None
    reference: str = ""

    @property
    def content(self) -> str | None:
        """What the policy sees of a run beside its signal: its feature or ``gram``, else None.

        A policy that sees none, and whose signal depends on timesteps alone, folds.
        """
        return self.feature or ("gram" if "gram" in self.kept else None)

    def always_run(self, parameters: Mapping[str, Any]) -> tuple[int, int]:
        """Return how many first and how many last blocks run at every step, by these parameters."""
        first = 1 if self.first_blocks is None else int(parameters[self.first_blocks])
        last = 0 if self.last_blocks is None else int(parameters[self.last_blocks])
        return first, last

    def signal_of(self, wanted: str | None, given: Container[str]) -> str | None:
        """Return the signal kind that the policy gets: the wanted one, else the first given one.

        Args:
            wanted: A setting's, or None.
            given: Kinds that a model, a trace or a table gives.

        Raises:
            ConfigError: the wanted one is none that the policy takes.
        """
        if wanted is not None and wanted not in self.signals:
            raise ConfigError(
                f"signal '{wanted}'",
                f"can't be given to policy '{self.name}'",
                nearest(wanted, self.signals)
                if self.signals
                else "leave it out: it takes no signal",
            )
        return wanted or next((s for s in self.signals if s in given), None)

    def resolve(self, given: Mapping[str, Any]) -> dict[str, Value]:
        """Fill defaults in and check every parameter.

        Raises:
            ConfigError: an unknown name (with the nearest known one) or a bad value.
        """
        for name in given:
            if name not in self.parameters:
                raise ConfigError(
                    f"parameter '{name}' of policy '{self.name}'",
                    "is not known",
                    nearest(name, list(self.parameters)),
                )
        resolved = {n: given.get(n, spec.default) for n, spec in self.parameters.items()}
        for name, value in resolved.items():
            spec = self.parameters[name]
            spec.tensor_values(name, value)
            listed = resolved.get(spec.listed_in) if spec.listed_in else None
            if isinstance(listed, list) and value not in listed:
                raise ConfigError(
                    f"parameter '{name}'",
                    f"{value!r} is none of '{spec.listed_in}'",
                    f"give one of {', '.join(map(str, listed))}",
                )
        return resolved


GUARD_STATE: dict[str, StateSpec] = {
    "consecutive": StateSpec(dtype="int64"),
    "reused": StateSpec(dtype="int64"),
}
"""State ``guard_state.<name>`` of every decide graph: reuses since the last computation and in all."""
