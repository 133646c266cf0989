"""The band holds whole empirical distribution functions as often as it says."""

import itertools

import pytest
import scipy.stats
import torch
from torch import Tensor

from pyro_ext.ops.uniform_band import uniform_band


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99], ids=str)
@pytest.mark.parametrize("num_values", [20, 200], ids=str)
def test_lines_of_uniform_draws_stay_inside(num_values: int, level: float) -> None:
    points = torch.linspace(0, 1, 52)[1:-1]
    band = uniform_band(num_values, points, level=level)
    below = (torch.rand(4000, num_values, 1) <= points).double().mean(1)
    inside = ((below >= band.lower - 1e-9) & (below <= band.upper + 1e-9)).all(1)
    # counts are integers: the probability is at least the level, and not much more
    error = (level * (1 - level) / 4000) ** 0.5
    assert level - 5 * error < inside.double().mean() < level + 5 * error + 0.4 * (1 - level)


def test_one_point_has_the_binomial_interval() -> None:
    band = uniform_band(40, torch.tensor([0.3]), level=0.9)
    expected = [float(scipy.stats.binom.ppf(p, 40, 0.3)) / 40 for p in (0.05, 0.95)]
    assert [float(band.lower), float(band.upper)] == expected


def test_against_all_outcomes() -> None:
    """Six draws in four intervals: the band is the narrowest of its kind with the level."""
    points, level = torch.tensor([0.1, 0.4, 0.8]), 0.8
    band = uniform_band(6, points, level=level)

    outcomes = torch.tensor([c for c in itertools.product(range(7), repeat=4) if sum(c) == 6])
    chances = torch.from_numpy(
        scipy.stats.multinomial.pmf(outcomes.numpy(), 6, [0.1, 0.3, 0.4, 0.2])
    )
    fractions = outcomes[:, :3].cumsum(1) / 6

    def probability(lower: Tensor, upper: Tensor) -> float:
        inside = (fractions >= lower - 1e-9) & (fractions <= upper + 1e-9)
        return float(chances[inside.all(1)].sum())

    def interval(gamma: float) -> tuple[Tensor, Tensor]:
        counts = scipy.stats.binom(6, points.numpy())
        return tuple(torch.from_numpy(counts.ppf(p)) / 6 for p in (gamma / 2, 1 - gamma / 2))

    assert probability(band.lower, band.upper) >= level
    gammas = torch.linspace(0.001, 0.2, 400).tolist()
    best = max(g for g in gammas if probability(*interval(g)) >= level)
    torch.testing.assert_close(torch.stack(interval(best)), torch.stack(band[1:]))


@pytest.mark.parametrize(
    ("number", "points", "level", "message"),
    [
        (0, [0.5], 0.95, "num_values .*got 0"),
        (5, [0.5], 1.0, r"level .*got 1\.0"),
        (5, [0.5, 0.5], 0.95, "increasing"),
        (5, [0.5, 1.5], 0.95, "between 0 and 1"),
        (5, [], 0.95, "points"),
    ],
    ids=["no draws", "level", "equal", "outside", "none"],
)
def test_bad_input(number: int, points: list[float], level: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        uniform_band(number, torch.tensor(points), level=level)
