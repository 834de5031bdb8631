# SPDX-License-Identifier: Apache-2.0
"""A suite of recorded runs on which every policy can be ranked in about a minute, without the model.

A replay on one uncached run counts how far each reused residual is off. A real run also drifts: its
samples leave the uncached trajectory, and the model answers them otherwise. So here the *sampler* is
replayed. With d the drift of the sample, L the linear map from a residual's change to the model
output's, and mixes m over residuals held of steps s, the output of step t is off by

    computed   G_t d_t
    reused     L_t(Σ m_s · r_s − r_t) + P_t d_t + Σ m_s · (G_s − P_s) d_s

where G is the answer of the whole model to a moved sample, and P that of its ends around a residual
that stays. Both are known for the drifts of some recorded cached runs of the same prompt; a drift is
taken apart into these by least squares, and what is left over answers as they do along themselves on
average. The sampler's own recurrence carries d on. All of it is linear, so a sample of the output's
elements is enough. Decisions are the policies' own, over sampled tokens of the recorded signals.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.sampler_table import SamplerTable
from ..core.errors import RequestError
from ..core.output import replaced_whole
from ..policies import policy as find_policy
from ..policies.setting import CacheSetting
from .replay import Replay, replay
from .trace import Trace

__all__ = ["Foretold", "RecordedSample", "Suite", "load_suite"]

Array = NDArray[np.float32]

LONGEST_LAG = 24
"""Steps back that a residual's effect is kept for; an older one counts as the oldest kept."""

TABLED = ("temb", "timestep_proj")
"""Signals that are the same for all prompts: what is decided by them is decided once."""

RIDGE = 1e-2
"""Pull of a drift's parts towards none, relative to the square of each recorded drift."""

FLOOR_DB = -100.0
"""Distance of samples that are equal."""


@dataclass(frozen=True)
class _Parts:
    """A drift by recorded ones: which are not zero, their sizes and directions, factors, the rest."""

    known: NDArray[np.bool_]
    sizes: NDArray[np.float64]
    units: NDArray[np.float64]
    factors: NDArray[np.float64]
    rest: NDArray[np.float64]


@dataclass(frozen=True)
class RecordedSample:
    """One recorded run of the suite.

    Attributes:
        trace: What policies look at, of sampled tokens.
        moves: Per branch [steps, LONGEST_LAG + 1, elements]: L_t(r_t), then L_t(r_{t − lag} − r_t).
        drifts: [steps, cached runs, elements]: how far each recorded cached run's sample was off.
        answers: Per branch [steps, cached runs, 2, elements]: G and P of the module's docstring,
            applied to these.
        size: Mean square of the final sample.
    """

    trace: Trace
    moves: Mapping[str, Array]
    drifts: Array
    answers: Mapping[str, Array]
    size: float

    def parts(self, step: int, drift: NDArray[np.float64]) -> _Parts:
        """Take a drift apart into those of the recorded cached runs."""
        recorded = self.drifts[step].astype(np.float64)
        sizes = np.sqrt(np.square(recorded).sum(1))
        known = sizes > 0
        units = recorded[known] / sizes[known, None]
        gram = units @ units.T + RIDGE * np.eye(len(units))
        factors = np.linalg.solve(gram, units @ drift)
        return _Parts(known, sizes[known], units, factors, drift - factors @ units)

    def answer(self, branch: str, step: int, parts: _Parts) -> NDArray[np.float64]:
        """Return G d and P d of a drift, [2, elements]."""
        known = self.answers[branch][step][parts.known] / parts.sizes[:, None, None]
        along = np.einsum("kie,ke->i", known, parts.units) / max(len(known), 1)
        found = np.einsum("k,kie->ie", parts.factors, known) + along[:, None] * parts.rest
        return np.asarray(found, dtype=np.float64)


