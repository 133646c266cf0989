r"""Projection of a free step back onto the constraint manifold.

Given a point :math:`\tilde u` and the Jacobian :math:`J_0` at the point the step started from,
each method solves :math:`c(\tilde u - J_0^\top\lambda) = 0` for the multipliers
:math:`\lambda`. A chain for which a method fails is reported, never raised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..jacobian.structure import Jacobian
from .broyden import Steps, broyden_step

__all__ = [
    "BatchFunction",
    "Equations",
    "Projection",
    "Projector",
    "Tolerances",
    "hybrid",
    "newton",
    "quasi_newton",
]

BatchFunction = Callable[[Tensor], Tensor]
# Entries of a Jacobian that is worth making a matrix of, chain by chain.
_LARGEST_MATRIX = 10**6
# A residual this many times the first one means that the iteration runs away.
_RUNAWAY = 1e3
# Iterations in which the residual should at least halve once.
_STALLED_AFTER = 10


class Equations(NamedTuple):
    """What there is to solve, for a batch of positions."""

    constraint: BatchFunction
    """Residuals, ``(chains, num_constraints)``."""

    correction: Callable[[Tensor, Jacobian], tuple[Tensor, Tensor]]
    """Residuals, and the shortest step by which a linear constraint would meet them."""

    slopes: Callable[[Tensor], Any]
    """Jacobians, as :meth:`.Jacobian.newton_step` takes them."""


class Tolerances(NamedTuple):
    """When a projection counts as solved."""

    constraint: Tensor
    """Largest residual of each constraint, in units of the output, ``(num_constraints,)``."""

    position: float
    """Largest next update of any input, in standard deviations of the input."""

    reverse: float
    """Largest distance between a point and the point retraced from its successor."""

    max_iters: int
    """Most iterations of one projection."""


class Projection(NamedTuple):
    """Result of projecting a batch of points."""

    position: Tensor  # (chains, dim)
    residual: Tensor  # (chains,) largest |c| there
    iterations: Tensor  # (chains,) evaluations of the constraint
    is_converged: Tensor  # (chains,) bool


Projector = Callable[[Equations, Tensor, Jacobian, Tolerances], Projection]


def quasi_newton(
    equations: Equations,
    start: Tensor,
    jacobian: Jacobian,
    tolerances: Tolerances,
) -> Projection:
    r"""
    Symmetric quasi-Newton iteration :math:`u \leftarrow u - J_0^\top(J_0J_0^\top)^{-1}c(u)`.

    The Gram matrix at the start of the step stands in for :math:`J(u)J_0^\top`, so that an
    iteration costs one evaluation of the constraint and one product with a matrix that is
    already there (Graham and Storkey 2017, algorithm 1, lines 21-26). From the second iteration
    on, Broyden's updates learn from the steps so far how the Jacobian has changed, which costs a
    few scalar products and saves four iterations out of ten on a typical simulator.

    :param equations: the constraint.
    :param Tensor start: points to project, ``(chains, dim)``.
    :param jacobian: factorised Jacobian at the points the step started from.
    :param tolerances: when to stop.
    """

    def correction(position: Tensor) -> tuple[Tensor, Tensor]:
        return equations.correction(position, jacobian)

    return _iterate(correction, start, tolerances, learns=True)


def newton(
    equations: Equations,
    start: Tensor,
    jacobian: Jacobian,
    tolerances: Tolerances,
) -> Projection:
    r"""
    Newton's iteration :math:`u \leftarrow u - J_0^\top(J(u)J_0^\top)^{-1}c(u)`.

    Fewer iterations than :func:`quasi_newton`, each with a new Jacobian and a linear solve;
    worth it where the constraint curves strongly within one step. Arguments as there.
    """

    def correction(position: Tensor) -> tuple[Tensor, Tensor]:
        residual = equations.constraint(position)
        return residual, jacobian.newton_step(equations.slopes(position), residual)

    return _iterate(correction, start, tolerances)


def _iterate(
    correction: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    tolerances: Tolerances,
    *,
    learns: bool = False,
) -> Projection:
    """Subtract corrections until they are small; ``learns`` adds Broyden's updates."""
    position = start
    history = Steps()
    is_active = torch.ones(len(start), dtype=torch.bool, device=start.device)
    is_converged = torch.zeros_like(is_active)
    iterations = torch.zeros(len(start), dtype=torch.long, device=start.device)
    largest = torch.full_like(start[:, 0], torch.inf)
    first_error, best_error, best_at = largest, largest, torch.zeros_like(iterations)
    for i in range(tolerances.max_iters + 1):
        residual, delta = correction(position)
        error = (residual.abs() / tolerances.constraint).amax(-1)
        first_error = error if i == 0 else first_error
        is_better = error <= 0.5 * best_error
        best_error = torch.where(is_better, error, best_error)
        best_at = torch.where(is_better, i, best_at)
        iterations += is_active
        largest = torch.where(is_active, residual.abs().amax(-1), largest)
        is_solved = (error <= 1) & (delta.abs().amax(-1) <= tolerances.position)
        is_converged |= is_active & is_solved
        # comparisons with NaN are false, so a non-finite chain drops out here
        is_active = is_active & ~is_solved & (error <= _RUNAWAY * first_error.clamp(min=1.0))
        # without a solution on its line an iteration wanders until it is stopped
        is_active &= i - best_at < _STALLED_AFTER
        if not is_active.any():
            break
        step = -delta
        if learns:
            step, history = broyden_step(history, delta)
        position = torch.where(is_active.unsqueeze(-1), position + step, position)
    return Projection(position, largest, iterations, is_converged)


