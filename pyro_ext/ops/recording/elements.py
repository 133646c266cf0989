"""Elements of tensors, numbered, so that moving them about is known before anything is computed.

Every element of every tensor that is computed has a number. What only moves elements (views,
slices, ``cat``, ``stack``, writing into a slice) is then run once, on tensors of these numbers,
and whatever is wanted of the result in the end is fetched from where it was computed.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Elements", "Fetch"]

Shape = tuple[int, ...]


class Fetch(NamedTuple):
    """How to make a tensor out of buffers."""

    cost: int
    """Number of operations."""

    shape: Shape
    build: Callable[[Sequence[Tensor]], Tensor]

    def then(self, shape: Shape, operation: Callable[[Tensor], Tensor]) -> Fetch:
        """Run one more operation."""
        return Fetch(self.cost + 1, shape, lambda buffers: operation(self.build(buffers)))

    def reshape(self, *shape: int) -> Fetch:
        """Reshape, if that changes anything."""
        return self if self.shape == shape else self.then(shape, lambda x: x.reshape(shape))

    def pick(self, index: Tensor) -> Fetch:
        """Pick elements of a tensor of one dimension."""
        return self.then((len(index),), lambda x: x.index_select(0, index.to(x.device)))


class Elements:
    """Numbers for the elements of a growing list of tensors, the *buffers*."""

    def __init__(self) -> None:
        self._shapes: list[Shape] = []
        self._starts: list[int] = [0]

    def add(self, shape: Sequence[int]) -> Tensor:
        """
        Number the elements of one more buffer.

        :returns: their numbers, in the shape of the buffer.
        """
        start, size = self._starts[-1], math.prod(shape)
        self._shapes.append(tuple(shape))
        self._starts.append(start + size)
        return torch.arange(start, start + size).reshape(tuple(shape))

    def fetch(self, numbers: Tensor) -> Fetch:
        """
        Find a cheap way to a tensor of given elements.

        :param Tensor numbers: of the elements, at least one, in the shape of the tensor.
        :returns: what makes the tensor from the list of buffers.
        """
        first, last = self._owner(int(numbers.min())), self._owner(int(numbers.max()))
        if first == last:
            return self._from_one(first, numbers)
        flat = numbers.reshape(-1)
        owners = self._all_owners(flat)
        changes = (owners[1:] != owners[:-1]).nonzero().flatten() + 1
        bounds = [0, *changes.tolist(), len(flat)]
        ways = [self._columns(flat, owners, bounds), self._indexed_together(flat, owners)]
        if bounds == list(range(0, len(flat) + 1, len(flat) // len(numbers))):
            ways.append(self._rows(numbers))
        return min(ways, key=lambda way: way.cost).reshape(*numbers.shape)

    def owners(self, numbers: Tensor) -> set[int]:
        """Buffers that the elements are from."""
        if numbers.numel() == 0:
            return set()
        first, last = self._owner(int(numbers.min())), self._owner(int(numbers.max()))
        if last - first <= 1:
            return {first, last}
        flat = numbers.reshape(-1)
        if len(flat) < len(self._starts):  # which are copied to search for many at once
            return {self._owner(number) for number in flat.tolist()}
        return set(self._all_owners(flat).tolist())

    def _all_owners(self, flat: Tensor) -> Tensor:
        return torch.searchsorted(torch.tensor(self._starts), flat.contiguous(), right=True) - 1

    def _owner(self, number: int) -> int:
        return bisect_right(self._starts, number) - 1

    def _whole(self, buffer: int) -> Fetch:
        return Fetch(0, self._shapes[buffer], lambda buffers: buffers[buffer])

    def _from_one(self, buffer: int, numbers: Tensor) -> Fetch:
        """Fetch from a single buffer."""
        whole, shape = self._whole(buffer), tuple(numbers.shape)
        local = numbers - self._starts[buffer]
        size = math.prod(whole.shape)
        if torch.equal(local.reshape(-1), torch.arange(size)):
            return whole.reshape(*shape)
        pattern = _Pattern.of(local)
        if pattern is not None:
            way = pattern.slices(whole) or pattern.merged().slices(whole.reshape(size))
            if way is not None:
                return pattern.expanded(way, shape)
        return whole.reshape(size).pick(local.reshape(-1)).reshape(*shape)

    def _rows(self, numbers: Tensor) -> Fetch:
        """Stack rows, each of which is from one buffer."""
        rows = [self.fetch(row) for row in numbers]
        return _joined(rows, torch.stack, tuple(numbers.shape))

    def _columns(self, flat: Tensor, owners: Tensor, bounds: list[int]) -> Fetch:
        """Join blocks of columns of a matrix with as many rows as the order of buffers repeats."""
        period = _period(owners, bounds)
        matrix = flat.reshape(-1, period)
        blocks = [matrix[:, a:b] for a, b in pairwise(bounds) if b <= period]
        if len(matrix) == 1:
            return _joined([self.fetch(x.reshape(-1)) for x in blocks], torch.cat, (period,))
        if period == len(blocks):
            columns = [self.fetch(x.reshape(-1)) for x in blocks]
            return _joined(columns, partial(torch.stack, dim=-1), tuple(matrix.shape))
        parts = [self.fetch(x) for x in blocks]
        return _joined(parts, partial(torch.cat, dim=-1), tuple(matrix.shape))

    def _indexed_together(self, flat: Tensor, owners: Tensor) -> Fetch:
        """Join whole buffers, then index."""
        used: list[int] = owners.unique().tolist()
        sizes = [math.prod(self._shapes[buffer]) for buffer in used]
        shift = torch.zeros(len(self._shapes), dtype=torch.long)
        for buffer, start in zip(used, accumulate([0, *sizes]), strict=False):
            shift[buffer] = start - self._starts[buffer]
        parts = [
            self._whole(buffer).reshape(size) for buffer, size in zip(used, sizes, strict=True)
        ]
        return _joined(parts, torch.cat, (sum(sizes),)).pick(flat + shift[owners])


def _joined(parts: list[Fetch], join: Callable[[list[Tensor]], Tensor], shape: Shape) -> Fetch:
    """Build several tensors and join them."""
    cost = 1 + sum(part.cost for part in parts)
    return Fetch(cost, shape, lambda buffers: join([part.build(buffers) for part in parts]))


def _period(owners: Tensor, bounds: list[int]) -> int:
    """After how many elements the order of buffers repeats; all of them where it does not."""
    first = int(owners[0])
    period = next((b for b in bounds[1:-1] if int(owners[b]) == first), len(owners))
    if len(owners) % period:
        return len(owners)
    matrix = owners.reshape(-1, period)
    return period if bool((matrix == matrix[0]).all()) else len(owners)


class _Pattern(NamedTuple):
    """Elements that lie on a grid: ``offset + sum_k index_k * strides_k``."""

    offset: int
    sizes: Shape
    strides: tuple[int, ...]

    @staticmethod
    def of(numbers: Tensor) -> _Pattern | None:
        """Find the grid, if there is one."""
        corner = numbers[(0,) * numbers.dim()]
        strides = []
        grid = corner
        for dim, size in enumerate(numbers.shape):
            stride = 0
            if size > 1:
                stride = int(
                    numbers[(0,) * dim + (1,) + (0,) * (numbers.dim() - dim - 1)] - corner
                )
            strides.append(stride)
            grid = grid.unsqueeze(-1) + stride * torch.arange(size)
        if not torch.equal(grid, numbers):
            return None
        return _Pattern(int(corner), tuple(numbers.shape), tuple(strides))

    def merged(self) -> _Pattern:
        """Leave out dimensions that only repeat, and join those that one stride steps through."""
        sizes: list[int] = []
        strides: list[int] = []
        for size, stride in zip(self.sizes, self.strides, strict=True):
            if stride == 0:
                continue
            if sizes and strides[-1] == stride * size:
                sizes[-1], strides[-1] = sizes[-1] * size, stride
            else:
                sizes, strides = [*sizes, size], [*strides, stride]
        return _Pattern(self.offset, tuple(sizes), tuple(strides))

    def slices(self, way: Fetch) -> Fetch | None:
        """
        Cut the grid out of a contiguous tensor by selecting and slicing its dimensions.

        :returns: the tensor without the dimensions that only repeat; ``None`` where that takes
            more than slices.
        """
        whole = way.shape
        steps = [math.prod(whole[dim + 1 :]) for dim in range(len(whole))]
        first = [self.offset // step % size for step, size in zip(steps, whole, strict=True)]
        order: list[int] = []
        cuts: dict[int, slice] = {}
        for size, stride in zip(self.sizes, self.strides, strict=True):
            if stride == 0:
                continue
            dim = self._dimension(size, stride, steps, first, whole)
            if dim is None or dim in cuts:
                return None
            step = stride // steps[dim]
            cuts[dim] = slice(first[dim], first[dim] + step * (size - 1) + 1, step)
            order.append(dim)
        for dim in reversed(range(len(whole))):
            way = _cut(way, dim, cuts.get(dim, first[dim]))
        if order != sorted(order):
            axes = [sorted(order).index(dim) for dim in order]
            way = way.then(tuple(way.shape[a] for a in axes), lambda x: x.permute(axes))
        return way

    def _dimension(
        self, size: int, stride: int, steps: list[int], first: list[int], whole: Shape
    ) -> int | None:
        """The dimension of the tensor that one dimension of the grid runs along."""
        for dim, step in enumerate(steps):
            if whole[dim] > 1 and stride > 0 and stride % step == 0:
                fits = first[dim] + (size - 1) * (stride // step) < whole[dim]
                return dim if fits else None
        return None

    def expanded(self, way: Fetch, shape: Shape) -> Fetch:
        """Put the dimensions that only repeat back in."""
        ones = tuple(1 if s == 0 else n for n, s in zip(self.sizes, self.strides, strict=True))
        way = way.reshape(*ones)
        return way if ones == shape else way.then(shape, lambda x: x.expand(shape))


def _cut(way: Fetch, dim: int, what: slice | int) -> Fetch:
    """Select or slice along one dimension."""
    before, size, after = way.shape[:dim], way.shape[dim], way.shape[dim + 1 :]
    if isinstance(what, int):
        return way.then((*before, *after), lambda x: x.select(dim, what))
    if what == slice(0, size, 1):
        return way
    length = len(range(size)[what])
    key = (*(slice(None),) * dim, what)
    return way.then((*before, length, *after), lambda x: x[key])
