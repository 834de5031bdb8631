# SPDX-License-Identifier: Apache-2.0
"""The cache policies in plain NumPy, transcribed from the algorithms' text and not from our code.

Works on the residuals themselves: what a policy calls a mix is here a forecast built from finite
differences of arrays. Nothing here imports torch or freewheel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Guard:
    first_exact: int = 1
    last_exact: int = 0
    max_consecutive: int = 0
    max_reused: int = 0
    exact_steps: tuple[int, ...] = ()


@dataclass
class Run:
    """What happened, per step: the decision, the distance after it, the forecast where reused."""

    computed: list[bool] = field(default_factory=list)
    distance: list[float | None] = field(default_factory=list)
    forecast: list[np.ndarray | None] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    """How near the quantity that decided came to its threshold, relative to it."""
    noise: list[float] = field(default_factory=list)
    """What float32 rounding may do to the distance: polynomials with large terms cancel."""


def run_reference(law, guard, step_count, signals=None, features=None, residuals=None):
    """Fold a law over a run, as ALGORITHMS 6 wraps it."""
    run = Run()
    history: list[tuple[int, np.ndarray]] = []
    in_a_row = in_all = 0
    for t in range(step_count):
        must = (
            not history
            or t in guard.exact_steps
            or t < guard.first_exact
            or t >= step_count - guard.last_exact
            or (guard.max_consecutive > 0 and in_a_row >= guard.max_consecutive)
            or (guard.max_reused > 0 and in_all >= guard.max_reused)
            or (signals is not None and not np.isfinite(signals[t]).all())
        )
        compute = law.wants_computation(t, must, signals) or must
        run.margin.append(law.margin)
        run.noise.append(law.noise)
        run.distance.append(law.distance)
        run.computed.append(compute)
        if compute:
            in_a_row = 0
            run.forecast.append(None)
            residual = np.zeros(1) if residuals is None else residuals[t]
            history.insert(0, (t, residual.astype(np.float64)))
            if features is not None:
                law.computed(t, step_count, features[t])
        else:
            in_a_row, in_all = in_a_row + 1, in_all + 1
            run.forecast.append(law.forecast(t, history))
    return run


class _Law:
    distance: float | None = None
    margin: float = math.inf
    noise: float = 0.0

    def forecast(self, t, history):
        return history[0][1]

    def computed(self, t, step_count, feature):
        pass


class Joined(_Law):
    """One law's decisions with another one's forecasts: steps follow the one, residuals the other."""

    def __init__(self, decider, mixer):
        self.decider, self.mixer = decider, mixer

    distance = property(lambda self: self.decider.distance)
    margin = property(lambda self: self.decider.margin)
    noise = property(lambda self: self.decider.noise)

    def wants_computation(self, t, must, signals):
        self.mixer.signals = signals
        return self.decider.wants_computation(t, must, signals)

    def forecast(self, t, history):
        return self.mixer.forecast(t, history)

    def computed(self, t, step_count, feature):
        self.decider.computed(t, step_count, feature)


class Off(_Law):
    def wants_computation(self, t, must, signals):
        return True


class TeaCache(_Law):
    """ALGORITHMS 1."""

    def __init__(self, threshold, coefficients):
        self.threshold = threshold
        self.coefficients = np.asarray(coefficients, np.float32)
        self.distance = np.float32(0)

    def wants_computation(self, t, must, signals):
        self.margin = math.inf
        if must:
            self.distance, self.noise = np.float32(0), 0.0
            return True
        before = np.abs(signals[t - 1]).mean(dtype=np.float32)
        with np.errstate(all="ignore"):
            rel_l1 = np.abs(signals[t] - signals[t - 1]).mean(dtype=np.float32) / before
            self.distance = self.distance + np.polyval(self.coefficients, rel_l1)
            # Eight roundings of half a unit in the last place of the largest terms.
            self.noise += 4 * 1.2e-7 * float(np.polyval(np.abs(self.coefficients), rel_l1))
        if self.threshold > 0:
            away = abs(float(self.distance) - self.threshold)
            self.margin = max(0.0, away - self.noise) / self.threshold
        # Threshold 0 never reuses, and a change that isn't finite computes.
        may_reuse = self.threshold > 0 and np.isfinite(rel_l1) and np.isfinite(self.distance)
        if may_reuse and self.distance < np.float32(self.threshold):
            return False
        self.distance, self.noise = np.float32(0), 0.0
        return True


class TaylorSeer(_Law):
    """ALGORITHMS 2."""

    def __init__(self, interval, order, variant):
        self.interval, self.order, self.variant = interval, order, variant

    def wants_computation(self, t, must, signals):
        return t % self.interval == 0

    def forecast(self, t, history):
        newest = history[: self.order + 1]
        return taylor(t, newest) if self.variant == "taylor" else newton(t, newest)


def taylor(t, history):
    """Sum the D_i(s) (t − s)^i / i!, each D_{i+1}(s) = (D_i(s) − D_i(p)) / (s − p)."""

    def difference(i, at):
        if i == 0:
            return history[at][1]
        gap = history[at][0] - history[at + 1][0]
        return (difference(i - 1, at) - difference(i - 1, at + 1)) / gap

    s = history[0][0]
    return sum(difference(i, 0) * (t - s) ** i / math.factorial(i) for i in range(len(history)))


def newton(t, history):
    """Evaluate the interpolating polynomial, in Lagrange's form."""
    total = 0.0
    for s, residual in history:
        basis = 1.0
        for other, _ in history:
            if other != s:
                basis *= (t - other) / (s - other)
        total = total + basis * residual
    return total


