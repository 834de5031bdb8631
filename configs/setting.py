# SPDX-License-Identifier: Apache-2.0
"""A resolved cache setting: what a runtime is told to do, whatever file or flag it came from."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from .policy_spec import Value

__all__ = ["CacheSetting", "GuardSetting"]

Count = Annotated[int, Field(ge=0)]


class GuardSetting(BaseModel):
    """Limits that hold for every policy (ALGORITHMS: guards).

    Attributes:
        first_exact: Steps computed at the start of a run.
        last_exact: Steps computed at the end of a run.
        max_consecutive: Reuses allowed in a row; 0 is no limit.
        max_reused: Reuses allowed in a run; 0 is no limit.
        exact_steps: Step indices that are always computed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    first_exact: Count = 1
    last_exact: Count = 0
    max_consecutive: Count = 0
    max_reused: Count = 0
    exact_steps: list[Count] = []


class CacheSetting(BaseModel):
    """A policy with its signal, parameters and guard; the form manifests carry and C++ reads.

    Attributes:
        policy: Name in the policy table.
        signal: Signal kind given to the policy; None takes the policy's first.
        parameters: Overrides of the policy's parameter defaults.
        branches: Overrides of ``parameters`` in single branches, by branch name.
        guard: Limits around the policy.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str = "off"
    signal: str | None = None
    parameters: dict[str, Value] = {}
    branches: dict[str, dict[str, Value]] = {}
    guard: GuardSetting = GuardSetting()

    def for_branch(self, name: str) -> CacheSetting:
        """Return the setting of one branch, its overrides among the parameters."""
        if not self.branches:
            return self
        own = {**self.parameters, **self.branches.get(name, {})}
        return self.model_copy(update={"parameters": own, "branches": {}})
