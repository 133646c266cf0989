"""Whether a structured Jacobian is still the Jacobian, and accurate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vjp

from .chainwise import take_chains
from .structure import factorize, projection_error
from .system import ConstrainedSystem, Point

__all__ = ["Misplaced", "find_misplaced", "has_lost_digits"]

_NO_BETTER = 0.1  # share of the error that a dense factorisation has to leave at most


class Misplaced(NamedTuple):
    """Entries of a Jacobian outside of the places where its structure has any."""

    rows: tuple[int, ...]
    """Constraints with such entries."""

    columns: tuple[int, ...]
    """Inputs of these entries, in the first of the rows."""


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
    found = point.jacobian.apply(vector)
    precision = torch.finfo(found.dtype).eps ** 0.5
    is_wrong = (found - product).abs() > precision * (found.abs() + product.abs())
    # a row of the true Jacobian may overflow where the structure leaves out what does
    is_wrong &= found.isfinite() & product.isfinite()
    if not bool(is_wrong.any()):
        return None
    chain = is_wrong.any(-1).long().argmax()
    rows = is_wrong[chain].nonzero().squeeze(-1)
    outputs, pullback = vjp(system.functions[0], point.position[chain] * scale)[:2]
    expected = pullback(torch.nn.functional.one_hot(rows[0], len(outputs)).to(outputs))[0] * scale
    row = take_chains(point.jacobian, chain.reshape(1)).dense()[0, rows[0]]
    is_other = (row - expected).abs() > precision * (row.abs() + expected.abs())
    return Misplaced(tuple(rows.tolist()), tuple(is_other.nonzero().squeeze(-1).tolist()))


def has_lost_digits(point: Point) -> bool:
    """
    Whether a structured factorisation loses half of the digits where a dense one does not.

    :param point: points with their structured Jacobians.
    """
    vector = torch.randn_like(point.position)
    error = projection_error(point.jacobian, vector)
    worst = error.nan_to_num(torch.inf).argmax().reshape(1)
    if bool(error[worst] <= torch.finfo(error.dtype).eps ** 0.5):
        return False
    dense = factorize(take_chains(point.jacobian, worst).dense())
    error, dense_error = error[worst], projection_error(dense, vector[worst])
    is_better = (dense_error <= _NO_BETTER * error) | (~error.isfinite() & dense_error.isfinite())
    return bool(is_better)
