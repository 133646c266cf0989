import math

import pytest
import torch
from torch import Tensor

from pyro_ext.ops.slice_sampling import slice_sweep
from pyro_ext.ops.tempering import temper
from tests.statistics import Quadrature, assert_distribution


def _normal(x: Tensor) -> Tensor:
    return -0.5 * x.square().sum(-1)


def _skewed(x: Tensor) -> Tensor:
    """A Gamma(3) density in the first coordinate, a normal that depends on it in the second."""
    first, second = x.unbind(-1)
    inside = 2.0 * first.log() - first - 0.5 * (second - first) ** 2
    return torch.where(first > 0, inside, torch.nan)


@pytest.mark.parametrize("width", [0.3, 10.0], ids=["narrow", "wide"])
def test_slice_sampling_leaves_a_density_as_it_is(width: float) -> None:
    first = torch.distributions.Gamma(3.0, 1.0).sample((2000,))
    x = torch.stack([first, first + torch.randn(2000)], -1)
    log_p = _skewed(x)
    for _ in range(4):
        x, log_p = slice_sweep(x, log_p, _skewed, torch.full((2,), width))
        torch.testing.assert_close(log_p, _skewed(x))
    exact = Quadrature(lambda t: 2.0 * t.log() - t, (0.0, 40.0, 4000))
    assert_distribution(x[None, :, 0], exact.cdf(), name="skewed coordinate")


def test_slice_sampling_comes_from_far() -> None:
    x = torch.full((500, 2), 8.0)
    log_p = _normal(x)
    for _ in range(30):
        x, log_p = slice_sweep(x, log_p, _normal, torch.ones(2))
    assert (x.mean(0).abs() < 5 / math.sqrt(500)).all()
    assert ((x.std(0) - 1).abs() < 5 / math.sqrt(2 * 500)).all()


def test_arguments_are_not_changed() -> None:
    x = torch.randn(10, 2)
    before = x.clone()
    slice_sweep(x, _normal(x), _normal, torch.ones(2))
    assert torch.equal(x, before)


def test_tempering_keeps_the_weights_of_modes_apart() -> None:
    centres, widths = torch.tensor([-4.0, 3.0]), torch.tensor([0.02, 0.2])
    share = torch.tensor([0.3, 0.7])

    def log_likelihood(x: Tensor) -> Tensor:
        posterior = share.log() + torch.distributions.Normal(centres, widths).log_prob(x)
        return posterior.logsumexp(-1) + 0.5 * x.squeeze(-1) ** 2 / 25

    fractions, evidence = [], []
    for seed in range(5):
        torch.manual_seed(seed)
        start = 5.0 * torch.randn(2000, 1)
        result = temper(start, lambda x: -0.5 * x.squeeze(-1) ** 2 / 25, log_likelihood)
        fractions.append(float((result.particles < 0).double().mean()))
        evidence.append(float(result.log_evidence))
        assert result.num_temperatures > 3
    mean = sum(fractions) / 5
    spread = torch.tensor(fractions).std() / math.sqrt(5)
    assert abs(mean - 0.3) < 5 * max(float(spread), 0.01)
    # the integral of the posterior times the normaliser of the prior
    expected = -0.5 * math.log(2 * math.pi * 25)
    assert sum(evidence) / 5 == pytest.approx(expected, abs=0.1)
    right = result.particles[result.particles > 0]
    assert abs(float(right.mean()) - 3.0) < 0.05
    assert float(right.std()) == pytest.approx(0.2, rel=0.1)


def test_a_posterior_that_is_the_prior_takes_one_step() -> None:
    result = temper(torch.randn(100, 2), _normal, lambda x: torch.zeros(len(x)))
    assert result.num_temperatures == 1
    assert float(result.log_evidence) == pytest.approx(0.0, abs=1e-12)


def test_no_likelihood_where_it_is_nan() -> None:
    result = temper(
        torch.randn(1000, 1),
        _normal,
        lambda x: torch.where(x.squeeze(-1) > 0, 0.0, torch.nan),
    )
    assert (result.particles > 0).all()
    assert float(result.log_evidence) == pytest.approx(math.log(0.5), abs=0.2)
