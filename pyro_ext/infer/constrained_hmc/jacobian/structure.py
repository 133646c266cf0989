r"""Jacobian of the constraint, factorised for everything the sampler asks of it.

The sampler needs, for a Jacobian :math:`J` of full row rank, products :math:`Jv`, minimum-norm
solutions :math:`J^\top (JJ^\top)^{-1} c`, :math:`\log\det JJ^\top`, and the entries of the matrix
:math:`(JJ^\top)^{-1} J` that the gradient of that determinant contracts with the second
derivatives (Graham and Storkey 2017, eq. 32). A :class:`Structure` says how to compute Jacobians
of one form, and factorises them; what is here takes any Jacobian, what uses sparsity has its own
files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.func import jacrev

from .forward import forward_jacobian
from .sparsity import Pattern

__all__ = [
    "DenseJacobian",
    "DenseStructure",
    "Jacobian",
    "LinAlgError",
    "Structure",
    "factorize",
    "is_small",
    "projection_error",
]

# what torch raises for a matrix that has no factorisation; its stubs do not export it
LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]

_LARGEST_DENSE = 4 * 10**6  # entries


class Jacobian(Protocol):
    """
    A batch of factorised Jacobians.

    A ``NamedTuple`` whose tensors have a leading chain axis; anything else in it is the same for
    all chains.
    """

    @property
    def half_log_det_gram(self) -> Tensor:
        r""":math:`\frac12 \log\det JJ^T`, shape ``(chains,)``; not finite where rank is lost."""

    def apply(self, vector: Tensor) -> Tensor:
        """:math:`Jv` for ``(chains, dim)`` vectors."""

    def minimum_norm(self, residual: Tensor) -> Tensor:
        r"""The shortest :math:`v` with :math:`Jv = c`, for ``(chains, num_constraints)``."""

    def newton_step(self, slopes: Any, residual: Tensor) -> Tensor:
        r"""
        The step along the rows of :math:`J` that solves another equation, :math:`J_uv = c`.

        .. math:: v = J^\top(J_uJ^\top)^{-1}c

        :param slopes: Jacobians :math:`J_u` at other points, by :meth:`Structure.slopes`.
        :param Tensor residual: shape ``(chains, num_constraints)``.
        """

    def dense(self) -> Tensor:
        """:math:`J`, shape ``(chains, num_constraints, dim)``."""

    def dense_slopes(self, slopes: Any) -> Tensor:
        """:math:`J_u` from its slopes, same shape."""


Factorized = TypeVar("Factorized")


class Structure(Protocol[Factorized]):
    """
    How to compute and to factorise Jacobians of one form.

    Derivatives are numbers of any number and order, from which the entries of :math:`J` are read.
    """

    mode: str
    """Of differentiation: ``"forward"``, ``"reverse"`` or ``"mixed"``."""

    pattern: Pattern | None
    """Places that may be nonzero; ``None`` where all may be."""

    def derivatives(self, constraint: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The function from one input to the derivatives there, itself differentiable."""

    def factorize(self, derivatives: Tensor, scale: Tensor) -> Factorized:
        """Jacobians with columns multiplied by ``scale``, from derivatives with a chain axis."""

    def cotangent(self, jacobian: Factorized, scale: Tensor) -> Tensor:
        """Gradient of ``half_log_det_gram`` by the derivatives."""

    def slopes(self, derivatives: Tensor, scale: Tensor) -> Any:
        """The same Jacobians in the form that :meth:`Jacobian.newton_step` takes."""

    def matrix(self, derivatives: Tensor, scale: Tensor) -> Tensor:
        """The same Jacobians as matrices, not factorised."""


class DenseJacobian(NamedTuple):
    """A batch of dense Jacobians with their pseudo-inverses; see :class:`Jacobian`."""

    matrix: Tensor
    """:math:`J`, shape ``(chains, num_constraints, dim)``."""

    dual: Tensor
    """:math:`(JJ^T)^{-1} J`, the transposed pseudo-inverse, same shape."""

    half_log_det_gram: Tensor

    def apply(self, vector: Tensor) -> Tensor:
        """:math:`Jv` for ``(chains, dim)`` vectors."""
        # a row vector on the left takes BLAS's fast path for a batch, a column on the right not
        return (vector.unsqueeze(-2) @ self.matrix.mT).squeeze(-2)

    def minimum_norm(self, residual: Tensor) -> Tensor:
        r"""The shortest :math:`v` with :math:`Jv = c`, for ``(chains, num_constraints)``."""
        return (residual.unsqueeze(-2) @ self.dual).squeeze(-2)

    def newton_step(self, slopes: Tensor, residual: Tensor) -> Tensor:
        """See :meth:`Jacobian.newton_step`; slopes are matrices."""
        transposed = self.matrix.mT
        multipliers, _ = torch.linalg.solve_ex(slopes @ transposed, residual.unsqueeze(-1))
        return (transposed @ multipliers).squeeze(-1)

    def dense(self) -> Tensor:
        """:math:`J`, shape ``(chains, num_constraints, dim)``."""
        return self.matrix

    def dense_slopes(self, slopes: Tensor) -> Tensor:
        """See :meth:`Jacobian.dense_slopes`."""
        return slopes


class DenseStructure:
    """
    Nothing is known about the Jacobian; its derivatives are its matrix.

    :param bool forward: differentiate forwards, one product per input, rather than in reverse,
        one per constraint.
    """

    def __init__(self, *, forward: bool) -> None:
        self.mode = "forward" if forward else "reverse"
        self.pattern: Pattern | None = None

    def derivatives(self, constraint: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """See :meth:`Structure.derivatives`."""
        return forward_jacobian(constraint) if self.mode == "forward" else jacrev(constraint)

    def factorize(self, derivatives: Tensor, scale: Tensor) -> DenseJacobian:
        """See :meth:`Structure.factorize`."""
        return factorize(derivatives * scale)

    def cotangent(self, jacobian: DenseJacobian, scale: Tensor) -> Tensor:
        """See :meth:`Structure.cotangent`."""
        return jacobian.dual * scale

    def slopes(self, derivatives: Tensor, scale: Tensor) -> Tensor:
        """See :meth:`Structure.slopes`."""
        return derivatives * scale

    def matrix(self, derivatives: Tensor, scale: Tensor) -> Tensor:
        """See :meth:`Structure.matrix`."""
        return derivatives * scale


def is_small(shape: tuple[int, int]) -> bool:
    """Whether Jacobians with so many rows and columns are worth trying as dense matrices."""
    return shape[0] * shape[1] <= _LARGEST_DENSE


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


def projection_error(jacobian: Jacobian, vector: Tensor) -> Tensor:
    r"""
    How far the projection onto the row space is from orthogonal, for some vectors.

    With :math:`w = J^+Jv`, exact arithmetic gives :math:`w^\top(v - w) = 0`; what rounding makes
    of it, relative to :math:`v^\top v`, is the error of the momenta in the cotangent space.

    :param Tensor vector: shape ``(chains, dim)``.
    :returns: shape ``(chains,)``; not finite where the factorisation failed.
    """
    normal = jacobian.minimum_norm(jacobian.apply(vector))
    error = (normal * (vector - normal)).sum(-1).abs() / vector.square().sum(-1)
    return error + 0 * jacobian.half_log_det_gram
