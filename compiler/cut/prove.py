# SPDX-License-Identifier: Apache-2.0
"""Prove a cut: run its segments in PyTorch, chained, and compare with the transformer itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import ExportError
from .arguments import example, filled, leaves_of, results_of
from .patch import patched
from .row import SIZES, Row
from .words import Call, Cut, Segment

__all__ = ["chain", "check_row", "eager", "random_inputs", "random_weights", "relative_error"]

TABLE, ROW = 5, 2
"""Timesteps in the batch with which tables are made, as a run makes them, and the step's own row."""


DEPTHS = ("num_layers", "num_single_layers", "num_refiner_layers", "num_double_layers", "depth")
"""Config keys that say how many blocks a model has."""

OTHER_COUNTS = {
    "batch": 1,
    "frames": 5,
    "height": 6,
    "width": 4,
    "tokens": 24,
    "text_tokens": 7,
    "rows": 6,
    "columns": 4,
}
TOLERANCE = 1e-5


def check_row(row: Row, model_class: Any, config: Mapping[str, Any]) -> None:
    """Hold a cut by a row that nobody tried to the transformer itself, of few blocks.

    Args:
        row: What the transformer takes.
        model_class: The diffusers class.
        config: Its config.

    Raises:
        ExportError: it can't be cut, or is not equal to the transformer at every size.
    """
    from .cut import cut_model

    few = {key: min(config[key], 3) for key in DEPTHS if isinstance(config.get(key), int)}
    model = random_weights(model_class.from_config({**config, **few}).eval())
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found: Any = model
    cut = cut_model(row, model_class, dict(found.config))
    for counts in (SIZES, {**SIZES, **OTHER_COUNTS}):
        sizes = row.sizes(found.config, counts)
        inputs = random_inputs(row, found.config, sizes, seed=1)
        expected = eager(row, model, inputs)
        try:
            made = chain(cut, weights, inputs)
        except RuntimeError as error:  # a size was fixed where it was traced
            raise ExportError(
                f"transformer '{row.model}'",
                f"cut by what its pipeline gives it, can't be computed at {sizes}: {error}",
                "write a row for the model (docs/how-to/add-a-family.md)",
            ) from error
        both = zip(made, expected, strict=True)
        distance = max(relative_error(ours, own) for ours, own in both)
        if not distance < TOLERANCE:
            raise ExportError(
                f"transformer '{row.model}'",
                f"cut by what its pipeline gives it, is {distance:.0e} away from itself at {sizes}",
                "write a row for the model (docs/how-to/add-a-family.md)",
            )


def chain(cut: Cut, weights: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> list[Tensor]:
    """Run a cut's calls one by one, as a runtime does.

    Args:
        cut: The cut.
        weights: Checkpoint name → tensor, float32.
        inputs: What `forward` is given, by name.

    Returns:
        What `forward` returns.
    """
    values: dict[str, Any] = {**weights, **inputs}
    tables = _timesteps(cut, inputs)
    prompts = {name for name, declared in cut.inputs.items() if declared.changes == "prompt"}
    for call in cut.calls:
        segment = cut.segments[call.segment]
        prefix = f"{call.block}." if call.block else ""
        own = {n: weights[prefix + n] for n, _ in segment.module.named_parameters()}
        if segment.runs in ("run", "modulation") and tables:
            made = _rows(segment, call, own, values, tables, prompts)
        else:
            made = _call(segment, own, [values[name] for name in call.inputs])
        values.update(zip(call.outputs, made, strict=True))
        if segment.runs in ("prompt", "context"):
            prompts.update(call.outputs)
    return [values[name] for name in cut.results]


def _call(segment: Segment, weights: dict[str, Tensor], given: list[Any]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        made: tuple[Tensor, ...] = torch.func.functional_call(segment.module, weights, tuple(given))
    return made


def _timesteps(cut: Cut, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return several timesteps for each input that is one, the given one among them.

    Empty if a batch's elements have timesteps of their own.
    """
    given = {name: inputs[name] for name, one in cut.inputs.items() if one.changes == "run"}
    if any(one.ndim != 1 or one.unique().numel() != 1 for one in given.values()):
        return {}
    return {
        name: torch.stack([one[0] * (1 + (i - ROW) / 10) for i in range(TABLE)]).to(one.dtype)
        for name, one in given.items()
    }


def _rows(
    segment: Segment,
    call: Call,
    weights: dict[str, Tensor],
    values: Mapping[str, Any],
    tables: dict[str, Tensor],
    prompts: Collection[str],
) -> tuple[Tensor, ...]:
    """Call a segment with all timesteps in one batch, keep its tables, return the step's row of each.

    If it reads a value of the prompt, its batch is each timestep with each prompt of the batch, and
    a row is one of each prompt.
    """
    per_prompt = [values[name] for name in call.inputs if name in prompts]
    batch = len(per_prompt[0]) if per_prompt else 1
    given = [
        tables[name].repeat_interleave(batch, dim=0)
        if name in tables
        else torch.cat([values[name]] * TABLE)
        if name in prompts
        else values[name]
        for name in call.inputs
    ]
    made = _call(segment, weights, given)
    tables.update(zip(call.outputs, made, strict=True))
    wanted = max(len(values[name]) for name in tables if name in values)
    rows = (table[ROW * batch : (ROW + 1) * batch] for table in made)
    return tuple(row.expand(wanted, *row.shape[1:]) for row in rows)


def eager(row: Row, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Run a transformer as it stands on the same inputs, but for what it rounds by itself."""
    arguments, named = leaves_of(row, getattr(model, "config", {}))
    given = filled(arguments, (inputs[name] for name in named))
    with torch.no_grad(), patched(type(model), [one for one in row.patches if one.rounds]):
        return results_of(model(**given))


def random_inputs(
    row: Row, config: Mapping[str, Any], sizes: Mapping[str, int], *, seed: int = 0
) -> dict[str, Any]:
    """Return inputs of given sizes (`Row.sizes`), by name."""
    generator = torch.Generator().manual_seed(seed)
    _, named = leaves_of(row, config)
    return {n: example(declared, config, sizes, generator) for n, declared in named.items()}


SCALES = ("weight", "gamma")
"""How the names of norms' scales end, which are about one."""


def random_weights(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Fill a transformer with weights at which no part of it vanishes or saturates."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                noise *= max(parameter[0].numel(), 1) ** -0.5
            else:
                noise = 0.1 * noise + float(name.endswith(SCALES))
            parameter.copy_(noise)
    return model.requires_grad_(False)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the relative L2 distance, in float64."""
    difference = found.double() - expected.double()
    return float(difference.norm() / expected.double().norm())
