# SPDX-License-Identifier: Apache-2.0
"""DiCache: let the first block tell when to compute, and how far the residual has gone since."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Decision, Mix, Mixed, Policy, Step, hold, relative_change, reuse_below
from .spec import HistorySpec, ParameterSpec, PolicySpec, StateSpec

__all__ = ["ALIGNED", "DiCache"]

PROBE = "first_block_residual"
MEASURES = ["distance", "projection"]
"""How far the probe has gone: by mean absolute differences, or along the way between computed steps."""


def _aligned(
    step: Step,
    signal: Tensor,
    kept: dict[str, Tensor],
    state: dict[str, Tensor],
    parameters: dict[str, Tensor],
) -> Mixed:
    """Mix the last two residuals in the proportion in which the probe lies to theirs.

    With ρ the probe of this step, ρ_s and ρ_p those of the last two computed steps,
    ``γ = mean|ρ − ρ_p| / mean|ρ_s − ρ_p|``, or ``⟨ρ − ρ_p, ρ_s − ρ_p⟩ / ‖ρ_s − ρ_p‖²``, between 1 and
    ``farthest_gain``, and ``mix = [γ, 1 − γ]``; holds where there is one residual or the probe stood.
    """
    older = kept["older_signal"]
    way, gone = kept["computed_signal"] - older, signal - older
    apart = gone.abs().mean() / way.abs().mean()
    along = (gone * way).mean() / way.square().mean()
    measured = torch.where(parameters["measure"] == MEASURES.index("projection"), along, apart)
    gain = torch.minimum(measured.clamp(min=1.0), parameters["farthest_gain"])
    is_known = (step.computed_steps[1] >= 0) & (way.square().mean() > 0)
    held = hold(step)
    moved = held - torch.roll(held, 1)
    return Mixed(torch.where(is_known, held + (gain - 1) * moved, held), {})


ALIGNED = Mix(
    law=_aligned,
    history=HistorySpec(maximum=2, depth=2),
    signals=(PROBE,),
    kept=("computed_signal", "older_signal"),
    parameters={
        "measure": ParameterSpec(
            default="distance",
            dtype="int64",
            choices=MEASURES,
            meaning="how far the probe has gone since the last computed step but one",
        ),
        "farthest_gain": ParameterSpec(
            default=1.5,
            minimum=1.0,
            meaning="bound of the last residual's factor, >= 1; 1 holds",
        ),
    },
    tolerance=1e-5,  # ends two means over a signal
)


class DiCache(Policy):
    """Reuse while the change of the first block's residual adds up to less than a threshold.

    The signal asks the session for a probe, as `FirstBlock`'s does: the first block runs before the
    decision, on computed steps the others follow it.

    Reference: Bu et al. 2025, DiCache, arXiv 2508.17356, online probe profiling and dynamic cache
        trajectory alignment; bounds of γ as in its authors' code.

    Differs: the probe is one block deep, the authors' default of 1 to 5.
    Differs: compared from step to step is what the first block adds, the authors' states are that
        and the input; it changes more, so thresholds are others.
    Differs: what is cached is what the blocks after the probe add, the authors' residual is of all.
    Differs: ``measure: projection`` takes the part of the way that the probe went along.
    """

    mix = ALIGNED
    spec = PolicySpec(
        name="dicache",
        summary="runs the first block always; its change decides, and says how far to extrapolate",
        signals=[PROBE],
        kept=["previous_signal", "computed_signal", "older_signal"],
        history=ALIGNED.history,
        state={"distance": StateSpec()},
        parameters={
            "threshold": ParameterSpec(
                default=0.4,
                minimum=0.0,
                meaning="accumulated relative change of the first block's residual at which a step"
                " is computed, >= 0; 0 never reuses",
            ),
            "retention": ParameterSpec(
                default=0.2,
                minimum=0.0,
                maximum=1.0,
                meaning="fraction of the run that is computed at its start, 0 to 1",
            ),
            **ALIGNED.parameters,
        },
        distance="distance",
        reference="Bu et al. 2025, DiCache, arXiv 2508.17356",
    )

    def decide(
        self,
        step: Step,
        signal: Tensor,
        feature: Tensor,
        kept: dict[str, Tensor],
        state: dict[str, Tensor],
        parameters: dict[str, Tensor],
    ) -> Decision:
        """Decide from the accumulated change; see `Policy.decide`."""
        distance = state["distance"] + relative_change(signal, kept["previous_signal"])
        retained = torch.floor(step.step_count.to(torch.float32) * parameters["retention"])
        is_early = step.step_index <= retained.to(torch.int64)
        is_last = step.step_index == step.step_count - 1
        must_compute = step.must_compute | is_early | is_last
        return reuse_below(must_compute, distance, parameters["threshold"])
