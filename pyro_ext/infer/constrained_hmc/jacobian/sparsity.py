r"""Which outputs depend on which inputs, read from derivatives at a few points.

The product of a Jacobian with a random vector that is zero outside of a group of inputs is nonzero
for the outputs that some input of the group acts on. Groups are halved until they are single
inputs, and groups that act on different outputs share a product: of :math:`n` inputs whose effects
are local :math:`O(\log n)` products find all, of a dense Jacobian they are :math:`2n` (compare
Griewank and Mitev 2002, *Detecting Jacobian sparsity patterns by Bayesian probing*).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from .coloring import greedy_coloring
from .forward import forward_product

__all__ = ["Pattern", "find_pattern", "merge_patterns"]

_ELEMENTS_AT_ONCE = 2**24  # of products held at once while the pattern is read


class Pattern(NamedTuple):
    """Places of a Jacobian that are not zero everywhere, in the order of rows."""

    rows: np.ndarray
    columns: np.ndarray
    num_rows: int
    num_columns: int
    is_known: np.ndarray
    """Per row, whether it could be read at one of the points at least; of a row that could not,
    no place is listed."""

    @property
    def is_complete(self) -> bool:
        """Whether every row is known."""
        return bool(self.is_known.all())


def find_pattern(
    constraint: Callable[[Tensor], Tensor],
    points: Tensor,
    *,
    forward: bool = True,
    most_products: int | None = None,
) -> Pattern:
    """
    Union of the nonzeros of a Jacobian at several points.

    Where a row is not finite at a point, zeros of the row are lost among the ``0 * inf`` there;
    the row is read at the other points. In reverse mode they are lost in all rows, and points
    where some row is not finite are left out.

    :param constraint: maps one input ``(dim,)`` to the residuals ``(num_constraints,)``.
    :param Tensor points: inputs, shape ``(points, dim)``.
    :param bool forward: differentiate forwards, with groups of inputs, rather than in reverse,
        with groups of constraints.
    :param most_products: how many products at one size of the groups to compute at most; where
        more are needed the search ends without a row that is known.
    """
    outputs = vmap(constraint)(points)
    num_rows, num_columns = outputs.shape[-1], points.shape[-1]
    edges = None
    if forward:
        is_read = _finite_rows(constraint, points)
        is_known = is_read.any(0).cpu().numpy()

        def product(seeds: Tensor) -> Tensor:
            return _tangents(constraint, points, seeds)

        edges = _probe(product, num_columns, is_read, most_products)
    else:
        points = points[_is_regular(constraint, points, outputs)]
        is_known = np.full(num_rows, len(points) > 0)

        def product(seeds: Tensor) -> Tensor:
            return _cotangents(constraint, points, seeds)

        is_read = torch.ones_like(points, dtype=torch.bool)
        edges = _probe(product, num_rows, is_read, most_products) if len(points) else None
    if edges is None:
        edges = (np.zeros(0, dtype=np.int64),) * 2
        is_known = np.zeros(num_rows, dtype=bool)
    rows, columns = reversed(edges) if forward else edges
    order = np.lexsort((columns, rows))
    return Pattern(rows[order], columns[order], num_rows, num_columns, is_known)


def merge_patterns(first: Pattern, second: Pattern) -> Pattern:
    """Union of two patterns; a row that one of them does not know is the other's."""
    keys = [one.rows * one.num_columns + one.columns for one in (first, second)]
    rows, columns = np.divmod(np.union1d(*keys), first.num_columns)
    is_known = first.is_known | second.is_known
    return Pattern(rows, columns, first.num_rows, first.num_columns, is_known)


