"""Adam for many independent problems at once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from .rows import BestPoints, Objective, RowsResult, RowStatus, evaluate

__all__ = ["minimize_adam"]

_RUNNING = -1
_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8


def minimize_adam(
    objective: Objective,
    start: Tensor,
    *,
    max_iter: int = 1000,
    gradient_tol: float = 1e-6,
    value_tol: float = 1e-6,
    learning_rate: float = 0.02,
    patience: int = 100,
    validate: Callable[[Tensor], Tensor] | None = None,
    callback: Callable[[Tensor, Tensor], None] | None = None,
) -> RowsResult:
    """
    Minimise one function per row by Adam, each row with its own end.

    A row whose value or gradient is not finite goes back to its best point with half the step.

    :param objective: from points, shape ``(rows, size)``, to values, shape ``(rows,)``, and
        gradients. No row may depend on another.
    :param Tensor start: shape ``(rows, size)``.
    :param int max_iter: most steps of a row.
    :param float gradient_tol: a row is done when no element of its gradient is larger.
    :param float value_tol: a row is done when ``patience`` steps gained less than this, relative
        to the value or to 1 if that is larger.
    :param float learning_rate: size of the steps.
    :param int patience: steps after which a gain is asked for.
    :param validate: from points to other values, for example on other data: every few evaluations
        the points are compared by it, and a row stops when they are no longer better.
    :param callback: called after each evaluation with the best values and which rows still run.
    :returns: the best point of every row, never worse than its start.

    Reference: Kingma and Ba 2015, "Adam: a method for stochastic optimization", algorithm 1.
    """
    point = start.clone()
    value, gradient, finite = evaluate(objective, point)
    best, reference = BestPoints(point, value, validate), value.clone()
    status = torch.full_like(value, _RUNNING, dtype=torch.long)
    status[~finite] = RowStatus.NOT_FINITE
    rate = torch.full_like(value, learning_rate)
    first, second = torch.zeros_like(start), torch.zeros_like(start)
    num_steps, since_gain = torch.zeros_like(status), torch.zeros_like(status)
    for num_evaluations in count(1):
        running = status == _RUNNING
        is_done = (gradient.abs().amax(-1) <= gradient_tol) & finite
        status[running & is_done] = RowStatus.CONVERGED
        status[running & (since_gain >= patience)] = RowStatus.CONVERGED
        running = status == _RUNNING
        status[running & (num_evaluations > max_iter)] = RowStatus.MAX_ITERATIONS
        running = status == _RUNNING
        if callback is not None:
            callback(best.trace[-1], running)
        if not bool(running.any()):
            break
        moves = running & finite
        num_steps += moves
        first = torch.where(moves[:, None], _BETA1 * first + (1 - _BETA1) * gradient, first)
        squares = _BETA2 * second + (1 - _BETA2) * gradient.square()
        second = torch.where(moves[:, None], squares, second)
        step = _step(first, second, num_steps) * rate[:, None]
        point = torch.where(moves[:, None], point - step, point)

        value, gradient, finite = evaluate(objective, point)
        stops = best.update(point, value)
        status[stops & running] = RowStatus.STOPPED_EARLY
        lowest = best.trace[-1]
        gained = reference - lowest > value_tol * lowest.abs().clamp(min=1.0)
        reference = torch.where(gained, lowest, reference)
        since_gain = torch.where(gained, torch.zeros_like(since_gain), since_gain + 1)
        lost = running & ~finite
        if bool(lost.any()):
            rate = torch.where(lost, 0.5 * rate, rate)
            point = torch.where(lost[:, None], best.point, point)
            first = torch.where(lost[:, None], torch.zeros_like(first), first)
            value_at_best, gradient_at_best, finite_at_best = evaluate(objective, point)
            value = torch.where(lost, value_at_best, value)
            gradient = torch.where(lost[:, None], gradient_at_best, gradient)
            finite = torch.where(lost, finite_at_best, finite)
    best.finish(point, value)
    return RowsResult(
        point=best.point,
        value=best.value,
        status=status,
        num_iterations=num_steps,
        num_evaluations=len(best.trace),
        trace=torch.stack(best.trace),
    )


def _step(first: Tensor, second: Tensor, num_steps: Tensor) -> Tensor:
    """The corrected moments' quotient; a row that has not moved has none."""
    n = num_steps.clamp(min=1)[:, None].to(first.dtype)
    return (first / (1 - _BETA1**n)) / ((second / (1 - _BETA2**n)).sqrt() + _EPS)
