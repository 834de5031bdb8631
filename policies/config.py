# SPDX-License-Identifier: Apache-2.0
"""What every caching config may say, whatever its policy.

Keys are spelled as LightX2V's caching configs spell them, so that such a file works unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, cast, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    create_model,
    model_validator,
)

from ..core.limits import LARGEST_SEED
from .setting import CacheSetting, GuardSetting
from .spec import ParameterSpec, PolicySpec, Value

__all__ = [
    "ALL",
    "BRANCHES",
    "PER_BRANCH",
    "CachingConfig",
    "Count",
    "Positive",
    "annotation",
    "config_model",
]

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Level = Annotated[float, Field(gt=0, le=1000)]

ALL, BRANCHES = "[all]", "[branches]"
"""Tags of a key that takes one table for all branches, or one per branch by name."""

PER_BRANCH = Discriminator(lambda value: BRANCHES if isinstance(value, dict) else ALL)
"""Tells the two apart, so that a fault is reported of the form that was meant alone."""


def _guard_keys() -> Any:
    """Return a model of the guard's limits, as keys that a file may leave out."""
    hints = get_type_hints(GuardSetting, include_extras=True)
    fields: dict[str, Any] = {n: (hints[n] | None, None) for n in GuardSetting.model_fields}
    return create_model("GuardKeys", **fields)


if TYPE_CHECKING:
    GuardKeys = BaseModel  # a checker knows no computed fields
else:
    GuardKeys = _guard_keys()


class CachingConfig(GuardKeys):
    """What every caching config may say, the guard's limits included; subclasses add one policy's keys.

    None means "choose for me": the model's or the policy's own default.

    Attributes:
        feature_caching: Which policy; each subclass pins it.
        infer_steps: Denoise steps.
        target_video_length: Frames of the video.
        target_height: Pixels.
        target_width: Pixels.
        text_len: Tokens that prompts are padded to.
        sample_guide_scale: Guidance scale; two are of two experts.
        sample_shift: Flow shift of the scheduler.
        enable_cfg: False runs the conditional branch only.
        seed: Seed of the initial noise.
        sampler: Which one denoises; None is the pipeline's own.
        denoising_step_list: Timesteps of 1000 before the shift, falling, that Euler runs through:
            those that a distilled model was trained at.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    policy: ClassVar[str]
    """Name in the policy table."""

    keys: ClassVar[Mapping[str, str]] = {}
    """Config key → the parameter that takes its value as it stands."""

    foreign: ClassVar[frozenset[str]] = frozenset(
        {"coefficients", "use_ret_steps", "teacache_thresh"}
    )
    """LightX2V keys of other policies, which its files carry along; ignored, and named."""

    feature_caching: str
    infer_steps: Positive | None = None
    target_video_length: Positive | None = None
    target_height: Positive | None = None
    target_width: Positive | None = None
    text_len: Positive | None = None
    sample_guide_scale: float | Annotated[list[float], Field(min_length=2, max_length=2)] | None = (
        None
    )
    sample_shift: Annotated[float, Field(gt=0)] | None = None
    enable_cfg: bool | None = None
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = None
    sampler: str | None = None
    denoising_step_list: Annotated[list[Level], Field(min_length=1)] | None = None

    _name: str = PrivateAttr("")
    _ignored: tuple[str, ...] = PrivateAttr(())

    @property
    def name(self) -> str:
        """Return what the config goes by: its file's stem, or its policy's name."""
        return self._name

    @property
    def ignored(self) -> tuple[str, ...]:
        """Return the keys that were accepted and mean nothing here, in the file's order."""
        return self._ignored

    @classmethod
    def of_policy(cls) -> Self:
        """Return the config that the policy's bare name stands for: its defaults.

        Raises:
            pydantic.ValidationError: a key without default, such as a calibration's tables.
        """
        return cls.model_validate({})

    @model_validator(mode="after")
    def _says_it_once(self) -> Self:
        owners: dict[str, str] = {}
        for key in (k for k in self.keys if getattr(self, k) is not None):
            first = owners.setdefault(self.keys[key], key)
            if first != key:
                raise ValueError(f"one of '{first}' and '{key}', which say the same")
        return self

    @model_validator(mode="after")
    def _steps_can_be_run_through(self) -> Self:
        steps = self.denoising_step_list
        if steps is None:
            return self
        if any(a <= b for a, b in pairwise(steps)):
            raise ValueError(f"'denoising_step_list' to fall from step to step, not {steps}")
        if self.sampler is not None:
            raise ValueError("one of 'sampler' and 'denoising_step_list', which names its own")
        if self.infer_steps not in (None, len(steps)):
            raise ValueError(f"'infer_steps' {len(steps)}, as 'denoising_step_list' has")
        return self

    def setting(self) -> CacheSetting:
        """Resolve to what a runtime is told to do."""
        given = {n: getattr(self, n) for n in GuardSetting.model_fields}
        guard = self._guard() | {n: v for n, v in given.items() if v is not None}
        return CacheSetting(
            policy=self.policy,
            signal=self._signal(),
            parameters=self._parameters(),
            branches=self._branches(),
            guard=GuardSetting(**guard),
        )

    def _guard(self) -> dict[str, Any]:
        """Return the policy's own exact steps, where it has some."""
        return {}

    def _signal(self) -> str | None:
        return None

    def _parameters(self) -> dict[str, Value]:
        given = {key: getattr(self, key) for key in self.keys}
        return {self.keys[key]: value for key, value in given.items() if value is not None}

    def _branches(self) -> dict[str, dict[str, Value]]:
        return {}


def config_model(spec: PolicySpec) -> type[CachingConfig]:
    """Make the config of a policy that declares none: its name, and its parameters by their names.

    Args:
        spec: The policy's declaration; no parameter is called as something that every config has.
    """
    fields = {n: (annotation(p) | None, None) for n, p in spec.parameters.items()}
    model = create_model(
        f"{spec.name}_config",
        __base__=CachingConfig,
        __doc__=spec.summary,
        feature_caching=(Literal[spec.name], spec.name),
        **fields,  # type: ignore[call-overload]  # pydantic's overloads know no computed fields
    )
    model.policy, model.keys = spec.name, {n: n for n in spec.parameters}
    return cast("type[CachingConfig]", model)


def annotation(spec: ParameterSpec) -> Any:
    """Return the type that a parameter's key has in a model of configs, its range included."""
    kind = {"float32": float, "int64": int, "bool": bool}[spec.dtype]
    if spec.choices is not None:
        return Annotated[str, spec.check]
    element = kind if spec.dtype == "bool" else Annotated[kind, spec.check]
    return Annotated[list[element], spec.length] if spec.shape else element  # type: ignore[valid-type]  # made here
