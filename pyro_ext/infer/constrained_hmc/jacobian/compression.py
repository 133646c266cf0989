r"""Sparse Jacobians by few products, through colouring.

Columns that share no row may be computed by one product: :math:`J(e_i + e_j)` holds both. So
may rows that share no column. The number of products is the number of colours, which local noise
keeps independent of the number of outputs (Curtis, Powell and Reid 1974; Griewank and Walther
2008, ch. 8).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import vjp, vmap

from .coloring import greedy_coloring
from .forward import forward_product
from .partition import BlockPartition
from .sparsity import Pattern

__all__ = ["Compression", "compress"]


@dataclass(frozen=True, eq=False)
class Compression:
    """
    Products that hold every entry of a partitioned Jacobian, and where they hold it.

    :meth:`products` computes; :meth:`entries` and :meth:`cotangent` only move numbers.
    """

    forward_seeds: Tensor  # (num_forward, num_columns)
    reverse_seeds: Tensor  # (num_reverse, num_rows)
    entry_places: Tensor  # (entries,) where each entry stands in the products
    product_places: Tensor  # (products,) and the other way round
    block_shape: tuple[int, int, int]  # local and global columns, rows, blocks
    remaining_shape: tuple[int, int]  # remaining rows, global columns

    @property
    def num_products(self) -> int:
        """Number of directional derivatives."""
        return len(self.forward_seeds) + len(self.reverse_seeds)

    def products(self, constraint: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The function that computes the products at one input, flattened, and a zero."""

        def compressed(u: Tensor) -> Tensor:
            parts = []
            if len(self.forward_seeds) > 0:
                tangents = vmap(lambda seed: forward_product(constraint, u, seed))
                parts.append(tangents(self.forward_seeds).flatten())
            if len(self.reverse_seeds) > 0:
                pullback = vjp(constraint, u)[1]
                parts.append(vmap(lambda seed: pullback(seed)[0])(self.reverse_seeds).flatten())
            return torch.cat([*parts, u.new_zeros(1)])

        return compressed

    def entries(self, products: Tensor) -> tuple[Tensor, Tensor]:
        """
        Read the entries of Jacobians from their products.

        :param Tensor products: shape ``(chains, products)``.
        :returns: columns of the blocks, local ones first, ``(chains, columns, r, blocks)``, and
            global columns of the remaining rows, ``(chains, m, g)``.
        """
        flat = products[:, self.entry_places]
        size = int(np.prod(self.block_shape))
        columns = flat[:, :size].unflatten(-1, self.block_shape)
        return columns, flat[:, size:].unflatten(-1, self.remaining_shape)

    def cotangent(self, columns: Tensor, remaining: Tensor) -> Tensor:
        """Transpose of :meth:`entries`."""
        zero = columns.new_zeros(len(columns), 1)
        flat = torch.cat([columns.flatten(1), remaining.flatten(1), zero], -1)
        return flat[:, self.product_places]


class _Entries(NamedTuple):
    """Row, column and kind of every entry, in the order of :meth:`Compression.entries`."""

    rows: np.ndarray
    columns: np.ndarray
    is_local: np.ndarray
    is_nonzero: np.ndarray


def compress(
    pattern: Pattern, partition: BlockPartition, mode: str, dtype: torch.dtype
) -> Compression:
    """
    Choose the products for a partitioned Jacobian.

    :param pattern: places that may be nonzero.
    :param partition: blocks and global columns.
    :param str mode: ``"forward"`` (columns are coloured), ``"reverse"`` (rows are coloured), or
        ``"mixed"`` (global columns forwards, local blocks in reverse).
    :param dtype: of the inputs.
    """
    device = partition.block_rows.device
    entries = _entries(pattern, partition)
    is_local_edge = (partition.split.column_blocks >= 0)[pattern.columns]
    edges = {
        "forward": (slice(None), slice(0)),
        "reverse": (slice(0), slice(None)),
        "mixed": (~is_local_edge, is_local_edge),
    }[mode]
    rows, columns = pattern.rows, pattern.columns
    column_colors = greedy_coloring(columns[edges[0]], rows[edges[0]], pattern.num_columns)
    row_colors = greedy_coloring(rows[edges[1]], columns[edges[1]], pattern.num_rows)
    forward_seeds, reverse_seeds = _seeds(column_colors), _seeds(row_colors)
    is_forward = np.full(len(entries.rows), mode == "forward")
    is_forward |= (mode == "mixed") & ~entries.is_local
    forward_places = column_colors[entries.columns] * pattern.num_rows + entries.rows
    reverse_places = row_colors[entries.rows] * pattern.num_columns + entries.columns
    num_forward = len(forward_seeds) * pattern.num_rows
    size = num_forward + len(reverse_seeds) * pattern.num_columns
    places = np.where(is_forward, forward_places, num_forward + reverse_places)
    places[~entries.is_nonzero] = size
    product_places = np.full(size + 1, len(places))
    product_places[places[entries.is_nonzero]] = entries.is_nonzero.nonzero()[0]
    k, g, (r, b) = partition.num_local, len(partition.global_columns), partition.block_rows.shape
    return Compression(
        forward_seeds=torch.as_tensor(forward_seeds, dtype=dtype, device=device),
        reverse_seeds=torch.as_tensor(reverse_seeds, dtype=dtype, device=device),
        entry_places=torch.as_tensor(places, device=device),
        product_places=torch.as_tensor(product_places, device=device),
        block_shape=(k + g, r, b),
        remaining_shape=(len(partition.remaining_rows), g),
    )


def _seeds(colors: np.ndarray) -> np.ndarray:
    """One vector per colour: one where an item has the colour, zero elsewhere."""
    return colors == np.arange(colors.max(initial=-1) + 1)[:, None]


def _entries(pattern: Pattern, partition: BlockPartition) -> _Entries:
    """Entries of the blocks, of the global columns beside them, and of the remaining rows."""
    local, shared = partition.block_columns.cpu().numpy(), partition.global_columns.cpu().numpy()
    remaining = partition.remaining_rows.cpu().numpy()
    block_rows = partition.block_rows.cpu().numpy()
    is_real_row = ~partition.is_row_padding.cpu().numpy()
    is_real_column = ~partition.is_column_padding.cpu().numpy()
    k, g, (r, b) = len(local), len(shared), block_rows.shape
    parts = (
        (block_rows[None], local[:, None], is_real_row[None] & is_real_column[:, None]),
        (block_rows[None], shared[:, None, None], is_real_row[None]),
        (remaining[:, None], shared[None], np.True_),
    )
    shapes = ((k, r, b), (g, r, b), (len(remaining), g))
    rows, columns, is_real = (
        np.concatenate(
            [np.broadcast_to(p, s).reshape(-1) for p, s in zip(arrays, shapes, strict=True)]
        )
        for arrays in zip(*parts, strict=True)
    )
    keys = pattern.rows * pattern.num_columns + pattern.columns
    is_nonzero = is_real & np.isin(rows * pattern.num_columns + columns, keys)
    return _Entries(rows, columns, np.arange(len(rows)) < k * r * b, is_nonzero)