def hybrid(
    equations: Equations,
    start: Tensor,
    jacobian: Jacobian,
    tolerances: Tolerances,
) -> Projection:
    r"""
    Powell's hybrid method on the multipliers, chain by chain, through MINPACK in SciPy.

    Slow and robust: the fallback for chains on which an iteration above failed. The result is
    accepted only if it meets the same tolerances. Where the matrices that MINPACK factorises would
    be too large it is :func:`newton`. Arguments as in :func:`quasi_newton`.
    """
    if start.shape[-1] * len(tolerances.constraint) > _LARGEST_MATRIX:
        return newton(equations, start, jacobian, tolerances)

    def matrix(position: Tensor) -> Tensor:
        return jacobian.dense_slopes(equations.slopes(position))

    results = [
        _hybrid_single(equations.constraint, matrix, point, own, tolerances)
        for point, own in zip(start, jacobian.dense(), strict=True)
    ]
    position = torch.stack([result[0] for result in results])
    # an update from the old Gram matrix, to judge the error in the units of the inputs
    residual, delta = equations.correction(position, jacobian)
    is_converged = (residual.abs() <= tolerances.constraint).all(-1)
    is_converged &= delta.abs().amax(-1) <= tolerances.position
    iterations = torch.tensor([result[1] for result in results], device=start.device)
    return Projection(position, residual.abs().amax(-1), iterations, is_converged)


def _hybrid_single(
    constraint: BatchFunction,
    jacobian_matrix: BatchFunction,
    start: Tensor,
    matrix: Tensor,
    tolerances: Tolerances,
) -> tuple[Tensor, int]:
    # residuals and multipliers in units of distance in input space: MINPACK's trust region
    # stalls when either is many orders of magnitude from one
    lengths = matrix.norm(dim=-1)
    rows = matrix / lengths.unsqueeze(-1)

    def position(multipliers: np.ndarray) -> Tensor:
        return start - torch.as_tensor(multipliers).to(start) @ rows

    def residual(multipliers: np.ndarray) -> np.ndarray:
        value = constraint(position(multipliers).unsqueeze(0))[0] / lengths
        return np.nan_to_num(value.double().cpu().numpy(), nan=1e100, posinf=1e100, neginf=-1e100)

    def derivative(multipliers: np.ndarray) -> np.ndarray:
        full = -jacobian_matrix(position(multipliers).unsqueeze(0))[0] @ rows.mT
        scaled = (full / lengths.unsqueeze(-1)).double().cpu().numpy()
        return np.nan_to_num(scaled, nan=0.0, posinf=1e100, neginf=-1e100)

    # here and not at the top: importing SciPy's special functions changes the warning filters
    import scipy.optimize

    solution = scipy.optimize.root(
        residual,
        np.zeros(len(rows)),
        jac=derivative,
        method="hybr",
        options={"xtol": 1e-14, "maxfev": 4 * tolerances.max_iters},
    )
    return position(solution.x), int(solution.nfev)
