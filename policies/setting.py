# SPDX-License-Identifier: Apache-2.0
"""A resolved cache setting: what a runtime is told to do, whatever file or flag it came from."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from .spec import ParameterSpec, Value

__all__ = ["GUARD_PARAMETERS", "CacheSetting", "GuardSetting"]

Count = Annotated[int, Field(ge=0)]


class GuardSetting(BaseModel):
    """Limits that hold for every policy (ALGORITHMS: guards), declared here and nowhere else.

    Config files have a key for each, decide graphs an input for each number; manifests carry them
    with their defaults, from which C++ has them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    first_exact: Count = Field(default=1, description="steps computed at the start of a run, >= 0")
    last_exact: Count = Field(default=0, description="steps computed at the end of a run, >= 0")
    max_consecutive: Count = Field(default=0, description="reuses allowed in a row; 0 is no limit")
    max_reused: Count = Field(default=0, description="reuses allowed in a run; 0 is no limit")
    exact_steps: list[Count] = Field(
        default=[], description="step indices that are always computed"
    )


GUARD_PARAMETERS: dict[str, ParameterSpec] = {
    name: ParameterSpec(
        default=field.default, dtype="int64", minimum=0, meaning=field.description or ""
    )
    for name, field in GuardSetting.model_fields.items()
    if name != "exact_steps"
}
"""Runtime inputs ``guard.<name>`` of every decide graph: the numbers of `GuardSetting`."""


class CacheSetting(BaseModel):
    """A policy with its signal, parameters and guard; the form manifests carry and C++ reads.

    Attributes:
        policy: Name in the policy table.
        signal: Signal kind given to the policy; None takes the policy's first.
        parameters: Overrides of the policy's parameter defaults.
        branches: Overrides of ``parameters`` in single branches, by branch name.
        guard: Limits around the policy.
        deadline: Seconds that the denoise loop may take, for a policy that chooses its number of
            computed steps by them; None is no deadline.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str = "off"
    signal: str | None = None
    parameters: dict[str, Value] = {}
    branches: dict[str, dict[str, Value]] = {}
    guard: GuardSetting = GuardSetting()
    deadline: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    def for_branch(self, name: str) -> CacheSetting:
        """Return the setting of one branch, its overrides among the parameters."""
        if not self.branches:
            return self
        own = {**self.parameters, **self.branches.get(name, {})}
        return self.model_copy(update={"parameters": own, "branches": {}})
