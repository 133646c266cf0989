"""Integrals of many functions of one number, to a tolerance, from their logarithms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LogIntegral", "halve", "log_integral", "log_trapezoid"]


class LogIntegral(NamedTuple):
    """Logarithms of integrals, shape ``(n,)`` each."""

    value: Tensor
    error: Tensor  # how much the last halving of the intervals changed the value
    is_converged: Tensor  # whether that was within the tolerance


def log_trapezoid(grid: Tensor, log_f: Tensor) -> Tensor:
    r"""
    Logarithm of the trapezoidal rule on a grid of unequal steps.

    .. math:: \log \sum_j \tfrac12 (x_{j+1} - x_j) (f(x_j) + f(x_{j+1}))

    computed from :math:`\log f`, so that nothing overflows (Pitkin 2017).

    :param Tensor grid: increasing points, shape ``(..., m)``.
    :param Tensor log_f: logarithm of the integrand there, shape ``(..., m)``.
    :returns: shape ``(...)``.
    """
    log_steps = (grid[..., 1:] - grid[..., :-1]).log()
    pairs = torch.logaddexp(log_f[..., 1:], log_f[..., :-1])
    return (log_steps + pairs).logsumexp(-1) - math.log(2.0)


def log_integral(
    log_f: Callable[[Tensor, Tensor], Tensor],
    grid: Tensor,
    *,
    tolerance: float = 1e-6,
    max_halvings: int = 12,
) -> LogIntegral:
    r"""
    Logarithms of the integrals of ``n`` positive functions, each from its own starting grid.

    All intervals of a grid are halved until two trapezoidal values :math:`T`, extrapolated to
    Simpson's rule :math:`(4 T_{h/2} - T_h) / 3`, differ by less than the tolerance: a relative
    error of the integral. Functions that are done are not evaluated again. The starting grid
    has to notice every feature of the function; it is halved at least twice.

    :param log_f: logarithms of functions, called with their numbers, shape ``(k,)``, and with
        points, shape ``(k, m)``; returns shape ``(k, m)``.
    :param Tensor grid: increasing points, shape ``(n, m)``; the integral is between the ends.
    :param float tolerance: largest change of the logarithm.
    :param int max_halvings: give up after as many.
    :returns: values, their last changes, and whether they converged.
    :raises ValueError: for a tolerance that is not positive, or fewer than two halvings.

    Reference: Pitkin 2017 ("lintegrate"); Nash and Durkan 2019, section 4.2.

    >>> from pyro_ext.ops.quadrature import log_integral
    >>> grid = torch.linspace(-10, 10, 21).expand(1, -1)
    >>> result = log_integral(lambda index, x: -0.5 * x.square(), grid)
    >>> torch.testing.assert_close(2 * result.value.exp() ** 2, 4 * torch.pi * torch.ones(1))
    """
    if not tolerance > 0.0:
        raise ValueError(f"tolerance must be positive, got {tolerance!r}")
    if max_halvings < 2:
        raise ValueError(f"max_halvings must be at least 2, got {max_halvings!r}")
    active = torch.arange(len(grid), device=grid.device)
    values = log_f(active, grid)
    trapezoid = log_trapezoid(grid, values)
    simpson = trapezoid
    value, error = trapezoid.clone(), torch.full_like(trapezoid, math.inf)
    for halving in range(max_halvings):
        middles = 0.5 * (grid[:, 1:] + grid[:, :-1])
        grid, values = halve(grid, middles), halve(values, log_f(active, middles))
        finer = log_trapezoid(grid, values)
        # never below a quarter of the trapezoidal value, and not NaN where both are zero
        log_ratio = torch.where(finer == -math.inf, 0.0, (trapezoid - finer).clamp_max(1.0))
        extrapolated = finer + torch.log1p(-torch.expm1(log_ratio) / 3.0)
        change = (extrapolated - simpson).abs()
        change = torch.where(extrapolated == simpson, 0.0, change)
        value[active], error[active] = extrapolated, change
        going = ~(change <= tolerance) if halving else torch.ones_like(change, dtype=torch.bool)
        if not bool(going.any()):
            break
        active, grid, values = active[going], grid[going], values[going]
        trapezoid, simpson = finer[going], extrapolated[going]
    return LogIntegral(value, error, error <= tolerance)


def halve(points: Tensor, middles: Tensor) -> Tensor:
    """
    Put values at the middles of intervals between those at their ends.

    :param Tensor points: shape ``(..., m)``.
    :param Tensor middles: shape ``(..., m - 1)``.
    :returns: shape ``(..., 2 m - 1)``.
    """
    pairs = torch.stack([points[..., :-1], middles], -1).flatten(-2)
    return torch.cat([pairs, points[..., -1:]], -1)
