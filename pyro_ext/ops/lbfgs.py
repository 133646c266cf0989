"""L-BFGS for many independent problems at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .rows import BestPoints, Objective, RowsResult, RowStatus, evaluate

__all__ = ["minimize_lbfgs"]

_SUFFICIENT_DECREASE = 1e-4
_CURVATURE = 0.9
_MAX_TRIALS = 25
_MAX_STEP = 1e8
_SMALL_GAINS = 3  # in a row, before a row counts as converged
_RUNNING = -1


def minimize_lbfgs(
    objective: Objective,
    start: Tensor,
    *,
    max_iter: int = 500,
    gradient_tol: float = 1e-6,
    value_tol: float = 1e-9,
    history: int = 10,
    validate: Callable[[Tensor], Tensor] | None = None,
    callback: Callable[[Tensor, Tensor], None] | None = None,
) -> RowsResult:
    r"""
    Minimise one function per row, all rows by the same calls of the objective.

    Every row has its own history, its own line search and its own end, and is where its own
    L-BFGS would be: each call of the objective evaluates the next trial point of every row that
    is not done yet, whether that is a first step for it or a further trial. A row accepts a step
    of size t along its direction p if it fulfils the weak Wolfe conditions

    .. math:: f(x + t p) \le f(x) + 10^{-4}\, t\, p^\top \nabla f(x), \qquad
        p^\top \nabla f(x + t p) \ge 0.9\, p^\top \nabla f(x),

    found by doubling and bisection, which also gets back from where the objective is not finite.

    :param objective: from points, shape ``(rows, size)``, to values, shape ``(rows,)``, and
        gradients. No row may depend on another.
    :param Tensor start: shape ``(rows, size)``.
    :param int max_iter: most steps of a row.
    :param float gradient_tol: a row is done when no element of its gradient is larger.
    :param float value_tol: a row is done when three steps in a row gained less than this, relative
        to the value or to 1 if that is larger.
    :param int history: pairs of steps and changes of the gradient that are remembered.
    :param validate: from points to other values, for example on other data: every few evaluations
        the points are compared by it, and a row stops when they are no longer better.
    :param callback: called after each evaluation with the best values and which rows still run.
    :returns: the best point of every row, never worse than its start.

    Reference: Liu and Nocedal 1989, "On the limited memory BFGS method for large scale
    optimization"; Lewis and Overton 2013, "Nonsmooth optimization via quasi-Newton methods",
    algorithm 2.6, for the line search.

    >>> from pyro_ext.ops.lbfgs import minimize_lbfgs
    >>> centre = torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    >>> objective = lambda x: ((x - centre).square().sum(-1), 2 * (x - centre))
    >>> result = minimize_lbfgs(objective, torch.zeros(2, 2))
    >>> torch.testing.assert_close(result.point, centre)
    """
    value, gradient, finite = evaluate(objective, start)
    status = torch.full_like(value, _RUNNING, dtype=torch.long)
    status[~finite] = RowStatus.NOT_FINITE
    status[finite & (gradient.abs().amax(-1) <= gradient_tol)] = RowStatus.CONVERGED
    memory = _Memory(start, history)
    search = _first_search(gradient, slice(None))
    point, best = start.clone(), BestPoints(start, value, validate)
    num_iterations, small_gains = torch.zeros_like(status), torch.zeros_like(status)
    while True:
        running = status == _RUNNING
        if callback is not None:
            callback(best.trace[-1], running)
        if not bool(running.any()):
            break
        step = torch.where(running, search.step, torch.zeros_like(search.step))
        trial = point + step[:, None] * search.direction
        trial_value, trial_gradient, _ = evaluate(objective, trial)
        decrease, is_accepted = _check_wolfe(search, value, trial_value, trial_gradient)
        is_accepted &= running
        search = _next_trial(search, value, trial_value, decrease)
        accepted = is_accepted.nonzero().squeeze(-1)
        gain = value[accepted] - trial_value[accepted]
        memory.append(
            accepted,
            trial[accepted] - point[accepted],
            trial_gradient[accepted] - gradient[accepted],
        )
        point[accepted] = trial[accepted]
        value[accepted] = trial_value[accepted]
        gradient[accepted] = trial_gradient[accepted]
        num_iterations[accepted] += 1

        scale = value[accepted].abs().clamp(min=1.0)
        small_gains[accepted] = torch.where(
            gain <= value_tol * scale, small_gains[accepted] + 1, torch.zeros_like(accepted)
        )
        is_done = gradient[accepted].abs().amax(-1) <= gradient_tol
        is_done |= small_gains[accepted] >= _SMALL_GAINS
        out_of_steps = num_iterations[accepted] >= max_iter
        status[accepted] = torch.where(
            is_done,
            int(RowStatus.CONVERGED),
            torch.where(out_of_steps, int(RowStatus.MAX_ITERATIONS), _RUNNING),
        )
        stops = best.update(point, value)
        status[stops & (status == _RUNNING)] = RowStatus.STOPPED_EARLY
        search.restart(accepted, memory.direction(accepted, gradient[accepted]), gradient)

        failed = (running & ~is_accepted & (search.num_trials >= _MAX_TRIALS)).nonzero()
        _give_up(failed.squeeze(-1), memory, search, gradient, status)
    best.finish(point, value)
    return RowsResult(
        point=best.point,
        value=best.value,
        status=status,
        num_iterations=num_iterations,
        num_evaluations=len(best.trace),
        trace=torch.stack(best.trace),
    )


class _Search(NamedTuple):
    """The line search that every row is in; the tensors are changed in place."""

    direction: Tensor
    slope: Tensor
    step: Tensor
    low: Tensor  # the largest step that decreased the value enough
    high: Tensor  # the smallest one that did not
    num_trials: Tensor

    def restart(self, rows: Tensor, direction: Tensor, gradient: Tensor) -> None:
        """Begin a new search in some rows, of unit length at first."""
        slope = (direction * gradient[rows]).sum(-1)
        downhill = (slope < 0) & direction.isfinite().all(-1)
        steepest = _first_search(gradient, rows)
        self.direction[rows] = torch.where(downhill[:, None], direction, steepest.direction)
        self.slope[rows] = torch.where(downhill, slope, steepest.slope)
        self.step[rows] = torch.where(downhill, torch.ones_like(slope), steepest.step)
        self.low[rows] = steepest.low
        self.high[rows] = steepest.high
        self.num_trials[rows] = 0


def _first_search(gradient: Tensor, rows: Tensor | slice) -> _Search:
    """Steepest descent, with a first step of about unit length at most."""
    gradient = gradient[rows]
    slope = -gradient.square().sum(-1)
    return _Search(
        direction=-gradient,
        slope=slope,
        step=1.0 / gradient.abs().sum(-1).clamp(min=1.0),
        low=torch.zeros_like(slope),
        high=torch.full_like(slope, float("inf")),
        num_trials=torch.zeros_like(slope, dtype=torch.long),
    )


def _check_wolfe(
    search: _Search, value: Tensor, trial_value: Tensor, trial_gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Whether the value has decreased enough, and whether the step can be accepted."""
    # Where the value is resolved no better than this, a decrease cannot be seen.
    resolution = torch.finfo(value.dtype).eps * value.abs()
    enough = value + _SUFFICIENT_DECREASE * search.step * search.slope + resolution
    decrease = trial_value <= enough
    trial_slope = (trial_gradient * search.direction).sum(-1)
    flatter = trial_slope >= _CURVATURE * search.slope
    # When the trials are used up, what has decreased enough is good enough.
    is_last = (search.num_trials >= _MAX_TRIALS - 1) | (search.step >= _MAX_STEP)
    return decrease, decrease & (flatter | is_last)


