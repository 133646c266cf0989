"""Densities, bounds and divergences with scores that are known, for all three diffusions."""

import math

import pytest
import torch
from torch import Tensor

from pyro_ext.distributions import ScoreFlow
from pyro_ext.distributions.diffusion import VESDE, VPSDE, SubVPSDE
from pyro_ext.distributions.diffusion.flow_ode import divergence
from tests.distributions.diffusion.problems import (
    FADED,
    MIXTURE,
    SKEWED,
    KnownScore,
    Mixture,
    known_flow,
)
from tests.statistics import assert_mean

PROBLEMS = {"gaussian": SKEWED, "mixture": MIXTURE}
TIGHT = {"rtol": 1e-6, "atol": 1e-6}


@pytest.mark.parametrize(
    ("name", "problem", "solver"),
    [
        *((name, problem, "rowwise") for name in FADED for problem in PROBLEMS),
        ("vp", "mixture", "dopri5"),
        ("vp", "mixture", "rk4"),
    ],
)
def test_log_prob_is_the_density(name: str, problem: str, solver: str) -> None:
    sde, mixture = FADED[name], PROBLEMS[problem]
    noisy = mixture.at(sde, sde.start)
    x = noisy.sample((20,))
    settings = TIGHT | {"solver": solver, "num_steps": 120}
    with torch.no_grad():
        found = known_flow(mixture, sde)().density(x, **settings)
    torch.testing.assert_close(found.log_prob, noisy.log_prob(x), atol=1e-4, rtol=0)
    assert int(found.num_evaluations.min()) > 50


def test_without_noise_at_the_start_it_is_the_density_of_the_data() -> None:
    sde = VPSDE(beta_max=60.0, start=1e-6)
    x = MIXTURE.density().sample((50,))
    with torch.no_grad():
        found = known_flow(MIXTURE, sde)().log_prob(x, **TIGHT)
    torch.testing.assert_close(found, MIXTURE.density().log_prob(x), atol=1e-4, rtol=0)


