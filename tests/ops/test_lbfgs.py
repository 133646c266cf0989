"""Row by row the same minima as scipy's, however the rows are put together."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyro_ext.ops.lbfgs import minimize_lbfgs
from pyro_ext.ops.row_adam import minimize_adam
from pyro_ext.ops.rows import BestPoints, Objective, RowsResult, RowStatus

OPTIMIZERS: dict[str, Callable[..., RowsResult]] = {"lbfgs": minimize_lbfgs, "adam": minimize_adam}


def _objective(function: Callable[[Tensor], Tensor]) -> Objective:
    def objective(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        value = function(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), gradient

    return objective


def _rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[..., 1:] - x[..., :-1].square()).square() + (1 - x[..., :-1]).square()).sum(
        -1
    )


def _scipy(function: Callable[[Tensor], Tensor], start: Tensor) -> Any:
    objective = _objective(function)

    def of_one(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective(torch.from_numpy(x)[None])
        return float(value), gradient[0].numpy()

    options = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 5000, "maxfun": 20_000}
    return scipy.optimize.minimize(
        of_one, start.numpy(), jac=True, method="L-BFGS-B", options=options
    )


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 5),
    size=st.integers(1, 12),
    condition=st.floats(0.0, 6.0),
    seed=st.integers(0, 1000),
)
def test_quadratics(rows: int, size: int, condition: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, _ = torch.linalg.qr(normal(rows, size, size))
    spectrum = 10 ** (condition * torch.rand(rows, size, generator=generator))
    matrix = q @ torch.diag_embed(spectrum) @ q.mT
    centre = normal(rows, size)

    def function(x: Tensor) -> Tensor:
        d = x - centre
        return 0.5 * torch.einsum("ri,rij,rj->r", d, matrix, d) + 3.0

    result = minimize_lbfgs(
        _objective(function), normal(rows, size), max_iter=2000, gradient_tol=1e-7, value_tol=0.0
    )
    assert (result.status <= RowStatus.STALLED).all()
    torch.testing.assert_close(result.value, torch.full((rows,), 3.0))
    torch.testing.assert_close(result.point, centre, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [2, 5, 10])
def test_rosenbrock_is_solved_in_about_as_many_calls_as_scipy_takes(size: int) -> None:
    start = torch.cat([torch.full((1, size), -1.2), torch.randn(5, size)])
    result = minimize_lbfgs(
        _objective(_rosenbrock), start, max_iter=2000, gradient_tol=1e-9, value_tol=1e-15
    )
    assert (result.status == RowStatus.CONVERGED).all()
    assert (result.value < 4.0).all()  # a local minimum of value near 4 exists from size 4 on
    calls = []
    for i in range(len(start)):
        other = _scipy(_rosenbrock, start[i])
        calls.append(other.nfev)
        if other.fun < 1.0 and result.value[i] < 1.0:
            torch.testing.assert_close(result.point[i], torch.ones(size), atol=1e-6, rtol=0)
    assert result.num_evaluations < 2 * max(calls)


def test_rows_do_not_depend_on_each_other() -> None:
    start = torch.randn(6, 4)
    objective = _objective(_rosenbrock)
    together = minimize_lbfgs(objective, start, max_iter=60)
    for i in range(len(start)):
        alone = minimize_lbfgs(objective, start[i : i + 1], max_iter=60)
        torch.testing.assert_close(alone.point[0], together.point[i], atol=1e-9, rtol=0)
        assert alone.status[0] == together.status[i]
        assert alone.num_iterations[0] == together.num_iterations[i]
    assert together.num_iterations.unique().numel() > 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_values_never_rise_and_the_best_point_is_returned(optimizer: str) -> None:
    start = torch.randn(4, 3)
    objective = _objective(_rosenbrock)
    result = OPTIMIZERS[optimizer](objective, start, max_iter=40)
    assert (result.trace.diff(dim=0) <= 0).all()
    torch.testing.assert_close(result.trace[0], objective(start)[0])
    torch.testing.assert_close(result.trace[-1], result.value)
    torch.testing.assert_close(objective(result.point)[0], result.value)
    assert len(result.trace) == result.num_evaluations
    assert (result.num_iterations <= 40).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rows_end_for_their_own_reasons(optimizer: str) -> None:
    """One starts at its minimum, one where nothing is finite, one has far to go."""

    def function(x: Tensor) -> Tensor:
        easy = 0.5 * x[:1].square().sum(-1)
        broken = x[1:2].sum(-1).log()
        far = _rosenbrock(x[2:])
        return torch.cat([easy, broken, far])

    start = torch.tensor([[0.0, 0.0, 0.0], [-1.0, -1.0, -1.0], [-1.2, 1.0, -1.2]])
    result = OPTIMIZERS[optimizer](_objective(function), start, max_iter=5)
    expected = [RowStatus.CONVERGED, RowStatus.NOT_FINITE, RowStatus.MAX_ITERATIONS]
    assert result.status.tolist() == expected
    torch.testing.assert_close(result.point[:2], start[:2])
    assert float(result.value[2]) < float(result.trace[0, 2])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("beyond", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_gets_back_from_where_the_objective_is_not_finite(optimizer: str, beyond: float) -> None:
    """f(x) = x - log x is minimal at 1; beyond 0 there is nothing."""

    def function(x: Tensor) -> Tensor:
        y = x.squeeze(-1)
        inside = y > 0
        safe = torch.where(inside, y, torch.ones_like(y))
        return torch.where(inside, 1e3 * (safe - safe.log()), beyond)

    start = torch.tensor([[0.5], [3.0], [50.0]])
    settings: dict[str, Any] = {"learning_rate": 4.0} if optimizer == "adam" else {}
    result = OPTIMIZERS[optimizer](_objective(function), start, max_iter=500, **settings)
    assert result.value.isfinite().all()
    torch.testing.assert_close(result.value, torch.full((3,), 1e3), rtol=1e-3, atol=0)


def test_single_precision_ends_where_values_are_resolved() -> None:
    start = torch.randn(20, 4, dtype=torch.float32)
    centre = torch.randn(20, 4, dtype=torch.float32)

    def function(x: Tensor) -> Tensor:
        return 1e4 + (x - centre).pow(4).sum(-1) + (x - centre).square().sum(-1)

    result = minimize_lbfgs(_objective(function), start, max_iter=200, gradient_tol=0.0)
    assert (result.status != RowStatus.MAX_ITERATIONS).all()
    assert (result.value <= function(centre) + 0.002).all()


def test_unbounded_objectives_end() -> None:
    result = minimize_lbfgs(_objective(lambda x: -x.sum(-1)), torch.zeros(2, 3), max_iter=20)
    assert result.num_evaluations < 1000
    assert (result.value < -1e6).all()


def test_wrong_gradients_stall_and_say_so() -> None:
    def objective(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.square().sum(-1), -2 * x

    result = minimize_lbfgs(objective, torch.ones(2, 3))
    assert (result.status == RowStatus.STALLED).all()
    torch.testing.assert_close(result.point, torch.ones(2, 3))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_callback_sees_the_best_values_and_who_runs(optimizer: str) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    result = OPTIMIZERS[optimizer](
        _objective(_rosenbrock),
        torch.randn(3, 2),
        max_iter=7,
        callback=lambda value, running: seen.append((value.clone(), running.clone())),
    )
    torch.testing.assert_close(torch.stack([value for value, _ in seen]), result.trace)
    assert not seen[-1][1].any()
    assert seen[0][1].all()


def test_a_second_opinion_chooses_the_points_and_ends_rows() -> None:
    """By the other objective row 0 is best half way, and row 1 where this one is."""
    centre = torch.full((2, 2), 2.0)

    def validate(x: Tensor) -> Tensor:
        return (x - torch.tensor([[1.0, 1.0], [2.0, 2.0]])).square().sum(-1)

    def function(x: Tensor) -> Tensor:
        return (x - centre).square().sum(-1)

    options: dict[str, Any] = {"gradient_tol": 0.0, "value_tol": 0.0, "learning_rate": 0.02}
    result = minimize_adam(_objective(function), torch.zeros(2, 2), validate=validate, **options)
    assert int(result.status[0]) == RowStatus.STOPPED_EARLY
    torch.testing.assert_close(result.value, function(result.point))
    torch.testing.assert_close(result.point[0], torch.ones(2), rtol=0, atol=0.1)
    torch.testing.assert_close(result.point[1], centre[1], rtol=0, atol=0.1)
    assert int(result.num_iterations[0]) < int(result.num_iterations[1])


def test_lbfgs_returns_the_point_that_the_second_opinion_likes() -> None:
    start = torch.tensor([[-1.2, 1.0, -1.2, 1.0]])
    opinion = torch.tensor([[-0.5, 0.3, 0.1, 0.0]])
    options: dict[str, Any] = {"max_iter": 300, "gradient_tol": 1e-9, "value_tol": 0.0}
    free = minimize_lbfgs(_objective(_rosenbrock), start, **options)
    judged = minimize_lbfgs(
        _objective(_rosenbrock),
        start,
        validate=lambda x: (x - opinion).square().sum(-1),
        **options,
    )
    assert int(judged.status[0]) == RowStatus.STOPPED_EARLY
    assert judged.num_evaluations < free.num_evaluations
    assert (judged.point - opinion).norm() < 0.8 * (free.point - opinion).norm()
    torch.testing.assert_close(judged.value, _rosenbrock(judged.point))


def test_points_of_a_second_opinion_that_is_nan_are_not_taken() -> None:
    best = BestPoints(
        torch.zeros(2, 1), torch.ones(2), lambda x: torch.full_like(x[:, 0], float("nan")), every=1
    )
    for _ in range(6):
        stops = best.update(torch.ones(2, 1), torch.zeros(2))
    assert stops.all()
    torch.testing.assert_close(best.point, torch.zeros(2, 1))
    torch.testing.assert_close(best.trace[-1], torch.zeros(2))


def test_adam_takes_the_steps_of_torch() -> None:
    start = torch.randn(2, 3)
    result = minimize_adam(_objective(_rosenbrock), start, max_iter=50, learning_rate=0.01)
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.01)
    best = _rosenbrock(x).detach()
    for _ in range(50):
        optimizer.zero_grad()
        _rosenbrock(x).sum().backward()
        optimizer.step()
        best = torch.minimum(best, _rosenbrock(x).detach())
    torch.testing.assert_close(result.value, best)


def test_adam_finds_the_minimum() -> None:
    centre = torch.randn(3, 4)
    result = minimize_adam(
        _objective(lambda x: (x - centre).square().sum(-1)),
        torch.zeros(3, 4),
        max_iter=2000,
        value_tol=1e-8,
    )
    assert (result.status == RowStatus.CONVERGED).all()
    torch.testing.assert_close(result.point, centre, atol=1e-3, rtol=0)
