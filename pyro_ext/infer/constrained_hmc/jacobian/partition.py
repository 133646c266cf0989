r"""Split inputs into global columns and local blocks of a Jacobian.

With its rows and columns sorted, a Jacobian of outputs with local noise is

.. math::

    J = \begin{pmatrix} L_1 & & & A_1 \\ & \ddots & & \vdots \\ & & L_B & A_B \\
        0 & \cdots & 0 & A_0 \end{pmatrix}

with small blocks :math:`L_b` of at least as many local inputs as outputs, and few columns of
global inputs at the right. The rows at the bottom, often none, belong to outputs without noise of
their own. Pure index work: nothing here computes a derivative.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from .sparsity import Pattern

__all__ = ["BlockPartition", "Split", "dense_operations", "find_splits", "partition"]

_MOST_CANDIDATES = 24


class Split(NamedTuple):
    """A choice of global columns, and the blocks that the other columns then fall into."""

    row_blocks: np.ndarray  # (num_rows,) block of every row, -1 for remaining rows
    column_blocks: np.ndarray  # (num_columns,) block of local columns, -1 global, -2 unused
    num_blocks: int

    @property
    def num_global(self) -> int:
        """Number of global columns."""
        return int((self.column_blocks == -1).sum())

    @property
    def num_remaining(self) -> int:
        """Number of rows that belong to no block."""
        return int((self.row_blocks == -1).sum())

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns of the largest blocks, to which the others are padded."""
        shapes = [
            np.bincount(blocks[blocks >= 0], minlength=1).max()
            for blocks in (self.row_blocks, self.column_blocks)
        ]
        return int(shapes[0]), int(shapes[1])

    @property
    def operations(self) -> float:
        """Multiplications to factorise a Jacobian of this form, to leading order."""
        (r, k), g, m = self.block_shape, self.num_global, self.num_remaining
        padded = self.num_blocks * r
        blocks = padded * (2 * r * k + 2 * r**2 + r * g)
        return blocks + 2 * padded * g**2 + g**3 + m * g * (g + m) + m**3


def dense_operations(num_rows: int, num_columns: int) -> float:
    """Multiplications to factorise a dense Jacobian, to leading order."""
    return num_rows**2 * (2 * num_columns + num_rows / 3)


def find_splits(pattern: Pattern) -> list[Split]:
    """
    Ways to split the columns of a Jacobian, those that are cheap to factorise first.

    Columns with more than some number of nonzeros are global, for every such number; what the
    other columns connect is a block. A block with fewer columns than rows is given up: its
    columns become global, its rows remain without a block.
    """
    counts = np.bincount(pattern.columns, minlength=pattern.num_columns)
    thresholds = np.unique(counts[counts > 0])
    if len(thresholds) > _MOST_CANDIDATES:
        chosen = np.linspace(0, len(thresholds) - 1, _MOST_CANDIDATES).round().astype(int)
        thresholds = thresholds[np.unique(chosen)]
    splits = [_split(pattern, counts, threshold) for threshold in thresholds]
    # more remaining rows than global columns are dependent
    possible = [s for s in splits if s.num_blocks > 0 and s.num_remaining <= s.num_global]
    return sorted(possible, key=lambda split: split.operations)


def _split(pattern: Pattern, counts: np.ndarray, threshold: int) -> Split:
    # here and not at the top, as everywhere in this package: importing SciPy takes long
    import scipy.sparse

    rows, columns = pattern.rows, pattern.columns
    is_local = (counts <= threshold) & (counts > 0)
    shape = (pattern.num_rows, pattern.num_columns)
    size = sum(shape)
    is_edge = is_local[columns]
    edges = (rows[is_edge], shape[0] + columns[is_edge])
    graph = scipy.sparse.coo_matrix((np.ones(len(edges[0]), dtype=np.int8), edges), (size, size))
    _, labels = scipy.sparse.csgraph.connected_components(graph, directed=False)
    row_labels, column_labels = labels[: shape[0]], labels[shape[0] :]
    num_rows = np.bincount(row_labels, minlength=size)
    num_columns = np.bincount(column_labels[is_local], minlength=size)
    is_block = (num_rows > 0) & (num_columns >= num_rows)
    # blocks in the order of their first rows
    first_rows, number = np.unique(row_labels, return_index=True)
    ordered = first_rows[np.argsort(number)]
    ordered = ordered[is_block[ordered]]
    numbers = np.full(size, -1)
    numbers[ordered] = np.arange(len(ordered))
    column_blocks = np.where(is_local, numbers[column_labels], -1)
    column_blocks[counts == 0] = -2
    return Split(numbers[row_labels], column_blocks, len(ordered))


