# SPDX-License-Identifier: Apache-2.0
"""Cache policies: the table of all there are, in the order in which they are listed.

``A+B`` is the policy that decides as A and mixes as B. A policy's file is imported when something
asks for it, so that a faulty one stops nobody else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_args

from ..core.errors import ConfigError, nearest
from .config import CachingConfig, config_model
from .spec import PolicySpec

if TYPE_CHECKING:
    from .base import Mix, Policy

__all__ = [
    "HOLDING",
    "JOINT",
    "POLICIES",
    "config_kinds",
    "form_of",
    "is_policy",
    "mix_of",
    "mixes",
    "policies",
    "policy",
    "policy_class",
    "policy_config",
    "sound_policies",
]

POLICIES: dict[str, str] = {
    "off": "off:Off",
    "teacache": "teacache:TeaCache",
    "taylorseer": "taylorseer:TaylorSeer",
    "adacache": "adacache:AdaCache",
    "custom": "custom:Custom",
    "magcache": "magcache:MagCache",
    "easycache": "easycache:EasyCache",
    "firstblock": "firstblock:FirstBlock",
    "solved": "solved:Solved",
    "spectrum": "spectrum:Spectrum",
    "hermite": "hermite:Hermite",
    "foca": "foca:FoCa",
    "sencache": "sencache:SenCache",
    "dmd": "dmd:DMD",
    "dicache": "dicache:DiCache",
    "seacache": "seacache:SeaCache",
    "dbcache": "dbcache:DBCache",
    "dualblock": "dualblock:DualBlock",
}
"""Name → ``module:Class`` in this folder."""

JOINT = "+"
"""Between the name of a decision's policy and that of a mix's."""

HOLDING = "hold"
"""Name of the mix that most policies share."""


def is_policy(name: str) -> bool:
    """Tell whether a text is spelled as a policy's name: the table's, or a pair's."""
    decider, joint, _ = name.partition(JOINT)
    return decider in POLICIES if joint else name in POLICIES


def policy(name: str) -> Policy:
    """Return the policy called ``name``.

    Raises:
        ConfigError: there is none, saying which is nearest; or its declaration is faulty.
    """
    return policy_class(name)()


def policies(named: Iterable[str] = ()) -> dict[str, type[Policy]]:
    """Return every policy of the table, then the pairs among some names.

    Raises:
        ConfigError: a declaration is faulty, or the two of a pair can't go together.
    """
    return {name: policy_class(name) for name in dict.fromkeys([*POLICIES, *named])}


def sound_policies() -> dict[str, type[Policy]]:
    """Return every policy of the table whose declaration is not faulty."""
    found = {}
    for name in POLICIES:
        with suppress(ConfigError):
            found[name] = policy_class(name)
    return found


@cache
def policy_class(name: str) -> type[Policy]:
    """Import a policy and check what it declares; make one of the two that a pair names.

    Raises:
        ConfigError: no such policy, its file can't be imported, its declaration is faulty (all
            faults in one error), or the two of a pair can't go together.
    """
    decider, joint, mixer = name.partition(JOINT)
    if joint and decider in POLICIES:
        from .pairs import pair_of

        return pair_of(policy_class(decider), mixer, mix_of(mixer))
    if name not in POLICIES:
        raise ConfigError(f"policy '{name}'", "is not known", nearest(name, list(POLICIES)))
    module, _, class_name = POLICIES[name].partition(":")
    where = f"policy '{name}', policies/{module}.py"
    hint = "correct the file, or take its row out of policies/__init__.py"
    try:
        found = getattr(import_module(f".{module}", __name__), class_name)
    except Exception as error:
        text = "; ".join(line.strip() for line in str(error).splitlines())
        raise ConfigError(
            where, f"can't be imported: {type(error).__name__}: {text}", hint
        ) from error
    faults = _faults(name, found)
    if faults:
        raise ConfigError(where, "; ".join(faults), hint)
    checked: type[Policy] = found
    return checked


def mixes() -> dict[str, Mix]:
    """Return every mix by what it goes by: `HOLDING`, and the first policy of the table that has it."""
    from .base import HOLD

    found = {HOLDING: HOLD}
    for name, policy_class in sound_policies().items():
        if not any(policy_class.mix is mix for mix in found.values()):
            found[name] = policy_class.mix
    return found


def mix_of(name: str) -> Mix:
    """Return the mix that goes by a name.

    Raises:
        ConfigError: there is none, it goes by another, or its policy's declaration is faulty.
    """
    known = mixes()
    if name in known:
        return known[name]
    if name not in POLICIES:
        raise ConfigError(f"mix '{name}'", "is not known", nearest(name, list(known)))
    mix = policy_class(name).mix
    first = next(n for n, other in known.items() if other is mix)
    raise ConfigError(f"mix '{name}'", f"is that of '{first}'", f"name it '{first}'")


