"""Random constraints with local blocks, global inputs and shuffled rows and columns."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from pyro_ext.infer.constrained_hmc.jacobian.block_structure import BlockStructure
from pyro_ext.infer.constrained_hmc.jacobian.partition import find_splits
from pyro_ext.infer.constrained_hmc.jacobian.sparsity import find_pattern
from tests.infer.constrained_hmc.problems import Problem

__all__ = ["BlockProblem", "block_problem", "block_shapes", "structure_of"]

# rows, and columns on top of them, of every block; global inputs; outputs without noise
block_shapes = st.tuples(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=2, max_size=6),
    st.integers(0, 4),
    st.integers(0, 2),
    st.integers(0, 10_000),
).filter(lambda shape: shape[2] <= max(shape[1] - 1, 0))


class BlockProblem(NamedTuple):
    """A constraint whose structure is known."""

    constraint: Callable[[Tensor], Tensor]
    potential: Callable[[Tensor], Tensor]
    dim: int
    num_constraints: int
    row_blocks: Tensor  # block of every row, -1 for outputs without noise
    column_blocks: Tensor  # block of every column, -1 for global inputs

    def plain(self) -> Problem:
        """The same without its structure."""
        return Problem(self.constraint, self.potential, self.dim, self.num_constraints)


def block_problem(
    blocks: list[tuple[int, int]], num_global: int, num_remaining: int, seed: int
) -> BlockProblem:
    """
    Outputs ``W n + sin(V n + U z)`` with sparse ``W``, ``V`` inside the blocks, shuffled.

    :param blocks: rows of every block, and how many more columns it has.
    :param int num_global: inputs ``z`` that every output depends on.
    :param int num_remaining: outputs that depend on ``z`` alone.
    :param int seed: of coefficients and order.
    """
    generator = torch.Generator().manual_seed(seed)
    row_blocks = torch.cat(
        [torch.full((r,), b) for b, (r, _) in enumerate(blocks)]
        + [torch.full((num_remaining,), -1)]
    )
    column_blocks = torch.cat(
        [torch.full((r + more,), b) for b, (r, more) in enumerate(blocks)]
        + [torch.full((num_global,), -1)]
    )
    shape = (len(row_blocks), len(column_blocks))
    is_local = (row_blocks[:, None] == column_blocks) & (row_blocks[:, None] >= 0)
    # every block has a nonzero diagonal, and half of its other entries
    first = torch.zeros(shape)
    row = column = 0
    for r, more in blocks:
        first[row : row + r, column : column + r] = 3 * torch.eye(r)
        row, column = row + r, column + r + more
    noise = torch.randn(shape, generator=generator)
    is_used = is_local & (torch.rand(shape, generator=generator) < 0.5)
    linear = torch.where(is_used, 0.4 * noise, 0.0) + first
    wave = torch.where(linear != 0, 0.4 * torch.randn(shape, generator=generator), 0.0)
    wave[:, column_blocks == -1] = torch.randn(shape[0], num_global, generator=generator)
    linear[row_blocks == -1] = wave[row_blocks == -1] * 1.5
    rows = torch.randperm(shape[0], generator=generator)
    columns = torch.randperm(shape[1], generator=generator)
    linear, wave = linear[rows][:, columns], wave[rows][:, columns]

    def constraint(u: Tensor) -> Tensor:
        return linear @ u + (wave @ u).sin()

    def potential(u: Tensor) -> Tensor:
        return 0.5 * u.square().sum() + 0.1 * (u[0] * u[-1]).cos()

    return BlockProblem(
        constraint, potential, shape[1], shape[0], row_blocks[rows], column_blocks[columns]
    )


def structure_of(problem: BlockProblem, mode: str = "forward", choice: int = 0) -> BlockStructure:
    """The structure found for a problem: the one that is cheapest to factorise, or another."""
    pattern = find_pattern(problem.constraint, torch.randn(3, problem.dim))
    splits = find_splits(pattern)
    device = torch.device("cpu")
    return BlockStructure(pattern, splits[choice], mode, dtype=torch.float64, device=device)
