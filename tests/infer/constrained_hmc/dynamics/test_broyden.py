"""Broyden's updates against the matrices they stand for, and for how fast they converge."""

import pytest
import torch
from torch import Tensor

from pyro_ext.infer.constrained_hmc.dynamics.broyden import Steps, broyden_step


def contraction(chains: int, dim: int, rate: float) -> Tensor:
    """Matrices ``I + E``, with the largest singular value of every ``E`` equal to the rate."""
    noise = torch.randn(chains, dim, dim)
    return torch.eye(dim) + rate * noise / torch.linalg.matrix_norm(noise, 2)[:, None, None]


def test_steps_are_those_of_the_matrix_that_broyden_updates() -> None:
    dim = 5
    slope = contraction(3, dim, 0.5)
    position, history = torch.randn(3, dim), Steps()
    approximation = torch.eye(dim).expand(3, dim, dim)
    value = (slope @ position.unsqueeze(-1)).squeeze(-1)
    for _ in range(5):
        step, history = broyden_step(history, value)
        expected = -torch.linalg.solve(approximation, value)
        torch.testing.assert_close(step, expected, rtol=1e-9, atol=1e-12)
        position = position + step
        new_value = (slope @ position.unsqueeze(-1)).squeeze(-1)
        # B <- B + (y - B s) s^T / s^T s, and y - B s is the new value
        square = step.square().sum(-1)[:, None, None]
        approximation = approximation + new_value[:, :, None] * step[:, None, :] / square
        value = new_value


def test_linear_equations_are_solved_in_few_steps() -> None:
    """After at most twice as many as there are dimensions (Gay 1979)."""
    slope = contraction(50, 3, 0.5)
    solution = torch.randn(50, 3)
    position, history = torch.zeros(50, 3), Steps()
    for _ in range(6):
        step, history = broyden_step(history, (slope @ (position - solution)[..., None])[..., 0])
        position = position + step
    assert (position - solution).abs().max() < 1e-8


def test_chains_do_not_see_each_other() -> None:
    values = torch.randn(6, 4, 7)
    values[2, 1] = torch.nan
    together, alone = Steps(), Steps()
    for value in values:
        step, together = broyden_step(together, value)
        single, alone = broyden_step(alone, value[3:])
        assert torch.equal(step[3:], single)
        assert step[[0, 2, 3]].isfinite().all()


def test_old_steps_are_forgotten() -> None:
    history = Steps()
    for _ in range(30):
        _, history = broyden_step(history, torch.randn(2, 3))
    assert len(history.steps) == len(history.squares) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_value_of_zero_stays(dtype: torch.dtype) -> None:
    history = Steps()
    for _ in range(4):
        step, history = broyden_step(history, torch.zeros(2, 3, dtype=dtype))
        assert torch.equal(step, torch.zeros(2, 3, dtype=dtype))


def test_a_step_is_never_much_longer_than_the_value_asks_for() -> None:
    """Values that do not change with the steps would ask for infinite ones."""
    history = Steps()
    value = torch.ones(1, 2)
    for _ in range(3):
        step, history = broyden_step(history, value)
        assert step.norm() < 10 * value.norm()