def _next_trial(search: _Search, value: Tensor, trial_value: Tensor, decrease: Tensor) -> _Search:
    """Double the step until the minimum is enclosed, then halve the interval."""
    step = search.step
    low = torch.where(decrease, step, search.low)
    high = torch.where(decrease, search.high, step)
    # At the first failure a parabola through what is known says more than the middle.
    excess = trial_value - value - search.slope * step
    parabola = -0.5 * search.slope * step.square() / excess
    inside = torch.where(
        trial_value.isfinite() & (low == 0),
        torch.maximum(torch.minimum(parabola, 0.5 * high), 0.1 * high),
        torch.where(trial_value.isfinite(), 0.5 * (low + high), 0.75 * low + 0.25 * high),
    )
    num_trials = search.num_trials + 1
    # The last trial is one that is known to decrease the value, if there is any.
    is_last = (num_trials == _MAX_TRIALS - 1) & (low > 0)
    next_step = torch.where(high.isinf(), 2.0 * step, inside)
    return search._replace(
        step=torch.where(is_last, low, next_step), low=low, high=high, num_trials=num_trials
    )


def _give_up(
    rows: Tensor, memory: _Memory, search: _Search, gradient: Tensor, status: Tensor
) -> None:
    """Rows without a step that helps try steepest descent once, and end if they just did."""
    if not len(rows):
        return
    is_steepest = memory.count[rows] == 0
    status[rows[is_steepest]] = int(RowStatus.STALLED)
    again = rows[~is_steepest]
    memory.count[again] = 0
    search.restart(again, torch.full_like(gradient[again], float("nan")), gradient)


class _Memory:
    """The latest steps and changes of the gradient of every row, in a ring."""

    def __init__(self, start: Tensor, size: int) -> None:
        rows = len(start)
        self.size = size
        self.steps = start.new_zeros(size, *start.shape)
        self.changes = start.new_zeros(size, *start.shape)
        self.inverse_curvature = start.new_zeros(size, rows)
        self.next = torch.zeros(rows, dtype=torch.long, device=start.device)
        self.count = torch.zeros_like(self.next)

    def append(self, rows: Tensor, step: Tensor, change: Tensor) -> None:
        """Remember a pair in some rows, where it has positive curvature."""
        curvature = (step * change).sum(-1)
        eps = torch.finfo(step.dtype).eps
        useful = curvature > eps * step.norm(dim=-1) * change.norm(dim=-1)
        rows, step, change, curvature = (v[useful] for v in (rows, step, change, curvature))
        slot = self.next[rows]
        self.steps[slot, rows] = step
        self.changes[slot, rows] = change
        self.inverse_curvature[slot, rows] = curvature.reciprocal()
        self.next[rows] = (slot + 1) % self.size
        self.count[rows] = (self.count[rows] + 1).clamp(max=self.size)

    def direction(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """The two loops of Liu and Nocedal's algorithm 2.1."""
        q = gradient.clone()
        count = self.count[rows]
        pairs: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for i in range(int(count.max()) if len(rows) else 0):
            slot = (self.next[rows] - 1 - i) % self.size
            # a pair that a row does not have yet changes nothing
            weight = self.inverse_curvature[slot, rows] * (i < count)
            step, change = self.steps[slot, rows], self.changes[slot, rows]
            alpha = weight * (step * q).sum(-1)
            q -= alpha[:, None] * change
            pairs.append((step, change, weight, alpha))
        if pairs:
            _, change, weight, _ = pairs[0]
            scale = 1.0 / (weight * change.square().sum(-1))
            q *= torch.where(count > 0, scale, torch.ones_like(scale))[:, None]
        for step, change, weight, alpha in reversed(pairs):
            beta = weight * (change * q).sum(-1)
            q += (alpha - beta)[:, None] * step
        return -q