class Custom(TeaCache):
    """ALGORITHMS 4, the trend damped by trend · trend_decay^(t − s)."""

    def __init__(self, threshold, coefficients, trend, trend_decay):
        super().__init__(threshold, coefficients)
        self.trend, self.trend_decay = trend, trend_decay

    def forecast(self, t, history):
        if len(history) == 1:
            return history[0][1]
        (s, newest), (p, older) = history[:2]
        slope = (newest - older) / (s - p)
        return newest + self.trend * self.trend_decay ** (t - s) * (t - s) * slope


class PublishedCustom(_Law):
    """LightX2V's Custom, written down from its description: TeaCache's polynomial of the signal's
    relative change, added up in float64 between ``use_ret_steps``' exact ends, and the first-order
    Taylor forecast, undamped: value plus difference quotient times the distance."""

    def __init__(self, threshold, coefficients, use_ret_steps, step_count):
        self.threshold, self.distance = threshold, 0.0
        self.polynomial = np.poly1d(coefficients[0 if use_ret_steps else 1])
        self.first, self.last = (5, step_count) if use_ret_steps else (1, step_count - 1)

    def wants_computation(self, t, must, signals):
        self.margin, self.noise = math.inf, 0.0
        if must or t < self.first or t >= self.last:
            self.distance = 0.0
            return True
        now, before = signals[t].astype(np.float64), signals[t - 1].astype(np.float64)
        change = np.abs(now - before).mean() / np.abs(before).mean()
        self.distance += self.polynomial(change)
        terms = np.polyval(np.abs(self.polynomial.coeffs), change)
        self.noise = 4 * 1.2e-7 * float(terms) * (t + 1)
        away = abs(self.distance - self.threshold)
        self.margin = max(0.0, away - self.noise) / self.threshold
        if self.distance < self.threshold:
            return False
        self.distance = 0.0
        return True

    def forecast(self, t, history):
        (s, newest), *older = history
        if not older:
            return newest
        p, previous = older[0]
        return newest + (newest - previous) / (s - p) * (t - s)


