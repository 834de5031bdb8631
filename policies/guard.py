# SPDX-License-Identifier: Apache-2.0
"""The guard around every policy, in the same graph: what is exported, compiled and run.

Inputs and outputs are flat, dotted names, the same for the eager module and for the compiled
graph, so whatever drives one drives the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Policy, Step
from .deadline import Pace
from .setting import GUARD_PARAMETERS
from .spec import GUARD_STATE, PolicySpec

__all__ = ["Guarded", "Shape", "decide_inputs", "decide_outputs"]

Shape = tuple[int | str, ...]

SIGNAL: Shape = ("rows", "width")
FEATURE: Shape = ("frames", "tokens_per_frame", "channels")


def decide_inputs(spec: PolicySpec) -> dict[str, tuple[str, Shape]]:
    """Return every input of a policy's decide graph: name → dtype and shape, dynamic sizes named.

    ``step_index``, ``step_count``, ``computed_steps``, ``exact``, ``timestep``, ``sigma``,
    ``computed_timesteps``, ``computed_sigmas``, ``seconds_left``, ``computed_seconds``,
    ``reused_seconds``, then what the policy declares of ``signal``, ``feature`` and their past
    (``kept``), then ``state.<name>``, ``param.<name>``, ``guard.<name>`` (the guard's parameters)
    and ``guard_state.<name>``.
    """
    inputs: dict[str, tuple[str, Shape]] = {
        "step_index": ("int64", ()),
        "step_count": ("int64", ()),
        "computed_steps": ("int64", (spec.history.maximum,)),
        "exact": ("bool", ()),
        "timestep": ("float32", ()),
        "sigma": ("float32", ()),
        "computed_timesteps": ("float32", (spec.history.maximum,)),
        "computed_sigmas": ("float32", (spec.history.maximum,)),
        **dict.fromkeys(Pace._fields, ("float32", ())),
    }
    if spec.signals:
        inputs["signal"] = ("float32", SIGNAL)
    if spec.feature:
        inputs["feature"] = ("float32", FEATURE)
    shapes = {"previous_feature": FEATURE, "gram": (spec.history.maximum,) * 2}
    for name in spec.kept:
        inputs[name] = ("float32", shapes.get(name, SIGNAL))
    inputs |= {f"state.{n}": (s.dtype, tuple(s.shape)) for n, s in spec.state.items()}
    inputs |= {f"param.{n}": (p.dtype, tuple(p.shape)) for n, p in spec.parameters.items()}
    inputs |= {f"guard.{n}": (p.dtype, tuple(p.shape)) for n, p in GUARD_PARAMETERS.items()}
    inputs |= {f"guard_state.{n}": (s.dtype, tuple(s.shape)) for n, s in GUARD_STATE.items()}
    return inputs


def decide_outputs(spec: PolicySpec) -> dict[str, tuple[str, Shape]]:
    """Return every output of a policy's decide graph: name → dtype and shape."""
    outputs: dict[str, tuple[str, Shape]] = {
        "compute": ("bool", ()),
        "mix": ("float32", (spec.history.maximum,)),
    }
    outputs |= {f"new_state.{n}": (s.dtype, tuple(s.shape)) for n, s in spec.state.items()}
    outputs |= {f"new_guard_state.{n}": (s.dtype, tuple(s.shape)) for n, s in GUARD_STATE.items()}
    return outputs


class Guarded(torch.nn.Module):
    """A policy inside the limits that hold for every policy.

    Computes, whatever the law says, where the session demands it, in the first and last exact
    steps, at the limits of consecutive and total reuses, before a residual exists, and where the
    signal, the mix or the law's state is not finite. A mix or state that is not finite also puts
    the law's whole state back to its initial values: it starts over from a computed step.

    Args:
        policy: The law; holds no state of its own.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.spec = policy.spec

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Decide about one step of one branch.

        Args:
            inputs: What `decide_inputs` names; further entries are ignored. ``exact`` says that
                the session wants this step computed.

        Returns:
            What `decide_outputs` names.
        """
        signal = inputs.get("signal", torch.zeros(1, 1))
        feature = inputs.get("feature", torch.zeros(1, 1, 1))
        limits, guard_state = _group(inputs, "guard."), _group(inputs, "guard_state.")
        must = self._must_compute(inputs, limits, guard_state)
        if self.spec.signals:
            must = must | ~torch.isfinite(signal.abs().mean())

        known = {name: inputs[name] for name in Step._fields if name != "must_compute"}
        step = Step(must_compute=must, **known)
        kept: dict[str, Tensor] = {name: inputs[name] for name in self.spec.kept}
        state, parameters = _group(inputs, "state."), _group(inputs, "param.")
        decision = self.policy.decide(step, signal, feature, kept, state, parameters)
        mixed = self.policy.mix.law(step, signal, kept, state, parameters)
        new_state = {**decision.state, **mixed.state}

        is_sound = torch.isfinite(mixed.mix).all()
        for name, declared in self.spec.state.items():
            if declared.dtype == "float32":
                is_sound = is_sound & torch.isfinite(new_state[name]).all()
        compute = must | decision.compute | ~is_sound
        has_residual = inputs["computed_steps"][0] >= 0
        outputs = {
            "compute": compute,
            "mix": torch.where(is_sound & has_residual, mixed.mix, 0.0),
        }
        for name, declared in self.spec.state.items():
            outputs[f"new_state.{name}"] = _or_initial(is_sound, new_state[name], declared.initial)
        consecutive = torch.where(compute, 0, guard_state["consecutive"] + 1)
        outputs["new_guard_state.consecutive"] = consecutive
        outputs["new_guard_state.reused"] = guard_state["reused"] + (~compute).to(torch.int64)
        return outputs

    def _must_compute(
        self, inputs: Mapping[str, Tensor], limits: dict[str, Tensor], state: dict[str, Tensor]
    ) -> Tensor:
        index, count = inputs["step_index"], inputs["step_count"]
        in_a_row, in_all = limits["max_consecutive"], limits["max_reused"]
        return (
            inputs["exact"]
            | (inputs["computed_steps"][0] < 0)
            | (index < limits["first_exact"])
            | (index >= count - limits["last_exact"])
            | ((in_a_row > 0) & (state["consecutive"] >= in_a_row))
            | ((in_all > 0) & (state["reused"] >= in_all))
        )


def _or_initial(is_sound: Tensor, state: Tensor, initial: float) -> Tensor:
    if state.dtype == torch.bool:
        # ONNX Runtime has no Where over booleans.
        return (state & is_sound) | ~is_sound if initial else state & is_sound
    return torch.where(is_sound, state, torch.full_like(state, initial))


def _group(inputs: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in inputs.items() if n.startswith(prefix)}
