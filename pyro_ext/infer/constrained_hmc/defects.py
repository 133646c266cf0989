"""Whether a structured Jacobian is still the Jacobian, and accurate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from .chainwise import take_chains
from .structure import DenseStructure, factorize, projection_error
from .system import ConstrainedSystem, Point

__all__ = ["Defect", "find_defect"]

_NO_BETTER = 0.1  # share of the error that a dense factorisation has to leave at most


class Defect(NamedTuple):
    """What is wrong with a structured Jacobian at some point."""

    rows: tuple[int, ...]
    """Constraints with entries outside of the pattern; none if digits are lost instead."""

    columns: tuple[int, ...]
    """Inputs of these entries, in the first of the rows."""


def find_defect(system: ConstrainedSystem, point: Point, scale: Tensor) -> Defect | None:
    """
    Compare a structured Jacobian with products of the true one and a random vector per chain.

    An entry outside of the pattern changes the product with probability one. Where digits are
    lost in a badly conditioned block, and a dense factorisation would keep them, that is a defect
    too.

    :param system: the system.
    :param point: where the chains are, with their structured Jacobians.
    :param Tensor scale: scale of each input, ``(dim,)``.
    :returns: what is wrong, or ``None`` if all is well or the Jacobian has no structure.
    """
    if isinstance(system.structure, DenseStructure):
        return None
    vectors = torch.randn_like(point.position)
    found = point.jacobian.apply(vectors)
    expected = _products(system, point.position * scale, vectors * scale)
    precision = torch.finfo(found.dtype).eps ** 0.5
    is_wrong = (found - expected).abs() > precision * (found.abs() + expected.abs())
    if bool(is_wrong.any()):
        return _misplaced(system, point, scale, is_wrong, precision)
    error = projection_error(point.jacobian, vectors)
    worst = error.nan_to_num(torch.inf).argmax().reshape(1)
    if bool(error[worst] <= precision):
        return None
    dense = factorize(take_chains(point.jacobian, worst).dense())
    is_better = projection_error(dense, vectors[worst]) <= _NO_BETTER * error[worst]
    is_better |= ~error[worst].isfinite() & dense.half_log_det_gram.isfinite()
    return Defect((), ()) if bool(is_better) else None


def _products(system: ConstrainedSystem, inputs: Tensor, vectors: Tensor) -> Tensor:
    """Jacobians times vectors, by forward differentiation or by reverse differentiation twice."""
    constraint = system.functions[0]

    def forward(u: Tensor, v: Tensor) -> Tensor:
        product: Tensor = jvp(constraint, (u,), (v,))[1]
        return product

    def reverse(u: Tensor, v: Tensor) -> Tensor:
        outputs, pullback = vjp(constraint, u)[:2]
        transposed = vjp(lambda cotangent: pullback(cotangent)[0], torch.zeros_like(outputs))[1]
        product: Tensor = transposed(v)[0]
        return product

    try:
        result: Tensor = vmap(forward)(inputs, vectors)
    except (RuntimeError, NotImplementedError):  # an operation without a forward derivative
        result = vmap(reverse)(inputs, vectors)
    return result


def _misplaced(
    system: ConstrainedSystem, point: Point, scale: Tensor, is_wrong: Tensor, precision: float
) -> Defect:
    """The rows that are wrong, and in the first of them the columns."""
    chain = is_wrong.any(-1).long().argmax()
    rows = is_wrong[chain].nonzero().squeeze(-1)
    outputs, pullback = vjp(system.functions[0], point.position[chain] * scale)[:2]
    expected = pullback(torch.nn.functional.one_hot(rows[0], len(outputs)).to(outputs))[0] * scale
    found = take_chains(point.jacobian, chain.reshape(1)).dense()[0, rows[0]]
    is_other = (found - expected).abs() > precision * (found.abs() + expected.abs())
    return Defect(tuple(rows.tolist()), tuple(is_other.nonzero().squeeze(-1).tolist()))
