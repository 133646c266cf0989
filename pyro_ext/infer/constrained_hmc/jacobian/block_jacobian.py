r"""Jacobians with local blocks and global columns, factorised at a cost linear in the blocks.

With :math:`L` the block-diagonal matrix of local columns, :math:`A` the global columns of the
same rows and :math:`A_0` those of the remaining rows (see :mod:`.partition`),

.. math::

    G = JJ^\top = \begin{pmatrix} LL^\top + AA^\top & AA_0^\top \\ A_0A^\top & A_0A_0^\top
    \end{pmatrix}.

Let :math:`W` be the inverse Cholesky factor of the blocks of :math:`LL^\top`, :math:`Q = WL`
(orthonormal rows), :math:`\tilde A = WA`, :math:`K = I + \tilde A^\top\tilde A`, :math:`S =
A_0K^{-1}A_0^\top`. Then (Woodbury, and the Schur complement of the first block)

.. math::

    \tfrac12\log\det G &= -\sum_i\log W_{ii} + \tfrac12\log\det K + \tfrac12\log\det S, \\
    N &= K^{-1} - PA_0K^{-1}, \qquad P = K^{-1}A_0^\top S^{-1},

and the shortest solution of :math:`Jv = c` has the global part
:math:`v_g = N\tilde A^\top Wc_1 + Pc_0` and the local part :math:`v_l = Q^\top(Wc_1 - \tilde A
v_g)`: whatever the rounding in :math:`N`, it solves the equations of the blocks. The low-rank
updates of appendix C of Graham and Storkey (2017) have the same cost.

Digits are lost where global inputs do what local ones should: where a row of :math:`\\tilde A` is
large while other rows are not. :func:`.structure.projection_error` measures how many.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .block_algebra import inverse_cholesky, multiply, sum_of_outer_products
from .partition import BlockPartition

__all__ = ["BlockJacobian", "BlockSlopes", "factorize_blocks"]


class BlockSlopes(NamedTuple):
    """Entries of Jacobians that are not factorised."""

    columns: Tensor
    """:math:`L` and :math:`A`, column by column, ``(chains, k + g, r, blocks)``."""

    remaining: Tensor
    """:math:`A_0`, ``(chains, m, g)``."""


class BlockJacobian(NamedTuple):
    """A batch of Jacobians with local blocks; see :class:`.structure.Jacobian`."""

    partition: BlockPartition
    columns: Tensor
    """:math:`L` and :math:`A`, column by column, ``(chains, k + g, r, blocks)``."""

    whitened: Tensor
    r""":math:`Q` and :math:`\tilde A`, same shape."""

    whitening: Tensor
    """:math:`W`, ``(chains, r, r, blocks)``."""

    remaining: Tensor
    """:math:`A_0`, ``(chains, m, g)``."""

    core: Tensor
    """:math:`N`, ``(chains, g, g)``."""

    lift: Tensor
    """:math:`P`, ``(chains, g, m)``."""

    half_log_det_gram: Tensor

    def apply(self, vector: Tensor) -> Tensor:
        """:math:`Jv` for ``(chains, dim)`` vectors."""
        k = self.partition.num_local
        local, shared = self.partition.split_columns(vector)
        blocks = (self.columns[:, :k] * local.unsqueeze(2)).sum(1)
        blocks = blocks + _combine(self.columns[:, k:], shared)
        remaining = (shared.unsqueeze(1) @ self.remaining.mT).squeeze(1)
        return self.partition.join_rows(blocks, remaining)

    def minimum_norm(self, residual: Tensor) -> Tensor:
        r"""The shortest :math:`v` with :math:`Jv = c`, for ``(chains, num_constraints)``."""
        k = self.partition.num_local
        blocks, remaining = self.partition.split_rows(residual)
        rest = multiply(self.whitening, blocks.unsqueeze(1))[:, 0]
        moment = rest.flatten(1).unsqueeze(1) @ self.whitened[:, k:].flatten(2).mT
        shared = (moment @ self.core).squeeze(1)
        if remaining.shape[1] > 0:
            shared = shared + (remaining.unsqueeze(1) @ self.lift.mT).squeeze(1)
        rest = rest - _combine(self.whitened[:, k:], shared)
        local = (self.whitened[:, :k] * rest.unsqueeze(1)).sum(2)
        return self.partition.join_columns(local, shared)

    def dual(self) -> tuple[Tensor, Tensor]:
        r"""
        :math:`(JJ^\top)^{-1}J` at the places of ``columns`` and of ``remaining``.

        Only these places count for the gradient of the determinant: the contraction of eq. 32
        with second derivatives that are zero elsewhere.
        """
        k = self.partition.num_local
        local, shared = self.whitened[:, :k], self.whitened[:, k:]
        shared_dual = (self.core @ shared.flatten(2)).unflatten(-1, shared.shape[2:])
        # of I - A~ N A~' the diagonal blocks alone meet the pattern
        overlap = sum_of_outer_products(shared, shared_dual)
        local_dual = local - multiply(overlap, local)
        duals = torch.cat([local_dual, shared_dual], 1)
        return multiply(self.whitening.transpose(1, 2), duals), self.lift.mT

    def newton_step(self, slopes: BlockSlopes, residual: Tensor) -> Tensor:
        r"""
        See :meth:`.structure.Jacobian.newton_step`.

        The blocks of :math:`B = L_uL^\top` are solved for their multipliers :math:`x = B^{-1}(c_1
        - A_uv_g)`. With :math:`v_g = A^\top x + A_0^\top x_0`, what is left is

        .. math::

            \begin{pmatrix} I + A^\top B^{-1}A_u & -A_0^\top \\ A_{0u} & 0 \end{pmatrix}
            \begin{pmatrix} v_g \\ x_0 \end{pmatrix} =
            \begin{pmatrix} A^\top B^{-1}c_1 \\ c_0 \end{pmatrix}.
        """
        part, k, g = self.partition, self.partition.num_local, len(self.partition.global_columns)
        blocks, remaining = part.split_rows(residual)
        blocks = torch.where(part.is_row_padding, 0.0, blocks)
        cross = sum_of_outer_products(slopes.columns[:, :k], self.columns[:, :k])
        padding = torch.diag_embed(part.is_row_padding.mT.to(cross)).movedim(0, -1)
        sides = torch.cat([slopes.columns[:, k:], blocks.unsqueeze(1)], 1)
        solved = _solve(cross + padding, sides)
        moments = self.columns[:, k:].flatten(2) @ solved.flatten(2).mT  # (chains, g, g + 1)
        eye = torch.eye(g, dtype=cross.dtype, device=cross.device)
        zero = cross.new_zeros(len(cross), remaining.shape[1], remaining.shape[1])
        top = torch.cat([moments[:, :, :g] + eye, -self.remaining.mT], -1)
        matrix = torch.cat([top, torch.cat([slopes.remaining, zero], -1)], 1)
        right = torch.cat([moments[:, :, g], remaining], -1)
        shared = torch.linalg.solve_ex(matrix, right.unsqueeze(-1))[0].squeeze(-1)[:, :g]
        multipliers = solved[:, g] - _combine(solved[:, :g], shared)
        local = (self.columns[:, :k] * multipliers.unsqueeze(1)).sum(2)
        return part.join_columns(local, shared)

    def dense(self) -> Tensor:
        """:math:`J` as ``(chains, num_constraints, dim)``."""
        return self.partition.dense(self.columns, self.remaining)

    def dense_slopes(self, slopes: BlockSlopes) -> Tensor:
        """See :meth:`.structure.Jacobian.dense_slopes`."""
        return self.partition.dense(*slopes)


def factorize_blocks(
    partition: BlockPartition, columns: Tensor, remaining: Tensor
) -> BlockJacobian:
    """
    Factorise a batch of partitioned Jacobians.

    :param partition: blocks and global columns.
    :param Tensor columns: local and global columns, ``(chains, k + g, r, blocks)``, zero where
        the partition has nothing.
    :param Tensor remaining: global columns of the remaining rows, ``(chains, m, g)``.
    :returns: the factorised Jacobians. One whose blocks or whose Gram matrix is singular has a
        non-finite ``half_log_det_gram``; the others in the batch are unaffected.
    """
    k = partition.num_local
    gram = sum_of_outer_products(columns[:, :k], columns[:, :k])
    padding = torch.diag_embed(partition.is_row_padding.mT.to(columns)).movedim(0, -1)
    whitening, pivots = inverse_cholesky(gram + padding)
    whitened = multiply(whitening, columns)
    shared = whitened[:, k:].flatten(2)
    core, lift, log_det_shared = _factorize_shared(shared @ shared.mT, remaining)
    log_det = pivots.log().sum((1, 2)) + log_det_shared
    return BlockJacobian(
        partition=partition,
        columns=columns,
        whitened=whitened,
        whitening=whitening,
        remaining=remaining,
        core=core,
        lift=lift,
        half_log_det_gram=0.5 * log_det,
    )


def _solve(matrices: Tensor, sides: Tensor) -> Tensor:
    """Solutions in every block, ``(chains, r, r, blocks)`` and ``(chains, n, r, blocks)``."""
    if matrices.shape[1] == 1:
        return sides / matrices
    solved, _ = torch.linalg.solve_ex(matrices.movedim(-1, 1), sides.movedim(-1, 1).mT)
    return solved.mT.movedim(1, -1)


def _combine(columns: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of columns, ``(chains, g, r, blocks)`` and ``(chains, g)``."""
    total = weights.unsqueeze(1) @ columns.flatten(2)
    return total.squeeze(1).unflatten(-1, columns.shape[2:])


def _factorize_shared(gram: Tensor, remaining: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""
    Core, lift and :math:`\log\det K + \log\det S` of the global part.

    With :math:`K = RR^\top` and the QR decomposition :math:`R^{-1}A_0^\top = ZT`,

    .. math:: N = R^{-\top}(I - ZZ^\top)R^{-1}, \quad P = R^{-\top}ZT^{-\top}, \quad
        \det S = (\det T)^2,

    so that :math:`A_0N = 0` up to rounding, however large :math:`K` is.

    :param Tensor gram: :math:`\tilde A^\top\tilde A`, ``(chains, g, g)``.
    :param Tensor remaining: :math:`A_0`, ``(chains, m, g)``.
    """
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(gram + eye)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_det = torch.where(info == 0, log_det, torch.nan)
    if remaining.shape[1] == 0:
        return inverse.mT @ inverse, remaining.mT, log_det
    basis, triangle = torch.linalg.qr(inverse @ remaining.mT)
    log_det = log_det + 2 * triangle.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    rest = inverse - basis @ (basis.mT @ inverse)
    lift = torch.linalg.solve_triangular(triangle.mT, basis, upper=False, left=False)
    return rest.mT @ rest, inverse.mT @ lift, log_det
