# SPDX-License-Identifier: Apache-2.0
"""Caching configs: typed models of the JSON files, told apart by ``feature_caching``.

Keys are spelled as LightX2V's caching configs spell them, so that such a file works unchanged;
what only steers that system's kernels and memory is accepted and named in ``ignored``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from .errors import ConfigError, nearest
from .policy_spec import Value
from .setting import CacheSetting, GuardSetting

__all__ = [
    "CACHING_CONFIGS",
    "CODEBOOKS",
    "Ada",
    "CachingConfig",
    "Custom",
    "NoCaching",
    "TaylorSeer",
    "Tea",
    "load_config",
    "parse_config",
    "shipped_configs",
]

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Polynomial = Annotated[list[float], Field(max_length=6)]
CodebookRow = Annotated[tuple[NotNegative, Positive], Field(strict=False)]
Codebook = Annotated[list[CodebookRow], Field(min_length=1, max_length=8)]
SignalKind = Literal["temb", "timestep_proj", "modulated_input"]

CODEBOOKS: dict[str, list[tuple[float, int]]] = {
    "steps_100": [(0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.0, 3)],
    "steps_30_fast": [(0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.4, 2), (1.0, 1)],
    "steps_30_slow": [(0.08, 3), (0.16, 2), (1.0, 1)],
}
"""AdaCache's published codebooks: upper bound of the feature's change → steps to the next
computation. Kahatapitiya et al. 2024, arXiv 2411.02397."""

IGNORED_KEYS = frozenset(
    {
        "_comment",
        "attention_type",
        "attn_type",
        "comment",
        "cpu_offload",
        "fps",
        "layer_norm_type",
        "lazy_load",
        "mm_config",
        "model_cls",
        "modulate_type",
        "num_channels_latents",
        "offload_granularity",
        "offload_ratio",
        "parallel",
        "patch_size",
        "rope_type",
        "target_fps",
        "task",
        "task_variant",
        "tokenizer_max_length",
        "transformer_model_name",
        "unload_modules",
        "use_compile",
        "use_image_encoder",
        "use_tiling_vae",
        "vae_scale_factor",
        "vae_stride",
        "video_duration",
    }
)
"""Keys of LightX2V's configs about kernels, memory and the model: settled here by `build`."""

IGNORED_FAMILIES = re.compile(
    r"(self|cross)_attn(_\d+)?_type|rms_(norm_)?type|attn_rms_norm_type|\w+_attn_setting"
    r"|\w+_(cpu_offload|quantized|quant_scheme|quantized_ckpt|original_ckpt)"
)
"""Families of such keys, one per module of the model."""


class CachingConfig(BaseModel):
    """What every caching config may say; subclasses add one policy's keys.

    None means "choose for me": the model's or the policy's own default.

    Attributes:
        feature_caching: Which policy; each subclass pins it.
        infer_steps: Denoise steps.
        target_video_length: Frames of the video.
        target_height: Pixels.
        target_width: Pixels.
        text_len: Tokens that prompts are padded to.
        sample_guide_scale: Guidance scale.
        sample_shift: Flow shift of the scheduler.
        enable_cfg: False runs the conditional branch only.
        seed: Seed of the initial noise.
        first_exact: Steps computed at the start of a run.
        last_exact: Steps computed at the end of a run.
        max_consecutive: Reuses allowed in a row; 0 is no limit.
        max_reused: Reuses allowed in a run; 0 is no limit.
        exact_steps: Step indices that are always computed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    policy: ClassVar[str]
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
    sample_guide_scale: float | None = None
    sample_shift: Annotated[float, Field(gt=0)] | None = None
    enable_cfg: bool | None = None
    seed: Count | None = None
    first_exact: Count | None = None
    last_exact: Count | None = None
    max_consecutive: Count | None = None
    max_reused: Count | None = None
    exact_steps: list[Count] | None = None

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

    def setting(self) -> CacheSetting:
        """Resolve to what a runtime is told to do."""
        given = {n: getattr(self, n) for n in GuardSetting.model_fields}
        guard = self._guard() | {n: v for n, v in given.items() if v is not None}
        return CacheSetting(
            policy=self.policy,
            signal=self._signal(),
            parameters=self._parameters(),
            guard=GuardSetting(**guard),
        )

    def _guard(self) -> dict[str, Any]:
        """Return the policy's own exact steps, where it has some."""
        return {}

    def _signal(self) -> str | None:
        return None

    def _parameters(self) -> dict[str, Value]:
        return {}