@cache
def policy_config(name: str) -> type[CachingConfig]:
    """Return the model of a policy's configs: the one it declares, or its parameters as they are.

    Raises:
        ConfigError: no such policy, or its declaration is faulty.
    """
    found = policy_class(name)
    return found.config or config_model(found.spec)


def config_kinds() -> tuple[dict[str, type[CachingConfig]], list[ConfigError]]:
    """Return ``feature_caching`` → model of the config, and the faults of policies left out."""
    kinds: dict[str, type[CachingConfig]] = {}
    faults = []
    for name in POLICIES:
        try:
            model = policy_config(name)
        except ConfigError as error:
            faults.append(error)
            continue
        kinds |= dict.fromkeys(get_args(model.model_fields["feature_caching"].annotation), model)
    return kinds, faults


def form_of(name: str, parameters: Mapping[str, Any]) -> str:
    """Return which form of a policy's law some parameters are, for a run's summary.

    Args:
        name: Of a bundle's policy, which this install need not have.
        parameters: Resolved.

    Returns:
        ``published forecast`` or the like; empty where the law has one form, or is not known here.
    """
    try:
        return policy_class(name).mix.form(parameters)
    except ConfigError:
        return ""


def _faults(name: str, found: object) -> list[str]:
    """Say what is wrong with a policy's declaration, all of it."""
    from .base import Policy

    if not (isinstance(found, type) and issubclass(found, Policy)):
        return [f"{found!r} is no subclass of Policy"]
    spec = getattr(found, "spec", None)
    if not isinstance(spec, PolicySpec):
        return ["declares no 'spec', expected a PolicySpec"]
    faults = []
    if spec.name != name:
        faults.append(f"spec.name is '{spec.name}', its row says '{name}'")
    if found.decide is Policy.decide:
        faults.append("has no 'decide'")
    for parameter, declared in spec.parameters.items():
        try:
            declared.tensor_values(parameter, declared.default)
        except ConfigError as error:
            faults.append(f"default of {error.where} {error.what}")
    if spec.history.parameter not in {None, *spec.parameters}:
        faults.append(f"history.parameter '{spec.history.parameter}' is not one of its parameters")
    counts = {"first_blocks": spec.first_blocks, "last_blocks": spec.last_blocks}
    faults += [
        f"{field} '{parameter}' is not one of its parameters"
        for field, parameter in counts.items()
        if parameter not in {None, *spec.parameters}
    ]
    if spec.distance not in {None, *spec.state}:
        faults.append(f"distance '{spec.distance}' is not part of its state")
    signals = ("previous_signal", "computed_signal", "older_signal")
    needs = {"signals": signals, "feature": ("previous_feature",)}
    for source, roles in needs.items():
        kept = [role for role in roles if role in spec.kept]
        if kept and not getattr(spec, source):
            faults.append(f"keeps '{kept[0]}' and declares no {source}")
    if "older_signal" in spec.kept and "computed_signal" not in spec.kept:
        faults.append("keeps 'older_signal' and not 'computed_signal'")
    if "older_signal" in spec.kept and spec.one_decision:
        faults.append("keeps 'older_signal', which is each branch's own, and decides for all")
    mix, history = found.mix, spec.history
    for kind in ("parameters", "state"):
        lacking = [n for n in getattr(mix, kind) if n not in getattr(spec, kind)]
        faults += [f"lacks '{n}' among its {kind}, which its mix declares" for n in lacking]
    faults += [
        f"lacks '{n}' in kept, which its mix declares" for n in mix.kept if n not in spec.kept
    ]
    if history != mix.history and mix.parameters:
        faults.append("spec.history is not its mix's")
    if "gram" in spec.kept and (history.parameter is not None or history.depth != history.maximum):
        faults.append(
            "keeps 'gram' and not all residuals, expected history.depth = history.maximum"
        )
    return faults + _config_faults(found.config, spec)


def _config_faults(config: type[CachingConfig] | None, spec: PolicySpec) -> list[str]:
    if config is None:
        taken = [n for n in spec.parameters if hasattr(CachingConfig, n)]
        taken += [n for n in spec.parameters if n in CachingConfig.model_fields]
        return [f"parameter '{n}' is called as something of every config" for n in taken]
    faults = []
    if config.policy != spec.name:
        faults.append(f"its config {config.__name__} is of policy '{config.policy}'")
    for key, parameter in config.keys.items():
        if key not in config.model_fields:
            faults.append(f"key '{key}' is no field of its config {config.__name__}")
        if parameter not in spec.parameters:
            faults.append(f"key '{key}' sets '{parameter}', which is not one of its parameters")
    return faults
