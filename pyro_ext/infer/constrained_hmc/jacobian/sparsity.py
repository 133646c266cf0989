"""Which outputs depend on which inputs, read from derivatives at a few points."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

__all__ = ["Pattern", "find_pattern", "merge_patterns"]

_ELEMENTS_AT_ONCE = 2**24  # of Jacobians held at once while the pattern is read


class Pattern(NamedTuple):
    """Places of a Jacobian that are not zero everywhere, in the order of rows."""

    rows: np.ndarray
    columns: np.ndarray
    num_rows: int
    num_columns: int
    is_known: np.ndarray
    """Per row, whether it was finite at one of the points at least; a row that was not counts
    as dense."""

    @property
    def is_complete(self) -> bool:
        """Whether every row is known."""
        return bool(self.is_known.all())


def find_pattern(
    constraint: Callable[[Tensor], Tensor], points: Tensor, *, forward: bool = True
) -> Pattern:
    """
    Union of the nonzeros of a Jacobian at several points.

    Where a row is not finite at a point, zeros of the row are lost among the ``0 * inf`` there;
    the row is read at the other points.

    :param constraint: maps one input ``(dim,)`` to the residuals ``(num_constraints,)``.
    :param Tensor points: inputs, shape ``(points, dim)``.
    :param bool forward: differentiate forwards, a product per input, rather than in reverse, a
        product per constraint. The memory needed grows with neither.
    """
    outputs = vmap(constraint)(points)
    num_rows, num_columns = outputs.shape[-1], points.shape[-1]
    is_known = np.zeros(num_rows, dtype=bool)
    is_nonzero = np.zeros((num_rows, num_columns), dtype=bool)
    num_products, length = (num_columns, num_rows) if forward else (num_rows, num_columns)
    chunk = max(1, _ELEMENTS_AT_ONCE // (len(points) * length))
    finite_rows = _finite_rows(constraint, points) if forward else outputs.isfinite()
    for first in range(0, num_products, chunk):
        index = torch.arange(first, min(first + chunk, num_products), device=points.device)
        seeds = torch.nn.functional.one_hot(index, num_products).to(points)
        if forward:
            values = _tangents(constraint, points, seeds).mT  # (points, rows, chunk)
            is_read = finite_rows.unsqueeze(-1)
            part = ((values != 0) & is_read).any(0)
            is_nonzero[:, first : first + chunk] = part.cpu().numpy()
            is_known |= finite_rows.any(0).cpu().numpy()
        else:
            values = _cotangents(constraint, points, seeds)  # (points, chunk, columns)
            is_read = values.isfinite().all(-1, keepdim=True)
            part = ((values != 0) & is_read).any(0)
            is_nonzero[first : first + chunk] = part.cpu().numpy()
            is_known[first : first + chunk] = is_read.any(0).squeeze(-1).cpu().numpy()
    is_nonzero[~is_known] = True
    rows, columns = is_nonzero.nonzero()
    return Pattern(rows, columns, num_rows, num_columns, is_known)


def merge_patterns(first: Pattern, second: Pattern) -> Pattern:
    """Union of two patterns; a row that one of them does not know is the other's."""
    keys = []
    for one, other in ((first, second), (second, first)):
        is_used = one.is_known[one.rows] | ~other.is_known[one.rows]
        keys.append((one.rows * one.num_columns + one.columns)[is_used])
    rows, columns = np.divmod(np.union1d(*keys), first.num_columns)
    is_known = first.is_known | second.is_known
    return Pattern(rows, columns, first.num_rows, first.num_columns, is_known)


def _finite_rows(constraint: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Rows without a non-finite entry: their product with a random vector is finite."""
    vectors = torch.randn_like(points)
    values, products = vmap(lambda u, v: jvp(constraint, (u,), (v,))[:2])(points, vectors)
    return values.isfinite() & products.isfinite()


def _tangents(constraint: Callable[[Tensor], Tensor], points: Tensor, seeds: Tensor) -> Tensor:
    """Columns of the Jacobian, shape ``(points, seeds, num_constraints)``."""

    def single(u: Tensor) -> Tensor:
        return vmap(lambda seed: jvp(constraint, (u,), (seed,))[1])(seeds)

    result: Tensor = vmap(single)(points)
    return result


def _cotangents(constraint: Callable[[Tensor], Tensor], points: Tensor, seeds: Tensor) -> Tensor:
    """Rows of the Jacobian, shape ``(points, seeds, dim)``."""

    def single(u: Tensor) -> Tensor:
        pullback = vjp(constraint, u)[1]
        return vmap(lambda seed: pullback(seed)[0])(seeds)

    result: Tensor = vmap(single)(points)
    return result