def _probe(
    product: Callable[[Tensor], Tensor], num_items: int, is_read: Tensor, most_products: int | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """
    Which items act on which of the others.

    :param product: maps seeds ``(number, num_items)`` to products, ``(points, number, others)``.
    :param int num_items: inputs, if the others are constraints, or the other way round.
    :param Tensor is_read: entries of the products that can be read, ``(points, others)``.
    :param most_products: when to give up. Before that, every item counts as acting on what more
        than half of the groups act on, so that a few such others do not keep the rest apart.
    :returns: items and others, a pair for each nonzero.
    """
    bounds = np.array([0, num_items])
    others = is_read.any(0).nonzero().squeeze(-1).cpu().numpy()
    groups = np.zeros_like(others)
    shared = np.zeros(0, dtype=others.dtype)
    while True:
        num_groups = len(bounds) - 1
        colors = greedy_coloring(groups, others, num_groups)
        if most_products is not None and colors.max(initial=-1) >= most_products:
            is_shared = np.bincount(others)[others] > num_groups / 2
            shared = np.union1d(shared, others[is_shared])
            groups, others = groups[~is_shared], others[~is_shared]
            colors = greedy_coloring(groups, others, num_groups)
            if max(colors.max(initial=-1) + 1, len(shared)) > most_products:
                return None
        item_colors = np.repeat(colors, np.diff(bounds))
        is_edge = _hits(product, item_colors, is_read)[colors[groups], others]
        groups, others = groups[is_edge], others[is_edge]
        if num_groups == num_items:
            pairs = np.repeat(np.arange(num_items), len(shared)), np.tile(shared, num_items)
            return np.concatenate([groups, pairs[0]]), np.concatenate([others, pairs[1]])
        first, bounds = _halved(bounds)
        has_second = np.diff(first, append=len(bounds) - 1)[groups] == 2
        groups = np.concatenate([first[groups], first[groups[has_second]] + 1])
        others = np.concatenate([others, others[has_second]])


def _halved(bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of the first half of every group, and the bounds of the halves."""
    halves = np.union1d(bounds, (bounds[:-1] + bounds[1:] + 1) // 2)
    return np.searchsorted(halves, bounds[:-1]), halves


def _hits(
    product: Callable[[Tensor], Tensor], item_colors: np.ndarray, is_read: Tensor
) -> np.ndarray:
    """Whether the product for each colour is nonzero, ``(colors, others)``."""
    num_points, num_others = is_read.shape
    num_colors = int(item_colors.max()) + 1
    colors = torch.as_tensor(item_colors, device=is_read.device)
    weights = torch.randn(len(colors), device=is_read.device)
    is_hit = np.zeros((num_colors, num_others), dtype=bool)
    chunk = max(1, _ELEMENTS_AT_ONCE // (max(num_points, 1) * max(num_others, len(colors))))
    for first in range(0, num_colors, chunk):
        index = torch.arange(first, min(first + chunk, num_colors), device=is_read.device)
        seeds = torch.where(colors == index.unsqueeze(-1), weights, 0.0)
        is_part = (product(seeds) != 0) & is_read.unsqueeze(1)
        is_hit[first : first + chunk] = is_part.any(0).cpu().numpy()
    return is_hit


def _finite_rows(constraint: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Rows without a non-finite entry: their product with a random vector is finite."""
    vectors = torch.randn_like(points)
    values, products = vmap(lambda u, v: jvp(constraint, (u,), (v,))[:2])(points, vectors)
    return values.isfinite() & products.isfinite()


def _is_regular(constraint: Callable[[Tensor], Tensor], points: Tensor, outputs: Tensor) -> Tensor:
    """Points at which everything is finite: a product of the transpose and a random vector."""
    products = _cotangents(constraint, points, torch.randn_like(outputs[:1]))
    return outputs.isfinite().all(-1) & products.isfinite().flatten(1).all(-1)


def _tangents(constraint: Callable[[Tensor], Tensor], points: Tensor, seeds: Tensor) -> Tensor:
    """Products with some vectors, shape ``(points, seeds, num_constraints)``."""

    def single(u: Tensor) -> Tensor:
        return vmap(lambda seed: forward_product(constraint, u, seed))(seeds.to(u))

    result: Tensor = vmap(single)(points)
    return result


def _cotangents(constraint: Callable[[Tensor], Tensor], points: Tensor, seeds: Tensor) -> Tensor:
    """Products of the transpose with some vectors, shape ``(points, seeds, dim)``."""

    def single(u: Tensor) -> Tensor:
        pullback = vjp(constraint, u)[1]
        return vmap(lambda seed: pullback(seed)[0])(seeds.to(u))

    result: Tensor = vmap(single)(points)
    return result
