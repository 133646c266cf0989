"""Run operations that are alike, and do not need each other, as one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from .elements import Elements, Fetch
from .moves import resolve
from .program import Operation, Program, Reference
from .schedule import TENSOR_FORMS, schedule

__all__ = ["BatchedProgram"]

_FEWEST = 4  # members of a group: fewer save less than joining and picking costs
_LARGEST = 1024  # elements of a member: with more, calling the operation is not what takes long


class _Step(NamedTuple):
    """One operation, or several as one."""

    operation: Operation
    leaves: list[Any]  # a Fetch for a tensor
    in_dims: list[int | None]  # empty for one operation
    buffers: list[int | None]  # where the results go
    results: list[Tensor | None]  # of one member, at the example


class BatchedProgram:
    """
    A program of which operations run as one that are the same on other tensors of equal shapes.

    It is planned once: which operations, in which order, on which elements.

    :param Program program: the operations.
    :param int fewest: how many operations make a group.
    """

    def __init__(self, program: Program, fewest: int = _FEWEST) -> None:
        resolved = resolve(program)
        self._values = program.values
        self._elements = resolved.elements
        self._space = Elements()
        self._buffers: list[Tensor | None] = []  # those that are known beforehand
        # of every element, as moves number them, the number of its place in the buffers
        self._places = torch.zeros(1 + _last(resolved.elements), dtype=torch.long)
        self._steps: list[_Step] = []
        for number in range(program.num_inputs):
            self._put(number, self._new_buffer(None, program.values[number].shape))
        device = program.values[0].device
        for number, value in program.constants().items():
            # numbers may stay on the CPU when other tensors do not, but not once they are stacked
            place = value.to(device) if value.dim() == 0 else value
            self._put(number, self._new_buffer(place, value.shape))
        for operations in schedule(program, resolved):
            if len(operations) < fewest or not self._add_group(operations):
                for operation in operations:
                    self._add(operation)
        self._outputs = [self._fetch(number) for number in program.outputs]

    @property
    def has_groups(self) -> bool:
        """Whether anything runs as one."""
        return any(step.in_dims for step in self._steps)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Run the steps, each group under :func:`torch.func.vmap`."""
        buffers: list[Any] = [*inputs, *self._buffers[len(inputs) :]]
        for step in self._steps:
            leaves = [x.build(buffers) if isinstance(x, Fetch) else x for x in step.leaves]
            results = step.operation.results_of(
                _run_group(step, leaves) if step.in_dims else step.operation.call(leaves)
            )
            for buffer, result in zip(step.buffers, results, strict=True):
                if buffer is not None:
                    buffers[buffer] = result
        return [output.build(buffers) for output in self._outputs]

    def _new_buffer(self, value: Tensor | None, shape: Sequence[int]) -> Tensor:
        self._buffers.append(value)
        return self._space.add(shape)

    def _put(self, number: int, places: Tensor) -> None:
        self._places[self._elements[number]] = places

    def _fetch(self, number: int) -> Fetch:
        value = self._values[number]
        if value.numel() == 0:
            return Fetch(0, tuple(value.shape), lambda buffers: value)
        return self._space.fetch(self._places[self._elements[number]])

    def _add(self, operation: Operation) -> None:
        """Plan an operation on its own."""
        leaves = [
            self._fetch(leaf.number) if isinstance(leaf, Reference) else leaf
            for leaf in operation.leaves
        ]
        results = self._results(operation)
        buffers = self._define([operation], [None if r is None else r.shape for r in results])
        self._steps.append(_Step(operation, leaves, [], buffers, results))

    def _add_group(self, operations: list[Operation]) -> bool:
        """Plan operations as one, unless that costs more."""
        results = self._results(operations[0])
        sizes = [result.numel() for result in results if result is not None]
        leaves: list[Any] = []
        in_dims: list[int | None] = []
        target = operations[0].target
        for column in zip(*(operation.leaves for operation in operations), strict=True):
            leaf, in_dim = self._joint_leaf(operations[0], column)
            if in_dim == 0 and not isinstance(column[0], Reference):
                target = TENSOR_FORMS.get(target, target)
            leaves.append(leaf)
            in_dims.append(in_dim)
            if in_dim == 0:
                sizes.append(math.prod(leaf.shape[1:]))
        if 0 not in in_dims or min(sizes) == 0 or max(sizes) > _LARGEST:
            return False
        together = 1 + sum(leaf.cost for leaf in leaves if isinstance(leaf, Fetch))
        if together >= len(operations):
            numbers = {number for operation in operations for number in operation.inputs()}
            if together >= len(operations) + sum(self._fetch(number).cost for number in numbers):
                return False
        shapes = [None if r is None else (len(operations), *r.shape) for r in results]
        buffers = self._define(operations, shapes)
        operation = operations[0]._replace(target=target)
        self._steps.append(_Step(operation, leaves, in_dims, buffers, results))
        return True

    def _results(self, operation: Operation) -> list[Tensor | None]:
        return [None if number is None else self._values[number] for number in operation.results]

    def _joint_leaf(self, operation: Operation, column: tuple[Any, ...]) -> tuple[Any, int | None]:
        """One argument of all members of a group, with its batch dimension."""
        numbers = [leaf.number for leaf in column if isinstance(leaf, Reference)]
        if not numbers and len({*map(repr, column)}) == 1:
            return column[0], None
        if len(numbers) == len(column) and self._is_same(numbers):
            return self._fetch(numbers[0]), None
        if numbers and self._values[numbers[0]].numel() == 0:
            return self._values[numbers[0]], None
        other = self._values[operation.inputs()[0]]
        rows = [
            self._places[self._elements[leaf.number]]
            if isinstance(leaf, Reference)
            else self._new_buffer(_as_tensor(leaf, other), ())
            for leaf in column
        ]
        return self._space.fetch(torch.stack(rows)), 0

    def _is_same(self, numbers: list[int]) -> bool:
        first = self._elements[numbers[0]]
        return all(torch.equal(self._elements[number], first) for number in numbers)

    def _define(
        self, operations: list[Operation], shapes: list[tuple[int, ...] | None]
    ) -> list[int | None]:
        """Number the elements of results; those of a group have a leading dimension."""
        buffers: list[int | None] = []
        for i, shape in enumerate(shapes):
            if shape is None:
                buffers.append(None)
                continue
            buffers.append(len(self._buffers))
            elements = self._new_buffer(None, shape)
            rows = elements.unbind(0) if len(operations) > 1 else [elements]
            for operation, row in zip(operations, rows, strict=True):
                number = operation.results[i]
                if number is not None:
                    self._put(number, row)
        return buffers


