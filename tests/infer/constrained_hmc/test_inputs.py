"""Inputs of many distributions: each posterior is known in closed form or by quadrature."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor

from tests.sampling import sample
from tests.statistics import Quadrature, assert_distribution, assert_mean, assert_moments


def check(draws: Tensor, truth: Quadrature, name: str, min_ess: float = 400) -> None:
    """Mean, variance and distribution of one number against those of a quadrature."""
    assert_moments(draws, truth.mean(), truth.sd(), min_ess=min_ess, name=name)
    assert_distribution(draws, truth.cdf(), min_ess=min_ess, name=name)


def check_against(draws: Tensor, truth: scipy.stats.rv_continuous, name: str) -> None:
    """The same against a distribution of SciPy."""
    assert_moments(draws, truth.mean(), truth.std(), min_ess=400, name=name)
    assert_distribution(draws, truth.cdf, min_ess=400, name=name)


# -- sums of independent inputs ------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [(2.0, 3.0), (0.7, 4.0)], ids=str)
def test_gammas_with_a_given_sum(shapes: tuple[float, float]) -> None:
    """Their shares have a beta distribution."""

    def model() -> None:
        first = pyro.sample("first", dist.Gamma(shapes[0], 0.5))
        second = pyro.sample("second", dist.Gamma(shapes[1], 0.5))
        pyro.deterministic("total", first + second)

    draws = sample(model, {"total": 6.0})
    check_against(draws["first"] / 6, scipy.stats.beta(*shapes), "share of the first")


def test_exponentials_with_a_given_sum() -> None:
    """Their shares are uniform on the simplex."""

    def model() -> None:
        x = pyro.sample("x", dist.Exponential(2.0).expand([4]).to_event(1))
        pyro.deterministic("total", x.sum())

    shares = sample(model, {"total": 3.0})["x"] / 3
    covariance = (torch.eye(4) / 4 - 1 / 16) / 5
    assert_moments(shares, 0.25, covariance=covariance, min_ess=400, name="shares")
    assert_distribution(shares[..., 0], scipy.stats.beta(1, 3).cdf, min_ess=400, name="share")


def test_uniforms_with_a_given_sum() -> None:
    def model() -> None:
        first = pyro.sample("first", dist.Uniform(0.0, 1.0))
        second = pyro.sample("second", dist.Uniform(0.0, 1.0))
        pyro.deterministic("total", first + second)

    draws = sample(model, {"total": 1.3})["first"]
    check_against(draws, scipy.stats.uniform(0.3, 0.7), "first")


def test_uniforms_with_a_given_product() -> None:
    def model() -> None:
        first = pyro.sample("first", dist.Uniform(0.0, 1.0))
        second = pyro.sample("second", dist.Uniform(0.0, 1.0))
        pyro.deterministic("product", first * second)

    draws = sample(model, {"product": 0.2})["first"]
    check_against(draws, scipy.stats.loguniform(0.2, 1.0), "first")


def sum_of(
    first: Callable[[], dist.Distribution], second: Callable[[], dist.Distribution]
) -> Callable[[], None]:
    def model() -> None:
        x = pyro.sample("x", first())
        y = pyro.sample("y", second())
        pyro.deterministic("total", x + y)

    return model


SUMS = {
    "beta": (
        lambda: dist.Beta(2.0, 3.0),
        lambda: dist.Beta(1.5, 0.8),
        1.1,
        (0.1, 1.0),
    ),
    "student": (
        lambda: dist.StudentT(4.0, 0.5, 2.0),
        lambda: dist.StudentT(6.0),
        2.0,
        (-60.0, 60.0),
    ),
    "log-normal and gamma": (
        lambda: dist.LogNormal(0.0, 1.0),
        lambda: dist.Gamma(3.0, 2.0),
        2.5,
        (0.0, 2.5),
    ),
    "half-normal and normal": (
        lambda: dist.HalfNormal(2.0),
        lambda: dist.Normal(-1.0, 0.7),
        0.5,
        (0.0, 12.0),
    ),
    "laplace and gumbel": (
        lambda: dist.Laplace(1.0, 0.5),
        lambda: dist.Gumbel(0.0, 1.0),
        1.0,
        (-15.0, 15.0),
    ),
}


@pytest.mark.parametrize(("first", "second", "total", "bounds"), SUMS.values(), ids=SUMS.keys())
def test_two_inputs_with_a_given_sum(
    first: Callable[[], dist.Distribution],
    second: Callable[[], dist.Distribution],
    total: float,
    bounds: tuple[float, float],
) -> None:
    def log_density(x: Tensor) -> Tensor:
        return first().log_prob(x) + second().log_prob(total - x)

    draws = sample(sum_of(first, second), {"total": total})["x"]
    # enough of them for kinks and for poles at the ends that can be integrated
    check(draws, Quadrature(log_density, (*bounds, 400_000)), "x")


# -- others --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_dirichlet_with_a_given_score() -> None:
    """On the segment of the simplex with that score."""
    concentration = torch.tensor([1.5, 2.0, 3.0])
    score = 1.4

    def model() -> None:
        shares = pyro.sample("shares", dist.Dirichlet(concentration))
        pyro.deterministic("score", shares @ torch.tensor([0.0, 1.0, 3.0]))

    def segment(third: Tensor) -> Tensor:
        second = score - 3 * third
        return torch.stack([1 - second - third, second, third], -1)

    # all shares are positive between these
    bounds = ((score - 1) / 2, score / 3)
    truth = Quadrature(
        lambda third: ((concentration - 1) * segment(third).log()).sum(-1), (*bounds, 100_000)
    )
    shares = sample(model, {"score": score})["shares"]
    assert (shares.sum(-1) - 1).abs().max() < 1e-12
    check(shares[..., 2], truth, "third share")


SCALE_DATA = (0.3, -1.2, 2.0, 0.8)


@pytest.mark.slow
def test_scale_of_normals_given_each_value() -> None:
    x = torch.tensor(SCALE_DATA)

    def model() -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        children = pyro.sample("children", dist.Normal(0.0, scale).expand([4]).to_event(1))
        pyro.deterministic("values", children)

    def log_density(log_scale: Tensor) -> Tensor:
        scale = log_scale.exp()
        likelihood = dist.Normal(0.0, scale.unsqueeze(-1)).log_prob(x).sum(-1)
        return dist.HalfCauchy(1.0).log_prob(scale) + likelihood + log_scale

    draws = sample(model, {"values": x}, num_samples=40, warmup_steps=60)["scale"]
    check(draws.log(), Quadrature(log_density, (-6.0, 8.0, 20_000)), "log scale")


@pytest.mark.slow
@pytest.mark.parametrize("centred", [True, False], ids=["centred", "with noise"])
def test_scale_of_normals_given_their_mean(centred: bool) -> None:
    """The posterior has no variance; its logarithm has."""
    mean = 0.9

    def model() -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        with pyro.plate("children", 4):
            if centred:
                children = pyro.sample("child", dist.Normal(0.0, scale))
            else:
                children = scale * pyro.sample("noise", dist.Normal(0.0, 1.0))
        pyro.deterministic("mean", children.mean())

    def log_density(log_scale: Tensor) -> Tensor:
        scale = log_scale.exp()
        likelihood = dist.Normal(0.0, scale / 2).log_prob(torch.tensor(mean))
        return dist.HalfCauchy(1.0).log_prob(scale) + likelihood + log_scale

    draws = sample(model, {"mean": mean}, num_samples=40, warmup_steps=60)["scale"]
    truth = Quadrature(log_density, (-12.0, 25.0, 40_000))
    check(draws.log(), truth, "log scale")


def test_gamma_precision_and_correlated_normals() -> None:
    """A hierarchy of three levels given two contrasts of its lowest."""
    contrasts = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
    observed = torch.tensor([1.0, -2.5])

    def model() -> None:
        precision = pyro.sample("precision", dist.Gamma(3.0, 2.0))
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        tril = torch.linalg.cholesky(torch.eye(3) + 0.5) / precision.sqrt()
        x = pyro.sample("x", dist.MultivariateNormal(loc.expand(3), scale_tril=tril))
        pyro.deterministic("contrasts", contrasts @ x)

    # the contrasts do not see the location, and the gamma prior is conjugate to the rest
    spread = contrasts @ (torch.eye(3) + 0.5) @ contrasts.T
    distance = float(observed @ torch.linalg.solve(spread, observed))
    draws = sample(model, {"contrasts": observed})
    posterior = scipy.stats.gamma(3 + 1, scale=1 / (2 + distance / 2))
    check_against(draws["precision"], posterior, "precision")
    assert_moments(draws["loc"], 0.0, 10.0, min_ess=400, name="loc")


def test_masked_and_scaled_inputs() -> None:
    """A site under a mask has a flat density, one under a scale a power of its own."""

    def model() -> None:
        with pyro.poutine.scale(scale=3.0):
            x = pyro.sample("x", dist.Normal(0.5, 1.0))
        with pyro.poutine.mask(mask=False):
            y = pyro.sample("y", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        pyro.deterministic("first", x + y + z)

    draws = sample(model, {"first": 1.0}, num_samples=110)
    check_against(draws["x"], scipy.stats.norm(0.5, 3**-0.5), "scaled")
    check_against(draws["z"], scipy.stats.norm(0.0, 2.0), "beside the masked one")
    assert_mean(draws["y"], 0.5, name="masked")
    assert_moments(draws["y"], 0.5, math.sqrt(4 + 1 / 3), min_ess=400, name="masked")