class NoCaching(CachingConfig):
    """Compute every step."""

    policy: ClassVar[str] = "off"

    feature_caching: Literal["NoCaching", "None"] = "NoCaching"


class _Accumulating(CachingConfig):
    """Keys of the policies that add up a signal's rescaled change.

    Attributes:
        teacache_thresh: Accumulated distance at which a step is computed; 0 never reuses.
        use_ret_steps: True takes the signal ``timestep_proj`` and computes the first 5 steps; False
            takes ``temb`` and computes the first and the last.
        coefficients: Rescaling polynomials, highest power first, as [[set for use_ret_steps true],
            [set for false]], or one set for both, alone or in a list.
        signal: Overrides the signal. One set of coefficients and no ``use_ret_steps``, the form of
            families other than Wan, takes ``modulated_input``.
    """

    foreign: ClassVar[frozenset[str]] = frozenset()

    teacache_thresh: NotNegative | None = None
    use_ret_steps: bool = False
    coefficients: list[Polynomial] | None = None
    signal: SignalKind | None = None

    @field_validator("coefficients", mode="before")
    @classmethod
    def _in_sets(cls, value: Any) -> Any:
        is_flat = isinstance(value, list) and value and not isinstance(value[0], list)
        return [value] if is_flat else value

    @field_validator("coefficients")
    @classmethod
    def _has_polynomial(
        cls, sets: list[list[float]] | None, info: ValidationInfo
    ) -> list[list[float]] | None:
        if sets is None:
            return None
        if len(sets) not in (1, 2):
            raise ValueError(f"[[set for ret steps], [plain set]] or one set, not {len(sets)}")
        if "use_ret_steps" in info.data and not _chosen(sets, info.data["use_ret_steps"]):
            wanted = str(info.data["use_ret_steps"]).lower()
            raise ValueError(f"coefficients in the set for 'use_ret_steps': {wanted}")
        return sets

    def _guard(self) -> dict[str, Any]:
        ends = (5, 0) if self.use_ret_steps else (1, 1)
        return dict(zip(("first_exact", "last_exact"), ends, strict=True))

    def _signal(self) -> str:
        if self.signal is not None:
            return self.signal
        is_one_set = self.coefficients is not None and len(self.coefficients) == 1
        if is_one_set and "use_ret_steps" not in self.model_fields_set:
            return "modulated_input"
        return "timestep_proj" if self.use_ret_steps else "temb"

    def _parameters(self) -> dict[str, Value]:
        sets = self.coefficients
        polynomial = None if sets is None else _chosen(sets, self.use_ret_steps)
        return _given(threshold=self.teacache_thresh, coefficients=polynomial)


def _chosen(sets: list[list[float]], use_ret_steps: bool) -> list[float]:
    return sets[0] if use_ret_steps or len(sets) == 1 else sets[1]


class Tea(_Accumulating):
    """TeaCache: reuse until the signal's rescaled change adds up to a threshold."""

    policy: ClassVar[str] = "teacache"

    feature_caching: Literal["Tea"] = "Tea"


class Custom(_Accumulating):
    """TeaCache's decision with a first-order forecast of the residual."""

    policy: ClassVar[str] = "custom"

    feature_caching: Literal["Custom"] = "Custom"


