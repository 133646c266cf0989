"""Ordinary differential equations for many rows at once.

The Dormand-Prince method here takes steps of its own for every row: what a row comes out as does
not depend on the others, and rows that are done leave, so that one hard row does not make all of
them slow. Other methods, and gradients by the adjoint equation, come from ``torchdiffeq``, which
solves all rows as one system.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ADAPTIVE_METHODS",
    "EXCEEDED",
    "FIXED_METHODS",
    "METHODS",
    "NOT_FINITE",
    "OK",
    "ROWWISE",
    "Field",
    "OdeSolution",
    "integrate_jointly",
    "integrate_rows",
]

Field = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Derivatives from times ``(n,)``, states ``(n, m)`` and the numbers of the rows ``(n,)``."""

ROWWISE = "rowwise"
ADAPTIVE_METHODS = ("dopri5", "dopri8", "adaptive_heun")
FIXED_METHODS = ("euler", "midpoint", "heun3", "rk4")
METHODS = (ROWWISE, *ADAPTIVE_METHODS, *FIXED_METHODS)

OK, EXCEEDED, NOT_FINITE = 0, 1, 2

# Dormand and Prince 1980, in the form of Hairer, Nørsett and Wanner 1993, table II.5.2.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_ORDER = 5
_SAFETY, _SLOWEST, _FASTEST = 0.9, 0.2, 5.0


class OdeSolution(NamedTuple):
    """Where the rows of a system have come."""

    state: Tensor
    """Shape ``(n, m)``; what was reached, for rows that failed."""

    num_evaluations: Tensor
    """How often the field was evaluated for each row, shape ``(n,)``."""

    status: Tensor
    """0 for rows that arrived, 1 for those that ran out of evaluations, 2 for those whose
    derivatives were not finite, shape ``(n,)``."""

    time: Tensor
    """The time each row has reached, shape ``(n,)``."""


def integrate_rows(
    field: Field,
    state: Tensor,
    start: float,
    end: float,
    *,
    rtol: float,
    atol: float,
    max_evaluations: int,
) -> OdeSolution:
    """
    Integrate with a step size for every row, by the method of Dormand and Prince.

    The estimated error of a step is kept below ``atol + rtol * |state|`` in every element.
    Gradients flow through the steps that were accepted, with the memory of all of them.

    :param field: the derivatives; it is called with the rows that are still on their way.
    :param Tensor state: at the start, shape ``(n, m)``.
    :param float start: time to start at.
    :param float end: time to arrive at, before or after the start.
    :param float rtol: relative tolerance.
    :param float atol: absolute tolerance.
    :param int max_evaluations: rows that need more stop where they are.
    :returns: the solution.
    """
    num_rows = len(state)
    rows = torch.arange(num_rows, device=state.device)
    time = state.new_full((num_rows,), start)
    slope = field(time, state, rows)
    evaluations = torch.ones_like(rows)
    span = end - start
    step = _first_step(state.detach(), slope.detach(), span, rtol, atol)
    smallest = 16 * torch.finfo(state.dtype).eps * abs(span)
    done: list[tuple[Tensor, ...]] = []
    while len(rows):
        remaining = end - time
        is_last = step.abs() >= remaining.abs()
        h = torch.where(is_last, remaining, step)
        proposal, new_slope, error = _dormand_prince(field, time, state, slope, h, rows)
        evaluations = evaluations + len(_NODES)
        with torch.no_grad():
            scale = atol + rtol * torch.maximum(state.abs(), proposal.abs())
            norm = (error.abs() / scale).amax(-1)
            is_finite = norm.isfinite() & new_slope.isfinite().all(-1)
            accepted = is_finite & (norm <= 1)
            factor = (_SAFETY * norm.clamp_min(1e-10) ** (-1 / _ORDER)).clamp(_SLOWEST, _FASTEST)
            factor = torch.where(is_finite, factor, _SLOWEST)
            step = h * torch.where(accepted, factor, factor.clamp_max(1.0))
            is_stuck = ~is_finite & (step.abs() < smallest) | ~slope.isfinite().all(-1)
            arrived = accepted & is_last
            status = torch.where(is_stuck, NOT_FINITE, OK)
            is_over = ~arrived & ~is_stuck & (evaluations + len(_NODES) > max_evaluations)
            status = torch.where(is_over, EXCEEDED, status)
        time = torch.where(accepted, time + h, time)
        state = torch.where(accepted.unsqueeze(-1), proposal, state)
        slope = torch.where(accepted.unsqueeze(-1), new_slope, slope)
        leaves = arrived | (status != OK)
        if bool(leaves.any()):
            done.append(
                (rows[leaves], state[leaves], evaluations[leaves], status[leaves], time[leaves])
            )
            stays = ~leaves
            rows, state, slope = rows[stays], state[stays], slope[stays]
            evaluations, time, step = evaluations[stays], time[stays], step[stays]
    if not done:
        return OdeSolution(state, evaluations, rows, time)
    columns = [torch.cat(parts) for parts in zip(*done, strict=True)]
    order = columns[0].argsort()
    return OdeSolution(*(column[order] for column in columns[1:]))


