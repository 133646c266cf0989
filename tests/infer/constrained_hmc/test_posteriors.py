"""Posteriors of models as users write them: summaries, plates, discrete sites, time series."""

import math
import warnings
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor

from pyro_ext import lift_observations
from pyro_ext.errors import VectorizationWarning
from tests.sampling import sample
from tests.statistics import (
    Quadrature,
    assert_distribution,
    assert_mean,
    assert_moments,
    assert_same_mean,
)


def first(x: Tensor, y: Tensor) -> Tensor:
    return x


def second(x: Tensor, y: Tensor) -> Tensor:
    return y


def check_two(draws: tuple[Tensor, Tensor], truth: Quadrature, min_ess: float = 400) -> None:
    """Moments, distributions and the mean product of two numbers."""
    for axis, (values, coordinate) in enumerate(zip(draws, (first, second), strict=True)):
        mean, sd = truth.mean(coordinate), truth.sd(coordinate)
        assert_moments(values, mean, sd, min_ess=min_ess, name=f"number {axis}")
        assert_distribution(values, truth.cdf(axis), min_ess=min_ess, name=f"number {axis}")
    product = truth.mean(lambda x, y: x * y)
    assert_mean(draws[0] * draws[1], product, min_ess=min_ess, name="product")


# -- summary statistics --------------------------------------------------------------------------


def test_mean_and_variance_of_five_normals() -> None:
    size, mean, variance = 5, 1.2, 0.8

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        log_scale = pyro.sample("log_scale", dist.Normal(0.0, 0.5))
        x = pyro.sample("x", dist.Normal(loc, log_scale.exp()).expand([size]).to_event(1))
        pyro.deterministic("summaries", torch.stack([x.mean(), x.var()]))

    def log_density(loc: Tensor, log_scale: Tensor) -> Tensor:
        scale = log_scale.exp()
        log_prior = dist.Normal(0.0, 2.0).log_prob(loc) + dist.Normal(0.0, 0.5).log_prob(log_scale)
        of_mean = dist.Normal(loc, scale / math.sqrt(size)).log_prob(torch.tensor(mean))
        # (size - 1) variance / scale^2 has a chi-square distribution
        rate = (size - 1) / (2 * scale.square())
        of_variance = dist.Gamma((size - 1) / 2, rate).log_prob(torch.tensor(variance))
        return log_prior + of_mean + of_variance

    draws = sample(model, {"summaries": torch.tensor([mean, variance])})
    truth = Quadrature(log_density, (-4.0, 6.0, 1000), (-2.5, 2.5, 1000))
    check_two((draws["loc"], draws["log_scale"]), truth)
    # the values are uniform on a sphere around their mean
    radius = math.sqrt((size - 1) * variance)
    cosine = (draws["x"][..., 0] - mean) / (radius * math.sqrt(1 - 1 / size))
    cdf = scipy.stats.beta(0.5, (size - 2) / 2).cdf
    assert_distribution(cosine.square(), cdf, name="squared cosine")
    assert_mean(cosine, 0.0, min_ess=400, name="cosine")


# -- plates and discrete sites -------------------------------------------------------------------


def test_plates() -> None:
    """Outputs inside one plate, observed sites inside two; everything is Gaussian."""
    y = torch.tensor([1.0, -0.5, 2.5])
    readings = torch.tensor([[0.3, -0.1, 1.9], [1.2, -1.5, 2.2]])

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        groups = pyro.plate("groups", 3, dim=-1)
        with groups:
            effect = pyro.sample("effect", dist.Normal(loc, 1.0))
            error = pyro.sample("error", dist.Normal(0.0, 0.5))
            pyro.deterministic("y", effect + 2 * error)
            with pyro.plate("repeats", 2, dim=-2):
                pyro.sample("reading", dist.Normal(effect, 0.8), obs=readings)

    draws = sample(model, {"y": y})
    # effects given the location: y has variance 1 around them, readings 0.64
    likelihood = 1 + 2 / 0.64
    effect_data = (y + readings.sum(0) / 0.64) / likelihood
    around_loc = 1 + 1 / likelihood
    precision = 1 / 4 + 3 / around_loc
    mean = effect_data.sum() / around_loc / precision
    assert_moments(draws["loc"], mean, precision**-0.5, min_ess=400, name="loc")
    weight = likelihood / (1 + likelihood)
    effect_mean = weight * effect_data + (1 - weight) * mean
    covariance = torch.eye(3) / (1 + likelihood) + (1 - weight) ** 2 / precision
    assert_moments(draws["effect"], effect_mean, covariance=covariance, min_ess=400, name="effect")


