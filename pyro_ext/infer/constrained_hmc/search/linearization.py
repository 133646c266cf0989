r"""Damped minimum-norm steps for some of the constraints, dense or block by block.

For chosen rows of the Jacobian, scaled to unit length, the step is

.. math:: \delta = -J^\top (JJ^\top + \mu I)^{-1} c,

with only enough damping :math:`\mu` for the factorisation to exist. Blocks are factorised as in
:mod:`..jacobian.block_jacobian`, with the damping in the blocks of the Gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..jacobian.block_algebra import inverse_cholesky, multiply, sum_of_outer_products
from ..jacobian.block_structure import BlockStructure
from ..jacobian.partition import BlockPartition

__all__ = [
    "BlockLinearization",
    "DenseLinearization",
    "Linearization",
    "Linearize",
    "block_linearization",
]


class Linearization(Protocol):
    """Jacobians of a batch of chains, not all of whose rows may be finite."""

    def finite_rows(self) -> Tensor:
        """Which rows are finite, ``(chains, num_constraints)``."""

    def damped_step(self, residual: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """
        The minimum-norm step for some rows.

        :param Tensor residual: shape ``(chains, num_constraints)``.
        :param Tensor rows: the rows to be met, same shape; all of them finite.
        :returns: the step, ``(chains, dim)``, and the lengths of the rows, one for other rows.
        """


Linearize = Callable[[Tensor], Linearization]


class DenseLinearization(NamedTuple):
    """Jacobians as matrices."""

    matrix: Tensor  # (chains, num_constraints, dim)

    def finite_rows(self) -> Tensor:
        """See :meth:`Linearization.finite_rows`."""
        return self.matrix.isfinite().all(-1)

    def damped_step(self, residual: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Linearization.damped_step`."""
        matrix = torch.where(rows.unsqueeze(-1), self.matrix, 0.0)
        norms = _lengths(matrix.square().sum(-1), rows)
        unit = matrix / norms.unsqueeze(-1)
        distance = torch.where(rows, residual, 0.0) / norms
        gram = unit @ unit.mT
        gram = gram + torch.diag_embed(_diagonal(rows, gram.shape[-1], gram))
        cholesky, _ = torch.linalg.cholesky_ex(gram)
        multipliers = torch.cholesky_solve(distance.unsqueeze(-1), cholesky)
        delta = -(unit.mT @ multipliers).squeeze(-1)
        return delta, norms


class BlockLinearization(NamedTuple):
    """Jacobians with local blocks beside global columns, as in :class:`.BlockJacobian`."""

    partition: BlockPartition
    columns: Tensor  # (chains, k + g, r, blocks)
    remaining: Tensor  # (chains, m, g)

    def finite_rows(self) -> Tensor:
        """See :meth:`Linearization.finite_rows`."""
        blocks, remaining = self.columns.isfinite().all(1), self.remaining.isfinite().all(-1)
        return self.partition.join_rows(blocks, remaining)

    def damped_step(self, residual: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Linearization.damped_step`."""
        part, k = self.partition, self.partition.num_local
        block_rows, remaining_rows = part.split_rows(rows)
        block_rows = block_rows & ~part.is_row_padding
        columns = torch.where(block_rows.unsqueeze(1), self.columns, 0.0)
        remaining = torch.where(remaining_rows.unsqueeze(-1), self.remaining, 0.0)
        block_norms = _lengths(columns.square().sum(1), block_rows)
        remaining_norms = _lengths(remaining.square().sum(-1), remaining_rows)
        columns = columns / block_norms.unsqueeze(1)
        remaining = remaining / remaining_norms.unsqueeze(-1)
        norms = part.join_rows(block_norms, remaining_norms)
        distance = part.split_rows(torch.where(rows, residual, 0.0) / norms)
        size = rows.shape[-1]
        damping = torch.diag_embed(_diagonal(block_rows, size, columns).movedim(1, -1))
        gram = sum_of_outer_products(columns[:, :k], columns[:, :k]) + damping.movedim(1, -1)
        whitening, _ = inverse_cholesky(gram)
        whitened = multiply(whitening, columns)
        rest = multiply(whitening, distance[0].unsqueeze(1))[:, 0]
        shared = whitened[:, k:].flatten(2)
        damping = _diagonal(remaining_rows, size, columns)
        weights = _shared_step(shared, rest.flatten(1), remaining, distance[1], damping)
        rest = rest - (weights.unsqueeze(1) @ shared).view_as(rest)
        local = (whitened[:, :k] * rest.unsqueeze(1)).sum(2)
        return -part.join_columns(local, weights), norms


def block_linearization(
    structure: BlockStructure, derivatives: Callable[[Tensor], Tensor]
) -> Linearize:
    """Linearisations by the products of a structure, batched over chains."""

    def linearize(position: Tensor) -> BlockLinearization:
        columns, remaining = structure.compression.entries(derivatives(position))
        return BlockLinearization(structure.partition, columns, remaining)

    return linearize


def _shared_step(
    shared: Tensor, rest: Tensor, remaining: Tensor, distance: Tensor, damping: Tensor
) -> Tensor:
    """Global part of the step, from whitened global columns and the remaining rows."""
    eye = torch.eye(shared.shape[1], dtype=shared.dtype, device=shared.device)
    core, _ = torch.linalg.cholesky_ex(shared @ shared.mT + eye)
    moment = (shared @ rest.unsqueeze(-1)).squeeze(-1)
    if remaining.shape[1] > 0:
        lift = torch.cholesky_solve(remaining.mT, core)
        schur = remaining @ lift + torch.diag_embed(damping)
        gap = distance.unsqueeze(-1) - lift.mT @ moment.unsqueeze(-1)
        multipliers = torch.cholesky_solve(gap, torch.linalg.cholesky_ex(schur)[0])
        moment = moment + (remaining.mT @ multipliers).squeeze(-1)
    return torch.cholesky_solve(moment.unsqueeze(-1), core).squeeze(-1)


def _lengths(squares: Tensor, rows: Tensor) -> Tensor:
    """Lengths of rows, from their squares; one for rows that are not used."""
    norms = squares.sqrt().clamp(min=torch.finfo(squares.dtype).tiny)
    return torch.where(rows, norms, 1.0)


def _diagonal(rows: Tensor, size: int, like: Tensor) -> Tensor:
    """What to add to the diagonal of the Gram matrix of unit rows: damping, or one."""
    # only enough damping for the factorisation to exist
    damping = 100 * torch.finfo(like.dtype).eps * size
    return torch.where(rows, damping, 1.0).to(like)
