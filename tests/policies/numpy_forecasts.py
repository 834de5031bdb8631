# SPDX-License-Identifier: Apache-2.0
"""Forecasts in plain NumPy, beside the laws of `numpy_reference` and like those."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy_reference import _Law, newton, taylor


class Hermite(_Law):
    """ALGORITHMS 9: the Taylor differences, times scale^i H_i(scale (t − s)) / i!."""

    def __init__(self, interval, order, scale):
        self.interval, self.order, self.scale = interval, order, scale

    def wants_computation(self, t, must, signals):
        return t % self.interval == 0

    def forecast(self, t, history):
        def difference(i, at):
            if i == 0:
                return history[at][1]
            gap = history[at][0] - history[at + 1][0]
            return (difference(i - 1, at) - difference(i - 1, at + 1)) / gap

        # NumPy's own physicists' polynomials: H_i has the series coefficients 0, …, 0, 1.
        reach = min(self.order, len(history) - 1)
        x = self.scale * (t - history[0][0])
        return sum(
            difference(i, 0)
            * self.scale**i
            * np.polynomial.hermite.hermval(x, [0] * i + [1])
            / math.factorial(i)
            for i in range(reach + 1)
        )


class Spectrum(_Law):
    """ALGORITHMS 9, with the authors' schedule: a window that each computed step widens."""

    def __init__(
        self, warmup, window, growth, degree, ridge, blend, clock, history, step_count, sigmas=None
    ):
        self.warmup, self.window, self.growth = warmup, window, growth
        self.degree, self.ridge, self.blend, self.history = degree, ridge, blend, history
        steps = np.arange(step_count)
        sigmas = 1 - steps / step_count if sigmas is None else np.asarray(sigmas)
        bounded = np.clip(sigmas, 1e-3, 1 - 1e-3)
        self.times = {
            "step": 2 * steps / step_count - 1,
            "sigma": 1 - 2 * sigmas,
            "logsnr": np.log((1 - bounded) / bounded) / math.log(999),
        }[clock]
        self.since = 0

    def wants_computation(self, t, must, signals):
        self.since += 1
        compute = must or t < self.warmup or self.since >= math.floor(round(self.window, 3))
        if compute:
            self.since = 0
            self.window += self.growth if t >= self.warmup else 0
        return compute

    def forecast(self, t, history):
        past = history[: self.history]
        basis = np.polynomial.chebyshev.chebvander(self.times[[s for s, _ in past]], self.degree)
        values = np.stack([r.ravel() for _, r in past])
        # Ridge regression as least squares over rows that pull each coefficient towards 0.
        pull = math.sqrt(self.ridge) * np.eye(self.degree + 1)
        targets = np.concatenate([values, np.zeros((self.degree + 1, values.shape[1]))])
        fitted = np.linalg.lstsq(np.concatenate([basis, pull]), targets, rcond=None)[0]
        fit = np.polynomial.chebyshev.chebvander(self.times[[t]], self.degree)[0] @ fitted
        line = taylor(t, history[:2])
        return self.blend * fit.reshape(line.shape) + (1 - self.blend) * line


class FoCa(_Law):
    """ALGORITHMS 9; every step so far as factors of computed steps, those no longer kept moved on to
    the oldest that is."""

    def __init__(self, interval, history):
        self.interval, self.history, self.seen = interval, history, []

    def wants_computation(self, t, must, signals):
        return t % self.interval == 0

    def _kept(self, factors, steps):
        kept = sorted(steps, reverse=True)[: self.history]
        moved = dict.fromkeys(kept, 0.0)
        for s, factor in factors.items():
            moved[max(s, kept[-1])] += factor
        return moved

    def forecast(self, t, history):
        steps = [s for s, _ in history]
        for known in range(len(self.seen), t):
            self.seen.append({known: 1.0})  # computed since the last forecast
            held = [s for s in steps if s <= known]
            self.seen = [self._kept(f, held) for f in self.seen]
        value = {steps[0]: 1.0}
        if len(steps) > 1:
            e = t - steps[0]
            trend = dict.fromkeys(steps, 0.0)
            for factors, sign in (
                ({steps[0]: 1.0}, 1),
                ({steps[1]: 1.0}, -1),
                (self.seen[-1], 1),
                (self.seen[-2], -1),
            ):
                for s, factor in factors.items():
                    trend[s] += sign * factor
            reach = e / 2 if e <= 3 else 3 / e * 3 / 2
            value = {s: value.get(s, 0.0) + reach * f for s, f in trend.items()}
        self.seen.append(value)
        residuals = dict(history)
        return sum(f * residuals[s] for s, f in value.items())


class DMD(_Law):
    """ALGORITHMS 9, on the residuals themselves: linear prediction, a cubic in between."""

    def __init__(self, interval, ridge, farthest):
        self.interval, self.ridge, self.farthest = interval, ridge, farthest

    def wants_computation(self, t, must, signals):
        return t % self.interval == 0

    def forecast(self, t, history):
        steps, past = [s for s, _ in history[:6]], [r for _, r in history[:6]]
        gaps = [a - b for a, b in itertools.pairwise(steps)]
        even = next((i for i, g in enumerate(gaps) if g != gaps[0]), len(gaps))
        line = taylor(t, history[:2])
        if even < 3:
            return line
        k, y = (t - steps[0]) / gaps[0], past[: even + 1]
        basis = [y[1], *(y[j] - y[j + 1] for j in range(1, even))]
        norms = np.array([np.linalg.norm(b) for b in basis])
        directions = np.stack([b.ravel() / n for b, n in zip(basis, norms, strict=True)], axis=1)
        normal = directions.T @ directions + self.ridge * np.eye(even)
        weights = np.linalg.solve(normal, directions.T @ (y[0] - y[1]).ravel()) / norms
        seen = list(reversed(y))
        for _ in range(2):
            newest = seen[::-1]
            ahead = (1 + weights[0]) * newest[0]
            ahead = ahead + sum(w * (newest[j] - newest[j + 1]) for j, w in enumerate(weights[1:]))
            seen.append(ahead)
        previous, now, first, second = seen[-4:]
        if k > 2 or np.linalg.norm(first - now) > self.farthest * np.linalg.norm(y[0] - y[1]):
            return line
        return newton(k, [(2, second), (1, first), (0, now), (-1, previous)])
