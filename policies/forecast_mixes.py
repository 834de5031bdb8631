# SPDX-License-Identifier: Apache-2.0
"""Turn a forecast of the residual into a mix of the residual history.

A Taylor forecast of any order is linear in the residuals of the past, so no finite difference of
a hidden-sized tensor is ever stored: the differences are taken of the mix factors instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Step

__all__ = ["difference_mix", "hermite_mix", "line_mix", "newton_mix", "taylor_mix"]


def difference_mix(step: Step, order: Tensor | int, factors: Sequence[Tensor]) -> Tensor:
    """Return the mix of a sum of finite differences of computed steps.

    With s the newest computed step and p the one before it,
    ``D0 = r_s``, ``D_{i+1}(s) = (D_i(s) − D_i(p)) / (s − p)`` and ``r̂_t = D0 + Σ_i factors[i−1] · D_i(s)``.
    Every order divides by the gap of the two newest steps of its own row, so on uneven gaps these
    are not divided differences.

    Args:
        step: Where the run stands; ``computed_steps`` says which residuals exist.
        order: Highest difference to use; int64 [] or a number. Falls back to what the history has.
        factors: float32 [], of the first difference and of each higher one:
            ``history.maximum − 1`` of them.

    Returns:
        float32 [history.maximum]; [1, 0, …] where one residual exists.
    """
    steps = step.computed_steps
    rows = torch.eye(steps.shape[0])
    mix = rows[0]
    for level, factor in enumerate(factors, 1):
        pairs = steps.shape[0] - level
        # NOTE: row j of the level divides by the gap j, j+1, whatever the level.
        rows = (rows[:-1] - rows[1:]) / _gaps(steps[:pairs], steps[1 : pairs + 1])
        mix = mix + torch.where(_has(steps, order, level), factor * rows[0], 0.0)
    return mix


def taylor_mix(step: Step, order: Tensor | int) -> Tensor:
    """Return the mix of the Taylor forecast over finite differences of computed steps.

    ``r̂_t = Σ_i D_i(s) · (t − s)^i / i!`` with the differences of `difference_mix`.

    Args:
        step: Where the run stands; ``computed_steps`` says which residuals exist.
        order: Highest difference to use; int64 [] or a number. Falls back to what the history has.

    Returns:
        float32 [history.maximum]; [1, 0, …] where one residual exists.

    Reference: Liu et al. 2025, TaylorSeer, arXiv 2503.06923, eq. 2 and 3.
    """
    ahead = (step.step_index - step.computed_steps[0]).to(torch.float32)
    factors, factor = [], torch.ones(())
    for level in range(1, step.computed_steps.shape[0]):
        factor = factor * ahead / level
        factors.append(factor)
    return difference_mix(step, order, factors)


def line_mix(step: Step) -> Tensor:
    """Return the mix of the straight line through the two newest residuals: Taylor's of order 1.

    Returns:
        float32 [history.maximum], at least two; [1, 0, …] where one residual exists.
    """
    two = step._replace(computed_steps=step.computed_steps[:2])
    return torch.cat([taylor_mix(two, 1), torch.zeros(step.computed_steps.shape[0] - 2)])


def hermite_mix(step: Step, order: Tensor | int, scale: Tensor) -> Tensor:
    """Return the mix of the Taylor forecast with scaled Hermite polynomials for its monomials.

    ``r̂_t = Σ_i D_i(s) · scale^i · H_i(scale · (t − s)) / i!`` with the differences of
    `difference_mix` and the physicists' Hermite polynomials:
    ``H_0 = 1``, ``H_1(x) = 2x``, ``H_{i+1}(x) = 2x · H_i(x) − 2i · H_{i−1}(x)``.

    Args:
        step: Where the run stands; ``computed_steps`` says which residuals exist.
        order: Highest difference to use; int64 [] or a number. Falls back to what the history has.
        scale: float32 [], contraction of the polynomial's argument and of its coefficient.

    Returns:
        float32 [history.maximum]; [1, 0, …] where one residual exists.

    Reference: Feng et al. 2025, HiCache, arXiv 2508.16984, Hermite forecast with dual scaling.
    """
    twice = 2 * scale * (step.step_index - step.computed_steps[0]).to(torch.float32)
    before, polynomial, weight = torch.zeros(()), torch.ones(()), torch.ones(())
    factors = []
    for level in range(1, step.computed_steps.shape[0]):
        before, polynomial = polynomial, twice * polynomial - 2 * (level - 1) * before
        weight = weight * scale / level
        factors.append(weight * polynomial)
    return difference_mix(step, order, factors)


def newton_mix(step: Step, order: Tensor | int) -> Tensor:
    """Return the mix of the polynomial through the newest computed steps, evaluated at this step.

    Divided differences ``f[s…q] = (f[s…p] − f[p…q]) / (s − q)``, Newton's form: exact for
    polynomials up to ``order`` on uneven gaps, equal to `taylor_mix` at order 1.

    Args:
        step: Where the run stands; ``computed_steps`` says which residuals exist.
        order: Degree of the polynomial; int64 [] or a number. Falls back to what the history has.

    Returns:
        float32 [history.maximum]; [1, 0, …] where one residual exists.
    """
    steps = step.computed_steps
    rows = torch.eye(steps.shape[0])
    factor = torch.ones(())
    mix = rows[0]
    for level in range(1, steps.shape[0]):
        pairs = steps.shape[0] - level
        rows = (rows[:-1] - rows[1:]) / _gaps(steps[:pairs], steps[level:])
        factor = factor * (step.step_index - steps[level - 1]).to(torch.float32)
        mix = mix + torch.where(_has(steps, order, level), factor * rows[0], 0.0)
    return mix


def _gaps(newer: Tensor, older: Tensor) -> Tensor:
    """Return ``newer − older`` as a float32 column, 1 where the history does not reach."""
    gaps = torch.where(older >= 0, newer - older, 1)
    return gaps.to(torch.float32).unsqueeze(1)


def _has(steps: Tensor, order: Tensor | int, level: int) -> Tensor:
    """Say whether the difference of this level is wanted and its oldest residual exists."""
    return (steps[level] >= 0) & (torch.as_tensor(order) >= level)
