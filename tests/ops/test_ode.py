"""Solvers against equations with known solutions."""

import math

import pytest
import torch
from torch import Tensor

from pyro_ext.ops.ode import (
    ADAPTIVE_METHODS,
    EXCEEDED,
    FIXED_METHODS,
    NOT_FINITE,
    OK,
    OdeSolution,
    integrate_jointly,
    integrate_rows,
)

RATES = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)


def decay(time: Tensor, state: Tensor, rows: Tensor) -> Tensor:
    """A row for each rate: the state decays, and its integral is taken."""
    rates = RATES[rows].unsqueeze(-1)
    return torch.cat([-rates * state[:, :1] * time.cos().unsqueeze(-1), state[:, :1]], -1)


def exact(end: float) -> Tensor:
    return (-RATES * math.sin(end)).exp()


def rowwise(tolerance: float = 1e-8, limit: int = 10_000) -> OdeSolution:
    state = torch.tensor([[1.0, 0.0]]).repeat(3, 1)
    return integrate_rows(
        decay, state, 0.0, 1.5, rtol=tolerance, atol=tolerance, max_evaluations=limit
    )


@pytest.mark.parametrize("tolerance", [1e-4, 1e-7, 1e-10])
def test_errors_go_with_the_tolerance(tolerance: float) -> None:
    solution = rowwise(tolerance)
    assert bool((solution.status == OK).all())
    assert float((solution.state[:, 0] - exact(1.5)).abs().max()) < 20 * tolerance


def test_a_row_does_not_depend_on_the_others() -> None:
    together = rowwise()
    assert int(together.num_evaluations[2]) > 2 * int(together.num_evaluations[0])

    def alone(time: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        return decay(time, state, rows + 1)

    one = integrate_rows(
        alone, torch.tensor([[1.0, 0.0]]), 0.0, 1.5, rtol=1e-8, atol=1e-8, max_evaluations=10_000
    )
    torch.testing.assert_close(one.state[0], together.state[1], rtol=1e-14, atol=1e-15)
    assert one.num_evaluations[0] == together.num_evaluations[1]


def test_backwards_in_time() -> None:
    there = rowwise(1e-10)
    back = integrate_rows(
        decay, there.state, 1.5, 0.0, rtol=1e-10, atol=1e-10, max_evaluations=10_000
    )
    start = torch.tensor([[1.0, 0.0]]).repeat(3, 1)
    # what was damped by 13 orders of magnitude does not come back
    torch.testing.assert_close(back.state[:2], start[:2], atol=1e-8, rtol=0)


def test_gradients_are_those_of_the_solution() -> None:
    rate = torch.tensor([0.7, 1.3], requires_grad=True)

    def field(time: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        return -rate[rows].unsqueeze(-1) * state

    solution = integrate_rows(
        field, torch.ones(2, 1), 0.0, 2.0, rtol=1e-9, atol=1e-9, max_evaluations=10_000
    )
    gradient = torch.autograd.grad(solution.state.sum(), rate)[0]
    torch.testing.assert_close(gradient, -2 * (-2 * rate).exp(), rtol=1e-6, atol=1e-7)


def test_rows_that_run_out_of_evaluations_say_so() -> None:
    solution = rowwise(1e-8, limit=200)
    assert solution.status.tolist() == [OK, OK, EXCEEDED]
    assert float(solution.time[2]) < 1.5
    assert int(solution.num_evaluations.max()) <= 200


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_say_so(value: float) -> None:
    def field(time: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        broken = (rows == 1) & (time > 0.5)
        return torch.where(broken.unsqueeze(-1), value, -state)

    solution = integrate_rows(
        field, torch.ones(3, 1), 0.0, 1.0, rtol=1e-6, atol=1e-6, max_evaluations=10_000
    )
    assert solution.status.tolist() == [OK, NOT_FINITE, OK]
    assert float(solution.time[1]) == pytest.approx(0.5, abs=1e-3)


def test_no_rows_are_no_work() -> None:
    solution = integrate_rows(
        lambda time, state, rows: -state,
        torch.ones(0, 2),
        0.0,
        1.0,
        rtol=1e-6,
        atol=1e-6,
        max_evaluations=100,
    )
    assert solution.state.shape == (0, 2)
    assert solution.num_evaluations.shape == (0,)


@pytest.mark.parametrize("method", [*ADAPTIVE_METHODS, *FIXED_METHODS])
def test_methods_of_torchdiffeq(method: str) -> None:
    solution = integrate_jointly(
        decay,
        torch.tensor([[1.0, 0.0]]).repeat(2, 1),
        0.0,
        1.5,
        method=method,
        rtol=1e-6,
        atol=1e-6,
        num_steps=4000 if method == "euler" else 200,
        max_evaluations=100_000,
    )
    error = {"euler": 1e-3, "midpoint": 1e-4}.get(method, 2e-5)
    assert float((solution.state[:, 0] - exact(1.5)[:2]).abs().max()) < error
    assert int(solution.num_evaluations[0]) >= 5


def test_the_adjoint_equation_gives_the_same_gradient() -> None:
    rate = torch.tensor([0.7, 1.3], requires_grad=True)
    gradients = []
    for parameters in (None, (rate,)):
        solution = integrate_jointly(
            lambda time, state, rows: -rate[rows].unsqueeze(-1) * state,
            torch.ones(2, 1),
            0.0,
            2.0,
            method="dopri5",
            rtol=1e-8,
            atol=1e-8,
            num_steps=1,
            max_evaluations=10_000,
            adjoint_parameters=parameters,
        )
        gradients.append(torch.autograd.grad(solution.state.sum(), rate)[0])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)
