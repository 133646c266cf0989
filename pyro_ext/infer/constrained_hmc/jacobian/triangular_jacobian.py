r"""Jacobians of a series, whose noise acts on what follows it.

With rows and columns ordered, :math:`J = (T\;A)` with a block lower triangular :math:`T` and few
other columns :math:`A`. The LQ decompositions :math:`T_{bb} = C_bQ_b` of its diagonal blocks make
:math:`\hat T = TQ^\top` lower triangular, the Cholesky factor of :math:`TT^\top`, without
forming it. With :math:`\tilde A = \hat T^{-1}A` and :math:`K = I + \tilde A^\top\tilde A`,

.. math::

    \tfrac12\log\det JJ^\top &= \sum_i\log|\hat T_{ii}| + \tfrac12\log\det K, \\
    (JJ^\top)^{-1}J &= \hat T^{-\top}\bigl(Q - \tilde AK^{-1}(Q^\top\tilde A)^\top \;\;
    \tilde AK^{-1}\bigr),

and the shortest solution of :math:`Jv = c` has the parts :math:`v_A = K^{-1}\tilde A^\top\hat
T^{-1}c` and :math:`v_T = Q^\top(\hat T^{-1}c - \tilde Av_A)`: work quadratic in the number of
outputs (Graham and Storkey 2017, appendix C, with a capacitance matrix in place of low-rank
updates).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import jacrev

from .block_algebra import inverse_cholesky, multiply, sum_of_outer_products
from .forward import forward_jacobian
from .sparsity import Pattern
from .triangle import Triangle

__all__ = ["TriangularJacobian", "TriangularStructure"]


@dataclass(frozen=True, eq=False)
class _Order:
    """Index tensors of a triangle; its diagonal blocks are padded to one shape."""

    rows: Tensor  # (num_rows,)
    columns: Tensor  # (num_columns,) those on the diagonal, then the others
    row_places: Tensor  # (num_rows,) inverse of ``rows``
    column_places: Tensor  # (num_columns,) inverse of ``columns``
    blocks: Tensor  # (r, blocks) places of the blocks on the diagonal, zero where padded
    is_padding: Tensor  # (r, blocks)
    block_places: Tensor  # (num_rows,) places on the diagonal in the flattened blocks


class TriangularJacobian(NamedTuple):
    """A batch of factorised Jacobians; see :class:`.structure.Jacobian`."""

    order: _Order
    matrix: Tensor
    """:math:`J`, rows and columns as they were, ``(chains, num_constraints, dim)``."""

    triangle: Tensor
    r""":math:`\hat T`, ``(chains, num_constraints, num_constraints)``."""

    rotation: Tensor
    """:math:`Q`, ``(chains, r, r, blocks)``."""

    whitening: Tensor
    """:math:`C_b^{-1}`, same shape."""

    shared: Tensor
    r""":math:`\tilde A`, ``(chains, num_constraints, g)``."""

    core: Tensor
    """:math:`K^{-1}`, ``(chains, g, g)``."""

    half_log_det_gram: Tensor

    def apply(self, vector: Tensor) -> Tensor:
        """:math:`Jv` for ``(chains, dim)`` vectors."""
        return (vector.unsqueeze(-2) @ self.matrix.mT).squeeze(-2)

    def minimum_norm(self, residual: Tensor) -> Tensor:
        r"""The shortest :math:`v` with :math:`Jv = c`, for ``(chains, num_constraints)``."""
        ordered = residual[:, self.order.rows].unsqueeze(-1)
        rest = torch.linalg.solve_triangular(self.triangle, ordered, upper=False)
        weights = self.core @ (self.shared.mT @ rest)
        rest = (rest - self.shared @ weights).squeeze(-1)
        own = _by_blocks(self.order, self.rotation.transpose(1, 2), rest.unsqueeze(1))[:, 0]
        return torch.cat([own, weights.squeeze(-1)], -1)[:, self.order.column_places]

    def newton_step(self, slopes: TriangularJacobian, residual: Tensor) -> Tensor:
        r"""
        See :meth:`.structure.Jacobian.newton_step`.

        With :math:`B = T_uT^\top` the other inputs take :math:`v_A = (I + A^\top B^{-1}A_u)^{-1}
        A^\top B^{-1}c` and the rest :math:`v_T = T_u^{-1}(c - A_uv_A)`, by substitution.
        """
        order, turned = self.order, self.rotation.transpose(1, 2)
        turned_there = slopes.rotation.transpose(1, 2)
        ordered = residual[:, order.rows].unsqueeze(-1)
        rest = torch.linalg.solve_triangular(slopes.triangle, ordered, upper=False)
        rest = _by_blocks(order, turned_there, rest.mT).mT  # of T_u
        there = _by_blocks(order, turned_there, slopes.shared.mT).mT
        here = _by_blocks(order, turned, self.shared.mT)
        eye = torch.eye(here.shape[1], dtype=here.dtype, device=here.device)
        weights, _ = torch.linalg.solve_ex(here @ there + eye, here @ rest)
        own = rest - there @ weights
        return torch.cat([own, weights], 1).squeeze(-1)[:, order.column_places]

    def dense(self) -> Tensor:
        """:math:`J`, shape ``(chains, num_constraints, dim)``."""
        return self.matrix

    def dense_slopes(self, slopes: TriangularJacobian) -> Tensor:
        """See :meth:`.structure.Jacobian.dense_slopes`."""
        return slopes.matrix

    def dual(self) -> Tensor:
        r"""
        :math:`(JJ^\top)^{-1}J` in and below the diagonal blocks of :math:`T`, and in :math:`A`.

        Above them, where :math:`J` is zero at every input, it differs by :math:`\hat
        T^{-\top}Q`, of which only the diagonal blocks :math:`C_b^{-\top}Q_b` are there.
        """
        order = self.order
        shared = torch.linalg.solve_triangular(
            self.triangle.mT, self.shared @ self.core, upper=True
        )
        rotated = _by_blocks(order, self.rotation.transpose(1, 2), self.shared.mT)
        diagonal = multiply(self.whitening.transpose(1, 2), self.rotation.transpose(1, 2))
        own = _block_diagonal(order, diagonal.transpose(1, 2)) - shared @ rotated
        ordered = torch.cat([own, shared], -1)
        return ordered[:, order.row_places][:, :, order.column_places]


class TriangularStructure:
    """
    Jacobians of a series; see :class:`.structure.Structure`.

    :param pattern: places of the Jacobian that may be nonzero.
    :param triangle: the order of its rows and columns.
    :param str mode: ``"forward"`` or ``"reverse"`` differentiation.
    :param device: of the inputs.
    """

    def __init__(
        self, pattern: Pattern, triangle: Triangle, mode: str, *, device: torch.device
    ) -> None:
        self.pattern: Pattern | None = pattern
        self.mode = mode
        self._triangle = triangle
        self._order = _order(triangle, device)

    def derivatives(self, constraint: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """See :meth:`.structure.Structure.derivatives`."""
        return forward_jacobian(constraint) if self.mode == "forward" else jacrev(constraint)

    def factorize(self, derivatives: Tensor, scale: Tensor) -> TriangularJacobian:
        """See :meth:`.structure.Structure.factorize`."""
        return _factorize(self._order, derivatives * scale)

    def slopes(self, derivatives: Tensor, scale: Tensor) -> TriangularJacobian:
        """See :meth:`.structure.Structure.slopes`."""
        return self.factorize(derivatives, scale)

    def cotangent(self, jacobian: TriangularJacobian, scale: Tensor) -> Tensor:
        """See :meth:`.structure.Structure.cotangent`."""
        return jacobian.dual() * scale

    def matrix(self, derivatives: Tensor, scale: Tensor) -> Tensor:
        """See :meth:`.structure.Structure.matrix`."""
        return derivatives * scale

    def describe(self) -> str:
        """What was found, in a line."""
        sizes = self._triangle.sizes
        return (
            f"lower triangular in {len(sizes)} blocks of up to {sizes.max()} x {sizes.max()}, "
            f"{len(self._triangle.others)} other inputs ({self.mode})"
        )


def _factorize(order: _Order, matrix: Tensor) -> TriangularJacobian:
    ordered = matrix[:, order.rows][:, :, order.columns]
    num_rows = len(order.rows)
    square, others = ordered[:, :, :num_rows], ordered[:, :, num_rows:]
    corners = square[:, order.blocks.unsqueeze(1), order.blocks]  # (chains, r, r, blocks)
    padding = order.is_padding.unsqueeze(1) | order.is_padding
    corners = torch.where(padding, 0.0, corners)
    by_columns = corners.transpose(1, 2)
    identity = torch.diag_embed(order.is_padding.mT.to(matrix)).movedim(0, -1)
    whitening, pivots = inverse_cholesky(sum_of_outer_products(by_columns, by_columns) + identity)
    rotation = multiply(whitening, by_columns).transpose(1, 2)
    triangle = _by_blocks(order, rotation, square)
    shared = torch.linalg.solve_triangular(triangle, others, upper=False)
    eye = torch.eye(others.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(shared.mT @ shared + eye)
    half_log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    half_log_det = torch.where(info == 0, half_log_det, torch.nan)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    return TriangularJacobian(
        order=order,
        matrix=matrix,
        triangle=triangle,
        rotation=rotation,
        whitening=whitening,
        shared=shared,
        core=inverse.mT @ inverse,
        half_log_det_gram=half_log_det + 0.5 * pivots.log().sum((1, 2)),
    )


def _by_blocks(order: _Order, blocks: Tensor, vectors: Tensor) -> Tensor:
    """Multiply parts of vectors ``(chains, n, num_rows)`` by blocks ``(chains, r, r, blocks)``."""
    parts = vectors[:, :, order.blocks]
    return multiply(blocks, parts).flatten(2)[:, :, order.block_places]


def _block_diagonal(order: _Order, blocks: Tensor) -> Tensor:
    """Matrices from their diagonal blocks, ``(chains, num_rows, num_rows)``."""
    size = len(order.rows)
    result = blocks.new_zeros(len(blocks), size * size + 1)
    places = order.blocks.unsqueeze(1) * size + order.blocks
    padding = order.is_padding.unsqueeze(1) | order.is_padding
    places = torch.where(padding, size * size, places)
    result = result.index_copy(1, places.flatten(), blocks.flatten(1))
    return result[:, :-1].unflatten(-1, (size, size))


def _order(triangle: Triangle, device: torch.device) -> _Order:
    columns = np.concatenate([triangle.columns, triangle.others])
    sizes, ends = triangle.sizes, np.cumsum(triangle.sizes)
    height, number = int(sizes.max()), len(sizes)
    offsets = np.arange(height)[:, None]
    is_padding = offsets >= sizes
    blocks = np.where(is_padding, 0, offsets + (ends - sizes))
    block_places = np.zeros(len(triangle.rows), dtype=np.int64)
    places = offsets * number + np.arange(number)
    block_places[blocks[~is_padding]] = places[~is_padding]

    def tensor(array: np.ndarray) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(array), device=device)

    return _Order(
        rows=tensor(triangle.rows),
        columns=tensor(columns),
        row_places=tensor(np.argsort(triangle.rows)),
        column_places=tensor(np.argsort(columns)),
        blocks=tensor(blocks),
        is_padding=tensor(is_padding),
        block_places=tensor(block_places),
    )