class TaylorSeer(CachingConfig):
    """Compute one step in ``interval``, forecast the others.

    Attributes:
        interval: Steps per computed step, the first being computed; 1 never reuses.
        order: Highest finite difference, 1 to 4.
        variant: ``taylor`` as published, ``newton`` for the interpolating polynomial.
    """

    policy: ClassVar[str] = "taylorseer"

    feature_caching: Literal["TaylorSeer"] = "TaylorSeer"
    interval: Positive | None = None
    order: Annotated[int, Field(ge=1, le=4)] | None = None
    variant: Literal["taylor", "newton"] | None = None

    def _parameters(self) -> dict[str, Value]:
        return _given(interval=self.interval, order=self.order, variant=self.variant)


class Ada(CachingConfig):
    """AdaCache: hold each residual for as long as a feature's rate of change allows.

    Attributes:
        codebook: Rows [upper bound of the change per step, steps to the next computation] in
            ascending order, up to 8; or the name of a published one (`CODEBOOKS`).
        scale_codebook: True multiplies the codebook's steps by infer_steps / 100.
        moreg_scale: Motion between latent frames at which regularisation is neutral.
        moreg_power: Exponent of the motion over ``moreg_scale``.
        moreg_first: Fraction of the run before which motion is ignored.
        moreg_last: Fraction of the run after which motion is ignored.
        mograd: Weight of the motion's growth per step.
    """

    policy: ClassVar[str] = "adacache"

    feature_caching: Literal["Ada"] = "Ada"
    codebook: Codebook | None = None
    scale_codebook: bool | None = None
    moreg_scale: Annotated[float, Field(ge=1e-6)] | None = None
    moreg_power: NotNegative | None = None
    moreg_first: Fraction | None = None
    moreg_last: Fraction | None = None
    mograd: NotNegative | None = None

    @field_validator("codebook", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in CODEBOOKS:
                hint = nearest(value, list(CODEBOOKS))
                raise ValueError(f"rows or the name of a codebook; {hint}")
            return CODEBOOKS[value]
        return value

    @field_validator("codebook")
    @classmethod
    def _is_ascending(cls, rows: list[CodebookRow] | None) -> list[CodebookRow] | None:
        bounds = [bound for bound, _ in rows or []]
        if bounds != sorted(set(bounds)):
            raise ValueError("rows in ascending order of their bounds")
        return rows

    def _parameters(self) -> dict[str, Value]:
        rows = self.codebook
        return _given(
            codebook_thresholds=None if rows is None else [bound for bound, _ in rows],
            codebook_skips=None if rows is None else [skip for _, skip in rows],
            scale_codebook=self.scale_codebook,
            moreg_scale=self.moreg_scale,
            moreg_power=self.moreg_power,
            moreg_first=self.moreg_first,
            moreg_last=self.moreg_last,
            mograd=self.mograd,
        )


CACHING_CONFIGS: dict[str, type[CachingConfig]] = {
    "NoCaching": NoCaching,
    "None": NoCaching,
    "Tea": Tea,
    "TaylorSeer": TaylorSeer,
    "Ada": Ada,
    "Custom": Custom,
}
"""``feature_caching`` → model of the file."""


def shipped_configs() -> dict[str, Path]:
    """Return the configs that come with the package: file stem → path, sorted by folder."""
    return {p.stem: p for p in sorted(Path(__file__).parent.rglob("*.json"))}


def load_config(path_or_name: str | Path) -> CachingConfig:
    """Read a caching config.

    Args:
        path_or_name: A JSON file; or a shipped config's stem, with or without its folder; or a
            policy's name, for its defaults.

    Raises:
        ConfigError: no such file or name, or a file with faults (all of them in one error).
    """
    text = str(path_or_name)
    by_policy = {c.policy: c for c in CACHING_CONFIGS.values()}
    if text in by_policy:
        config = by_policy[text].model_validate({})
        config._name = text
        return config
    shipped = shipped_configs()
    named = shipped | {f"{p.parent.name}/{stem}": p for stem, p in shipped.items()}
    path = Path(text)
    if not path.exists() and text.removesuffix(".json") in named:
        path = named[text.removesuffix(".json")]
    is_path = isinstance(path_or_name, Path) or path.exists() or path.suffix == ".json"
    if not is_path:
        raise ConfigError(
            f"caching config '{text}'",
            "is neither a file, nor a shipped config, nor a policy",
            nearest(text, [*by_policy, *shipped]),
        )
    return parse_config(_read(path), where=str(path), name=path.stem)


def parse_config(data: Mapping[str, Any], *, where: str, name: str = "") -> CachingConfig:
    """Check a config that was read from JSON.

    Args:
        data: Its keys and values.
        where: The file, for messages.
        name: What the config is to go by.

    Raises:
        ConfigError: unknown policy or key, wrong type or range; every fault of the file.
    """
    model, faults = _model_of(data)
    ignored = [key for key in data if _is_ignored(key, model)]
    kept = {key: value for key, value in data.items() if key not in ignored}
    try:
        config = model.model_validate(kept)
    except ValidationError as error:
        faults += [_fault(e, model) for e in error.errors() if e["loc"] != ("feature_caching",)]
        raise ConfigError(where, _listed(faults), "correct these keys") from error
    if faults:
        raise ConfigError(where, _listed(faults), "correct these keys")
    config._name, config._ignored = name or config.policy, tuple(ignored)
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise ConfigError(
            str(path), f"can't be read: {error.strerror}", "give an existing JSON file"
        ) from error
    except ValueError as error:
        raise ConfigError(str(path), f"is not JSON: {error}", "correct the file") from error
    if not isinstance(data, dict):
        raise ConfigError(str(path), f"expected a JSON object, found {_shown(data)}")
    return data


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"key '{twice[0]}' stands twice")
    return dict(pairs)


