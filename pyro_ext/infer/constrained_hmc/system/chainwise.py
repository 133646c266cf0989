"""Select, split and join batches of chains in nested tuples of tensors.

A batch is a tensor, or a ``NamedTuple`` of batches: every tensor inside has chains as its leading
axis. Whatever is neither a tensor nor a tuple, list or dictionary (the pattern of a sparse
Jacobian, say) is the same for all chains and passes through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["join_chains", "select_chains", "split_chains", "take_chains"]

Batch = TypeVar("Batch")


def select_chains(mask: Tensor, new: Batch, old: Batch) -> Batch:
    """
    Take chains from ``new`` where ``mask`` holds and from ``old`` elsewhere.

    :param Tensor mask: shape ``(chains,)``.
    """
    if bool(mask.all()):
        return new

    def select(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(mask.reshape(mask.shape + (1,) * (new.dim() - 1)), new, old)

    return _map(select, new, old)


def take_chains(batch: Batch, indices: Tensor) -> Batch:
    """The chains of the given indices, in their order."""
    return _map(lambda part: part[indices], batch)


def split_chains(batch: Batch) -> list[Batch]:
    """A batch as batches of one chain each."""
    leaves, structure = tree_flatten(batch)
    number = next(len(leaf) for leaf in leaves if isinstance(leaf, Tensor))
    rows = [
        leaf.split(1) if isinstance(leaf, Tensor) else (leaf,) * number  # the same for all
        for leaf in leaves
    ]
    return [tree_unflatten(list(row), structure) for row in zip(*rows, strict=True)]


def join_chains(batches: Sequence[Batch]) -> Batch:
    """Batches one after the other as a single one; the inverse of :func:`split_chains`."""
    return _map(lambda *parts: torch.cat(parts), *batches)


def _map(function: Callable[..., Tensor], *batches: Batch) -> Batch:
    """Apply a function to corresponding tensors; other leaves are those of the first batch."""
    flat = [tree_flatten(batch) for batch in batches]
    leaves: list[Any] = [
        function(*parts) if isinstance(parts[0], Tensor) else parts[0]
        for parts in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    batch: Batch = tree_unflatten(leaves, flat[0][1])
    return batch
