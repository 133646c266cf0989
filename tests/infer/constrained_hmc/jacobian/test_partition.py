"""Blocks and global columns found in patterns whose blocks are known."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from torch import Tensor

from pyro_ext.infer.constrained_hmc.jacobian.partition import (
    Split,
    dense_operations,
    find_splits,
    partition,
)
from pyro_ext.infer.constrained_hmc.jacobian.sparsity import find_pattern
from tests.infer.constrained_hmc.block_problems import block_problem, block_shapes

CPU = torch.device("cpu")
Shape = tuple[list[tuple[int, int]], int, int, int]


def splits_of(constraint: object, dim: int) -> list[Split]:
    return find_splits(find_pattern(constraint, torch.randn(2, dim)))  # type: ignore[arg-type]


@hypothesis_settings(max_examples=30, deadline=None, derandomize=True)
@given(shape=block_shapes)
def test_every_split_is_consistent(shape: Shape) -> None:
    problem = block_problem(*shape)
    matrix = torch.autograd.functional.jacobian(problem.constraint, torch.randn(problem.dim))
    splits = splits_of(problem.constraint, problem.dim)
    operations = [split.operations for split in splits]
    assert operations == sorted(operations)
    for split in splits:
        rows, columns = torch.tensor(split.row_blocks), torch.tensor(split.column_blocks)
        is_outside = (columns >= 0) & (rows[:, None] != columns)
        assert (matrix[is_outside] == 0).all(), "a local input acts outside of its block"
        for b in range(split.num_blocks):
            assert (columns == b).sum() >= (rows == b).sum() > 0
        assert split.num_global == (columns == -1).sum()
        assert split.num_remaining == (rows == -1).sum()


def test_the_cheapest_split_has_the_blocks_of_the_model() -> None:
    problem = block_problem([(2, 1)] * 12, 2, 1, 3)
    split = splits_of(problem.constraint, problem.dim)[0]
    is_remaining = torch.tensor(split.row_blocks) == -1
    assert torch.equal(is_remaining, problem.row_blocks == -1)
    assert torch.equal(torch.tensor(split.column_blocks) == -1, problem.column_blocks == -1)
    assert split.num_blocks >= 12
    assert split.operations < 0.1 * dense_operations(problem.num_constraints, problem.dim)


def test_inputs_that_nothing_depends_on_are_in_no_block() -> None:
    split = splits_of(lambda u: torch.stack([u[0] + u[2], u[1] - u[2]]), 5)[0]
    assert split.column_blocks.tolist() == [0, 1, -1, -2, -2]
    vector = torch.randn(2, 5)
    part = partition(split, CPU)
    expected = vector.clone()
    expected[:, 3:] = 0.0
    assert torch.equal(part.join_columns(*part.split_columns(vector)), expected)


def groups(u: Tensor) -> Tensor:
    """Three inputs shared by twenty outputs each, one by all."""
    return (u[:60].reshape(3, 20) * u[60:63, None] + u[63]).flatten()


def test_inputs_of_groups_are_local_or_global_whichever_is_cheaper() -> None:
    splits = splits_of(groups, 64)
    found = {(s.num_blocks, s.block_shape, s.num_global) for s in splits}
    assert found == {(60, (1, 1), 4), (3, (20, 21), 1), (1, (60, 64), 0)}
    assert splits[0].num_blocks == 60


@hypothesis_settings(max_examples=30, deadline=None, derandomize=True)
@given(shape=block_shapes)
def test_moving_rows_and_columns_there_and_back(shape: Shape) -> None:
    problem = block_problem(*shape)
    residual, vector = torch.randn(2, problem.num_constraints), torch.randn(2, problem.dim)
    for split in splits_of(problem.constraint, problem.dim):
        part = partition(split, CPU)
        assert torch.equal(part.join_rows(*part.split_rows(residual)), residual)
        is_used = torch.tensor(split.column_blocks) != -2
        joined = part.join_columns(*part.split_columns(vector))
        assert torch.equal(joined, torch.where(is_used, vector, 0.0))


def test_a_dense_jacobian_has_no_blocks_of_its_own() -> None:
    mix = torch.randn(3, 5)
    splits = splits_of(lambda u: (mix @ u).sin(), 5)
    assert [(s.num_blocks, s.num_global) for s in splits] == [(1, 0)]


@pytest.mark.parametrize("rows", [3, 50])
def test_operations_of_many_blocks_grow_with_their_number(rows: int) -> None:
    few = block_problem([(1, 0)] * rows, 2, 0, 1)
    many = block_problem([(1, 0)] * (2 * rows), 2, 0, 1)
    a, b = (splits_of(p.constraint, p.dim)[0].operations for p in (few, many))
    assert 1.5 < b / a <= 2
