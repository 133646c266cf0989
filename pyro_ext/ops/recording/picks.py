"""Take many parts of one tensor by one operation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from .program import Operation, Program, Reference

__all__ = ["joint_picks"]

aten = torch.ops.aten


def joint_picks(program: Program) -> Program:
    """
    Replace many ``select`` of one tensor by one ``unbind``, and many slices by one ``split``.

    Beside the calls that this saves, the derivative of each ``select`` or slice is a whole tensor
    of zeros but for one part, so that reverse mode would take time quadratic in their number.
    """
    picks: dict[tuple[Any, int, int], list[Operation]] = defaultdict(list)
    for operation in program.operations:
        if operation.target in (aten.select.int, aten.slice.Tensor):
            source, dim = operation.leaves[:2]
            picks[operation.target, source.number, dim].append(operation)
    joint: dict[tuple[int | None, ...], Operation] = {}  # by the result of each pick
    for (_, source, dim), operations in picks.items():
        together = _together(operations, source, dim, program.values[source].shape[dim])
        if together is not None:
            joint.update({operation.results: together for operation in operations})
    seen: set[int] = set()
    replaced = []
    for operation in program.operations:
        operation = joint.get(operation.results, operation)
        if id(operation) not in seen:
            replaced.append(operation)
        seen.add(id(operation))
    return program._replace(operations=replaced)


def _together(picks: list[Operation], source: int, dim: int, size: int) -> Operation | None:
    """One operation for several picks along a dimension, if they take most of the tensor apart."""
    results = {}
    for pick in picks:
        _, _, start, *rest = pick.leaves
        stop = start + 1 if pick.target is aten.select.int else rest[0] if len(rest) == 1 else -1
        results[start, stop] = pick.results[0]
    bounds = [0, *(bound for part in sorted(results) for bound in part), size]
    if len(picks) < 2 or bounds != sorted(bounds):
        return None
    if picks[0].target is aten.select.int:
        if 2 * len(picks) < size:
            return None
        found = [results.get((i, i + 1)) for i in range(size)]
        return _operation(aten.unbind.int, (Reference(source), dim), found)
    parts = [part for part in pairwise(bounds) if part[0] < part[1]]
    if len(parts) > 2 * len(picks):
        return None
    sizes = [stop - start for start, stop in parts]
    found = [results.get(part) for part in parts]
    return _operation(aten.split_with_sizes.default, (Reference(source), sizes, dim), found)


def _operation(target: Any, args: Sequence[Any], results: Sequence[int | None]) -> Operation:
    # a reference is a tuple too, which must stay whole
    leaves, structure = tree_flatten((tuple(args), {}), is_leaf=lambda x: isinstance(x, Reference))
    return Operation(target, tuple(leaves), structure, tuple(results), returns_one=False)