@dataclass(frozen=True)
class Foretold:
    """What the suite tells of one setting.

    Attributes:
        computed_steps: Mean over runs.
        distances: Of each run's final sample from the uncached one, dB; lower is nearer.
    """

    computed_steps: float
    distances: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean distance of all runs, dB."""
        return float(np.mean(self.distances))

    @property
    def worst(self) -> float:
        """Distance of the farthest run, dB."""
        return max(self.distances)


@dataclass(frozen=True)
class Suite:
    """Recorded runs, and how the model answers a moved sample.

    Attributes:
        about: Checkpoint, steps, guidance and prompts.
        runs: The runs, all of one length.
        table: The sampler.
        guidance: Factor of each branch's output in the guided one.
    """

    about: Mapping[str, Any]
    runs: Sequence[RecordedSample]
    table: SamplerTable
    guidance: Mapping[str, float]

    @property
    def steps(self) -> int:
        """Steps of every run."""
        return len(self.table.timesteps)

    def foretell(
        self, setting: CacheSetting, done: Callable[[int], None] = lambda run: None
    ) -> Foretold:
        """Replay a setting on every run, decisions and sampler.

        Args:
            setting: Policy, parameters, guard.
            done: Told of each run.

        Raises:
            ConfigError, RequestError: as of `replay`.
        """
        distances, counts = [], []
        spec = find_policy(setting.policy).spec
        signal = spec.signal_of(setting.signal, spec.signals)
        is_folded = spec.content is None and signal in (None, *TABLED)
        known = replay(self.runs[0].trace, setting) if is_folded else None
        for index, run in enumerate(self.runs):
            taken = known or replay(run.trace, setting)
            distances.append(self._distance(run, taken))
            counts.append(float(taken.computed_steps))
            done(index)
        return Foretold(float(np.mean(counts)), tuple(distances))

    def _distance(self, run: RecordedSample, taken: Replay) -> float:
        """Return how far the final sample drifts, in dB of the uncached sample's mean square."""
        elements = next(iter(run.moves.values())).shape[-1]
        drift = np.zeros((self.steps + 1, elements))
        errors = np.zeros((self.steps, elements))
        moved: dict[tuple[str, int], NDArray[np.float64]] = {}
        for step in range(self.steps):
            parts = run.parts(step, drift[step])
            for branch, factor in self.guidance.items():
                whole, ends = run.answer(branch, step, parts)
                moved[branch, step] = whole - ends
                decided = taken.branches[branch]
                if decided.computed[step]:
                    errors[step] += factor * whole
                    continue
                held = [s for s in range(step - 1, -1, -1) if decided.computed[s]]
                mix, moves = decided.mix[step], run.moves[branch][step]
                errors[step] += factor * ((sum(mix) - 1) * moves[0] + ends)
                for share, past in zip(mix, held, strict=False):
                    lag = min(step - past, LONGEST_LAG)
                    errors[step] += factor * share * (moves[lag] + moved[branch, past])
            for age in range(min(self.table.window, step + 1)):
                drift[step + 1] += self.table.a[step, age] * drift[step - age]
                drift[step + 1] += self.table.b[step, age] * errors[step - age]
        apart = float(np.square(drift[-1]).mean())
        return max(FLOOR_DB, 10 * float(np.log10(apart / run.size))) if apart else FLOOR_DB

    def save(self, path: Path) -> None:
        """Write the suite as one compressed npz of float16, whole or not at all.

        What all runs share is written once.

        Raises:
            OutputError: it can't be written.
        """
        about = {**self.about, "guidance": dict(self.guidance), "runs": len(self.runs)}
        shared, own = _shared([run.trace.arrays for run in self.runs])
        arrays = {
            "about": np.array(json.dumps(about)),
            "table": self.table.packed(),
            "sizes": np.array([run.size for run in self.runs]),
            **{f"shared/{name}": _small(array) for name, array in shared.items()},
        }
        for index, (run, rest) in enumerate(zip(self.runs, own, strict=True)):
            arrays |= {f"run/{index}/trace/{name}": _small(a) for name, a in rest.items()}
            arrays |= {f"run/{index}/moves/{name}": _small(a) for name, a in run.moves.items()}
            arrays |= {f"run/{index}/answers/{name}": _small(a) for name, a in run.answers.items()}
            arrays[f"run/{index}/drifts"] = _small(run.drifts)
        with (
            replaced_whole(path, "choose another --suite") as partial,
            partial.open("wb") as stream,
        ):
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]  # numpy types it as bool


def _small(array: NDArray[Any]) -> NDArray[Any]:
    is_large = array.dtype == np.float32 and array.size > 1024
    return array.astype(np.float16) if is_large else array


def _shared(
    traces: Sequence[Mapping[str, NDArray[Any]]],
) -> tuple[dict[str, NDArray[Any]], list[dict[str, NDArray[Any]]]]:
    """Return the arrays that all traces have alike, and what each has beside them."""
    first, *others = traces
    shared = {
        name: array
        for name, array in first.items()
        if others and all(name in t and _are_equal(t[name], array) for t in others)
    }
    return shared, [{n: a for n, a in t.items() if n not in shared} for t in traces]


def _are_equal(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return one.shape == other.shape and one.tobytes() == other.tobytes()


def load_suite(path: Path) -> Suite:
    """Read what `Suite.save` wrote; never unpickles.

    Raises:
        RequestError: no such file, or none that holds a suite.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {n: _wide(file[n]) for n in file.files}
        about = json.loads(str(arrays["about"]))
        shared = _under(arrays, "shared/")
        runs = []
        for index in range(about.pop("runs")):
            where = f"run/{index}/"
            own = _under(arrays, f"{where}trace/")
            moves, answers = (_under(arrays, f"{where}{n}/") for n in ("moves", "answers"))
            size = float(arrays["sizes"][index])
            runs.append(
                RecordedSample(
                    Trace({**shared, **own}), moves, arrays[f"{where}drifts"], answers, size
                )
            )
        table = SamplerTable.of(arrays["table"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RequestError(
            str(path), f"is not a suite of recorded runs: {error}", "delete it; it is made again"
        ) from error
    return Suite(about, runs, table, about.pop("guidance"))


def _wide(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _under(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
