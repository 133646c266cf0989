"""What the optimizers of many small problems, one per row, have in common."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BestPoints", "Objective", "RowStatus", "RowsResult", "evaluate", "is_finite"]

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From points, shape ``(rows, size)``, to the values, ``(rows,)``, and gradients at them."""


class RowStatus(IntEnum):
    """How the optimization of one row ended."""

    CONVERGED = 0
    """The gradient, or what the latest steps gained, is below its tolerance."""
    MAX_ITERATIONS = 1
    """It was still improving when it was stopped."""
    STALLED = 2
    """No step along the gradient lowers the value, though the gradient is not small."""
    NOT_FINITE = 3
    """The value or the gradient at the start is NaN or infinite."""
    STOPPED_EARLY = 4
    """The value still fell, but no longer the one that the points are chosen by."""


class RowsResult(NamedTuple):
    """Result of an optimization of rows."""

    point: Tensor
    """The best point of every row, shape ``(rows, size)``."""
    value: Tensor
    """The value there, shape ``(rows,)``; infinite where it was not finite at the start."""
    status: Tensor
    """A :class:`RowStatus` for each row."""
    num_iterations: Tensor
    """Steps that each row took."""
    num_evaluations: int
    """Calls of the objective, each of which is of all rows."""
    trace: Tensor
    """Best value of each row after each evaluation, shape ``(num_evaluations, rows)``."""


def is_finite(value: Tensor, gradient: Tensor) -> Tensor:
    """Which rows have a finite value and gradient."""
    return value.isfinite() & gradient.isfinite().all(-1)


def evaluate(objective: Objective, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    Evaluate, with infinity and zeros where the value or the gradient are not finite.

    :returns: values, gradients, and which rows are finite.
    """
    value, gradient = objective(point)
    finite = is_finite(value, gradient)
    gradient = torch.where(finite[:, None], gradient, torch.zeros_like(gradient))
    return torch.where(finite, value, torch.full_like(value, float("inf"))), gradient, finite


class BestPoints:
    """
    The best point of every row so far, by its value or by a second opinion.

    :param Tensor point: where the rows start, shape ``(rows, size)``.
    :param Tensor value: the values there.
    :param validate: from points to other values, by which the points are chosen instead. It is
        asked rarely.
    :param int every: evaluations of the objective from one such question to the next.
    :param int patience: how many answers in a row may be no better.
    """

    def __init__(
        self,
        point: Tensor,
        value: Tensor,
        validate: Callable[[Tensor], Tensor] | None,
        every: int = 5,
        patience: int = 6,
    ) -> None:
        self.point = point.clone()
        self.value = value.clone()
        self.trace = [value.clone()]
        self._lowest = value.clone()
        self._validate = validate
        self._every = every
        self._patience = patience
        self._judged = None if validate is None else _finite_or_infinity(validate(point))
        self._failures = torch.zeros_like(value, dtype=torch.long)

    def update(self, point: Tensor, value: Tensor) -> Tensor:
        """
        Look at the points after an evaluation.

        :returns: which rows should stop, because their points are no longer better.
        """
        self._lowest = torch.minimum(self._lowest, value)
        self.trace.append(self._lowest)
        if self._validate is None:
            self._keep(value < self.value, point, value)
        elif (len(self.trace) - 1) % self._every == 0:
            self._ask(point, value)
        return self._failures >= self._patience

    def finish(self, point: Tensor, value: Tensor) -> None:
        """Look at the points where the rows have ended."""
        if self._validate is not None:
            self._ask(point, value)

    def _ask(self, point: Tensor, value: Tensor) -> None:
        if self._validate is None or self._judged is None:
            return
        judged = _finite_or_infinity(self._validate(point))
        better = (judged < self._judged) & value.isfinite()
        self._keep(better, point, value)
        self._judged = torch.where(better, judged, self._judged)
        self._failures = torch.where(better, torch.zeros_like(self._failures), self._failures + 1)

    def _keep(self, better: Tensor, point: Tensor, value: Tensor) -> None:
        self.point = torch.where(better[:, None], point, self.point)
        self.value = torch.where(better, value, self.value)


def _finite_or_infinity(value: Tensor) -> Tensor:
    return torch.where(value.isfinite(), value, torch.full_like(value, float("inf")))
