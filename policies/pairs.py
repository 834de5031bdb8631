# SPDX-License-Identifier: Apache-2.0
"""Combine one policy's decisions with another one's mix: a policy like any other, with one graph."""

from __future__ import annotations

from typing import Literal, cast

from pydantic import create_model

from ..core.errors import ConfigError
from . import JOINT, sound_policies
from .base import HOLD, Mix, Policy
from .config import CachingConfig, annotation, config_model
from .spec import PolicySpec

__all__ = ["pair_of"]


def pair_of(decider: type[Policy], mixer: str, mix: Mix) -> type[Policy]:
    """Return the policy that decides as ``decider`` and mixes as ``mix``.

    Args:
        decider: Its decisions are taken, with what it declares for them.
        mixer: What the mix goes by.
        mix: Takes the place of the decider's own.

    Raises:
        ConfigError: the two can't go together, and why.
    """
    own = decider.spec
    name = f"{own.name}{JOINT}{mixer}"
    if reason := _obstacle(decider, mixer, mix):
        raise ConfigError(f"policy '{name}'", *reason)
    parameters = {n: p for n, p in own.parameters.items() if n not in decider.mix.parameters}
    state = {n: s for n, s in own.state.items() if n not in decider.mix.state}
    kept = [n for n in own.kept if n not in decider.mix.kept]
    taken = sorted({*parameters, *state} & {*mix.parameters, *mix.state})
    assert not taken, f"'{taken[0]}' is of the decision '{own.name}' and of the mix '{mixer}'"
    spec = PolicySpec(
        name=name,
        summary=f"decides as {own.name}, mixes as {mixer}",
        signals=own.signals or list(mix.signals),
        feature=own.feature,
        kept=[*kept, *(n for n in mix.kept if n not in kept)],
        one_decision=own.one_decision,
        history=mix.history,
        first_blocks=own.first_blocks,
        last_blocks=own.last_blocks,
        state={**state, **mix.state},
        parameters={**parameters, **mix.parameters},
        distance=own.distance,
        reference=own.reference,
    )
    body = {"__module__": decider.__module__, "__qualname__": name, "__doc__": spec.summary}
    laws = {"spec": spec, "mix": mix, "config": _config(decider, spec, mix)}
    return cast("type[Policy]", type(name, (decider,), {**body, **laws}))


def _obstacle(decider: type[Policy], mixer: str, mix: Mix) -> tuple[str, str] | None:
    """Say why decisions and mix can't go together, and what to do; None where they can."""
    spec = decider.spec
    alike = {n: p for n, p in sound_policies().items() if p.decide is decider.decide}
    same = next((n for n, p in alike.items() if p.mix is mix), None)
    if same is not None:
        return f"is '{same}' itself", f"name it '{same}'"
    first = next(iter(alike), spec.name)
    if first != spec.name:
        return f"decides as '{first}'", f"name it '{first}{JOINT}{mixer}'"
    if spec.history.parameter is None and spec.history.depth == 0:
        return f"has no step to mix: '{spec.name}' computes every one", "name another decision"
    if mix.bound:
        return f"can't take the mix of '{mixer}': {mix.bound}", "name another mix"
    if mix.signals and not set(spec.signals) <= set(mix.signals):
        return (
            f"needs two signals, and a policy is given one: the mix looks at "
            f"{' or '.join(mix.signals)}, the decision at {' or '.join(spec.signals)}",
            "name decisions that look at the mix's signal or at none, or another mix",
        )
    looks_at = [*mix.signals, *(n for n in mix.kept if n == "gram")]
    if spec.one_decision and looks_at:
        return (
            f"can't be: '{spec.name}' decides once for all branches, and the mix of '{mixer}' is "
            "each branch's own",
            "name a mix that looks at step numbers alone",
        )
    return None


def _config(decider: type[Policy], spec: PolicySpec, mix: Mix) -> type[CachingConfig] | None:
    """Return the decider's config with the mix's parameters by their names.

    Where the decider's keys are of its own mix too, all parameters go by their names. None takes
    the config that a spec alone makes.
    """
    if decider.config is None:
        return None
    if decider.mix is not HOLD:
        plain = config_model(spec)
        plain._guard = decider.config._guard  # type: ignore[method-assign]  # its exact steps stay
        return plain
    fields = {n: (annotation(p) | None, None) for n, p in mix.parameters.items()}
    model = create_model(
        f"{spec.name}_config",
        __base__=decider.config,
        __doc__=spec.summary,
        feature_caching=(Literal[spec.name], spec.name),
        **fields,  # type: ignore[call-overload]  # pydantic's overloads know no computed fields
    )
    model.policy = spec.name
    model.keys = {**decider.config.keys, **{n: n for n in mix.parameters}}
    return cast("type[CachingConfig]", model)
