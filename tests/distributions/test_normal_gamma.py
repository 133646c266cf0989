"""The Normal-Gamma distribution against its two parts, and in a model."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to, kl_divergence

from pyro_ext.distributions import NormalGamma
from tests.statistics import assert_moments

PARAMETERS = (
    torch.tensor([0.5, -1.0], dtype=torch.float64),
    torch.tensor([0.4, 2.0], dtype=torch.float64),
    torch.tensor(3.0, dtype=torch.float64),
    1.5,
)


def test_density_is_that_of_its_parts() -> None:
    normal_gamma = NormalGamma(*PARAMETERS)
    value = normal_gamma.sample((5,))
    mean, precision = value.unbind(-1)
    loc, nu, alpha, beta = PARAMETERS
    expected = dist.Gamma(alpha, beta).log_prob(precision)
    expected = expected + dist.Normal(loc, (nu * precision).rsqrt()).log_prob(mean)
    torch.testing.assert_close(normal_gamma.log_prob(value), expected)


def test_draws_have_the_moments() -> None:
    normal_gamma = NormalGamma(*PARAMETERS)
    draws = normal_gamma.sample((20_000,))
    assert_moments(draws[None], normal_gamma.mean, normal_gamma.variance.sqrt())


def test_variance_of_the_mean_may_be_infinite() -> None:
    variance = NormalGamma(0.0, 1.0, torch.tensor([0.5, 1.0, 2.0]), 1.0).variance
    assert variance[:, 0].tolist() == [torch.inf, torch.inf, 1.0]


def test_draws_have_gradients() -> None:
    parameters = [torch.tensor(v, requires_grad=True) for v in (0.5, 0.4, 3.0, 1.5)]
    NormalGamma(*parameters).rsample((10,)).sum().backward()
    assert all(p.grad is not None and p.grad.abs() > 0 for p in parameters)


def test_entropy_and_divergence_are_averages() -> None:
    p = NormalGamma(*PARAMETERS)
    q = NormalGamma(torch.tensor([0.0, -0.8]), 1.0, 2.5, 1.0)
    value = p.sample((40_000,))
    for name, exact, terms in (
        ("entropy", p.entropy(), -p.log_prob(value)),
        ("divergence", kl_divergence(p, q), p.log_prob(value) - q.log_prob(value)),
    ):
        error = terms.std(0) / len(terms) ** 0.5
        assert (error < 0.02).all(), f"{name}: {error}"
        assert ((terms.mean(0) - exact).abs() < 5 * error).all(), f"{name}: {exact}"
    torch.testing.assert_close(kl_divergence(p, p), torch.zeros(2))


def test_it_broadcasts_and_expands() -> None:
    normal_gamma = NormalGamma(*PARAMETERS)
    assert normal_gamma.batch_shape == (2,)
    assert normal_gamma.event_shape == (2,)
    expanded = normal_gamma.expand((3, 2))
    assert expanded.sample((4,)).shape == (4, 3, 2, 2)
    value = normal_gamma.sample((3,))
    torch.testing.assert_close(expanded.log_prob(value), normal_gamma.log_prob(value))
    together = expanded.to_event(1).log_prob(value)
    torch.testing.assert_close(together, normal_gamma.log_prob(value).sum(-1))


def test_support_maps_to_real_numbers() -> None:
    normal_gamma = NormalGamma(*PARAMETERS)
    transform = biject_to(normal_gamma.support)
    value = normal_gamma.sample()
    torch.testing.assert_close(transform(transform.inv(value)), value)
    assert normal_gamma.support.check(value).all()
    assert not normal_gamma.support.check(-value.abs()).all(-1).any()


@pytest.mark.parametrize("parameter", [1, 2, 3], ids=["mean_concentration", "alpha", "beta"])
def test_parameters_must_be_positive(parameter: int) -> None:
    parameters: list[float] = [0.0, 1.0, 1.0, 1.0]
    parameters[parameter] = -1.0
    with pytest.raises(ValueError, match=r"GreaterThan\(lower_bound=0.0\)"):
        NormalGamma(*parameters, validate_args=True)


def test_a_precision_cannot_be_negative() -> None:
    with pytest.raises(ValueError, match="support"):
        NormalGamma(0.0, 1.0, 1.0, 1.0, validate_args=True).log_prob(torch.tensor([0.0, -1.0]))


def test_it_is_a_site_in_plates() -> None:
    def model() -> None:
        with pyro.plate("sets", 4, dim=-2), pyro.plate("clusters", 3, dim=-1):
            value = pyro.sample("value", NormalGamma(torch.zeros(2), 1.0, 1.0, 1.0).to_event(1))
        assert value.shape == (4, 3, 2, 2)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["value"]["log_prob"].shape == (4, 3)
