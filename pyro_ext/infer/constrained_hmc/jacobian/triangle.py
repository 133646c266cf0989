"""Order a Jacobian so that the noise of a series makes it block lower triangular."""

from __future__ import annotations

from graphlib import TopologicalSorter
from typing import NamedTuple

import numpy as np

from .sparsity import Pattern

__all__ = ["Triangle", "find_triangles"]

_LARGEST_BLOCK = 8


class Triangle(NamedTuple):
    """Rows in an order, with a column for each, that is block lower triangular."""

    rows: np.ndarray  # (num_rows,) the order
    columns: np.ndarray  # (num_rows,) column on the diagonal beside each of ``rows``
    others: np.ndarray  # (num_columns - num_rows,) all other columns
    sizes: np.ndarray  # of the diagonal blocks, in order


def find_triangles(pattern: Pattern) -> list[Triangle]:
    """
    Give every row a column of its own so that rows depend on columns of earlier rows only.

    Columns with few nonzeros are preferred: noise that comes late in a series, rather than
    parameters. Rows that depend on each other's columns are a diagonal block.

    :returns: the order that, among columns with as many nonzeros, prefers those that come late
        in the model, where noise mostly is, and the one that prefers those that come early; none
        that has large diagonal blocks.
    """
    matchings = [_matching(pattern, late=late) for late in (True, False)]
    triangles = [_triangle(pattern, columns) for columns in matchings if columns is not None]
    return [triangle for triangle in triangles if triangle.sizes.max() <= _LARGEST_BLOCK]


def _triangle(pattern: Pattern, columns: np.ndarray) -> Triangle:
    owner = np.full(pattern.num_columns, -1)
    owner[columns] = np.arange(pattern.num_rows)
    is_owned = owner[pattern.columns] >= 0
    needs, needed = pattern.rows[is_owned], owner[pattern.columns[is_owned]]
    blocks = _blocks_in_order(needs, needed, pattern.num_rows)
    rows = np.concatenate(blocks)
    others = (owner == -1).nonzero()[0]
    return Triangle(rows, columns[rows], others, np.array([len(block) for block in blocks]))


def _matching(pattern: Pattern, *, late: bool) -> np.ndarray | None:
    """A column for every row, with as few nonzeros in all of them as is possible."""
    import scipy.sparse

    counts = np.bincount(pattern.columns, minlength=pattern.num_columns)
    places = np.arange(pattern.num_columns) / pattern.num_columns
    # ties are worth less than one nonzero in all columns together
    weights = counts + (1 - places if late else 1 + places) / pattern.num_rows
    shape = (pattern.num_rows, pattern.num_columns)
    graph = scipy.sparse.csr_matrix(
        (weights[pattern.columns], (pattern.rows, pattern.columns)), shape
    )
    try:
        rows, columns = scipy.sparse.csgraph.min_weight_full_bipartite_matching(graph)
    except ValueError:  # there is no full matching
        return None
    result: np.ndarray = columns[np.argsort(rows)].astype(np.int64)
    return result


def _blocks_in_order(needs: np.ndarray, needed: np.ndarray, size: int) -> list[np.ndarray]:
    """Groups of rows that need each other, after the groups that they need."""
    import scipy.sparse

    graph = scipy.sparse.coo_matrix((np.ones(len(needs), dtype=np.int8), (needs, needed)))
    graph.resize(size, size)
    number, labels = scipy.sparse.csgraph.connected_components(graph, connection="strong")
    # groups by their first rows, so that a series keeps its order
    first = np.full(number, size)
    np.minimum.at(first, labels, np.arange(size))
    sorter: TopologicalSorter[int] = TopologicalSorter(
        dict.fromkeys(np.argsort(first).tolist(), ())
    )
    pairs = np.unique(np.stack([labels[needs], labels[needed]], -1), axis=0)
    for later, earlier in pairs[pairs[:, 0] != pairs[:, 1]].tolist():
        sorter.add(later, earlier)
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(labels, minlength=number))[:-1])
    return [members[label] for label in sorter.static_order()]
