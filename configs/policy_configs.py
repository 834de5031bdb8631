# SPDX-License-Identifier: Apache-2.0
"""Caching configs by policy: one typed model per value of ``feature_caching``, and their table."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from .caching import CachingConfig, Fraction, NotNegative, Positive
from .errors import nearest
from .policy_spec import Value

__all__ = [
    "CACHING_CONFIGS",
    "CODEBOOKS",
    "Ada",
    "Custom",
    "Easy",
    "FirstBlock",
    "Mag",
    "NoCaching",
    "Solved",
    "TaylorSeer",
    "Tea",
]

Polynomial = Annotated[list[float], Field(max_length=6)]
CodebookRow = Annotated[tuple[NotNegative, Positive], Field(strict=False)]
Codebook = Annotated[list[CodebookRow], Field(min_length=1, max_length=8)]
SignalKind = Literal["temb", "timestep_proj", "modulated_input"]
Table = Annotated[list[NotNegative], Field(min_length=1, max_length=200)]
SOLVED_HISTORY = 6
"""Residuals that a row of a solved mix may use."""

MixRow = Annotated[list[float], Field(max_length=SOLVED_HISTORY)]
MixTable = Annotated[list[MixRow], Field(min_length=1, max_length=200)]

CODEBOOKS: dict[str, list[tuple[float, int]]] = {
    "steps_100": [(0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.0, 3)],
    "steps_30_fast": [(0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.4, 2), (1.0, 1)],
    "steps_30_slow": [(0.08, 3), (0.16, 2), (1.0, 1)],
}
"""AdaCache's published codebooks: upper bound of the feature's change → steps to the next
computation. Kahatapitiya et al. 2024, arXiv 2411.02397."""


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
    """TeaCache's decision with a first-order forecast of the residual.

    Attributes:
        trend: Share of the last trend that the forecast follows; 1, with ``trend_decay`` 1, is the
            published form.
        trend_decay: Factor on that share per step since the last computed one.
    """

    policy: ClassVar[str] = "custom"

    feature_caching: Literal["Custom"] = "Custom"
    trend: Fraction | None = None
    trend_decay: Fraction | None = None

    def _parameters(self) -> dict[str, Value]:
        return super()._parameters() | _given(trend=self.trend, trend_decay=self.trend_decay)


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


class Mag(CachingConfig):
    """MagCache: reuse while the residual's magnitude, known from a calibration, stays.

    Attributes:
        magcache_thresh: Accumulated error at which a step is computed; 0 never reuses.
        magcache_K: Reuses allowed in a row.
        magcache_retention: Fraction of the run that is computed at its start.
        magcache_ratios: Residual magnitude over that of the step before, one number per step of
            the calibration run; one table per branch, or one for all.
    """

    policy: ClassVar[str] = "magcache"

    feature_caching: Literal["Mag"] = "Mag"
    magcache_thresh: NotNegative | None = None
    magcache_K: Annotated[int, Field(ge=0)] | None = None  # noqa: N815 (LightX2V spells it so)
    magcache_retention: Fraction | None = None
    magcache_ratios: Table | dict[str, Table] | None = None

    def _parameters(self) -> dict[str, Value]:
        tables = self.magcache_ratios
        shared = _ratios(tables) if isinstance(tables, list) else {}
        return shared | _given(
            threshold=self.magcache_thresh,
            max_skip=self.magcache_K,
            retention=self.magcache_retention,
        )

    def _branches(self) -> dict[str, dict[str, Value]]:
        tables = self.magcache_ratios
        return {n: _ratios(t) for n, t in tables.items()} if isinstance(tables, dict) else {}


def _ratios(table: list[float]) -> dict[str, Value]:
    return {"steps": len(table), "ratios": table}


class Easy(CachingConfig):
    """EasyCache: reuse while the output's change, foretold from the input's, stays small.

    Attributes:
        easycache_thresh: Accumulated relative change at which a step is computed; 0 never reuses.
    """

    policy: ClassVar[str] = "easycache"

    feature_caching: Literal["Easy"] = "Easy"
    easycache_thresh: NotNegative | None = None

    def _parameters(self) -> dict[str, Value]:
        return _given(threshold=self.easycache_thresh)

    def _guard(self) -> dict[str, Any]:
        return {"first_exact": 7, "last_exact": 2}


class FirstBlock(CachingConfig):
    """First-Block Cache: run the first block always, reuse the others while its residual stays.

    Attributes:
        firstblock_thresh: Relative change at which a step is computed; 0 never reuses.
    """

    policy: ClassVar[str] = "firstblock"

    feature_caching: Literal["FirstBlock"] = "FirstBlock"
    firstblock_thresh: NotNegative | None = None

    def _parameters(self) -> dict[str, Value]:
        return _given(threshold=self.firstblock_thresh)


class Solved(CachingConfig):
    """A schedule and mixes computed offline, as `freewheel calibrate` writes them.

    Attributes:
        infer_steps: Steps the tables were made for; needed.
        mix: One row per step: up to 6 factors of past residuals, newest first, and an empty row for
            a computed step. One table per branch, or one for all.
        solved_from: What the tables were made from, for the reader: traces, guidance, error.
    """

    policy: ClassVar[str] = "solved"

    feature_caching: Literal["Solved"] = "Solved"
    mix: MixTable | dict[str, MixTable]
    solved_from: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Solved:
        tables = self.mix if isinstance(self.mix, dict) else {"": self.mix}
        for name, rows in tables.items():
            where = f"'mix.{name}'" if name else "'mix'"
            if len(rows) != self.infer_steps:
                raise ValueError(
                    f"one row in {where} for each of 'infer_steps' {self.infer_steps}, "
                    f"not {len(rows)}"
                )
            if rows[0]:
                raise ValueError(f"an empty first row in {where}: nothing can be reused yet")
        return self

    def _parameters(self) -> dict[str, Value]:
        return _solved(self.mix) if isinstance(self.mix, list) else {}

    def _branches(self) -> dict[str, dict[str, Value]]:
        return {n: _solved(t) for n, t in self.mix.items()} if isinstance(self.mix, dict) else {}


def _solved(rows: list[list[float]]) -> dict[str, Value]:
    """Return the policy's tables: a whole row of factors for every step, 1 and zeros where computed."""
    rest = [0.0] * SOLVED_HISTORY
    filled = [[*(row or [1.0]), *rest][:SOLVED_HISTORY] for row in rows]
    return {
        "steps": len(rows),
        "reuse": [int(bool(row)) for row in rows],
        "mix": [factor for row in filled for factor in row],
        "history": max(1, *(len(row) for row in rows)),
    }


def _given(**values: Value | None) -> dict[str, Value]:
    return {name: value for name, value in values.items() if value is not None}


CACHING_CONFIGS: dict[str, type[CachingConfig]] = {
    "NoCaching": NoCaching,
    "None": NoCaching,
    "Tea": Tea,
    "TaylorSeer": TaylorSeer,
    "Ada": Ada,
    "Custom": Custom,
    "Mag": Mag,
    "Easy": Easy,
    "FirstBlock": FirstBlock,
    "Solved": Solved,
}
"""``feature_caching`` → model of the file."""