def test_a_shift_and_a_scale_of_the_data_are_in_the_density() -> None:
    sde = FADED["vp"]
    flow = known_flow(MIXTURE, sde)
    flow.loc.copy_(torch.tensor([3.0, -1.0]))
    flow.scale.copy_(torch.tensor([2.0, 0.1]))
    z = MIXTURE.at(sde, sde.start).sample((20,))
    x = z * flow.scale + flow.loc
    with torch.no_grad():
        found = flow().log_prob(x, **TIGHT)
    expected = MIXTURE.at(sde, sde.start).log_prob(z) - math.log(0.2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    t = torch.tensor(sde.start).expand(20)
    score = MIXTURE.score(sde, z, t) / flow.scale
    torch.testing.assert_close(flow().score(x).detach(), score)


@pytest.mark.parametrize("name", FADED)
def test_to_noise_and_back(name: str) -> None:
    """Reversible to the tolerance of the solver, and both directions have the same density."""
    flow, x = known_flow(MIXTURE, FADED[name]), MIXTURE.density().sample((10,))
    with torch.no_grad():
        there = flow().density(x, **TIGHT)
        back = flow().to_data(there.noise, **TIGHT)
        drawn = flow().to_data(torch.randn(10, 2), **TIGHT)
        again = flow().to_data(flow().density(drawn, **TIGHT).noise, **TIGHT)
    assert float((back - x).abs().max()) < 1e-4
    assert float((again - drawn).abs().max()) < 1e-4


def test_noise_of_data_is_standard_normal() -> None:
    with torch.no_grad():
        x = MIXTURE.at(FADED["ve"], 1e-5).sample((2000,))
        noise = known_flow(MIXTURE, FADED["ve"])().density(x).noise
    for i in range(2):
        assert_mean(noise[None, :, i], 0.0, name=f"noise {i}")
        assert_mean(noise[None, :, i].square(), 1.0, name=f"square of noise {i}")


def test_a_value_does_not_depend_on_its_batch() -> None:
    flow, x = known_flow(MIXTURE, VPSDE()), MIXTURE.density().sample((20,))
    far = torch.full((1, 2), 30.0)
    with torch.no_grad():
        alone = flow().density(x)
        together = flow().density(torch.cat([x, far]))
    torch.testing.assert_close(alone.log_prob, together.log_prob[:-1], rtol=1e-10, atol=1e-10)
    assert alone.num_evaluations.tolist() == together.num_evaluations[:-1].tolist()


def test_gradients_of_log_prob_are_the_score() -> None:
    sde = FADED["vp"]
    x = MIXTURE.at(sde, sde.start).sample((10,)).requires_grad_()
    log_prob = known_flow(MIXTURE, sde)().log_prob(x, **TIGHT)
    gradient = torch.autograd.grad(log_prob.sum(), x)[0]
    score = MIXTURE.score(sde, x.detach(), torch.tensor(sde.start).expand(10))
    torch.testing.assert_close(gradient, score, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinsons_estimate_is_unbiased(probe: str) -> None:
    sde = VPSDE()
    x = SKEWED.density().sample((1,))
    flow = known_flow(SKEWED, sde)
    with torch.no_grad():
        exact = flow().log_prob(x, trace="exact")
        settings = {"trace": "hutchinson", "probe": probe, "solver": "rk4", "num_steps": 25}
        bias = flow().log_prob(x, trace="exact", solver="rk4", num_steps=25) - exact
        draws = flow().log_prob(x.expand(2000, 3), **settings)
    assert float(draws.std()) > 0.01
    assert_mean(draws[None], float(exact + bias), name="estimate of the log-density")


def test_hutchinsons_vectors_can_be_the_same_again() -> None:
    flow, x = known_flow(SKEWED, VPSDE()), SKEWED.density().sample((5,))
    with torch.no_grad():
        first, second = (flow().log_prob(x, trace="hutchinson", seed=3) for _ in range(2))
        other = flow().log_prob(x, trace="hutchinson", seed=4)
        many = flow().log_prob(x, trace="hutchinson", seed=3, num_probes=4)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.shape == many.shape


def test_exact_divergence() -> None:
    sde, x = VPSDE(), MIXTURE.density().sample((4,))
    network = KnownScore(MIXTURE, sde)
    t = torch.tensor([0.1, 0.2, 0.5, 0.9])

    def score(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return network(x, t)

    found, trace = divergence(score, x, t, torch.arange(4), None)
    torch.testing.assert_close(found, MIXTURE.score(sde, x, t))
    for i in range(4):
        jacobian = torch.func.jacrev(lambda x, i=i: MIXTURE.score(sde, x[None], t[i : i + 1])[0])(
            x[i]
        )
        torch.testing.assert_close(trace[i], jacobian.trace())


# -- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FADED)
def test_the_bound_is_tight_where_the_score_is_exact(name: str) -> None:
    """Theorem 2: the mean over the data is that of the density, but for the noise at the start."""
    sde = FADED[name]
    x = MIXTURE.density().sample((600,))
    with torch.no_grad():
        bound = known_flow(MIXTURE, sde)().elbo(x, 50, correction=False)
    # without the correction it bounds what the data are after the noise of the start
    noisy = sde.mean_factor(torch.tensor(sde.start)) * x
    noisy = noisy + sde.std(torch.tensor(sde.start)) * torch.randn(200, *x.shape)
    expected = MIXTURE.at(sde, sde.start).log_prob(noisy).mean(0)
    difference = bound.value - expected
    assert_mean(difference[None], 0.0, min_ess=300, name="bound minus log-density")
    ratio = float(difference.square().mean() / bound.standard_error.square().mean())
    assert 0.6 < ratio < 1.5, f"squared errors are {ratio:.2f} times what standard errors say"


@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
@pytest.mark.parametrize("factor", [0.7, 1.0, 1.2])
def test_the_bound_is_one(name: str, factor: float) -> None:
    """For the reverse diffusion of any score: of a Gaussian, its density is known too."""
    sde = {"vp": VPSDE(), "subvp": SubVPSDE(), "ve": VESDE()}[name]
    unit = Mixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    flow = known_flow(unit, sde, factor)
    x = torch.randn(200, 2)
    variance = _variance_of_reversed(flow, unit)
    expected = torch.distributions.Normal(0.0, variance.sqrt()).log_prob(x).sum(-1)
    with torch.no_grad():
        bound = flow().elbo(x, 50)
    gap = expected - bound.value
    error = float(gap.std()) / math.sqrt(len(gap))
    assert float(gap.mean()) > -5 * error, "the bound is above the density"
    if factor != 1.0:
        assert float(gap.mean()) > 5 * error, "the bound of a wrong score is tight"


def _variance_of_reversed(flow: ScoreFlow, unit: Mixture) -> Tensor:
    """Variance of each number that the reverse diffusion ends with, and eq. 38 adds to it."""
    sde = flow.sde
    factor = flow.score_net.get_parameter("factor").detach()
    grid = sde.time(torch.linspace(1, 0, 20_001))
    middle = 0.5 * (grid[1:] + grid[:-1])
    rate = sde.drift_rate(middle) + sde.likelihood_weight(middle) * factor / (
        sde.mean_factor(middle).square() + sde.std(middle).square()
    )
    # backwards in time: dv = -(2 rate v) dt + g^2 dt, exponentially in each step
    length = grid[:-1] - grid[1:]
    decay = (-2 * rate * length).exp()
    added = sde.likelihood_weight(middle) * -torch.expm1(-2 * rate * length) / (2 * rate)
    variance = torch.tensor(sde.prior_std**2)
    later = decay.flip(0).cumprod(0).flip(0)
    variance = later[0] * variance + (added * torch.cat([later[1:], torch.ones(1)])).sum()
    t = torch.tensor(sde.start)
    a, std = sde.mean_factor(t), sde.std(t)
    slope = (1 - factor * std.square() / (a.square() + std.square())) / a
    return slope.square() * variance + (std / a).square()


def test_divergence_from_the_model_is_the_score_matching_error() -> None:
    """Eq. 10: KL(p || q) = J_SM(g^2) + KL(p_T || q_T), for two Gaussians."""
    sde = VPSDE(start=1e-6)
    first = Mixture(torch.ones(1), torch.tensor([[0.3]]), torch.tensor([[[0.5]]]))
    second = Mixture(torch.ones(1), torch.tensor([[-0.2]]), torch.tensor([[[1.2]]]))
    u = (torch.arange(2000) + 0.5) / 2000
    t = sde.time(u)
    nodes = torch.linspace(-9, 9, 2001)
    total = torch.zeros(())
    for time in t.split(500):
        a = sde.mean_factor(time)
        mean = a * 0.3
        std = (a.square() * 0.5 + sde.std(time).square()).sqrt()
        x = mean[:, None] + std[:, None] * nodes
        density = (-0.5 * nodes.square()).exp()
        flat, times = x.reshape(-1, 1), time.repeat_interleave(len(nodes))
        difference = first.score(sde, flat, times) - second.score(sde, flat, times)
        errors = (difference.square().reshape(x.shape) * density).sum(-1) / density.sum()
        total = total + (errors * sde.std(time).square()).sum()
    matching = 0.5 * sde.natural_length * total / len(t)

    def kl(time: float) -> Tensor:
        p, q = (mixture.at(sde, time).component_distribution for mixture in (first, second))
        return torch.distributions.kl_divergence(p, q)[0]

    torch.testing.assert_close(kl(sde.start), matching + kl(1.0), atol=1e-6, rtol=1e-5)
