r"""Initial points on the manifold, from prior draws.

A prior draw :math:`u_0` is moved to a nearby solution of :math:`c(u) = 0` by damped
minimum-norm Gauss-Newton steps

.. math:: \delta = -J^\top (JJ^\top + \mu I)^{-1} c(u)

with rows of :math:`J` scaled to unit length, so that a residual counts as the distance by which
the inputs have to move. For linear generators and Gaussian inputs the nearest solution is an
exact posterior draw (Matheron's rule), and near it otherwise: the chains start spread out, where
they belong.

Simulators run from prior draws often explode, and a Newton step from an exploded output is
useless. Constraints are therefore met progressively, in the order in which the model
registers them: a stage solves the leading constraints only, and grows while that succeeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..dynamics.projection import BatchFunction, Tolerances
from ..jacobian.structure import is_small
from .linearization import DenseLinearization, Linearize

__all__ = ["InitialPoints", "find_initial_points"]

_MAX_JACOBIANS = 150
_STAGE_STEPS = 8  # of a stage that can still be made smaller
_PATIENT_STEPS = 40  # of a stage that cannot
_SMALL_STAGE = 3  # constraints by which the smallest stages grow
_LONGEST_STEP = 2.0  # largest change of any input in one step, in standard deviations
_HALVINGS = 6
_STAGE_DISTANCE = 1e-2  # an intermediate stage is done at this distance from its solution


class InitialPoints(NamedTuple):
    """Where chains start; positions of chains that are not found do not solve the constraint."""

    position: Tensor  # (chains, dim)
    residual: Tensor  # (chains, num_constraints), signed
    is_found: Tensor  # (chains,) bool


class _Search(NamedTuple):
    """State of the progressive search, one row per chain."""

    position: Tensor
    saved: Tensor  # where the last stage ended
    solved: Tensor  # leading constraints that are met at ``saved``
    target: Tensor  # leading constraints that the current stage is to meet
    steps: Tensor  # steps taken in the current stage
    is_found: Tensor
    is_lost: Tensor


def find_initial_points(
    constraint: BatchFunction,
    jacobian_matrix: BatchFunction,
    draw: Callable[[int], Tensor],
    num_chains: int,
    tolerances: Tolerances,
    *,
    max_tries: int = 3,
    linearize: Linearize | None = None,
    solve_blocks: BatchFunction | None = None,
) -> InitialPoints:
    """
    Find a solution of the constraint near a prior draw, for every chain.

    Chains for which the search fails are drawn again; those that still fail after
    ``max_tries`` draws have their local blocks solved, where there are any, and are given to
    SciPy's least-squares solver as the last resort, unless there are too many outputs for its
    dense matrices.

    :param constraint: batched constraint.
    :param jacobian_matrix: batched Jacobian.
    :param draw: returns a number of prior draws, ``(number, dim)``.
    :param int num_chains: points to find.
    :param tolerances: when a residual counts as zero.
    :param int max_tries: prior draws to try for each chain.
    :param linearize: linearises the constraint; by default by ``jacobian_matrix``.
    :param solve_blocks: moves the local inputs of a batch of points to solve the constraint for
        their global ones.
    :returns: the points, with a flag per chain.
    """
    if linearize is None:

        def linearize(position: Tensor) -> DenseLinearization:
            return DenseLinearization(jacobian_matrix(position))

    points = _search(constraint, linearize, draw(num_chains), tolerances)
    for _ in range(max_tries - 1):
        lost = (~points.is_found).nonzero().squeeze(-1)
        if len(lost) == 0:
            return points
        retry = _search(constraint, linearize, draw(len(lost)), tolerances)
        points = _replace(points, lost, retry)
    lost = (~points.is_found).nonzero().squeeze(-1)
    if len(lost) == 0:
        return points
    if solve_blocks is not None:
        retry = _search(constraint, linearize, solve_blocks(draw(len(lost))), tolerances)
        points = _replace(points, lost, retry)
        lost = (~points.is_found).nonzero().squeeze(-1)
        if len(lost) == 0:
            return points
    if not is_small((points.residual.shape[-1], points.position.shape[-1])):
        return points
    retry = _least_squares(constraint, jacobian_matrix, points.position[lost], tolerances)
    return _replace(points, lost, retry)


def _replace(points: InitialPoints, index: Tensor, new: InitialPoints) -> InitialPoints:
    return InitialPoints(
        *(old.index_copy(0, index, n) for old, n in zip(points, new, strict=True))
    )


def _search(
    constraint: BatchFunction,
    linearize: Linearize,
    start: Tensor,
    tolerances: Tolerances,
) -> InitialPoints:
    """The progressive Gauss-Newton search from one batch of starts."""
    residual = constraint(start)
    counts = torch.zeros(len(start), dtype=torch.long, device=start.device)
    flags = torch.zeros_like(counts, dtype=torch.bool)
    target = counts + residual.shape[-1]
    search = _Search(start, start, counts, target, counts, flags, flags)
    for _ in range(_MAX_JACOBIANS):
        search = _search_step(constraint, linearize, search, tolerances)
        if (search.is_found | search.is_lost).all():
            break
    return InitialPoints(search.position, constraint(search.position), search.is_found)


def _search_step(
    constraint: BatchFunction,
    linearize: Linearize,
    search: _Search,
    tolerances: Tolerances,
) -> _Search:
    residual, linearization = constraint(search.position), linearize(search.position)
    is_finite = residual.isfinite() & linearization.finite_rows()
    rows = _leading_rows(is_finite, search.target)
    delta, norms = linearization.damped_step(residual, rows)
    is_all = rows.all(-1)
    is_met = (residual.abs() <= tolerances.constraint).all(-1)
    is_met &= delta.abs().amax(-1) <= tolerances.position
    is_found = search.is_found | (is_all & is_met)
    is_stage_done = ~is_all & (delta.abs().amax(-1) <= _STAGE_DISTANCE) & rows.any(-1)
    position, is_moved = _line_search(constraint, search.position, residual, delta, rows, norms)
    is_small = rows.sum(-1) - search.solved <= _SMALL_STAGE
    patience = torch.where(is_small, _PATIENT_STEPS, _STAGE_STEPS)
    is_stuck = ~is_stage_done & (~is_moved | (search.steps >= patience) | ~rows.any(-1))
    return _next_stage(search, rows.sum(-1), position, is_found, is_stage_done, is_stuck)


def _next_stage(
    search: _Search,
    num_rows: Tensor,
    position: Tensor,
    is_found: Tensor,
    is_stage_done: Tensor,
    is_stuck: Tensor,
) -> _Search:
    """Grow the stage where it succeeded, shrink it where it failed."""
    is_running = ~(is_found | search.is_lost)
    is_done, is_stuck = is_stage_done & is_running, is_stuck & is_running
    solved = torch.where(is_done, torch.maximum(num_rows, search.solved), search.solved)
    saved = torch.where(is_done.unsqueeze(-1), search.position, search.saved)
    grown = 2 * num_rows + 1
    shrunk = solved + (torch.minimum(search.target, num_rows.clamp(min=1)) - solved) // 3
    is_lost = search.is_lost | (is_stuck & (shrunk <= solved))
    target = torch.where(is_done, grown, torch.where(is_stuck, shrunk, search.target))
    back = torch.where(is_stuck.unsqueeze(-1), saved, position)
    back = torch.where(is_done.unsqueeze(-1), search.position, back)
    return _Search(
        position=torch.where(is_running.unsqueeze(-1), back, search.position),
        saved=saved,
        solved=solved,
        target=target,
        steps=torch.where(is_done | is_stuck, 0, search.steps + 1),
        is_found=is_found,
        is_lost=is_lost,
    )


def _leading_rows(is_finite: Tensor, target: Tensor) -> Tensor:
    """Constraints up to ``target`` before the first one that is not finite."""
    order = torch.arange(is_finite.shape[-1], device=is_finite.device)
    return (is_finite.long().cumprod(-1) > 0) & (order < target.unsqueeze(-1))


def _line_search(
    constraint: BatchFunction,
    position: Tensor,
    residual: Tensor,
    delta: Tensor,
    rows: Tensor,
    norms: Tensor,
) -> tuple[Tensor, Tensor]:
    """Halve the step until the scaled residual falls; also says which chains moved."""

    def merit(value: Tensor) -> Tensor:
        return (torch.where(rows, value, 0.0) / norms).norm(dim=-1)

    longest = delta.abs().amax(-1, keepdim=True)
    delta = delta * (_LONGEST_STEP / longest.clamp(min=_LONGEST_STEP))
    before = merit(residual)
    is_moved = torch.zeros_like(before, dtype=torch.bool)
    result = position
    for _ in range(_HALVINGS):
        trial = position + delta
        is_better = (merit(constraint(trial)) < before) & ~is_moved
        result = torch.where(is_better.unsqueeze(-1), trial, result)
        is_moved |= is_better
        if is_moved.all():
            break
        delta = 0.5 * delta
    return result, is_moved


def _least_squares(
    constraint: BatchFunction,
    jacobian_matrix: BatchFunction,
    start: Tensor,
    tolerances: Tolerances,
) -> InitialPoints:
    """Trust-region least squares through SciPy, chain by chain; slow, and the last resort."""
    # here and not at the top: importing SciPy's special functions changes the warning filters
    import scipy.optimize

    def residual(u: np.ndarray) -> np.ndarray:
        value = constraint(torch.as_tensor(u).to(start).unsqueeze(0))[0]
        return np.nan_to_num(value.double().cpu().numpy(), nan=1e100, posinf=1e100, neginf=-1e100)

    def derivative(u: np.ndarray) -> np.ndarray:
        matrix = jacobian_matrix(torch.as_tensor(u).to(start).unsqueeze(0))[0]
        return np.nan_to_num(matrix.double().cpu().numpy(), nan=0.0, posinf=1e100, neginf=-1e100)

    # SciPy's own tolerances stop short of ours, and it raises at starts that are not finite
    options = {"x_scale": "jac", "max_nfev": 100, "ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15}
    solutions = [
        scipy.optimize.least_squares(residual, row, derivative, **options).x
        for row in start.nan_to_num(0.0, 0.0, 0.0).double().cpu().numpy()
    ]
    position = torch.as_tensor(np.stack(solutions)).to(start)
    value = constraint(position)
    return InitialPoints(position, value, (value.abs() <= tolerances.constraint).all(-1))