class AdaCache(_Law):
    """ALGORITHMS 3."""

    def __init__(
        self,
        codebook,
        scale_codebook=False,
        moreg_scale=0.385,
        moreg_power=8.0,
        moreg_first=0.1,
        moreg_last=0.9,
        mograd=10.0,
    ):
        self.codebook, self.scale_codebook = codebook, scale_codebook
        self.moreg_scale, self.moreg_power, self.mograd = moreg_scale, moreg_power, mograd
        self.moreg_first, self.moreg_last = moreg_first, moreg_last
        self.skip, self.moreg, self.previous, self.due = 1, 1.0, None, 0

    def wants_computation(self, t, must, signals):
        return t >= self.due

    def computed(self, t, step_count, feature):
        f = feature.astype(np.float64)
        if self.previous is None:
            self.skip = 1
        else:
            self.skip = self._next_skip(t, step_count, f)
        self.previous, self.due = f, t + self.skip

    def _next_skip(self, t, step_count, f):
        with np.errstate(all="ignore"):
            d = np.abs(self.previous - f).sum() / np.abs(self.previous).sum() / self.skip
        if int(self.moreg_first * step_count) <= t <= int(self.moreg_last * step_count):
            tokens = f.shape[1]
            flat = f.reshape(-1, f.shape[2])
            later, earlier = flat[tokens:], flat[:-tokens]
            total = np.abs(later).sum() + np.abs(earlier).sum()
            m = np.abs(later - earlier).sum() / total if total > 0 else 0.0
            m = (m / self.moreg_scale) ** self.moreg_power / 1
        else:
            m = 1.0
        grad = self.mograd * (m - self.moreg) / self.skip
        self.moreg = m
        d = d * (m + abs(grad))
        if not np.isfinite(d):
            return 1
        self.margin = min(abs(d - bound) / bound for bound, _ in self.codebook)
        skip = next((skip for bound, skip in self.codebook if bound > d), self.codebook[-1][1])
        if self.scale_codebook:
            skip = max(1, round(skip * step_count / 100))
        return skip


class MagCache(_Law):
    """ALGORITHMS 5."""

    def __init__(self, threshold, max_skip, retention, steps, ratios, step_count):
        self.threshold, self.max_skip = threshold, max_skip
        self.first = int(np.float32(retention) * step_count)
        picks = [round(t * (steps - 1) / max(1, step_count - 1)) for t in range(step_count)]
        self.ratios = [ratios[min(pick, len(ratios) - 1)] for pick in picks]
        self.distance = 0.0
        self._reset()

    def _reset(self):
        self.product, self.skipped, self.distance = 1.0, 0, 0.0

    def wants_computation(self, t, must, signals):
        self.margin = math.inf
        if must or t < self.first:
            self._reset()
            return True
        self.product *= self.ratios[t]
        self.skipped += 1
        self.distance += abs(1 - self.product)
        if self.threshold > 0:
            self.margin = abs(self.distance - self.threshold) / self.threshold
        if self.distance < self.threshold and self.skipped <= self.max_skip:
            return False
        self._reset()
        return True


class EasyCache(_Law):
    """ALGORITHMS 5: k between the last two computed steps, x the signal, v the feature."""

    def __init__(self, threshold):
        self.threshold, self.distance = threshold, 0.0
        self.inputs, self.outputs = [], []

    def wants_computation(self, t, must, signals):
        self.margin = math.inf
        wants = must or len(self.outputs) < 2
        if not wants:
            (v, older_v), (x, older_x) = self.outputs, self.inputs
            k = np.abs(v - older_v).mean() / np.abs(x - older_x).mean()
            moved = np.abs(signals[t].astype(np.float64) - signals[t - 1]).mean()
            self.distance += k * moved / np.abs(v).mean()
            if self.threshold > 0:
                self.margin = abs(self.distance - self.threshold) / self.threshold
            wants = not self.distance < self.threshold
        if wants:
            self.distance = 0.0
            self.inputs = [signals[t].astype(np.float64), *self.inputs][:2]
        return wants

    def computed(self, t, step_count, feature):
        self.outputs = [feature.astype(np.float64), *self.outputs][:2]


