"""The statistical checks pass what is right and fail what is wrong, for the right reason."""

import pytest
import scipy.stats
import torch
from torch import Tensor

from tests.statistics import (
    Quadrature,
    assert_distribution,
    assert_mean,
    assert_moments,
    assert_same_mean,
    effective_sample_size,
    thin,
)


def autoregressive(correlation: float, chains: int = 20, draws: int = 400) -> Tensor:
    """A stationary chain with standard normal draws."""
    values = [torch.randn(chains)]
    for _ in range(draws - 1):
        noise = (1 - correlation**2) ** 0.5 * torch.randn(chains)
        values.append(correlation * values[-1] + noise)
    return torch.stack(values, 1)


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.8])
def test_right_draws_pass(correlation: float) -> None:
    draws = autoregressive(correlation)
    assert_moments(draws, 0.0, 1.0)
    assert_distribution(draws, scipy.stats.norm.cdf)
    assert_same_mean(draws, autoregressive(0.0))


def test_effective_sample_size_of_an_autoregressive_chain() -> None:
    draws = autoregressive(0.8, draws=2000)
    assert effective_sample_size(draws) == pytest.approx(draws.numel() / 9, rel=0.15)
    assert thin(draws).shape[1] == pytest.approx(2000 / 18, rel=0.2)


def test_correlated_draws_are_too_few() -> None:
    with pytest.raises(AssertionError, match="too few effective draws for mean of draws"):
        assert_moments(autoregressive(0.99), 0.0)


def test_constant_draws_are_too_few() -> None:
    with pytest.raises(AssertionError, match="too few effective draws"):
        assert_mean(torch.randn(20, 1).expand(20, 100), 0.0, name="stuck")


@pytest.mark.parametrize(
    ("mean", "sd", "message"),
    [(0.2, 1.0, "mean of draws is wrong"), (0.0, 1.1, "variance of draws is wrong")],
)
def test_wrong_moments_are_found(mean: float, sd: float, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_moments(autoregressive(0.5), mean, sd)


def test_wrong_covariance_is_found() -> None:
    draws = torch.stack([autoregressive(0.0), autoregressive(0.0)], -1)
    assert_moments(draws, torch.zeros(2), covariance=torch.eye(2))
    with pytest.raises(AssertionError, match=r"covariance of draws\[1\] and draws\[0\]"):
        assert_moments(draws, 0.0, covariance=torch.tensor([[1.0, 0.2], [0.2, 1.0]]))


def test_wrong_distribution_is_found() -> None:
    with pytest.raises(AssertionError, match="distribution of draws is wrong"):
        assert_distribution(autoregressive(0.0), scipy.stats.t(5, scale=0.6**0.5).cdf)


def test_different_means_are_found() -> None:
    with pytest.raises(AssertionError, match="differs"):
        assert_same_mean(autoregressive(0.0), autoregressive(0.0) + 0.1)


def test_quadrature() -> None:
    normal = torch.distributions.Normal(1.0, 2.0)
    grid = Quadrature(
        lambda x, y: normal.log_prob(x) - 0.5 * (y - x).square(), (-19, 21, 400), (-20, 22, 420)
    )
    assert grid.mean() == pytest.approx(1.0, abs=1e-9)
    assert grid.sd(lambda x, y: y) == pytest.approx(5**0.5, abs=1e-9)
    points = torch.tensor([-1.0, 2.0, 4.0]).numpy()
    expected = scipy.stats.norm(1, 5**0.5).cdf(points)
    assert grid.cdf(axis=1)(points) == pytest.approx(expected, abs=1e-4)