@pytest.mark.parametrize("in_plate", [False, True], ids=["one", "plate"])
def test_discrete_sites_are_summed_out(in_plate: bool) -> None:
    readings = torch.tensor([2.5, -0.4, 1.1]) if in_plate else torch.tensor([2.2])
    weights, locs = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 1.5])

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
        pyro.deterministic("y", z + 0.3 * z**2 + noise)
        if in_plate:
            with pyro.plate("readings", 3):
                k = pyro.sample("k", dist.Categorical(weights))
                pyro.sample("reading", dist.Normal(z + locs[k], 0.5), obs=readings)
        else:
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("reading", dist.Normal(z + locs[k], 0.5), obs=readings[0])

    def log_density(z: Tensor) -> Tensor:
        of_y = dist.Normal(z + 0.3 * z**2, 1.0).log_prob(torch.tensor(0.8))
        components = dist.Normal(z[:, None, None] + locs, 0.5).log_prob(readings[:, None])
        of_readings = (components + weights.log()).logsumexp(-1).sum(-1)
        return dist.Normal(0.0, 1.0).log_prob(z) + of_y + of_readings

    draws = sample(model, {"y": 0.8})["z"]
    truth = Quadrature(log_density, (-6.0, 6.0, 4000))
    assert_moments(draws, truth.mean(), truth.sd(), min_ess=400, name="z")
    assert_distribution(draws, truth.cdf(), name="z")


@pytest.mark.parametrize("in_plate", [False, True], ids=["one", "plate"])
def test_components_of_a_mixture_are_summed_out(in_plate: bool) -> None:
    """A continuous site whose parameters a discrete one chooses."""
    weights, locs = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 1.5])
    y = torch.tensor([0.2, 1.0]) if in_plate else torch.tensor(0.2)

    def model() -> None:
        with pyro.plate("rows", 2) if in_plate else nullcontext():
            k = pyro.sample("k", dist.Categorical(weights))
            x = pyro.sample("x", dist.Normal(locs[k], 1.0))
            noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
        pyro.deterministic("y", x + noise)

    draws = sample(model, {"y": y})["x"]
    evidence = dist.Normal(locs, 2**0.5).log_prob(y.unsqueeze(-1)) + weights.log()
    weights_given_y, means = evidence.softmax(-1), (locs + y.unsqueeze(-1)) / 2
    mean = (weights_given_y * means).sum(-1)
    sd = ((weights_given_y * (means**2 + 0.5)).sum(-1) - mean**2).sqrt()
    assert_moments(draws, mean, sd, min_ess=400, name="x")


# -- lifted observations -------------------------------------------------------------------------


def decoder(z: Tensor) -> tuple[Tensor, Tensor]:
    """Location and scale of five pixels."""
    features = torch.stack(
        [z[..., 0], z[..., 1], z[..., 0] * z[..., 1], z.square().sum(-1)], -1
    ).tanh()
    weights = torch.linspace(-1.5, 2.0, 20).reshape(5, 4).cos()
    scales = torch.nn.functional.softplus(torch.linspace(-1.0, 0.5, 5) + z[..., :1])
    return 2 * features @ weights.T, 0.3 + scales