def _model_of(data: Mapping[str, Any]) -> tuple[type[CachingConfig], list[str]]:
    """Pick the model; with an unknown policy, one that can still check the common keys."""
    known = list(CACHING_CONFIGS)
    if "feature_caching" not in data:
        return _AnyPolicy, [f"'feature_caching': missing, expected one of {', '.join(known)}"]
    kind = data["feature_caching"]
    if isinstance(kind, str) and kind in CACHING_CONFIGS:
        return CACHING_CONFIGS[kind], []
    hint = nearest(kind, known) if isinstance(kind, str) else f"known: {', '.join(known)}"
    return _AnyPolicy, [f"'feature_caching': found {_shown(kind)}, no such policy; {hint}"]


class _AnyPolicy(CachingConfig):
    """Stand-in for a policy that is not known: checks the common keys, lets the others pass."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    feature_caching: Any = None


def _is_ignored(key: str, model: type[CachingConfig]) -> bool:
    if key in model.model_fields:
        return False
    return key in IGNORED_KEYS or key in model.foreign or bool(IGNORED_FAMILIES.fullmatch(key))


def _fault(error: Mapping[str, Any], model: type[CachingConfig]) -> str:
    """Say field path, found value and expectation of one of pydantic's errors."""
    path = _path(error["loc"])
    if error["type"] == "extra_forbidden":
        owners = [kind for kind, m in CACHING_CONFIGS.items() if path in m.model_fields]
        if owners:
            return f"'{path}': is a key of {' and '.join(owners)}, not of {model.__name__}"
        return f"'{path}': is not a known key; {nearest(path, list(model.model_fields))}"
    expected = str(error["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    if error["type"] == "too_long":
        expected = f"at most {error['ctx']['max_length']} values"
    if not path:
        return f"expected {expected}"
    return f"'{path}': found {_shown(error['input'])}, expected {expected}"


def _path(location: Iterable[int | str]) -> str:
    """Write ``("coefficients", "list[…]", 1, 0)`` as ``coefficients[1][0]``."""
    parts = [p for p in location if isinstance(p, int) or re.fullmatch(r"\w+", p)]
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts).removeprefix(".")


def _shown(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, str | int | float | bool | None) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(faults: list[str]) -> str:
    return faults[0] if len(faults) == 1 else f"{len(faults)} faults: " + "; ".join(faults)


def _given(**values: Value | None) -> dict[str, Value]:
    return {name: value for name, value in values.items() if value is not None}
