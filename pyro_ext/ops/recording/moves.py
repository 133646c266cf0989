"""Operations that only move elements about: views, joins, and writing into a part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_unflatten

from .program import Operation, Program, Reference

__all__ = ["index_leaves", "moves"]

aten = torch.ops.aten

# the operations, with the positions of the arguments that say where to
_MOVES: dict[Any, tuple[int, ...]] = {
    aten.cat.default: (),
    aten.copy.default: (),
    aten.diagonal.default: (),
    aten.diagonal_scatter.default: (),
    aten.expand.default: (),
    aten.flip.default: (),
    aten.gather.default: (2,),
    aten.index.Tensor: (1,),
    aten.index_put.default: (1,),
    aten.index_select.default: (2,),
    aten.permute.default: (),
    aten.repeat.default: (),
    aten.reshape.default: (),
    aten.roll.default: (),
    aten.select.int: (),
    aten.select_scatter.default: (),
    aten.slice.Tensor: (),
    aten.slice_scatter.default: (),
    aten.split.Tensor: (),
    aten.split_with_sizes.default: (),
    aten.squeeze.default: (),
    aten.squeeze.dim: (),
    aten.squeeze.dims: (),
    aten.stack.default: (),
    aten.t.default: (),
    aten.transpose.int: (),
    aten.unbind.int: (),
    aten.unfold.default: (),
    aten.unsqueeze.default: (),
    aten.where.self: (0,),
}


def moves(program: Program) -> set[int]:
    """
    Find the operations that only move elements, to places that do not depend on the input.

    :returns: their positions in the program.
    """
    constants = program.constants()
    return {
        position
        for position, operation in enumerate(program.operations)
        if operation.target in _MOVES and _is_move(operation, program, constants)
    }


def index_leaves(operation: Operation) -> set[int]:
    """Positions, among the flat arguments of a move, of those that say where to."""
    args = tree_unflatten(list(range(len(operation.leaves))), operation.structure)[0]
    return {i for position in _MOVES[operation.target] for i in tree_leaves(args[position])}


def _is_move(operation: Operation, program: Program, constants: dict[int, Tensor]) -> bool:
    if any(leaf is True for leaf in operation.leaves):
        return False  # the only flag that these operations have is to add up
    places = index_leaves(operation)
    dtypes = {program.values[number].dtype for number in operation.results if number is not None}
    for position, leaf in enumerate(operation.leaves):
        if not isinstance(leaf, Reference):
            continue
        if position not in places:
            dtypes.add(program.values[leaf.number].dtype)
        elif leaf.number not in constants:
            return False
    return len(dtypes) == 1
