# SPDX-License-Identifier: Apache-2.0
"""Describe the policies to somebody who chooses one: parameters, ranges, memory, what they look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from ..core.errors import ConfigError, nearest
from . import JOINT, POLICIES, is_policy, mixes, policy_class, policy_config
from .base import HOLD, Mix
from .setting import GUARD_PARAMETERS
from .spec import ParameterSpec, PolicySpec

__all__ = ["TIMESTEP_SIGNALS", "describe_guard", "describe_policies", "render"]

TIMESTEP_SIGNALS = ("temb", "timestep_proj")
"""Signals that the timestep alone decides, in every family: known before step 0."""

FIRST_BLOCKS = "first_block_residual"
"""Signal for which the body's first blocks run at every step."""

SHOWN_VALUES = 6


def describe_policies(names: Sequence[str] = ()) -> tuple[list[dict[str, Any]], list[ConfigError]]:
    """Describe policies.

    Args:
        names: Which, pairs too; none is all of the table.

    Returns:
        One JSON object per policy, and the faults of those that can't be described.

    Raises:
        ConfigError: there is no policy of a name.
    """
    for name in names:
        if not is_policy(name):
            raise ConfigError(f"policy '{name}'", "is not known", nearest(name, list(POLICIES)))
    described, faults = [], []
    for name in names or POLICIES:
        try:
            described.append(_described(name))
        except ConfigError as error:
            faults.append(error)
    return described, faults


def describe_guard() -> list[dict[str, Any]]:
    """Describe the parameters of the guard, which every policy takes beside its own."""
    return [_parameter(name, spec, None) for name, spec in GUARD_PARAMETERS.items()]


def render(described: Sequence[Mapping[str, Any]], guard: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write what `describe_policies` and `describe_guard` returned as lines."""
    lines: list[str] = []
    for entry in described:
        lines += [f"{entry['name']}: {entry['summary']}"]
        if entry["reference"]:
            lines += [f"    after     {entry['reference']}"]
        lines += [f'    config    "feature_caching": "{entry["feature_caching"]}"']
        lines += [f"    looks at  {entry['looks_at']}"]
        if entry["always_runs"]:
            lines += [f"    runs      {entry['always_runs']} at every step"]
        lines += [f"    decides   {entry['decides']}"]
        lines += [f"    mixes     {entry['mixes']}"]
        lines += [f"    memory    {entry['memory']} per branch"]
        lines += [_line(parameter) for parameter in entry["parameters"]]
        lines += [""]
    return [*lines, "guard of every policy", *(_line(parameter) for parameter in guard)]


def _described(name: str) -> dict[str, Any]:
    found, config = policy_class(name), policy_config(name)
    spec = found.spec
    mixer = next(n for n, mix in mixes().items() if mix is found.mix)
    keys = {parameter: key for key, parameter in config.keys.items() if key != parameter}
    return {
        "name": name,
        "summary": spec.summary,
        "reference": spec.reference,
        "feature_caching": get_args(config.model_fields["feature_caching"].annotation)[0],
        "signals": spec.signals,
        "feature": spec.feature,
        "looks_at": _looks_at(spec),
        "decides": _decides(spec),
        "folds": _folds(spec),
        "mix": mixer,
        "mixes": _mixes(mixer, found.mix),
        "residuals": {"default": _residuals(spec), "maximum": _most_residuals(spec)},
        "kept": spec.kept,
        "always_runs": _always_runs(spec),
        "memory": _memory(spec),
        "parameters": [_parameter(n, p, keys.get(n)) for n, p in spec.parameters.items()],
    }


def _mixes(mixer: str, mix: Mix) -> str:
    if mix is HOLD:
        return "the newest residual, held"
    if mix.bound:
        return f"by a law that serves no other decision: {mix.bound}"
    return f"by a law that serves other decisions too: DECISION{JOINT}{mixer}"


def _always_runs(spec: PolicySpec) -> str:
    """Say which blocks run at every step; empty where none does."""
    if FIRST_BLOCKS not in spec.signals:
        return ""
    count = f"the first {spec.first_blocks}" if spec.first_blocks else "the first block"
    return f"{count} and the last {spec.last_blocks}" if spec.last_blocks else count


def _parameter(name: str, spec: ParameterSpec, key: str | None) -> dict[str, Any]:
    return {
        "name": name,
        "config_key": key or name,
        "default": spec.default,
        "dtype": spec.dtype,
        "values": spec.shape[0] if spec.shape else 1,
        "allowed": spec.allowed,
        "minimum": spec.minimum,
        "maximum": spec.maximum,
        "choices": spec.choices,
        "meaning": spec.meaning,
    }


def _looks_at(spec: PolicySpec) -> str:
    looked_at = list(spec.signals) if spec.signals else []
    text = " or ".join(looked_at)
    if spec.feature is not None:
        text = f"{text} and {spec.feature}" if text else spec.feature
    if "gram" in spec.kept:
        text = f"{text} and its residuals" if text else "its residuals"
    return text or "nothing but the step"


def _folds(spec: PolicySpec) -> list[str] | bool:
    """Return with which signals all decisions are known before step 0; a bool if none matters."""
    if spec.content is not None:
        return False
    if not spec.signals:
        return True
    return [name for name in spec.signals if name in TIMESTEP_SIGNALS] or False


def _decides(spec: PolicySpec) -> str:
    folds = _folds(spec)
    if folds is True:
        return "every step before step 0"
    if not folds:
        return "step by step"
    return f"every step before step 0 with {' or '.join(folds)}, else step by step"


def _residuals(spec: PolicySpec) -> int:
    return spec.history.kept({n: p.default for n, p in spec.parameters.items()})


def _most_residuals(spec: PolicySpec) -> int:
    return spec.history.maximum if spec.history.parameter else _residuals(spec)


def _memory(spec: PolicySpec) -> str:
    count, parameter = _residuals(spec), spec.history.parameter
    text = f"{count} residual{'' if count == 1 else 's'}"
    if parameter is not None:
        plus = f" + {spec.history.offset}" if spec.history.offset else ""
        text += f" ({parameter}{plus}, at most {spec.history.maximum})"
    return " and ".join((text, *(f"the {role.replace('_', ' ')}" for role in spec.kept)))


def _line(parameter: Mapping[str, Any]) -> str:
    key = parameter["config_key"]
    called = f" (config key {key})" if key != parameter["name"] else ""
    values = f"up to {parameter['values']} values, each " if parameter["values"] > 1 else ""
    return (
        f"    --set {parameter['name']}={_shown(parameter['default'])}  "
        f"[{values}{parameter['allowed']}]  {parameter['meaning']}{called}"
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        more = f",… ({len(value)} values)" if len(value) > SHOWN_VALUES else ""
        return ",".join(f"{v:g}" for v in value[:SHOWN_VALUES]) + more
    return str(value)