def _last(elements: dict[int, Tensor]) -> int:
    return max((int(e.max()) for e in elements.values() if e.numel()), default=0)


def _as_tensor(number: float, other: Tensor) -> Tensor:
    """A Python number as the tensor that it stands for beside another one."""
    return torch.tensor(number, dtype=torch.result_type(other, number), device=other.device)


def _run_group(step: _Step, leaves: list[Any]) -> Any:
    """Run the operation of a group; one member after the other where ``vmap`` cannot."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what has no rule of its own warns and is slow
            together = _run_together(step, leaves)
        results = step.operation.results_of(together)
        if all(
            result is None or (batch.dtype, batch.shape[1:]) == (result.dtype, result.shape)
            for batch, result in zip(results, step.results, strict=True)
        ):
            return together
    except (RuntimeError, UserWarning, ValueError, TypeError, IndexError):
        pass
    rows = [
        leaf.unbind(0) if dim == 0 else repeat(leaf)
        for leaf, dim in zip(leaves, step.in_dims, strict=True)
    ]
    members = zip(*rows, strict=False)
    results = [step.operation.call(member) for member in members]
    if step.operation.returns_one:
        return torch.stack(results)
    columns = zip(*map(step.operation.results_of, results), strict=True)
    return [None if column[0] is None else torch.stack(column) for column in columns]


def _run_together(step: _Step, leaves: list[Any]) -> Any:
    def member(*leaves: Any) -> Any:
        result = step.operation.call(leaves)
        # vmap wants a tensor even of what only checks its arguments
        return result if step.results else leaves[step.in_dims.index(0)]

    together = vmap(member, tuple(step.in_dims))(*leaves)
    return together if step.results else None
