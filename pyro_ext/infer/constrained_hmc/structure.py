r"""Jacobian of the constraint, factorised for everything the sampler asks of it.

The sampler needs, for a Jacobian :math:`J` of full row rank, products :math:`Jv`, minimum-norm
solutions :math:`J^\top (JJ^\top)^{-1} c`, :math:`\log\det JJ^\top`, and the matrix
:math:`(JJ^\top)^{-1} J` that the gradient of that determinant contracts with the second
derivatives (Graham and Storkey 2017, eq. 32). A structured Jacobian is another class with the
same four members.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DenseJacobian", "LinAlgError", "factorize"]

# what torch raises for a matrix that has no factorisation; its stubs do not export it
LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]


class DenseJacobian(NamedTuple):
    """A batch of dense Jacobians with their pseudo-inverses."""

    matrix: Tensor
    """:math:`J`, shape ``(chains, num_constraints, dim)``."""

    dual: Tensor
    """:math:`(JJ^T)^{-1} J`, the transposed pseudo-inverse, same shape."""

    half_log_det_gram: Tensor
    r""":math:`\frac12 \log\det JJ^T`, shape ``(chains,)``; not finite where rank is lost."""

    def apply(self, vector: Tensor) -> Tensor:
        """:math:`Jv` for ``(chains, dim)`` vectors."""
        # a row vector on the left takes BLAS's fast path for a batch, a column on the right not
        return (vector.unsqueeze(-2) @ self.matrix.mT).squeeze(-2)

    def minimum_norm(self, residual: Tensor) -> Tensor:
        r"""The shortest :math:`v` with :math:`Jv = c`, for ``(chains, num_constraints)``."""
        return (residual.unsqueeze(-2) @ self.dual).squeeze(-2)


def factorize(matrix: Tensor) -> DenseJacobian:
    r"""
    Factorise a batch of Jacobians through the Cholesky factor of their Gram matrices.

    .. math:: JJ^\top = LL^\top, \qquad \tfrac12 \log\det JJ^\top = \sum_i \log L_{ii}

    (Graham and Storkey 2017, eq. 30).

    :param Tensor matrix: shape ``(chains, num_constraints, dim)``.
    :returns: the factorised Jacobians. A rank-deficient or non-finite one is marked by a
        non-finite ``half_log_det_gram``; the others in the batch are unaffected.
    """
    cholesky, info = torch.linalg.cholesky_ex(matrix @ matrix.mT)
    log_det = cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_det = torch.where(info == 0, log_det, torch.full_like(log_det, torch.nan))
    return DenseJacobian(matrix, torch.cholesky_solve(matrix, cholesky), log_det)