class DBCache(_Law):
    """ALGORITHMS 10, over what the first blocks add; how many those are is the body's matter."""

    def __init__(self, threshold, first_blocks, last_blocks):
        self.threshold, self.distance, self.of_computed = threshold, 0.0, None

    def wants_computation(self, t, must, signals):
        self.margin, change = math.inf, math.nan
        new = signals[t].astype(np.float64).ravel()
        if self.of_computed is not None:
            change = np.sum(np.abs(new - self.of_computed)) / np.sum(np.abs(self.of_computed))
            if self.threshold > 0 and not must:
                self.margin = abs(change - self.threshold) / self.threshold
        reuses = change < self.threshold and not must
        self.of_computed = self.of_computed if reuses else new
        self.distance = change if reuses else 0.0
        return not reuses


class DualBlock(_Law):
    """LightX2V's first blocks, from one step to the next and in every n-th channel."""

    def __init__(self, threshold, first_blocks, last_blocks, channel_stride):
        self.threshold, self.stride = threshold, channel_stride
        self.distance, self.previous = 0.0, None

    def wants_computation(self, t, must, signals):
        self.margin, diff = math.inf, 1.0
        new = signals[t].astype(np.float64)[..., :: self.stride]
        if self.previous is not None:
            diff = np.abs(self.previous - new).mean() / np.abs(self.previous).mean()
            if self.threshold > 0 and not must:
                self.margin = abs(diff - self.threshold) / self.threshold
        self.previous = new
        wants = not diff < self.threshold
        self.distance = 0.0 if wants or must else diff
        return wants


class FirstBlock(_Law):
    """ALGORITHMS 5."""

    def __init__(self, threshold):
        self.threshold, self.distance, self.kept = threshold, 0.0, None

    def wants_computation(self, t, must, signals):
        self.margin = math.inf
        rho = signals[t].astype(np.float64)
        if self.kept is not None:
            self.distance = np.abs(rho - self.kept).mean() / np.abs(self.kept).mean()
            if self.threshold > 0 and not must:
                self.margin = abs(self.distance - self.threshold) / self.threshold
        if must or not self.distance < self.threshold:
            self.kept, self.distance = rho, 0.0
            return True
        return False


