"""Starting points: on the manifold, near where the prior put them, found even when it is hard."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import jacfwd, vmap

from pyro_ext.infer.constrained_hmc.search.initialization import InitialPoints, find_initial_points
from tests.infer.constrained_hmc.problems import PROBLEMS, tolerances


def find(
    constraint: Callable[[Tensor], Tensor],
    start: Tensor,
    num_constraints: int,
    *,
    max_tries: int = 3,
    redraw: Callable[[int], Tensor] | None = None,
) -> tuple[InitialPoints, list[int]]:
    """Starting points from given draws, and how many draws were asked for each time."""
    asked: list[int] = []

    def draw(number: int) -> Tensor:
        asked.append(number)
        if len(asked) == 1 or redraw is None:
            return start[:number]
        return redraw(number)

    points = find_initial_points(
        vmap(constraint),
        vmap(jacfwd(constraint)),
        draw,
        len(start),
        tolerances(num_constraints, 1e-9),
        max_tries=max_tries,
    )
    return points, asked


@pytest.mark.parametrize("name", PROBLEMS)
def test_found_points_solve_the_constraint_near_the_start(name: str) -> None:
    problem = PROBLEMS[name]
    start = torch.randn(20, problem.dim)
    points, asked = find(problem.constraint, start, problem.num_constraints)
    assert points.is_found.all()
    residual = vmap(problem.constraint)(points.position)
    assert (residual.abs() <= 1e-9).all()
    torch.testing.assert_close(points.residual, residual)
    if asked == [20]:
        distance = (points.position - start).norm(dim=-1)
        assert (distance > 1e-3).any()
        assert (distance < 4.0).all()


def test_a_circle_is_met_at_the_nearest_point() -> None:
    problem = PROBLEMS["circle"]
    start = torch.randn(30, 2)
    points, _ = find(problem.constraint, start, 1)
    nearest = start / start.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(points.position, nearest, rtol=0, atol=1e-8)


def test_linear_generators_give_the_orthogonal_projection() -> None:
    """Which, from prior draws, is an exact draw from the posterior (Matheron's rule)."""
    matrix, y = torch.randn(3, 7), torch.randn(3)
    start = torch.randn(3000, 7)
    points, asked = find(lambda u: matrix @ u - y, start, 3)
    assert asked == [3000]
    assert points.is_found.all()
    inverse = torch.linalg.pinv(matrix)
    expected = start - (start @ matrix.T - y) @ inverse.T
    torch.testing.assert_close(points.position, expected, rtol=0, atol=1e-8)
    covariance = torch.eye(7) - inverse @ matrix
    torch.testing.assert_close(points.position.T.cov(), covariance, rtol=0, atol=0.12)


def exploding(steps: int) -> Callable[[Tensor], Tensor]:
    """An unstable recursion that overflows from most draws of its rate."""
    target = torch.linspace(1.0, 2.0, steps)

    def constraint(u: Tensor) -> Tensor:
        rate = (3 * u[0]).exp()
        state, outputs = u.new_ones(()), []
        for t in range(steps):
            state = rate * state * state + 0.3 * u[1 + t]
            outputs.append(state)
        return torch.stack(outputs) - target

    return constraint


def test_exploding_simulators_are_met_progressively() -> None:
    constraint = exploding(12)
    start = torch.randn(20, 13)
    first = vmap(constraint)(start)
    # a plain Newton iteration would start from these
    assert (first.abs() > 1e6).any(-1).sum() + (~first.isfinite()).any(-1).sum() >= 8
    points, _ = find(constraint, start, 12)
    assert points.is_found.all()
    assert (vmap(constraint)(points.position).abs() <= 1e-9).all()


def test_unreachable_values_are_not_found() -> None:
    points, asked = find(
        lambda u: torch.stack([u[0] - 0.5, u[1:].square().sum() + 2.0]),
        torch.randn(4, 4),
        2,
        redraw=lambda number: torch.randn(number, 4),
    )
    assert not points.is_found.any()
    assert asked == [4, 4, 4]
    assert points.position.shape == (4, 4)
    # as near as it gets, and with the residual that says so
    assert ((points.residual[:, 1] - 2).abs() < 1e-3).all()


def test_only_chains_that_failed_are_drawn_again() -> None:
    def constraint(u: Tensor) -> Tensor:
        # nothing can be done about a negative second input
        return torch.where(u[1] > 0, u[:1] - 1, u[:1].detach() * 0 + 3.0)

    start = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.3, 2.0], [0.1, -2.0]])
    points, asked = find(constraint, start, 1, redraw=lambda number: torch.full((number, 2), 0.7))
    assert asked == [4, 2]
    assert points.is_found.all()
    expected = torch.tensor([[1.0, 1.0], [1.0, 0.7], [1.0, 2.0], [1.0, 0.7]])
    torch.testing.assert_close(points.position, expected, rtol=0, atol=1e-8)


def test_least_squares_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the search gives up at once, SciPy still finds the points."""
    from pyro_ext.infer.constrained_hmc.search import initialization

    def give_up(
        constraint: Callable[[Tensor], Tensor], _: object, start: Tensor, __: object
    ) -> InitialPoints:
        return InitialPoints(start, constraint(start), torch.zeros(len(start), dtype=torch.bool))

    monkeypatch.setattr(initialization, "_search", give_up)
    problem = PROBLEMS["quadrics"]
    points, _ = find(problem.constraint, torch.randn(4, 4), 2)
    assert points.is_found.all()
    assert (vmap(problem.constraint)(points.position).abs() <= 1e-9).all()
    monkeypatch.setattr(initialization, "is_small", lambda shape: False)
    points, _ = find(problem.constraint, torch.randn(4, 4), 2)
    assert not points.is_found.any(), "of many outputs its matrices are too large"


def test_one_hopeless_chain_does_not_hold_up_the_others() -> None:
    def constraint(u: Tensor) -> Tensor:
        return (u.square().sum() - 1 + torch.where(u[1] > 5, torch.nan, 0.0)).reshape(1)

    start = torch.tensor([[2.0, 0.0], [0.0, 6.0], [0.0, 0.5]])
    points, _ = find(constraint, start, 1, max_tries=1)
    assert points.is_found.tolist() == [True, False, True]
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(points.position[[0, 2]], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_a_start_that_is_not_finite_is_no_exception(value: float) -> None:
    """A draw at the edge of a support has an infinite input."""
    start = torch.tensor([[2.0, 0.0, 0.0, 0.5], [0.0, value, 1.0, 1.0]])
    points, _ = find(PROBLEMS["quadrics"].constraint, start, 2, max_tries=1)
    assert bool(points.is_found[0])
    assert points.position.isfinite().all()
