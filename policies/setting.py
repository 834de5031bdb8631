# SPDX-License-Identifier: Apache-2.0
"""A resolved cache setting: what a runtime is told to do, whatever file or flag it came from."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ..core.errors import ConfigError
from .promise import Promise, chosen_budget
from .spec import ParameterSpec, Value

__all__ = ["GUARD_PARAMETERS", "CacheSetting", "GuardSetting"]

Count = Annotated[int, Field(ge=0)]


class GuardSetting(BaseModel):
    """Limits that hold for every policy, declared here and nowhere else.

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
        min_psnr: Least PSNR in dB against the uncached run, for a policy that chooses its number of
            computed steps by it; None is no bound.
        promise: What numbers of computed steps keep, if it was measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str = "off"
    signal: str | None = None
    parameters: dict[str, Value] = {}
    branches: dict[str, dict[str, Value]] = {}
    guard: GuardSetting = GuardSetting()
    deadline: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    min_psnr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    promise: Promise | None = None

    def for_branch(self, name: str) -> CacheSetting:
        """Return the setting of one branch, its overrides among the parameters."""
        if not self.branches:
            return self
        own = {**self.parameters, **self.branches.get(name, {})}
        return self.model_copy(update={"parameters": own, "branches": {}})

    def every_branch(self) -> list[CacheSetting]:
        """Return the setting, and what it is in each branch that overrides it."""
        return [self, *(self.for_branch(name) for name in self.branches)]

    def keeping_bound(self) -> CacheSetting:
        """Return the setting with the fewest computed steps that keep ``min_psnr``, if it is given.

        Raises:
            ConfigError: nothing keeps it, or a deadline stands beside it.
        """
        if self.min_psnr is None:
            return self
        if self.deadline is not None:
            raise ConfigError(
                f"min_psnr {self.min_psnr:g}",
                "can't be kept beside a deadline, which may compute fewer steps",
                "give one of the two",
            )
        budgets = self.parameters.get("budgets", [])
        assert isinstance(budgets, list), "a list parameter"
        count = chosen_budget(self.promise, [int(b) for b in budgets], self.min_psnr)
        return self.model_copy(update={"parameters": {**self.parameters, "computed_steps": count}})