class Solved(_Law):
    """ALGORITHMS 7: one schedule of several, stretched to the run's length."""

    def __init__(
        self, computed_steps, steps, sigmas, budgets, computed, mix, history, step_count, sigma=1.0
    ):
        levels = [*sigmas, *[sigmas[-1]] * steps][:steps]
        self.first = min(
            range(steps), key=lambda row: abs(np.float32(levels[row]) - np.float32(sigma))
        )
        rest = steps - self.first
        self.rows = [self.first + t * rest // step_count for t in range(step_count)]
        self.stretch, self.depth = step_count / rest, history
        chosen = budgets.index(computed_steps)
        marks = [*computed, *[computed[-1]] * 200][200 * chosen : 200 * chosen + steps]
        self.computed = [step for step in range(steps) if marks[step]]
        first = sum(steps - budget for budget in budgets[:chosen])
        reused = [step for step in range(steps) if not marks[step]]
        self.mix = {
            step: mix[history * (first + i) : history * (first + i + 1)]
            for i, step in enumerate(reused)
        }

    def wants_computation(self, t, must, signals):
        before = self.rows[t - 1] if t else self.first - 1
        return any(before < row <= self.rows[t] for row in self.computed)

    def forecast(self, t, history):
        row = self.rows[t]
        factors = self.mix.get(row)
        if factors is None:
            return history[0][1]
        meant = [
            math.ceil((s - self.first) * self.stretch - 1e-9)
            for s in self.computed[::-1]
            if s <= row
        ]
        steps, residuals = zip(*reversed(history[: self.depth]), strict=True)
        held = np.array(residuals)
        total = 0.0
        for factor, step in zip(factors, meant, strict=False):
            shares = [np.interp(step, steps, unit) for unit in np.eye(len(steps))]
            total = total + factor * np.tensordot(shares, held, 1)
        return total


class SeaCache(TaylorSeer):
    """ALGORITHMS 10: the signal is filtered already; the mix is TaylorSeer's."""

    def __init__(self, threshold, order, variant):
        super().__init__(1, order, variant)
        self.threshold, self.distance = threshold, 0.0

    def wants_computation(self, t, must, signals):
        self.margin = math.inf
        if not must:
            now, before = signals[t].astype(np.float64), signals[t - 1].astype(np.float64)
            self.distance += np.abs(now - before).mean() / np.abs(before).mean()
            if self.threshold > 0:
                self.margin = abs(self.distance - self.threshold) / self.threshold
        if must or not self.distance < self.threshold:
            self.distance = 0.0
            return True
        return False


class DiCache(_Law):
    """ALGORITHMS 9, the first steps and the last computed as its authors' code has it."""

    def __init__(self, threshold, retention, measure, farthest_gain, step_count):
        self.threshold, self.distance = threshold, 0.0
        self.exact = {*range(int(np.float32(retention) * step_count) + 1), step_count - 1}
        self.measure, self.farthest_gain = measure, farthest_gain

    def wants_computation(self, t, must, signals):
        self.margin, self.signals, self.now = math.inf, signals, t
        if not must and t not in self.exact:
            now, before = signals[t].astype(np.float64), signals[t - 1].astype(np.float64)
            self.distance += np.abs(now - before).mean() / np.abs(before).mean()
            if self.threshold > 0:
                self.margin = abs(self.distance - self.threshold) / self.threshold
            if self.distance < self.threshold:
                return False
        self.distance = 0.0
        return True

    def forecast(self, t, history):
        (s, newest), *older = history
        if not older:
            return newest
        p, before = older[0]
        probe, probe_s, probe_p = (self.signals[i].astype(np.float64).ravel() for i in (t, s, p))
        gain = np.abs(probe - probe_p).mean() / np.abs(probe_s - probe_p).mean()
        if self.measure == "projection":
            way = probe_s - probe_p
            gain = (probe - probe_p) @ way / (way @ way)
        return before + np.clip(gain, 1, self.farthest_gain) * (newest - before)


class SenCache(_Law):
    """ALGORITHMS 10, in the form of its authors' code: against the last computed step."""

    def __init__(
        self,
        threshold,
        early_threshold,
        early,
        max_skip,
        timesteps,
        latent_sensitivity,
        timestep_sensitivity,
        step_count,
    ):
        self.threshold, self.max_skip, self.distance = threshold, max_skip, 0.0
        self.early_threshold, self.early_steps = early_threshold, np.float32(early) * step_count
        self.table = np.array(timesteps)
        size = len(timesteps)
        tables = (latent_sensitivity, timestep_sensitivity)
        self.by_latents, self.by_timestep = (
            np.array([*table, *[table[-1]] * size][:size]) for table in tables
        )
        self.step_count, self.last, self.skipped = step_count, None, 0

    def wants_computation(self, t, must, signals):
        self.margin, timestep = math.inf, 1000 * (1 - t / self.step_count)
        wants = must or self.last is None
        if not wants:
            then, x = self.last
            nearest = np.argmin(np.abs(self.table - then))
            moved = np.sqrt(np.square(signals[t].astype(np.float64) - x).mean())
            self.distance = self.by_latents[nearest] * moved
            self.distance += self.by_timestep[nearest] * abs(timestep - then)
            threshold = self.threshold
            if t < self.early_steps:
                threshold = min(threshold, self.early_threshold)
            if threshold > 0:
                self.margin = abs(self.distance - threshold) / threshold
            self.skipped += 1
            wants = not self.distance < threshold or self.skipped > self.max_skip
        if wants:
            self.distance, self.skipped = 0.0, 0
            self.last = timestep, signals[t].astype(np.float64)
        return wants
