"""Draws by the flow, by the reverse diffusion, with guidance, and with gradients."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from pyro_ext.distributions import ScoreFlow
from pyro_ext.distributions.diffusion import VPSDE
from tests.distributions.diffusion.problems import FADED, MIXTURE, SDES, Mixture, known_flow
from tests.statistics import assert_distribution, assert_moments

METHODS: dict[str, dict[str, Any]] = {
    "ode": {"solver": "rk4", "num_steps": 30},
    "euler_maruyama": {"num_steps": 300},
    "predictor_corrector": {"num_steps": 120},
}


def _cdf(mixture: Mixture, axis: int) -> Callable[[np.ndarray], np.ndarray]:
    """Distribution function of one coordinate of a mixture."""
    means = mixture.means[:, axis].numpy()
    stds = mixture.covariances[:, axis, axis].sqrt().numpy()
    weights = mixture.weights.numpy()
    return lambda x: (weights * scipy.stats.norm.cdf((x[..., None] - means) / stds)).sum(-1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SDES)
def test_draws_have_the_distribution_of_the_data(name: str, method: str) -> None:
    flow = known_flow(MIXTURE, FADED[name] if name != "ve" else SDES[name])
    draws = flow().sample((4000,), method=method, **METHODS[method])
    assert not draws.requires_grad
    for axis in range(2):
        assert_distribution(draws[None, :, axis], _cdf(MIXTURE, axis), name=f"coordinate {axis}")
    product = draws.prod(-1) - float(MIXTURE.density().sample((100_000,)).prod(-1).mean())
    assert abs(float(product.mean())) < 5 * float(product.std()) / len(draws) ** 0.5


def test_steps_of_the_corrector_leave_the_distribution_alone() -> None:
    """Few steps of the predictor are not enough; corrections make up for them."""
    flow = known_flow(MIXTURE, FADED["vp"])
    arguments = {"num_steps": 60, "correction_size": 0.3}
    exact = MIXTURE.density().sample((4000,))
    distances = []
    for corrections in (0, 8):
        draws = flow().sample(
            (4000,), method="predictor_corrector", num_corrections=corrections, **arguments
        )
        distances.append(scipy.stats.ks_2samp(draws[:, 1].numpy(), exact[:, 1].numpy()).statistic)
    assert distances[1] < 0.7 * distances[0]


def test_denoising_takes_the_noise_of_the_first_time_away() -> None:
    point = Mixture(torch.ones(1), torch.tensor([[1.0, -2.0]]), 1e-6 * torch.eye(2)[None])
    flow = known_flow(point, VPSDE(start=1e-2))
    settings = {"method": "euler_maruyama", "num_steps": 100}
    noisy, clean = (flow().sample((500,), denoise=d, **settings) for d in (False, True))
    assert float(noisy.std(0).max()) > 0.03
    assert float(clean.std(0).max()) < 1e-3
    assert float((clean.mean(0) - point.means[0]).abs().max()) < 1e-3


def test_gradients_of_draws_reach_the_parameters() -> None:
    """The same by the adjoint equation, by the steps of a solver, and by differences."""
    unit = Mixture(torch.ones(1), torch.zeros(1, 2), 0.3 * torch.eye(2)[None])
    flow = known_flow(unit, VPSDE(start=1e-2), factor=0.9)
    factor = flow.score_net.get_parameter("factor")
    noise = torch.randn(3, 2)
    gradients = []
    for settings in ({}, {"solver": "dopri5"}, {"solver": "dopri5", "adjoint": True}):
        x = flow().to_data(noise, rtol=1e-6, atol=1e-6, **settings)
        gradients.append(torch.autograd.grad(x.square().sum(), factor)[0])
    values = []
    with torch.no_grad():
        for change in (1e-4, -1e-4):
            factor.add_(change)
            values.append(flow().to_data(noise, rtol=1e-9, atol=1e-9).square().sum())
            factor.sub_(change)
    expected = (values[0] - values[1]) / 2e-4
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_log_prob_reach_the_parameters() -> None:
    unit = Mixture(torch.ones(1), torch.zeros(1, 2), 0.3 * torch.eye(2)[None])
    flow = known_flow(unit, VPSDE(start=1e-2), factor=0.9)
    factor = flow.score_net.get_parameter("factor")
    x = torch.randn(3, 2)
    gradients = []
    for settings in ({}, {"solver": "dopri5", "adjoint": True}):
        log_prob = flow().log_prob(x, rtol=1e-6, atol=1e-6, **settings)
        gradients.append(torch.autograd.grad(log_prob.sum(), factor)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


# -- guidance -------------------------------------------------------------------------------------


PRIOR = Mixture(
    torch.ones(1, dtype=torch.float64),
    torch.tensor([[0.5, -0.5]], dtype=torch.float64),
    torch.tensor([[[1.0, 0.8], [0.8, 1.0]]], dtype=torch.float64),
)
OBSERVED, NOISE = 1.2, 0.4


def _posterior() -> tuple[Tensor, Tensor]:
    """Of both numbers, given the first one with noise."""
    covariance, mean = PRIOR.covariances[0], PRIOR.means[0]
    gain = covariance[:, 0] / (covariance[0, 0] + NOISE**2)
    return mean + gain * (OBSERVED - mean[0]), covariance - torch.outer(gain, covariance[0])


def test_guidance_with_the_likelihood_of_noisy_data_is_exact() -> None:
    """Of a Gaussian, p(y | x_t) is known."""
    sde = FADED["vp"]

    def likelihood(x: Tensor, t: Tensor) -> Tensor:
        a, variance = sde.mean_factor(t), sde.std(t).square()
        covariance = PRIOR.covariances[0]
        noisy = a[:, None, None].square() * covariance + variance[:, None, None] * torch.eye(2)
        gain = torch.linalg.solve(noisy, a[:, None] * covariance[0])
        mean = PRIOR.means[0, 0] + (gain * (x - a[:, None] * PRIOR.means[0])).sum(-1)
        spread = covariance[0, 0] - a * (gain * covariance[0]).sum(-1) + NOISE**2
        return -0.5 * (OBSERVED - mean).square() / spread

    guided = known_flow(PRIOR, sde)().guided(likelihood, of_denoised=False)
    mean, covariance = _posterior()
    for method in ("ode", "euler_maruyama"):
        draws = guided.sample((4000,), method=method, **METHODS[method])
        assert_moments(draws[None], mean, covariance=covariance, name=method)


def test_guidance_with_the_likelihood_of_data() -> None:
    """Exact where the spread of the data given noisy ones is added to that of the likelihood."""
    sde, covariance = FADED["vp"], PRIOR.covariances[0]

    def likelihood(x: Tensor, t: Tensor) -> Tensor:
        ratio = sde.std(t).square() / sde.mean_factor(t).square()
        precision = torch.linalg.inv(covariance) + torch.eye(2) / ratio[:, None, None]
        spread = torch.linalg.inv(precision)[:, 0, 0] + NOISE**2
        return -0.5 * (OBSERVED - x[:, 0]).square() / spread

    mean, expected = _posterior()
    guided = known_flow(PRIOR, sde)().guided(likelihood)
    draws = guided.sample((4000,), **METHODS["ode"])
    assert_moments(draws[None], mean, covariance=expected, name="draws")


def test_guidance_is_as_strong_as_wanted() -> None:
    sde = FADED["vp"]

    def likelihood(x: Tensor, t: Tensor) -> Tensor:
        return -0.5 * ((OBSERVED - x[:, 0]) / NOISE).square()

    prior = known_flow(PRIOR, sde)()
    x, t = torch.randn(6, 2), torch.full((6,), 0.3)
    scores = [prior.guided(likelihood, weight).score(x, t) for weight in (0.0, 1.0, 2.0)]
    torch.testing.assert_close(scores[0], prior.score(x, t))
    torch.testing.assert_close(scores[2] - scores[1], scores[1] - scores[0])
    twice = prior.guided(likelihood).guided(likelihood, of_denoised=False)
    assert not torch.equal(twice.score(x, t), scores[1])


class TwoClasses(nn.Module):
    """The score of N(c, 1) with context, and of N(0, 2) without: the mixture of c = +-1."""

    def __init__(self, sde: VPSDE) -> None:
        super().__init__()
        self.sde, self.weight = sde, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        assert context is not None
        a, variance = self.sde.mean_factor(t)[:, None], self.sde.std(t).square()[:, None]
        value, hidden = context.split(1, -1)
        conditional = -(x - a * value) / (a.square() + variance)
        unconditional = -x / (2 * a.square() + variance)
        return self.weight * torch.where(hidden > 0, unconditional, conditional)


def test_guidance_without_a_classifier() -> None:
    sde = FADED["vp"]
    flow = ScoreFlow(
        1,
        TwoClasses(sde),
        sde=sde,
        parametrization="score",
        context_features=1,
        context_dropout=0.1,
    )
    context = torch.ones(1)
    w = 1.5
    x, t = torch.randn(7, 1), torch.rand(7) * 0.9 + 0.05
    a, variance = sde.mean_factor(t)[:, None], sde.std(t).square()[:, None]
    conditional = -(x - a) / (a.square() + variance)
    unconditional = -x / (2 * a.square() + variance)
    found = flow(context).away_from_unconditional(w).score(x, t)
    torch.testing.assert_close(found, (1 + w) * conditional - w * unconditional)
    plain = flow(context).away_from_unconditional(0.0).score(x, t)
    torch.testing.assert_close(plain, flow(context).score(x, t))
    settings = METHODS["ode"]
    strong = flow(context).away_from_unconditional(w).sample((500,), **settings)
    weak = flow(context).sample((500,), **settings)
    assert float(strong.mean()) > float(weak.mean()) + 0.3


def test_hidden_contexts_are_as_many_as_wanted() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            seen.append(context)
            return 0 * x

    flow = ScoreFlow(1, Spy(), context_features=2, context_dropout=0.25)
    flow.training_loss(torch.randn(2000, 1), torch.ones(2000, 2))
    hidden = seen[0][:, 2] == 1
    assert 0.2 < float(hidden.double().mean()) < 0.3
    assert float(seen[0][hidden, :2].abs().max()) == 0
    flow.eval().training_loss(torch.randn(100, 1), torch.ones(100, 2))
    assert float(seen[1][:, 2].abs().max()) == 0
