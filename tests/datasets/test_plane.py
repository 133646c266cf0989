"""Densities in the plane: their mass, their draws, their formulas against independent ones."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from pyro_ext.datasets import Checkerboard, Rings, RotatedGrid, TwoSpirals, plane

# a square that holds all but a negligible part of each density
DENSITIES: dict[str, tuple[Callable[[], dist.TorchDistribution], float]] = {
    "rotated grid": (RotatedGrid, 4.0),
    "small grid": (lambda: RotatedGrid(rows=3, std=0.4), 6.0),
    "checkerboard": (Checkerboard, 5.0),
    "small board": (lambda: Checkerboard(rows=2, side=1.5), 2.0),
    "two spirals": (TwoSpirals, 5.0),
    "rings": (Rings, 4.0),
    "one ring": (lambda: Rings(radii=(1.0,), std=0.5), 6.0),
}
# the density of the spirals is an integral over the arm for every point
WITH_QUADRATURE = [
    pytest.param(name, marks=pytest.mark.slow) if name == "two spirals" else name
    for name in DENSITIES
]


def cells(half_width: float, number: int) -> tuple[Tensor, float]:
    """Midpoints of a square grid of cells, and the area of a cell."""
    width = 2 * half_width / number
    middles = (torch.arange(number) + 0.5) * width - half_width
    return torch.cartesian_prod(middles, middles), width**2


@pytest.fixture(params=DENSITIES)
def case(request: pytest.FixtureRequest) -> tuple[dist.TorchDistribution, float]:
    make, half_width = DENSITIES[request.param]
    return make(), half_width


@pytest.mark.parametrize("name", WITH_QUADRATURE)
def test_densities_integrate_to_one_and_draws_follow_them(name: str) -> None:
    """
    Chi-square of the counts in squares, whose probabilities come from quadrature.

    Midpoints converge fast where a density is smooth; edges of squares lie on cell edges.
    """
    make, half_width = DENSITIES[name]
    density = make()
    fine, coarse, num_draws = 160, 20, 20_000
    points, area = cells(half_width, fine)
    per_side = fine // coarse
    mass = density.log_prob(points).exp().reshape(coarse, per_side, coarse, per_side) * area
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-6)
    expected = num_draws * mass.sum((1, 3)).flatten()
    draws = density.sample((num_draws,))
    inside = draws[(draws.abs() < half_width).all(-1)]
    assert len(inside) >= num_draws - 2
    square = ((inside + half_width) * (coarse / (2 * half_width))).long()
    counts = torch.bincount(square[:, 0] * coarse + square[:, 1], minlength=coarse**2)
    is_common = expected > 5
    observed = torch.cat([counts[is_common], counts[~is_common].sum().reshape(1)]).numpy()
    wanted = torch.cat([expected[is_common], expected[~is_common].sum().reshape(1)]).numpy()
    observed, wanted = observed[wanted > 0.5], wanted[wanted > 0.5]
    assert scipy.stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3


def test_draws_are_reproducible(case: tuple[dist.TorchDistribution, float]) -> None:
    density, _ = case
    pyro.set_rng_seed(5)
    first = density.sample((10,))
    second = density.sample((10,))
    pyro.set_rng_seed(5)
    assert torch.equal(density.sample((10,)), first)
    assert not torch.equal(first, second)


def test_shapes_are_those_of_a_distribution(case: tuple[dist.TorchDistribution, float]) -> None:
    density, _ = case
    assert density.batch_shape == ()
    assert density.event_shape == (2,)
    assert density.sample().shape == (2,)
    assert density.sample((3, 4)).shape == (3, 4, 2)
    assert density.log_prob(torch.zeros(5, 1, 2)).shape == (5, 1)
    assert density.log_prob(torch.zeros(2)).shape == ()
    expanded = density.expand((6,))
    assert expanded.sample((2,)).shape == (2, 6, 2)
    assert expanded.log_prob(expanded.sample()).shape == (6,)


def test_they_are_sites_of_a_model(case: tuple[dist.TorchDistribution, float]) -> None:
    density, _ = case
    with pyro.plate("points", 7):
        x = pyro.sample("x", density)
    assert x.shape == (7, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda one: RotatedGrid(std=0.06 * one),
        lambda one: Checkerboard(side=0.3 * one),
        lambda one: TwoSpirals(std=0.09 * one),
        lambda one: Rings(std=0.08 * one),
    ],
    ids=["rotated grid", "checkerboard", "two spirals", "rings"],
)
def test_dtypes_follow_the_parameters(
    make: Callable[[Tensor], dist.TorchDistribution], dtype: torch.dtype
) -> None:
    density = make(torch.ones((), dtype=dtype))
    draws = density.sample((2000,))
    assert draws.dtype == dtype
    log_prob = density.log_prob(draws)
    assert log_prob.dtype == dtype
    assert log_prob.isfinite().all()


@pytest.mark.parametrize("side", [0.1, 0.3, 1.0, 7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_draw_is_rounded_over_an_edge(
    side: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest and the largest number that ``torch.rand`` can return."""
    board = Checkerboard(side=torch.tensor(side, dtype=dtype))
    for extreme in (0.0, 1 - torch.finfo(dtype).eps / 2):
        monkeypatch.setattr(
            plane, "_uniform", lambda shape, like, u=extreme: like.new_full(shape, u)
        )
        draws = board.sample((1000,))
        assert draws.dtype == dtype
        assert board.log_prob(draws).isfinite().all()


# -------------------------------------------------------------------------- formulas, one by one