@dataclass(frozen=True, eq=False)
class BlockPartition:
    """
    Index tensors of a split: where the rows and columns of a Jacobian stand in its blocks.

    Blocks are padded to one shape, with index zero where there is nothing. A padded block has
    ``r`` rows and ``k`` columns; the axis of the blocks is the last one, so that operations on
    blocks of one row are plain arithmetic on vectors.
    """

    block_rows: Tensor  # (r, blocks)
    is_row_padding: Tensor  # (r, blocks)
    block_columns: Tensor  # (k, blocks)
    is_column_padding: Tensor  # (k, blocks)
    global_columns: Tensor  # (g,)
    remaining_rows: Tensor  # (m,)
    row_places: Tensor  # (num_rows,) place in the flattened rows of blocks, then the remaining
    column_places: Tensor  # (num_columns,) in columns of blocks, then global ones, then a zero
    split: Split
    has_unused: bool  # whether there are inputs that nothing depends on

    @property
    def num_local(self) -> int:
        """Columns of a padded block."""
        return self.block_columns.shape[0]

    def split_rows(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """From ``(chains, num_rows)`` to ``(chains, r, blocks)`` and ``(chains, m)``."""
        return residual[:, self.block_rows], residual[:, self.remaining_rows]

    def join_rows(self, blocks: Tensor, remaining: Tensor) -> Tensor:
        """Inverse of :meth:`split_rows`."""
        rows = blocks.flatten(1)
        if len(self.remaining_rows) > 0:
            rows = torch.cat([rows, remaining], -1)
        return rows[:, self.row_places]

    def split_columns(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """From ``(chains, num_columns)`` to ``(chains, k, blocks)`` and ``(chains, g)``."""
        return vector[:, self.block_columns], vector[:, self.global_columns]

    def join_columns(self, local: Tensor, shared: Tensor) -> Tensor:
        """Inverse of :meth:`split_columns`; columns that nothing depends on are zero."""
        parts = [local.flatten(1), shared]
        if self.has_unused:
            parts.append(shared.new_zeros(len(shared), 1))
        return torch.cat(parts, -1)[:, self.column_places]

    def dense(self, columns: Tensor, remaining: Tensor) -> Tensor:
        """
        Matrices from their parts.

        :param Tensor columns: local, then global columns, ``(chains, k + g, r, blocks)``.
        :param Tensor remaining: global columns of the remaining rows, ``(chains, m, g)``.
        :returns: shape ``(chains, num_rows, num_columns)``.
        """
        k, num_blocks = self.block_columns.shape
        own = torch.eye(num_blocks, dtype=columns.dtype, device=columns.device)
        local = torch.einsum("ckrb,bd->crbkd", columns[:, :k], own).flatten(3)
        shared = columns[:, k:].movedim(1, -1)
        blocks = torch.cat([local, shared], -1).flatten(1, 2)
        rows = torch.cat([blocks, pad(remaining, (k * num_blocks, 0))], 1)[:, self.row_places]
        return pad(rows, (0, 1))[:, :, self.column_places]


def partition(split: Split, device: torch.device) -> BlockPartition:
    """Index tensors of a split."""
    block_rows, row_padding, row_places = _padded(split.row_blocks, split.num_blocks)
    block_columns, column_padding, column_places = _padded(split.column_blocks, split.num_blocks)
    remaining = (split.row_blocks == -1).nonzero()[0]
    row_places[remaining] = block_rows.size + np.arange(len(remaining))
    shared = (split.column_blocks == -1).nonzero()[0]
    column_places[shared] = block_columns.size + np.arange(len(shared))
    column_places[split.column_blocks == -2] = block_columns.size + len(shared)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(array), device=device)

    return BlockPartition(
        block_rows=tensor(block_rows),
        is_row_padding=tensor(row_padding),
        block_columns=tensor(block_columns),
        is_column_padding=tensor(column_padding),
        global_columns=tensor(shared),
        remaining_rows=tensor(remaining),
        row_places=tensor(row_places),
        column_places=tensor(column_places),
        split=split,
        has_unused=bool((split.column_blocks == -2).any()),
    )


def _padded(blocks: np.ndarray, num_blocks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Members of every block as columns of one table, and the place of every member in it."""
    members = list(_members(blocks, num_blocks))
    height = max(len(block) for block in members)
    table = np.zeros((height, num_blocks), dtype=np.int64)
    is_padding = np.ones((height, num_blocks), dtype=bool)
    places = np.zeros(len(blocks), dtype=np.int64)
    for b, block in enumerate(members):
        table[: len(block), b] = block
        is_padding[: len(block), b] = False
        places[block] = np.arange(len(block)) * num_blocks + b
    return table, is_padding, places


def _members(blocks: np.ndarray, num_blocks: int) -> Iterator[np.ndarray]:
    order = np.argsort(blocks, kind="stable")
    bounds = np.searchsorted(blocks[order], np.arange(num_blocks + 1))
    for start, stop in pairwise(bounds):
        yield order[start:stop]
