"""Patterns of Jacobians read from derivatives at a few points."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from torch import Tensor

from pyro_ext.infer.constrained_hmc.jacobian import sparsity
from pyro_ext.infer.constrained_hmc.jacobian.sparsity import Pattern, find_pattern, merge_patterns
from tests.infer.constrained_hmc.block_problems import block_problem, block_shapes

Shape = tuple[list[tuple[int, int]], int, int, int]
each_mode = pytest.mark.parametrize("forward", [True, False], ids=["forward", "reverse"])


def as_matrix(pattern: Pattern) -> np.ndarray:
    matrix = np.zeros((pattern.num_rows, pattern.num_columns), dtype=bool)
    matrix[pattern.rows, pattern.columns] = True
    return matrix


@each_mode
@hypothesis_settings(max_examples=20, deadline=None, derandomize=True)
@given(shape=block_shapes)
def test_the_pattern_is_that_of_the_jacobian(forward: bool, shape: Shape) -> None:
    problem = block_problem(*shape)
    points = torch.randn(2, problem.dim)
    pattern = find_pattern(problem.constraint, points, forward=forward)
    matrices = [torch.autograd.functional.jacobian(problem.constraint, u) for u in points]
    expected = torch.stack([matrix != 0 for matrix in matrices]).any(0)
    assert (as_matrix(pattern) == expected.numpy()).all()
    assert pattern.is_complete


@each_mode
def test_chunks_make_no_difference(forward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = block_problem([(2, 1), (3, 0)], 2, 0, 5)
    points = torch.randn(2, problem.dim)
    whole = find_pattern(problem.constraint, points, forward=forward)
    monkeypatch.setattr(sparsity, "_ELEMENTS_AT_ONCE", 30)
    parts = find_pattern(problem.constraint, points, forward=forward)
    assert (as_matrix(parts) == as_matrix(whole)).all()
    assert (parts.is_known == whole.is_known).all()


def gated(u: Tensor) -> Tensor:
    """The second output sees the third input on one side only, the third output all of them."""
    return torch.stack([u[0] + u[3], u[1] + torch.where(u[3] > 0, u[2], 0.0), u.sum()])


@each_mode
def test_points_complement_each_other(forward: bool) -> None:
    left = torch.tensor([[1.0, 1.0, 1.0, -1.0]])
    one = find_pattern(gated, left, forward=forward)
    both = find_pattern(gated, torch.cat([left, -left]), forward=forward)
    assert not as_matrix(one)[1, 2]
    assert as_matrix(both)[1, 2]
    merged = merge_patterns(one, find_pattern(gated, -left, forward=forward))
    assert (as_matrix(merged) == as_matrix(both)).all()


def explosive(u: Tensor) -> Tensor:
    """A recursion that overflows after the first step where its first input is large."""
    first = u[1] + u[0]
    second = u[2] + (first * (1e3 * u[0]).exp()) * u[0]
    return torch.stack([first, second, u[3] + second * u[0]])


@each_mode
def test_rows_that_are_not_finite_are_read_elsewhere(forward: bool) -> None:
    fine, wild = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([5.0, 1.0, 1.0, 1.0])
    alone = find_pattern(explosive, wild[None], forward=forward)
    assert not alone.is_complete
    assert not alone.is_known[2]
    both = find_pattern(explosive, torch.stack([wild, fine]), forward=forward)
    expected = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], dtype=bool)
    assert both.is_complete
    assert (as_matrix(both) == expected).all()
    merged = merge_patterns(alone, find_pattern(explosive, fine[None], forward=forward))
    assert (as_matrix(merged) == expected).all()
    assert merged.is_complete


def shared_and_local(u: Tensor) -> Tensor:
    """As many outputs as inputs but one, each with a noise of its own; the first acts on all."""
    return u[0].sin() * torch.linspace(1.0, 2.0, len(u) - 1) + u[1:].flip(0).exp()


@pytest.mark.parametrize("size", [64, 1024])
def test_local_inputs_take_few_products(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    number = 0

    def counting(constraint: Any, points: Tensor, seeds: Tensor) -> Tensor:
        nonlocal number
        number += len(seeds)
        return tangents(constraint, points, seeds)

    tangents = sparsity._tangents
    monkeypatch.setattr(sparsity, "_tangents", counting)
    pattern = find_pattern(shared_and_local, torch.randn(2, size + 1))
    assert len(pattern.rows) == 2 * size
    assert (pattern.columns[::2] == 0).all()
    assert (pattern.columns[1::2] == size - np.arange(size)).all()
    assert number <= 4 * (1 + np.log2(size))


@each_mode
def test_a_search_for_a_dense_jacobian_is_given_up(forward: bool) -> None:
    mix = torch.randn(40, 40)
    pattern = find_pattern(
        lambda u: (mix @ u).sin(), torch.randn(2, 40), forward=forward, most_products=16
    )
    assert not pattern.is_known.any()
    assert len(pattern.rows) == 0


def test_what_all_depend_on_does_not_keep_outputs_apart_in_reverse() -> None:
    points = torch.randn(2, 129)
    pattern = find_pattern(shared_and_local, points, forward=False, most_products=16)
    exact = find_pattern(shared_and_local, points, forward=False)
    assert pattern.is_complete
    assert (as_matrix(pattern) == as_matrix(exact)).all()


def test_inputs_that_act_on_most_outputs_count_as_acting_on_all() -> None:
    """A pattern may have too many places, never too few."""

    def constraint(u: Tensor) -> Tensor:
        gate = torch.arange(128) < 100
        return torch.where(gate, u[0], 0.0) + u[1:]

    points = torch.randn(2, 129)
    pattern = as_matrix(find_pattern(constraint, points, forward=False, most_products=16))
    assert pattern[:, 0].all()
    assert (pattern[:, 1:] == np.eye(128, dtype=bool)).all()