def _dormand_prince(
    field: Field, time: Tensor, state: Tensor, slope: Tensor, h: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step: the new state, the derivative there, and the estimated error."""
    slopes = [slope]
    h_column = h.unsqueeze(-1)
    for node, weights in zip(_NODES, _STAGES, strict=True):
        stage = state + h_column * _combined(weights, slopes)
        slopes.append(field(time + node * h, stage, rows))
    return stage, slopes[-1], h_column * _combined(_ERROR, slopes)


def _combined(weights: Iterable[float], slopes: list[Tensor]) -> Tensor:
    terms = [weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]
    return sum(terms[1:], terms[0])


def _first_step(state: Tensor, slope: Tensor, span: float, rtol: float, atol: float) -> Tensor:
    """A small step, which the control of errors lengthens at once where that is too careful."""
    scale = atol + rtol * state.abs()
    distance, speed = (state.abs() / scale).amax(-1), (slope.abs() / scale).amax(-1)
    step = 0.01 * distance / speed.clamp_min(1e-10)
    return span * torch.nan_to_num(step / abs(span), nan=1e-4).clamp(1e-6, 0.1)


def integrate_jointly(
    field: Field,
    state: Tensor,
    start: float,
    end: float,
    *,
    method: str,
    rtol: float,
    atol: float,
    num_steps: int,
    max_evaluations: int,
    adjoint_parameters: tuple[Tensor, ...] | None = None,
) -> OdeSolution:
    """
    Integrate all rows with the same steps, by a method of ``torchdiffeq``.

    :param field: the derivatives.
    :param Tensor state: at the start, shape ``(n, m)``.
    :param float start: time to start at.
    :param float end: time to arrive at.
    :param str method: one of :data:`ADAPTIVE_METHODS`, where the worst row decides on the step,
        or of :data:`FIXED_METHODS`.
    :param float rtol: relative tolerance, of adaptive methods.
    :param float atol: absolute tolerance, of adaptive methods.
    :param int num_steps: steps of equal length, of the others.
    :param int max_evaluations: stop there; all rows have failed then.
    :param adjoint_parameters: gradients by the adjoint equation, to the state at the start and
        to these tensors; ``None`` for gradients through the steps.
    :returns: the solution.
    """
    # imported here, since SciPy, which it imports, changes the filters of warnings
    from torchdiffeq import odeint, odeint_adjoint

    rows = torch.arange(len(state), device=state.device)
    reached = torch.full_like(rows, OK)
    if not len(state):
        return OdeSolution(state, reached, reached, state.new_zeros(0))
    counter = _Counter(field, rows, max_evaluations)
    options: dict[str, Any] = {}
    if method in FIXED_METHODS:
        options["step_size"] = abs(end - start) / num_steps
    else:
        options["norm"] = _largest
        options["first_step"] = 1e-3 * abs(end - start)
    times = torch.tensor([start, end], dtype=state.dtype, device=state.device)
    arguments = {"rtol": rtol, "atol": atol, "method": method, "options": options}
    status, solution = OK, state
    try:
        if adjoint_parameters is None:
            solution = odeint(counter, state, times, **arguments)[-1]
        else:
            adjoint_options = {k: v for k, v in options.items() if k != "norm"}
            solution = odeint_adjoint(
                counter,
                state,
                times,
                adjoint_params=adjoint_parameters,
                adjoint_options=adjoint_options,
                **arguments,
            )[-1]
    except _Stop as stop:
        status = stop.status
    counter.limit = None  # the backward pass of the adjoint equation has evaluations of its own
    evaluations = torch.full_like(rows, counter.count)
    time = state.new_full((len(state),), end if status == OK else counter.time)
    return OdeSolution(solution, evaluations, torch.full_like(rows, status), time)


class _Stop(Exception):  # noqa: N818 -- it ends a solver of torchdiffeq, and never leaves this file
    def __init__(self, status: int) -> None:
        super().__init__()
        self.status = status


class _Counter:
    """A field that counts its evaluations, and stops where they are too many or not finite."""

    def __init__(self, field: Field, rows: Tensor, limit: int | None) -> None:
        self.field, self.rows, self.limit = field, rows, limit
        self.count, self.time = 0, 0.0

    def __call__(self, time: Tensor, state: Tensor) -> Tensor:
        if self.limit is None:
            return self.field(time.expand(len(state)), state, self.rows)
        self.time = float(time)
        if self.count >= self.limit:
            raise _Stop(EXCEEDED)
        self.count += 1
        slope = self.field(time.expand(len(state)), state, self.rows)
        if not bool(slope.detach().isfinite().all()):
            raise _Stop(NOT_FINITE)
        return slope


def _largest(state: Tensor) -> Tensor:
    """The error of the worst element, so that a row is not lost in the mean of many."""
    return state.abs().amax()
