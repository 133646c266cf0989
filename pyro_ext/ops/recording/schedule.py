"""Which operations of a program are alike, and which of them can run at the same time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_unflatten

from .moves import Resolved
from .program import Operation, Program, Reference

__all__ = ["TENSOR_FORMS", "schedule"]

aten = torch.ops.aten

# operations on a number with the same on a tensor, so that numbers may differ in a group
TENSOR_FORMS = {
    aten.add.Scalar: aten.add.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.eq.Scalar: aten.eq.Tensor,
    aten.fmod.Scalar: aten.fmod.Tensor,
    aten.ge.Scalar: aten.ge.Tensor,
    aten.gt.Scalar: aten.gt.Tensor,
    aten.le.Scalar: aten.le.Tensor,
    aten.lt.Scalar: aten.lt.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.ne.Scalar: aten.ne.Tensor,
    aten.remainder.Scalar: aten.remainder.Tensor,
    aten.rsub.Scalar: aten.rsub.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
}

# operations are alike if the program looks the same up to so many operations around them
_ROUNDS = 2


def schedule(program: Program, resolved: Resolved) -> Iterator[list[Operation]]:
    """
    Order the operations, with those that are alike and do not need each other together.

    An operation waits until all that are alike can run, unless nothing else can go on; then those
    run on which the longest chain of operations depends.

    :param Program program: where the operations are from.
    :param Resolved resolved: the operations to order.
    :returns: one or more operations at a time.
    """
    operations = resolved.operations
    needs = [frozenset().union(*each) - {-1} for each in resolved.sources]
    consumers: list[list[int]] = [[] for _ in operations]
    for i, producers in enumerate(needs):
        for producer in producers:
            consumers[producer].append(i)
    heights = _heights(consumers)
    kinds = _kinds(program, resolved, consumers)
    left = Counter(kinds)
    waiting = [len(producers) for producers in needs]
    ready: dict[int, list[int]] = defaultdict(list)
    released = [i for i, count in enumerate(waiting) if count == 0]
    while True:
        for i in released:
            ready[kinds[i]].append(i)
        if not ready:
            return
        complete = [kind for kind in ready if len(ready[kind]) == left[kind]]
        kind = max(complete or ready, key=lambda kind: max(heights[i] for i in ready[kind]))
        members = sorted(ready.pop(kind))
        left[kind] -= len(members)
        yield [operations[i] for i in members]
        released = []
        for consumer in (consumer for i in members for consumer in consumers[i]):
            waiting[consumer] -= 1
            if waiting[consumer] == 0:
                released.append(consumer)


def _heights(consumers: list[list[int]]) -> list[int]:
    """Length of the longest chain of operations that begins with each one."""
    heights = [1] * len(consumers)
    for i in reversed(range(len(consumers))):
        heights[i] += max((heights[consumer] for consumer in consumers[i]), default=0)
    return heights


def _kinds(program: Program, resolved: Resolved, consumers: list[list[int]]) -> list[int]:
    """
    Numbers that are equal for operations that are alike.

    Operations are told apart by what they are, then by those that they take from and give to, and
    so on (the refinement of Weisfeiler and Leman), and last by their settings.
    """
    operations = resolved.operations
    kinds = _numbered([(op.target, *_tensor_arguments(op, program)) for op in operations])
    for _ in range(_ROUNDS):
        labels: list[Hashable] = []
        for i, kind in enumerate(kinds):
            sources = [
                frozenset(kinds[s] if s >= 0 else s for s in each) for each in resolved.sources[i]
            ]
            # a Python number in place of a tensor counts as a constant
            sources = [each for each in sources if each != {-1}]
            labels.append((kind, *sources, frozenset(kinds[c] for c in consumers[i])))
        kinds = _numbered(labels)
    return _numbered([(kind, *_settings(op)) for kind, op in zip(kinds, operations, strict=True)])


def _numbered(labels: list[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels]


def _tensor_arguments(operation: Operation, program: Program) -> list[Hashable]:
    """Shapes and dtypes of the tensor arguments; a Python number in their place counts as one."""
    as_tensors = _numbers_as_tensors(operation)
    arguments: list[Hashable] = []
    for position, leaf in enumerate(operation.leaves):
        if isinstance(leaf, Reference):
            value = program.values[leaf.number]
            arguments.append((value.shape, value.dtype, value.device))
        elif position in as_tensors:
            other = program.values[operation.inputs()[0]]
            dtype = torch.result_type(other, leaf)
            arguments.append((torch.Size(), dtype, other.device))
    return arguments


def _settings(operation: Operation) -> Iterator[Hashable]:
    """What operations that are alike must share to run as one."""
    as_tensors = _numbers_as_tensors(operation)
    yield str(operation.structure)
    for position, leaf in enumerate(operation.leaves):
        is_tensor = isinstance(leaf, Reference) or position in as_tensors
        yield None if is_tensor else repr(leaf)


def _numbers_as_tensors(operation: Operation) -> set[int]:
    """Positions of Python numbers that stand where the operation takes a tensor."""
    args: Any = tree_unflatten(list(range(len(operation.leaves))), operation.structure)[0]
    target = TENSOR_FORMS.get(operation.target, operation.target)
    return {
        arg
        for arg, parameter in zip(args, target._schema.arguments, strict=False)
        if isinstance(arg, int)
        and type(operation.leaves[arg]) in (int, float)
        and isinstance(parameter.type, torch.TensorType)
    }
