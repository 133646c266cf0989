"""Whether a structured Jacobian is still the Jacobian, and accurate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vjp

from ..jacobian.structure import factorize, is_small, projection_error
from .chainwise import take_chains
from .constrained_system import ConstrainedSystem, Point

__all__ = ["Misplaced", "find_misplaced", "has_lost_digits"]

_MOST_ROWS = 100  # that are looked at one by one
_NO_BETTER = 0.1  # share of the error that a dense factorisation has to leave at most


class Misplaced(NamedTuple):
    """Entries of a Jacobian outside of the places where its structure has any."""

    chain: int
    """The first chain that has such entries."""

    rows: tuple[int, ...]
    """Constraints with such entries in this chain, or the first of them."""

    columns: tuple[int, ...]
    """Inputs of these entries, in the first of the rows."""

    inputs: Tensor
    """Where the chain is, ``(dim,)``."""


def find_misplaced(
    system: ConstrainedSystem, point: Point, scale: Tensor, vector: Tensor, product: Tensor
) -> Misplaced | None:
    """
    Compare a structured Jacobian with products of the true one and random vectors.

    An entry outside of the pattern changes the product with probability one.

    :param system: the system.
    :param point: points with their structured Jacobians.
    :param Tensor scale: scale of each input, ``(dim,)``.
    :param Tensor vector: a random vector per chain, ``(chains, dim)``.
    :param Tensor product: true products of Jacobians and vectors, by ``system.product``.
    :returns: what is wrong, or ``None``. Entries that are not finite tell nothing.
    """
    is_wrong = _differs(point.jacobian.apply(vector), product)
    if not bool(is_wrong.any()):
        return None
    # in many runs of many rows one of them cancels to rounding; but not twice
    again = torch.randn_like(vector)
    is_wrong &= _differs(point.jacobian.apply(again), system.product(point.position, again, scale))
    if not bool(is_wrong.any()):
        return None
    chain = int(is_wrong.any(-1).long().argmax())
    inputs = point.position[chain] * scale
    rows = is_wrong[chain].nonzero().squeeze(-1)[:_MOST_ROWS].tolist()
    outside = {row: _outside(system, inputs, row) for row in rows}
    # where rows share a product, an entry of one spoils the others
    named = {row: columns for row, columns in outside.items() if columns} or outside
    return Misplaced(chain, tuple(named), next(iter(named.values())), inputs)


def _outside(system: ConstrainedSystem, inputs: Tensor, row: int) -> tuple[int, ...]:
    """Columns of the true nonzeros of a row outside of the pattern."""
    outputs, pullback = vjp(system.functions[0], inputs)[:2]
    cotangent = torch.zeros_like(outputs)
    cotangent[row] = 1.0
    columns = pullback(cotangent)[0].nonzero().squeeze(-1).tolist()
    pattern = system.structure.pattern
    known = () if pattern is None else pattern.columns[pattern.rows == row].tolist()
    return tuple(column for column in columns if column not in known)


def _differs(found: Tensor, expected: Tensor) -> Tensor:
    """Where numbers differ in more than the last half of their digits, and both are finite."""
    precision = torch.finfo(found.dtype).eps ** 0.5
    is_wrong = (found - expected).abs() > precision * (found.abs() + expected.abs())
    # a row of the true Jacobian may overflow where the structure leaves out what does
    return is_wrong & found.isfinite() & expected.isfinite()


def has_lost_digits(point: Point) -> bool:
    """
    Whether a structured factorisation loses half of the digits where a dense one does not.

    :param point: points with their structured Jacobians. Of those that are too large to be made
        matrices it is not known, and no use to know.
    """
    vector = torch.randn_like(point.position)
    error = projection_error(point.jacobian, vector)
    worst = error.nan_to_num(torch.inf).argmax().reshape(1)
    if bool(error[worst] <= torch.finfo(error.dtype).eps ** 0.5):
        return False
    jacobian = take_chains(point.jacobian, worst)
    num_rows = jacobian.apply(vector[worst]).shape[-1]
    if not is_small((num_rows, vector.shape[-1])):
        return False
    dense = factorize(jacobian.dense())
    error, dense_error = error[worst], projection_error(dense, vector[worst])
    is_better = (dense_error <= _NO_BETTER * error) | (~error.isfinite() & dense_error.isfinite())
    return bool(is_better)