FAMILIES = {"normal": dist.Normal, "student": lambda loc, scale: dist.StudentT(5.0, loc, scale)}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_lifting_observations_keeps_the_posterior(family: str) -> None:
    image = torch.tensor([0.9, -0.3, 0.2, 1.4, -0.8])

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("image", FAMILIES[family](*decoder(z)).to_event(1), obs=image)

    def log_density(x: Tensor, y: Tensor) -> Tensor:
        z = torch.stack([x, y], -1)
        log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        return log_prior + FAMILIES[family](*decoder(z)).log_prob(image).sum(-1)

    draws = sample(lift_observations(model), num_chains=60, num_samples=35)
    truth = Quadrature(log_density, (-6.0, 6.0, 600), (-6.0, 6.0, 600))
    check_two((draws["z"][..., 0], draws["z"][..., 1]), truth, min_ess=400)
    loc, scale = decoder(draws["z"])
    assert (loc + scale * draws["image_noise"] - image).abs().max() < 1e-8


# -- time series ---------------------------------------------------------------------------------

SERIES = (0.7, 1.5, 0.6, 0.2, -0.9, -1.6, -0.2, 0.4)


def step_by_step() -> None:
    """A site per step: the code after it sees the data, so that noise acts on one step alone."""
    persistence = pyro.sample("persistence", dist.Normal(0.0, 0.5))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    value = torch.zeros(())
    for t in range(len(SERIES)):
        noise = pyro.sample(f"noise_{t}", dist.Normal(0.0, 1.0))
        value = pyro.deterministic(f"value_{t}", persistence * value + scale * noise)


def monolithic() -> None:
    """One site for the whole series, with the recursion inside."""
    persistence = pyro.sample("persistence", dist.Normal(0.0, 0.5))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0).expand([len(SERIES)]).to_event(1))
    values = [torch.zeros(())]
    for t in range(len(SERIES)):
        values.append(persistence * values[-1] + scale * noise[t])
    pyro.deterministic("series", torch.stack(values[1:]))


def in_place() -> None:
    """The same written into a tensor, which ``vmap`` cannot follow."""
    persistence = pyro.sample("persistence", dist.Normal(0.0, 0.5))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0).expand([len(SERIES)]).to_event(1))
    series, value = torch.zeros(len(SERIES)), torch.zeros(())
    for t in range(len(SERIES)):
        value = persistence * value + scale * noise[t]
        series[t] = value
    pyro.deterministic("series", series)


def series_truth() -> Quadrature:
    values = torch.tensor(SERIES)
    previous = torch.cat([torch.zeros(1), values[:-1]])

    def log_density(persistence: Tensor, log_scale: Tensor) -> Tensor:
        loc, scale = persistence[..., None] * previous, log_scale.exp()[..., None]
        log_prior = dist.Normal(0.0, 0.5).log_prob(persistence)
        log_prior = log_prior + dist.Normal(0.0, 0.5).log_prob(log_scale)
        return log_prior + dist.Normal(loc, scale).log_prob(values).sum(-1)

    return Quadrature(log_density, (-2.5, 2.5, 500), (-2.0, 2.5, 500))


def parameters(draws: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return draws["persistence"], draws["scale"].log()


@pytest.mark.slow
def test_teacher_forced_and_monolithic_series_agree() -> None:
    forced_data = {f"value_{t}": value for t, value in enumerate(SERIES)}
    size = {"num_chains": 60, "num_samples": 60}
    forced = parameters(sample(step_by_step, forced_data, **size))
    plain = parameters(sample(monolithic, {"series": torch.tensor(SERIES)}, **size))
    check_two(forced, series_truth())
    check_two(plain, series_truth())
    for name, a, b in zip(("persistence", "log scale"), forced, plain, strict=True):
        assert_same_mean(a, b, min_ess=400, name=name)
        assert_same_mean(a.square(), b.square(), min_ess=400, name=f"square of {name}")


@pytest.mark.slow
def test_model_that_writes_in_place() -> None:
    """It runs once per chain, and is told."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.warns(VectorizationWarning, match="once per chain"):
            draws = sample(
                in_place,
                {"series": torch.tensor(SERIES)},
                num_chains=4,
                num_samples=80,
                warmup_steps=30,
            )
    persistence, log_scale = parameters(draws)
    truth = series_truth()
    for axis, values, coordinate in ((0, persistence, first), (1, log_scale, second)):
        name, mean, sd = f"number {axis}", truth.mean(coordinate), truth.sd(coordinate)
        assert_moments(values, mean, sd, min_ess=80, name=name)
