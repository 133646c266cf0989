"""Whatever elements are wanted, of however many buffers: the fetched tensor has exactly these."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyro_ext.ops.recording.elements import Elements

SHAPES = [(), (1,), (7,), (3, 2), (2, 3, 4), (1, 5)]
small_shapes = st.lists(st.integers(1, 4), max_size=3)

Move = Callable[[Tensor], Tensor]
MOVES: dict[str, Move] = {
    "as it is": lambda x: x,
    "flat": lambda x: x.reshape(-1),
    "first row": lambda x: x.reshape(x.shape[0] if x.dim() else 1, -1)[0],
    "last column": lambda x: x.reshape(x.shape[0] if x.dim() else 1, -1)[:, -1],
    "every other": lambda x: x.reshape(-1)[::2],
    "backwards": lambda x: x.reshape(-1).flip(0),
    "transposed": lambda x: x.reshape(x.shape[0] if x.dim() else 1, -1).T,
    "repeated": lambda x: x.expand(3, *x.shape),
    "repeated inside": lambda x: x.unsqueeze(-1).expand(*x.shape, 2),
    "one element": lambda x: x.reshape(-1)[-1],
    "a window": lambda x: x.reshape(-1)[1:3],
    "overlapping windows": lambda x: x.reshape(-1).unfold(0, min(2, x.numel()), 1),
}


def buffers_of(shapes: list[tuple[int, ...]]) -> tuple[Elements, list[Tensor], list[Tensor]]:
    elements = Elements()
    numbers = [elements.add(shape) for shape in shapes]
    sizes = [math.prod(shape) for shape in shapes]
    values = torch.randn(sum(sizes)).split(sizes)
    return elements, numbers, [v.reshape(s) for v, s in zip(values, shapes, strict=True)]


def check(elements: Elements, numbers: Tensor, buffers: list[Tensor]) -> int:
    """The fetched tensor is right; returns what it costs."""
    flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
    way = elements.fetch(numbers)
    fetched = way.build(buffers)
    assert torch.equal(fetched, flat[numbers])
    assert way.shape == tuple(fetched.shape)
    return way.cost


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moves_of_one_buffer(shape: tuple[int, ...], move: Move) -> None:
    elements, numbers, buffers = buffers_of([(2, 2), shape, (3,)])
    wanted = move(numbers[1])
    if wanted.numel():
        check(elements, wanted, buffers)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), shapes=st.lists(small_shapes.map(tuple), min_size=1, max_size=4))
def test_any_elements_in_any_order(data: st.DataObject, shapes: list[tuple[int, ...]]) -> None:
    elements, numbers, buffers = buffers_of(shapes)
    total = sum(n.numel() for n in numbers)
    wanted = data.draw(small_shapes)
    size = math.prod(wanted)
    picked = data.draw(st.lists(st.integers(0, total - 1), min_size=size, max_size=size))
    check(elements, torch.tensor(picked).reshape(wanted), buffers)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), shape=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_any_chain_of_views(data: st.DataObject, shape: list[int]) -> None:
    elements, numbers, buffers = buffers_of([(2,), tuple(shape), (2,)])
    wanted = numbers[1]
    for _ in range(data.draw(st.integers(1, 4))):
        if wanted.dim() == 0:
            break
        dim = data.draw(st.integers(0, wanted.dim() - 1))
        kind = data.draw(st.sampled_from(["select", "slice", "move", "expand", "split"]))
        size = wanted.shape[dim]
        if kind == "select":
            wanted = wanted.select(dim, data.draw(st.integers(0, size - 1)))
        elif kind == "slice":
            start = data.draw(st.integers(0, size - 1))
            key = slice(
                start, data.draw(st.integers(start + 1, size)), data.draw(st.integers(1, 3))
            )
            wanted = wanted[(*(slice(None),) * dim, key)]
        elif kind == "move":
            wanted = wanted.movedim(dim, 0)
        elif kind == "expand":
            wanted = wanted.unsqueeze(dim).expand(*wanted.shape[:dim], 2, *wanted.shape[dim:])
        else:
            wanted = wanted.unflatten(dim, (-1, 1))
    check(elements, wanted, buffers)


@pytest.mark.parametrize(
    ("name", "cost"),
    [
        ("whole", 0),
        ("row", 1),
        ("element", 2),
        ("columns in turn", 2),
        ("one after the other", 3),
        ("scalars", 1),
    ],
)
def test_the_usual_patterns_are_cheap(name: str, cost: int) -> None:
    elements, numbers, buffers = buffers_of([(50, 2), (50,), (50,), (), (), (), ()])
    wanted = {
        "whole": numbers[0],
        "row": numbers[0][7],
        "element": numbers[0][7, 1],
        "columns in turn": torch.stack(numbers[1:3], -1).reshape(-1),
        "one after the other": torch.cat([numbers[0].reshape(-1), *numbers[1:3]]).reshape(100, 2),
        "scalars": torch.stack(numbers[3:]),
    }[name]
    assert check(elements, wanted, buffers) == cost
