"""Integrals of functions of one number: closed forms, hard shapes, what does not converge."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_ext.ops.quadrature import halve, log_integral, log_trapezoid

GRID = torch.linspace(-30, 30, 121, dtype=torch.float64)
INTEGRANDS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "normal": (lambda x: -0.5 * x.square(), 0.5 * math.log(2 * math.pi)),
    "logistic": (lambda x: -x - 2 * torch.nn.functional.softplus(-x), 0.0),
    "Laplace, with a kink": (lambda x: -(x - 0.123).abs(), math.log(2)),
    "narrow": (lambda x: -0.5 * (x / 0.1).square(), math.log(0.1 * math.sqrt(2 * math.pi))),
    "huge": (lambda x: 5000 - 0.5 * x.square(), 5000 + 0.5 * math.log(2 * math.pi)),
    "tiny": (lambda x: -5000 - 0.5 * x.square(), -5000 + 0.5 * math.log(2 * math.pi)),
    "constant": (torch.zeros_like, math.log(60)),
}


@pytest.mark.parametrize(("log_f", "truth"), INTEGRANDS.values(), ids=INTEGRANDS)
@pytest.mark.parametrize("tolerance", [1e-4, 1e-8])
def test_integrals_are_within_the_tolerance(
    log_f: Callable[[Tensor], Tensor], truth: float, tolerance: float
) -> None:
    result = log_integral(
        lambda _, x: log_f(x), GRID.expand(1, -1), tolerance=tolerance, max_halvings=14
    )
    assert result.is_converged.all()
    assert float(result.value) == pytest.approx(truth, abs=10 * tolerance)


def test_only_intervals_that_need_it_are_halved() -> None:
    scales, evaluated = torch.tensor([3.0, 0.05, 0.01]), torch.zeros(3)

    def log_f(index: Tensor, x: Tensor) -> Tensor:
        evaluated.index_add_(0, index, torch.full(index.shape, float(x.shape[1])))
        return -0.5 * (x / scales[index, None]).square()

    result = log_integral(log_f, GRID.expand(3, -1), tolerance=1e-7)
    truth = (scales * math.sqrt(2 * math.pi)).log()
    torch.testing.assert_close(result.value, truth, atol=1e-6, rtol=0)
    assert (result.error <= 1e-7).all()
    first_grid_and_middles = 2 * len(GRID) - 1
    assert (evaluated >= first_grid_and_middles).all()
    # steps of 0.005, as the peak needs, would be 12,000 all over the range
    assert (evaluated[1:] < 4 * first_grid_and_middles).all()


def test_a_peak_that_shows_up_late_sets_the_scale() -> None:
    def log_f(_: Tensor, x: Tensor) -> Tensor:
        narrow = 2000.0 - 0.5 * ((x - 0.1) / 0.01).square()
        return torch.logaddexp(-0.5 * x.square(), narrow)

    result = log_integral(log_f, GRID.expand(1, -1), tolerance=1e-8)
    truth = 2000.0 + math.log(0.01 * math.sqrt(2 * math.pi))
    assert float(result.value) == pytest.approx(truth, abs=1e-7)


def test_a_jump_that_is_not_on_the_grid_does_not_converge_and_says_so() -> None:
    def log_f(_: Tensor, x: Tensor) -> Tensor:
        return torch.where(x > math.pi / 10, 0.0, -math.inf)

    result = log_integral(log_f, GRID.expand(1, -1), tolerance=1e-10, max_halvings=5)
    assert not result.is_converged.any()
    assert float(result.value.exp()) == pytest.approx(30 - math.pi / 10, abs=0.02)


def test_zero_everywhere_and_nan_are_values_of_their_own() -> None:
    constants = torch.tensor([-math.inf, math.nan, 0.0])
    result = log_integral(
        lambda index, x: constants[index, None].expand_as(x), GRID.expand(3, -1), max_halvings=3
    )
    assert result.value[0] == -math.inf
    assert result.value[1].isnan()
    assert float(result.value[2]) == pytest.approx(math.log(60))
    assert result.is_converged.tolist() == [True, False, True]


def test_trapezoids_on_unequal_steps_with_points_that_are_double() -> None:
    grid = torch.tensor([0.0, 0.5, 0.5, 2.0])
    f = torch.tensor([1.0, 3.0, 3.0, 2.0])
    assert float(log_trapezoid(grid, f.log()).exp()) == pytest.approx(1.0 + 3.75)


def test_halving_keeps_the_order() -> None:
    points = torch.tensor([[0.0, 2.0, 6.0]])
    assert halve(points, torch.tensor([[1.0, 4.0]])).tolist() == [[0.0, 1.0, 2.0, 4.0, 6.0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"tolerance": 0.0}, "tolerance must be positive"), ({"max_halvings": 1}, "at least 2")],
    ids=["tolerance", "halvings"],
)
def test_bad_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_integral(lambda _, x: x, GRID.expand(1, -1), **settings)  # type: ignore[arg-type]
