"""Which operations of a program are alike, and which of them can run at the same time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_unflatten

from .program import Operation, Program, Reference

__all__ = ["numbers_as_tensors", "schedule"]

# operations are alike if the program looks the same up to so many operations around them
_ROUNDS = 2


def schedule(program: Program, moves: set[int]) -> Iterator[list[Operation]]:
    """
    Order the operations, with those that are alike and do not need each other together.

    An operation waits until all that are alike can run, unless nothing else can go on; then those
    run on which the longest chain of operations depends.

    :param Program program: the operations.
    :param moves: positions of the operations that cost nothing; they come alone.
    :returns: one or more operations at a time.
    """
    operations = program.operations
    producers, consumers = _edges(operations)
    kinds = _kinds(program, moves, producers, consumers)
    heights = _heights(operations, moves, consumers)
    waiting = [len(inputs) for inputs in producers]
    left = Counter(kind for i, kind in enumerate(kinds) if i not in moves)
    ready: dict[int, list[int]] = defaultdict(list)
    released = [i for i, count in enumerate(waiting) if count == 0]
    while released or ready:
        if not released:
            complete = [kind for kind in ready if len(ready[kind]) == left[kind]]
            kind = max(complete or ready, key=lambda k: max(heights[i] for i in ready[k]))
            released = sorted(ready.pop(kind))
            left[kind] -= len(released)
            yield [operations[i] for i in released]
            finished = released
        else:
            finished = [i for i in released if i in moves]
            for i in finished:
                yield [operations[i]]
            for i in released:
                if i not in moves:
                    ready[kinds[i]].append(i)
        released = []
        for i in finished:
            for consumer in consumers[i]:
                waiting[consumer] -= 1
                if waiting[consumer] == 0:
                    released.append(consumer)


def _edges(operations: list[Operation]) -> tuple[list[set[int]], list[set[int]]]:
    """Which operations each one takes its arguments from, and gives its results to."""
    makers = {n: i for i, op in enumerate(operations) for n in op.results if n is not None}
    producers = [{makers[n] for n in op.inputs() if n in makers} for op in operations]
    consumers: list[set[int]] = [set() for _ in operations]
    for i, inputs in enumerate(producers):
        for producer in inputs:
            consumers[producer].add(i)
    return producers, consumers


def _heights(operations: list[Operation], moves: set[int], consumers: list[set[int]]) -> list[int]:
    """Length of the longest chain of computations that begins with each operation."""
    heights = [0] * len(operations)
    for i in reversed(range(len(operations))):
        after = max((heights[consumer] for consumer in consumers[i]), default=0)
        heights[i] = after + (i not in moves)
    return heights


def _kinds(
    program: Program, moves: set[int], producers: list[set[int]], consumers: list[set[int]]
) -> list[int]:
    """Numbers that are equal for operations that are alike (Weisfeiler-Lehman refinement)."""
    makers = {n: i for i, op in enumerate(program.operations) for n in op.results if n is not None}
    kinds = _numbered(
        [_signature(op, program, i in moves) for i, op in enumerate(program.operations)]
    )
    for _ in range(_ROUNDS):
        refined: list[Hashable] = []
        for i, operation in enumerate(program.operations):
            before = tuple(kinds[makers[n]] if n in makers else -1 for n in operation.inputs())
            refined.append((kinds[i], before, frozenset(kinds[c] for c in consumers[i])))
        kinds = _numbered(refined)
    return kinds


def _numbered(labels: list[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels]


def _signature(operation: Operation, program: Program, is_move: bool) -> Hashable:
    """What operations must share to run as one; of a move, the shape of its results."""
    if is_move:
        return tuple(program.values[n].shape for n in operation.results if n is not None)
    as_tensors = numbers_as_tensors(operation)
    leaves: list[Hashable] = []
    for position, leaf in enumerate(operation.leaves):
        if isinstance(leaf, Reference):
            value = program.values[leaf.number]
            leaves.append((value.shape, value.dtype, value.device))
        elif position in as_tensors:
            leaves.append((torch.Size(), ...))
        else:
            leaves.append(repr(leaf))
    return (operation.target, str(operation.structure), *leaves)


def numbers_as_tensors(operation: Operation) -> set[int]:
    """Positions of Python numbers that stand where the operation takes a tensor."""
    args: Any = tree_unflatten(list(range(len(operation.leaves))), operation.structure)[0]
    return {
        arg
        for arg, parameter in zip(args, operation.target._schema.arguments, strict=False)
        if isinstance(arg, int)
        and type(operation.leaves[arg]) in (int, float)
        and isinstance(parameter.type, torch.TensorType)
    }
