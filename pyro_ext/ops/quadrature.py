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
    error: Tensor  # about the relative error, from what the last halvings changed
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

    Simpson's rule, adaptive: every interval whose halving still changes its part of the integral
    is halved again, until the errors of a function add up to less than the tolerance, relative
    to its integral. The error is a third of what the halving changed, in absolute value: the
    bound where it makes the error smaller by a factor of four, as at kinks. Intervals and
    functions that are done are not evaluated again. The starting grid has to notice every
    feature of the function; its middles are always evaluated.

    :param log_f: logarithms of functions, called with their numbers, shape ``(k,)``, which may
        repeat, and with points, shape ``(k, m)``; returns shape ``(k, m)``.
    :param Tensor grid: increasing points, shape ``(n, m)``; the integral is between the ends.
    :param float tolerance: largest error of an integral, relative to it.
    :param int max_halvings: give up after as many.
    :returns: values, their errors, and whether they converged.
    :raises ValueError: for a tolerance that is not positive, or fewer than two halvings.

    Reference: Pitkin 2017 ("lintegrate"); Nash and Durkan 2019, section 4.2; the control of the
    error is that of Lyness 1969 ("Notes on the adaptive Simpson quadrature routine").

    >>> from pyro_ext.ops.quadrature import log_integral
    >>> grid = torch.linspace(-10, 10, 21).expand(1, -1)
    >>> result = log_integral(lambda index, x: -0.5 * x.square(), grid)
    >>> torch.testing.assert_close(2 * result.value.exp() ** 2, 4 * torch.pi * torch.ones(1))
    """
    if not tolerance > 0.0:
        raise ValueError(f"tolerance must be positive, got {tolerance!r}")
    if max_halvings < 2:
        raise ValueError(f"max_halvings must be at least 2, got {max_halvings!r}")
    number, num_intervals = len(grid), grid.shape[1] - 1
    intervals, sums = _start(log_f, grid)
    trapezoid, simpson = _rules(intervals, sums.peak)
    error = (simpson - trapezoid).abs()
    # of an interval of the starting grid; of its halves, each has half of it
    share = 0.5 * tolerance / num_intervals
    is_done = error <= share * _sum_by(intervals.function, simpson, number)[intervals.function]
    intervals, sums = _finish(sums, intervals, simpson, error, is_done)
    for halving in range(1, max_halvings):
        if not len(intervals.function):
            break
        quarters = grid.new_tensor([0.25, 0.75]) * intervals.width[:, None]
        new = log_f(intervals.function, intervals.left[:, None] + quarters)
        sums = _raise_peak(sums, intervals.function, new)
        halves = _split(intervals, new)
        before, after = _rules(intervals, sums.peak)[1], _rules(halves, sums.peak)[1]
        error = (after.view(-1, 2).sum(-1) - before).abs() / 3.0
        total = sums.total + _sum_by(halves.function, after, number)
        errors = sums.error + _sum_by(intervals.function, error, number)
        is_converged = (errors <= tolerance * total)[intervals.function]
        is_done = is_converged | (error <= 0.5**halving * share * total[intervals.function])
        is_done |= error.isnan() | (halving == max_halvings - 1)
        twice = is_done.repeat_interleave(2)
        error = 0.5 * error.repeat_interleave(2)
        intervals, sums = _finish(sums, halves, after, error, twice)
    error = torch.where(sums.total == 0.0, 0.0, sums.error / sums.total)
    return LogIntegral(sums.peak + sums.total.log(), error, error <= tolerance)


class _Intervals(NamedTuple):
    """Intervals of several functions, ``k`` in all."""

    function: Tensor  # number of the function, (k,)
    left: Tensor  # (k,)
    width: Tensor  # (k,)
    log_f: Tensor  # at the left end, the middle and the right end, (k, 3)


class _Sums(NamedTuple):
    """Of the intervals that are done, relative to the exponential of the peak."""

    peak: Tensor  # largest logarithm that was seen, (n,)
    total: Tensor  # (n,)
    error: Tensor  # (n,)


def _start(log_f: Callable[[Tensor, Tensor], Tensor], grid: Tensor) -> tuple[_Intervals, _Sums]:
    """All intervals of a grid."""
    index = torch.arange(len(grid), device=grid.device)
    ends, middles = log_f(index, grid), log_f(index, 0.5 * (grid[:, 1:] + grid[:, :-1]))
    peak = torch.maximum(ends.amax(-1), middles.amax(-1))
    peak = torch.where(peak == -math.inf, 0.0, peak)
    intervals = _Intervals(
        index.repeat_interleave(middles.shape[1]),
        grid[:, :-1].flatten(),
        (grid[:, 1:] - grid[:, :-1]).flatten(),
        torch.stack([ends[:, :-1], middles, ends[:, 1:]], -1).flatten(0, 1),
    )
    return intervals, _Sums(peak, torch.zeros_like(peak), torch.zeros_like(peak))


def _rules(intervals: _Intervals, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Trapezoidal and Simpson's rule on each interval, shape ``(k,)``."""
    left, middle, right = (intervals.log_f - peak[intervals.function, None]).exp().unbind(-1)
    ends = intervals.width * (left + right)
    return 0.5 * ends, (ends + 4.0 * intervals.width * middle) / 6.0


def _split(intervals: _Intervals, new: Tensor) -> _Intervals:
    """Halve intervals, given the function at the middles of their halves, shape ``(k, 2)``."""
    left, middle, right = intervals.log_f.unbind(-1)
    log_f = [left, new[:, 0], middle, middle, new[:, 1], right]
    width = 0.5 * intervals.width
    return _Intervals(
        intervals.function.repeat_interleave(2),
        torch.stack([intervals.left, intervals.left + width], -1).flatten(),
        width.repeat_interleave(2),
        torch.stack(log_f, -1).view(-1, 3),
    )


def _raise_peak(sums: _Sums, function: Tensor, new: Tensor) -> _Sums:
    """Where new values, shape ``(k, 2)``, are higher, make sums relative to these."""
    peak = sums.peak.scatter_reduce(0, function, new.amax(-1), "amax")
    factor = (sums.peak - peak).exp()
    return _Sums(peak, sums.total * factor, sums.error * factor)


def _finish(
    sums: _Sums, intervals: _Intervals, value: Tensor, error: Tensor, is_done: Tensor
) -> tuple[_Intervals, _Sums]:
    """Add intervals that are done to the sums; the others stay."""
    done, number = intervals.function[is_done], len(sums.total)
    total = sums.total + _sum_by(done, value[is_done], number)
    errors = sums.error + _sum_by(done, error[is_done], number)
    others = _Intervals(*(values[~is_done] for values in intervals))
    return others, _Sums(sums.peak, total, errors)


def _sum_by(function: Tensor, values: Tensor, number: int) -> Tensor:
    """Sums of the values of each function, shape ``(number,)``."""
    return values.new_zeros(number).index_add_(0, function, values)


def halve(points: Tensor, middles: Tensor) -> Tensor:
    """
    Put values at the middles of intervals between those at their ends.

    :param Tensor points: shape ``(..., m)``.
    :param Tensor middles: shape ``(..., m - 1)``.
    :returns: shape ``(..., 2 m - 1)``.
    """
    pairs = torch.stack([points[..., :-1], middles], -1).flatten(-2)
    return torch.cat([pairs, points[..., -1:]], -1)
