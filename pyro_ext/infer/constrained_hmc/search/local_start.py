r"""Starting points by solving every local block for its own inputs.

Given the global inputs, the outputs of a block are as many equations as the block has rows, in at
least as many inputs of its own (Graham and Storkey 2017, end of section 5). The blocks are solved
at once, by Newton steps of minimum norm that each block shortens as it needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..dynamics.projection import BatchFunction, Tolerances
from ..jacobian.block_algebra import inverse_cholesky, multiply, sum_of_outer_products
from ..jacobian.block_structure import BlockStructure

__all__ = ["solve_local_blocks"]

_MAX_STEPS = 50
_HALVINGS = 8


def solve_local_blocks(
    constraint: BatchFunction,
    derivatives: Callable[[Tensor], Tensor],
    structure: BlockStructure,
    start: Tensor,
    tolerances: Tolerances,
) -> Tensor:
    """
    Solve the blocks for their local inputs, with the global inputs as they are.

    :param constraint: batched constraint.
    :param derivatives: batched derivatives of the structure.
    :param structure: blocks and global columns.
    :param Tensor start: inputs, ``(chains, dim)``.
    :param tolerances: when a block counts as solved.
    :returns: inputs whose blocks are solved, or as nearly as was possible.
    """
    part, k = structure.partition, structure.partition.num_local
    padding = torch.diag_embed(part.is_row_padding.mT.to(start)).movedim(0, -1)
    limits = part.split_rows(tolerances.constraint.unsqueeze(0))[0]
    position, residual = start, constraint(start)
    for _ in range(_MAX_STEPS):
        blocks = part.split_rows(residual)[0]
        is_solved = ((blocks.abs() <= limits) | part.is_row_padding).all(1)
        if bool(is_solved.all()):
            break
        columns = structure.compression.entries(derivatives(position))[0][:, :k]
        whitening, _ = inverse_cholesky(sum_of_outer_products(columns, columns) + padding)
        whitened = multiply(whitening, columns)
        distance = multiply(whitening, blocks.unsqueeze(1))
        step = (whitened * distance).sum(2)  # (chains, k, blocks)
        moved, residual = _line_search(constraint, structure, position, residual, step, whitening)
        if torch.equal(moved, position):
            break
        position = moved
    return position


def _line_search(
    constraint: BatchFunction,
    structure: BlockStructure,
    position: Tensor,
    residual: Tensor,
    step: Tensor,
    whitening: Tensor,
) -> tuple[Tensor, Tensor]:
    """Halve the step of every block until its own outputs come nearer."""
    part = structure.partition
    no_shared = position.new_zeros(len(position), len(part.global_columns))

    def distance(value: Tensor) -> Tensor:
        """Of the blocks, in units of their local inputs; ``(chains, blocks)``."""
        blocks = part.split_rows(value)[0].masked_fill(part.is_row_padding, 0.0)
        return multiply(whitening, blocks.unsqueeze(1))[:, 0].square().sum(1)

    before = distance(residual)
    step = torch.where(step.isfinite().all(1, keepdim=True), step, 0.0)
    accepted = torch.zeros_like(step)
    for _ in range(_HALVINGS):
        trial = position - part.join_columns(accepted + step, no_shared)
        is_better = (distance(constraint(trial)) < before).unsqueeze(1)
        accepted = torch.where(is_better, accepted + step, accepted)
        step = torch.where(is_better, 0.0, 0.5 * step)
        if bool((step == 0).all()):
            break
    position = position - part.join_columns(accepted, no_shared)
    return position, constraint(position)
