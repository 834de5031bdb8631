# SPDX-License-Identifier: Apache-2.0
"""Apply ``--set key=value`` to a cache setting, typed by what the policy declares."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ..core.errors import ConfigError, nearest
from .setting import GUARD_PARAMETERS, CacheSetting
from .spec import ParameterSpec, PolicySpec, Value

__all__ = ["apply_overrides"]


def apply_overrides(
    setting: CacheSetting, overrides: Mapping[str, str], spec: PolicySpec
) -> CacheSetting:
    """Replace parameters, guard limits, the signal, the deadline and the bound of a setting.

    Args:
        setting: What a config resolved to; its policy is the spec's.
        overrides: Key → text. Keys are the policy's parameters, the guard's limits,
            ``exact_steps``, ``signal``, ``deadline`` (seconds, ``20`` or ``20s``) and ``min_psnr``
            (dB; it chooses the number of computed steps); lists are written ``1,2,3`` or as JSON.
        spec: The policy's declaration.

    Raises:
        ConfigError: unknown keys or values of the wrong type or range, all of them in one error; a
            bound that nothing keeps.
    """
    parameters, guard, signal = dict(setting.parameters), setting.guard.model_dump(), setting.signal
    deadline, bound = setting.deadline, setting.min_psnr
    if "computed_steps" in overrides:
        bound = None
    branches = {
        n: {k: v for k, v in own.items() if k not in overrides}
        for n, own in setting.branches.items()
    }
    faults = []
    for key, text in overrides.items():
        try:
            if key in spec.parameters:
                parameters[key] = _value(key, text, spec.parameters[key])
            elif key in GUARD_PARAMETERS:
                guard[key] = _value(key, text, GUARD_PARAMETERS[key])
            elif key == "exact_steps":
                guard[key] = _steps(text)
            elif key == "signal":
                signal = _signal(text, spec)
            elif key == "deadline":
                deadline = _seconds(text)
            elif key == "min_psnr":
                bound = _decibels(text, overrides)
            else:
                known = [
                    *spec.parameters,
                    *GUARD_PARAMETERS,
                    "exact_steps",
                    "signal",
                    "deadline",
                    "min_psnr",
                ]
                raise ConfigError(
                    f"parameter '{key}'", f"policy '{spec.name}' has none", nearest(key, known)
                )
        except ConfigError as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise ConfigError(
            f"policy '{spec.name}'",
            f"{len(faults)} faults: " + "; ".join(str(fault) for fault in faults),
        )
    changed = CacheSetting.model_validate(
        {
            "policy": setting.policy,
            "signal": signal,
            "parameters": parameters,
            "branches": branches,
            "guard": guard,
            "deadline": deadline,
            "min_psnr": bound,
            "promise": setting.promise,
        }
    )
    return changed.keeping_bound()


def _value(key: str, text: str, spec: ParameterSpec) -> Value:
    """Parse ``text`` as the parameter's type and check its range."""
    value: Value
    if spec.choices is not None:
        value = text
    elif spec.shape:
        value = _parsed(text if text.lstrip().startswith("[") else f"[{text}]")
    else:
        value = _parsed(text)
    spec.tensor_values(key, value)
    return value


def _steps(text: str) -> list[int]:
    steps = _parsed(text if text.lstrip().startswith("[") else f"[{text}]")
    if not isinstance(steps, list):
        raise ConfigError("parameter 'exact_steps'", f"expected step indices, found {text!r}")
    for step in steps:
        GUARD_PARAMETERS["first_exact"].tensor_values("exact_steps", step)
    return steps


def _seconds(text: str) -> float:
    seconds = _positive(text.removesuffix("s"))
    if seconds is None:
        raise ConfigError(
            "parameter 'deadline'", f"expected seconds above 0, found {text!r}", "give 20 or 20s"
        )
    return seconds


def _decibels(text: str, overrides: Mapping[str, str]) -> float:
    decibels = _positive(text)
    if decibels is None:
        raise ConfigError(
            "parameter 'min_psnr'", f"expected dB above 0, found {text!r}", "give 30 to 50"
        )
    if "computed_steps" in overrides:
        raise ConfigError(
            "parameter 'min_psnr'",
            "chooses 'computed_steps', which is given too",
            "give one of the two",
        )
    return decibels


def _positive(text: str) -> float | None:
    number = _parsed(text)
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    return float(number) if is_number and 0 < number < math.inf else None


def _signal(text: str, spec: PolicySpec) -> str:
    if text not in spec.signals:
        hint = nearest(text, spec.signals) if spec.signals else "remove it, none is looked at"
        raise ConfigError("parameter 'signal'", f"policy '{spec.name}' takes no '{text}'", hint)
    return text


def _parsed(text: str) -> Any:
    """Read ``text`` as JSON; what isn't JSON stays text, for the type check to name."""
    try:
        return json.loads(text)
    except ValueError:
        return text
