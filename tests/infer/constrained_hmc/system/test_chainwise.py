"""Batches of chains in nested tuples, with parts that all chains share."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pyro_ext.infer.constrained_hmc.system.chainwise import (
    join_chains,
    select_chains,
    split_chains,
    take_chains,
)
from pyro_ext.infer.constrained_hmc.system.constrained_system import project_momentum
from tests.infer.constrained_hmc.problems import PROBLEMS, phase_state


class Pattern:
    """Shared by the chains; not a tuple, so that its tensors are left alone."""

    def __init__(self) -> None:
        self.indices = torch.arange(7)


class SparseJacobian(NamedTuple):
    values: Tensor
    pattern: Pattern
    half_log_det_gram: Tensor


class Batch(NamedTuple):
    jacobian: SparseJacobian
    position: Tensor


def batch(first: int, number: int, pattern: Pattern) -> Batch:
    """Chains are numbered, and every entry is the number of its chain."""
    numbers = torch.arange(first, first + number, dtype=torch.float64)
    values = numbers[:, None, None].expand(number, 2, 3)
    return Batch(SparseJacobian(values, pattern, numbers), numbers[:, None].expand(number, 4))


def numbers(batch: Batch) -> list[int]:
    """Of the chains in a batch, all of whose parts must agree."""
    result = batch.jacobian.half_log_det_gram
    assert batch.jacobian.values.shape == (len(result), 2, 3)
    assert batch.position.shape == (len(result), 4)
    assert (batch.jacobian.values == result[:, None, None]).all()
    assert (batch.position == result[:, None]).all()
    assert isinstance(batch, Batch)
    assert isinstance(batch.jacobian, SparseJacobian)
    return [int(number) for number in result]


@pytest.mark.parametrize("mask", [[True, False, True], [False] * 3, [True] * 3], ids=str)
def test_select(mask: list[bool]) -> None:
    pattern = Pattern()
    mixed = select_chains(torch.tensor(mask), batch(0, 3, pattern), batch(10, 3, pattern))
    assert numbers(mixed) == [i if m else 10 + i for i, m in enumerate(mask)]
    assert mixed.jacobian.pattern is pattern


def test_take() -> None:
    pattern = Pattern()
    taken = take_chains(batch(0, 5, pattern), torch.tensor([3, 0]))
    assert numbers(taken) == [3, 0]
    assert taken.jacobian.pattern is pattern


def test_split_and_join() -> None:
    pattern = Pattern()
    rows = split_chains(batch(0, 3, pattern))
    assert [numbers(row) for row in rows] == [[0], [1], [2]]
    assert all(row.jacobian.pattern is pattern for row in rows)
    joined = join_chains([rows[2], batch(5, 2, pattern), rows[0]])
    assert numbers(joined) == [2, 5, 6, 0]
    assert joined.jacobian.pattern is pattern


def test_points_of_a_system() -> None:
    problem = PROBLEMS["quadrics"]
    a, b = phase_state(problem, 3, seed=0), phase_state(problem, 3, seed=5)
    mixed = select_chains(torch.tensor([True, False, True]), a, b)
    assert torch.equal(mixed.point.position[0], a.point.position[0])
    assert torch.equal(mixed.point.position[1], b.point.position[1])
    assert torch.equal(mixed.point.jacobian.dual[1], b.point.jacobian.dual[1])
    assert torch.equal(mixed.momentum[2], a.momentum[2])
    torch.testing.assert_close(
        project_momentum(mixed.point.jacobian, mixed.momentum), mixed.momentum
    )
