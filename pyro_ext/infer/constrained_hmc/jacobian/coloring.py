"""Greedy colouring: which items may share a product because they have nothing in common."""

from __future__ import annotations

import numpy as np

__all__ = ["greedy_coloring"]


def greedy_coloring(items: np.ndarray, others: np.ndarray, num_items: int) -> np.ndarray:
    """
    Colour the items of a bipartite graph so that two of one colour have no neighbour in common.

    :param items: item of every edge.
    :param others: neighbour of every edge.
    :param int num_items: number of items.
    :returns: a colour for every item, counted from zero; -1 for items without neighbours.
    """
    counts = np.bincount(items, minlength=num_items)
    order = np.argsort(items, kind="stable")
    neighbours = np.split(others[order], np.cumsum(counts)[:-1])
    colors = np.full(num_items, -1)
    is_taken = np.zeros((others.max(initial=-1) + 1, 8), dtype=bool)
    for item in np.argsort(-counts, kind="stable"):
        if counts[item] == 0:
            break
        near = neighbours[item]
        is_free = ~is_taken[near].any(0)
        if not is_free.any():
            is_taken = np.pad(is_taken, ((0, 0), (0, is_taken.shape[1])))
            is_free = ~is_taken[near].any(0)
        colors[item] = is_free.argmax()
        is_taken[near, colors[item]] = True
    return colors