def test_the_grid_is_the_mixture_it_stands_for() -> None:
    line = torch.linspace(-2.5, 2.5, 15)
    turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / math.sqrt(2)
    centres = torch.cartesian_prod(line, line) @ turn.T
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(225)), dist.Normal(centres, 0.06).to_event(1)
    )
    x = torch.randn(50, 2) * 2
    torch.testing.assert_close(RotatedGrid().log_prob(x), mixture.log_prob(x))


def test_the_board_is_thirty_two_unit_squares() -> None:
    corners = torch.cartesian_prod(torch.arange(-6, 6), torch.arange(-6, 6))
    log_prob = Checkerboard().log_prob(corners + 0.5)
    assert int(log_prob.isfinite().sum()) == 32
    of_the_colour = corners.sum(-1) % 2 == 0
    inside = ((corners >= -4) & (corners < 4)).all(-1)
    expected = torch.where(of_the_colour & inside, -math.log(32.0), -math.inf)
    torch.testing.assert_close(log_prob, expected)
    # just outside, on either side
    assert Checkerboard().log_prob(torch.tensor([4.01, 0.5])) == -math.inf
    assert Checkerboard().log_prob(torch.tensor([-4.01, 1.5])) == -math.inf


@pytest.mark.parametrize("point", [(0.3, 0.2), (1.0, -2.0), (-3.2, 0.4), (0.0, 0.0), (4.0, 4.5)])
def test_spirals_against_adaptive_quadrature(point: tuple[float, float]) -> None:
    """scipy's adaptive rule, on the integral over ``u`` and the sum of two arms."""

    def interval(distance: np.ndarray) -> np.ndarray:
        low, high = (distance - 0.7 / 6) / 0.09, distance / 0.09
        return (scipy.special.ndtr(high) - scipy.special.ndtr(low)) / (0.7 / 6)

    def integrand(m: float) -> float:
        corner = 0.7 * m * np.array([-math.cos(m), math.sin(m)]) / 3
        arms = [sign * np.array(point) - corner for sign in (1, -1)]
        return sum(0.5 * interval(arm).prod() for arm in arms) * 2 * m / (5 * math.pi) ** 2

    edges = np.linspace(0, 5 * math.pi, 61)
    expected = sum(
        scipy.integrate.quad(integrand, a, b, epsabs=1e-14, epsrel=1e-12)[0]
        for a, b in itertools.pairwise(edges)
    )
    computed = float(TwoSpirals().log_prob(torch.tensor(point)).exp())
    assert computed == pytest.approx(expected, rel=1e-5, abs=1e-13)


def test_more_panels_change_little_where_the_arms_are() -> None:
    spirals = TwoSpirals()
    x = spirals.sample((300,))
    difference = (spirals.log_prob(x) - TwoSpirals(panels=400).log_prob(x)).abs()
    assert difference.median() < 1e-11
    assert difference.max() < 1e-4


def test_spirals_are_finite_and_have_gradients_far_away() -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([[30.0, -40.0], [0.0, 0.0], [-100.0, 3.0]], dtype=dtype)
        x.requires_grad_()
        log_prob = TwoSpirals(std=torch.tensor(0.09, dtype=dtype)).log_prob(x)
        log_prob.sum().backward()
        assert log_prob.isfinite().all()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        # uphill is towards the arms
        assert x.grad[0, 0] < 0 < x.grad[0, 1]


@pytest.mark.parametrize("distance", [0.0, 0.3, 0.75, 1.1, 3.0])
def test_rings_against_an_integral_over_the_circle(distance: float) -> None:
    def ring(angle: float, radius: float) -> float:
        squared = distance**2 + radius**2 - 2 * distance * radius * math.cos(angle)
        return math.exp(-0.5 * squared / 0.08**2) / (2 * math.pi * 0.08**2)

    expected = sum(
        scipy.integrate.quad(ring, -math.pi, math.pi, (radius,), points=[0.0], limit=200)[0]
        for radius in (0.75, 1.5, 2.25, 3.0)
    ) / (4 * 2 * math.pi)
    point = distance * torch.tensor([math.cos(1.0), math.sin(1.0)])
    assert float(Rings().log_prob(point).exp()) == pytest.approx(expected, rel=1e-7, abs=1e-15)


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RotatedGrid(rows=1), "rows must be an integer of at least 2, got 1"),
        (lambda: RotatedGrid(rows=2.5), "rows must be an integer of at least 2, got 2.5"),
        (lambda: RotatedGrid(std=torch.ones(2)), r"std must be one number, got shape \(2,\)"),
        (lambda: RotatedGrid(std=-1.0, validate_args=True), "std"),
        (lambda: Checkerboard(rows=3), "rows must be even"),
        (lambda: Checkerboard(side=0.0, validate_args=True), "side"),
        (lambda: TwoSpirals(panels=0), "panels must be an integer of at least 1"),
        (lambda: TwoSpirals(std=0.0, validate_args=True), "std"),
        (lambda: Rings(radii=()), r"at least one radius, got shape \(0,\)"),
        (lambda: Rings(radii=torch.ones(2, 2)), r"radii must be a vector"),
        (lambda: Rings(radii=(1.0, -1.0), validate_args=True), "radii"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_no_points_are_scored_as_none() -> None:
    assert TwoSpirals(validate_args=False).log_prob(torch.zeros(3, 0, 2)).shape == (3, 0)


def test_bad_points_are_refused_when_validating() -> None:
    rings = Rings(validate_args=True)
    with pytest.raises(ValueError, match="support"):
        rings.log_prob(torch.tensor([math.nan, 0.0]))
    with pytest.raises(ValueError, match="size"):
        rings.log_prob(torch.zeros(5, 3))
