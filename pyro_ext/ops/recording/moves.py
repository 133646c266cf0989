"""Operations that only move elements about: views, joins, and writing into a part."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_unflatten

from .elements import Elements
from .program import Operation, Program, Reference

__all__ = ["Resolved", "resolve"]

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


class Resolved(NamedTuple):
    """A program without moves: which elements each operation takes, and from where."""

    operations: list[Operation]
    """Those that compute something."""

    elements: dict[int, Tensor]
    """Of every tensor, by its number; a tensor that is not moved has elements of its own."""

    sources: list[list[frozenset[int]]]
    """Of every operation, for each tensor that it takes, the operations that made it."""


def resolve(program: Program) -> Resolved:
    """Run the operations that only move elements, to places known beforehand, on numbers."""
    constants = program.constants()
    space = Elements()
    elements: dict[int, Tensor] = {}
    makers: list[int] = []  # of every buffer, -1 for one that is there from the start
    for number in (*range(program.num_inputs), *constants):
        elements[number] = space.add(program.values[number].shape)
        makers.append(-1)
    operations: list[Operation] = []
    sources: list[list[frozenset[int]]] = []
    for operation in program.operations:
        if operation.target in _MOVES and _is_move(operation, program, constants):
            elements.update(_moved(operation, program, elements))
            continue
        owners = [space.owners(elements[number]) for number in operation.inputs()]
        sources.append([frozenset(makers[buffer] for buffer in each) for each in owners])
        for number in operation.results:
            if number is not None:
                elements[number] = space.add(program.values[number].shape)
                makers.append(len(operations))
        operations.append(operation)
    return Resolved(operations, elements, sources)


def _moved(
    operation: Operation, program: Program, elements: dict[int, Tensor]
) -> dict[int, Tensor]:
    """Elements of the results of a move."""
    places = _places(operation)
    leaves: list[Any] = list(operation.leaves)
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, Reference):
            place = program.values[leaf.number]
            leaves[position] = place.cpu() if position in places else elements[leaf.number]
    results = operation.results_of(operation.call(leaves))
    return {n: part for n, part in zip(operation.results, results, strict=True) if n is not None}


def _places(operation: Operation) -> set[int]:
    """Positions, among the flat arguments of a move, of those that say where to."""
    args = tree_unflatten(list(range(len(operation.leaves))), operation.structure)[0]
    return {i for position in _MOVES[operation.target] for i in tree_leaves(args[position])}


def _is_move(operation: Operation, program: Program, constants: dict[int, Tensor]) -> bool:
    if any(leaf is True for leaf in operation.leaves):
        return False  # the only flag that these operations have is to add up
    places = _places(operation)
    dtypes = {program.values[number].dtype for number in operation.results if number is not None}
    for position, leaf in enumerate(operation.leaves):
        if not isinstance(leaf, Reference):
            continue
        if position not in places:
            dtypes.add(program.values[leaf.number].dtype)
        elif leaf.number not in constants:
            return False
    return len(dtypes) == 1
