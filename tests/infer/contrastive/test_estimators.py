import math
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import NUTS, Predictive
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyro_ext import (
    MCMC,
    NeuralLikelihoodEstimator,
    NeuralPosteriorEstimator,
    NeuralSplineFlow,
)
from pyro_ext.infer.contrastive import FlowPosterior, RatioPosterior
from pyro_ext.infer.contrastive.losses import Batch
from tests.infer.contrastive.problems import (
    ESTIMATORS,
    NOISE,
    SMALL_FLOW,
    WEIGHT,
    exact_linear_gaussian,
    linear_gaussian,
    make,
)
from tests.statistics import Quadrature, assert_moments

X = torch.tensor([0.4, 1.1], dtype=torch.float64)
# fewer and larger steps than the defaults, for problems as smooth as these
FIT: dict[str, Any] = {"num_epochs": 20, "batch_size": 200, "learning_rate": 5e-3}


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_linear_gaussian_posterior(kind: str) -> None:
    estimator = make(kind, linear_gaussian)
    estimator.simulate(3000)
    estimator.fit(**FIT)
    posterior = estimator.posterior(X)
    exact = exact_linear_gaussian(X)
    truth = exact.sample((500,))
    log_prob = posterior.log_prob({"first": truth[:, 0], "second": truth[:, 1]})
    difference = exact.log_prob(truth) - log_prob
    # what a learned density may be off by, in nats
    difference = (difference - difference.median() * (not posterior.is_normalized)).detach()
    assert difference.abs().mean() < 0.15
    if posterior.is_normalized:
        assert abs(float(difference.mean())) < 0.05
    draws = torch.stack(list(posterior.sample(1000).values()), -1)
    z = (draws.mean(0) - exact.mean) / exact.stddev
    assert z.abs().max() < 5 / math.sqrt(1000) + 0.1
    assert (draws.std(0) / exact.stddev).log().abs().max() < 0.15
    # by weights that know the likelihood, the rest of the error goes
    refined = posterior.refine(4000)
    assert refined.ess > 3000
    exactly = torch.stack(list(refined.resample(2000).values()), -1)
    assert_moments(exactly[None], exact.mean, exact.stddev, name="refined draws", min_ess=1500)
    if posterior.is_normalized:
        evidence = _log_evidence(X)
        assert float(refined.log_evidence) == pytest.approx(evidence, abs=0.05)


def _log_evidence(x: Tensor) -> float:
    theta = exact_linear_gaussian(x).mean
    given = {"first": theta[0], "second": theta[1], "x": x}
    trace = pyro.poutine.trace(pyro.poutine.condition(linear_gaussian, given)).get_trace()
    return float(trace.log_prob_sum() - exact_linear_gaussian(x).log_prob(theta))


SAMPLERS: dict[str, dict[str, Any]] = {
    "smc": {},
    "importance": {"num_draws": 50_000},
    "nuts": {"num_chains": 2, "warmup_steps": 40},
    "slice": {"num_chains": 500, "thinning": 3},
}


@pytest.mark.parametrize("method", SAMPLERS)
def test_sampling_methods_on_a_known_ratio(method: str) -> None:
    estimator = make("ratio", linear_gaussian)

    def log_ratio(u: Tensor, log_prior: Tensor, features: Tensor) -> Tensor:
        # the prior has its own place in the posterior
        return exact_linear_gaussian(X).log_prob(u) - log_prior

    posterior = RatioPosterior(estimator.simulator, log_ratio, X[None], X)
    num = 200 if method == "nuts" else 2000
    with torch.no_grad():  # which chains that need gradients do without
        draws = posterior.sample(num, method=method, **SAMPLERS[method])
    exact = exact_linear_gaussian(X)
    together = torch.stack(list(draws.values()), -1)[None]
    assert_moments(together, exact.mean, exact.stddev, name=method, min_ess=num / 3)


def test_two_kinds_of_posterior() -> None:
    for kind, expected in (("ratio", RatioPosterior), ("posterior", FlowPosterior)):
        estimator = make(kind, linear_gaussian)
        estimator.simulate(300)
        estimator.fit(num_epochs=1)
        assert isinstance(estimator.posterior(X), expected)


def _may_fail() -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    x = pyro.sample("noise", dist.Normal(0.0, 1.0)) + theta
    fails = pyro.sample("u", dist.Uniform(0.0, 1.0)) > torch.sigmoid(3.0 * theta)
    pyro.deterministic("x", torch.where(fails, torch.nan, x))


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_failed_simulations_leave_no_bias(kind: str) -> None:
    estimator = make(kind, _may_fail, nuisance=["noise", "u"], max_failed=0.6)
    simulations = estimator.simulate(4000)
    assert abs(simulations.num_failed / 4000 - 0.5) < 5 * math.sqrt(0.25 / 4000)
    estimator.fit(**(FIT | {"num_epochs": 16, "learning_rate": 1e-2}))
    x = torch.tensor(-0.5)
    exact = Quadrature(
        lambda t: -0.5 * t**2 - 0.5 * (x - t) ** 2 + logsigmoid(3.0 * t), (-5.0, 5.0, 1000)
    )
    draws = estimator.posterior(x).sample(2000)["theta"]
    # without the probability of failing the mean would be -0.25
    assert exact.mean() > 0.25
    assert float(draws.mean()) == pytest.approx(exact.mean(), abs=0.08)
    assert float(draws.std()) == pytest.approx(exact.sd(), rel=0.12)


class _ExactPosterior(nn.Module):
    """The exact posterior of the linear-Gaussian model, and directions away from it."""

    def __init__(self, features: int, context_features: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.loc, self.scale = torch.zeros(context_features), torch.ones(context_features)

    def forward(self, features: Tensor) -> dist.MultivariateNormal:
        at_zero = exact_linear_gaussian(torch.zeros(2))
        slope = torch.stack(
            [exact_linear_gaussian(x).mean - at_zero.mean for x in torch.eye(2)], -1
        )
        x = features * self.scale + self.loc
        mean = at_zero.mean + x @ slope.T + self.shift
        factor = at_zero.scale_tril * self.log_scale.exp()[:, None]
        return dist.MultivariateNormal(mean, scale_tril=factor)


@pytest.mark.parametrize("combined", [True, False], ids=["and likelihood", "classification"])
def test_exact_posterior_is_stationary_in_further_rounds(combined: bool) -> None:
    z = _gradient_of_exact_posterior(combined, from_prior=False)
    assert z.abs().max() < 5, f"the gradient is {z.tolist()} standard errors from zero"


def test_maximum_likelihood_on_proposals_would_not_do() -> None:
    assert _gradient_of_exact_posterior(True, from_prior=True).abs().max() > 10


def _gradient_of_exact_posterior(combined: bool, *, from_prior: bool) -> Tensor:
    """Gradients in standard errors, with simulations of the prior and of a narrower proposal."""
    estimator = NeuralPosteriorEstimator(
        linear_gaussian, observed=["x"], flow=_ExactPosterior, combined=combined, num_atoms=5
    )
    estimator.simulate(6000)
    proposed = torch.tensor([0.8, 0.0]) + 0.6 * torch.randn(6000, 2)
    x = proposed @ WEIGHT.T + NOISE * torch.randn(6000, 2)
    latents = {"first": proposed[:, 0], "second": proposed[:, 1]}
    simulations = estimator.add_simulations(latents, {"x": x}, from_prior=from_prior)
    assert len(simulations.is_valid) == 6000
    assert estimator.simulations is not None
    packed, flat = estimator._training_data(estimator.simulations)
    flow = estimator.flow
    assert isinstance(flow, _ExactPosterior)
    flow.loc, flow.scale = estimator.encoder.loc, estimator.encoder.scale
    gradients = []
    for rows in torch.randperm(12_000).split(60):
        loss = estimator.loss(Batch.unpack(packed[rows]), flat[rows])
        gradients.append(torch.cat(torch.autograd.grad(loss, list(flow.parameters()))))
    values = torch.stack(gradients)
    return values.mean(0) / (values.std(0) / math.sqrt(len(values)))


ROUNDS: dict[str, Any] = {"num_epochs": 12, "batch_size": 200, "learning_rate": 1e-2}
# a likelihood that is normal in its mean needs no spline
AFFINE = partial(NeuralSplineFlow, transforms=1, coupling=False, spline="affine")


@pytest.mark.parametrize("kind", ["ratio", "posterior", "likelihood"])
def test_proposals_of_further_rounds_do_not_bias(kind: str) -> None:
    estimator = make(kind, linear_gaussian, **({} if kind == "ratio" else {"flow": AFFINE}))
    posterior = estimator.run_rounds(X, num_rounds=3, num_simulations=800, **ROUNDS)
    assert estimator.simulations is not None
    assert estimator.simulations.round.unique().tolist() == [0, 1, 2]
    exact = exact_linear_gaussian(X)
    draws = torch.stack(list(posterior.sample(1000).values()), -1)
    z = (draws.mean(0) - exact.mean) / exact.stddev
    assert z.abs().max() < 5 / math.sqrt(1000) + 0.15
    assert (draws.std(0) / exact.stddev).log().abs().max() < 0.2
    # proposals are narrower than the prior: their moments would be wrong by this much
    proposals = estimator.simulations.latents["first"][estimator.simulations.round > 0]
    assert proposals.std() < 0.75


def test_surrogate_of_the_likelihood_in_nuts() -> None:
    estimator = NeuralLikelihoodEstimator(linear_gaussian, observed=["x"], flow=AFFINE)
    estimator.simulate(2000)
    estimator.fit(**FIT)
    theta = {"first": torch.tensor([0.3, -1.0]), "second": torch.tensor([0.0, 1.0])}
    assert estimator.likelihood(theta).sample((5,)).shape == (5, 2, 2)
    surrogate = estimator.surrogate(X)
    mcmc = MCMC(NUTS(surrogate), 100, 60, disable_progbar=True)
    mcmc.run()
    exact = exact_linear_gaussian(X)
    for i, value in enumerate(mcmc.get_samples().values()):
        assert abs(float(value.mean() - exact.mean[i])) < 0.5 * float(exact.stddev[i])


def test_posterior_is_a_guide_for_predictions() -> None:
    estimator = NeuralPosteriorEstimator(linear_gaussian, observed=["x"], flow=SMALL_FLOW)
    estimator.simulate(2000)
    estimator.fit(**FIT)
    posterior = estimator.posterior(X)
    predictive = Predictive(linear_gaussian, guide=posterior, num_samples=500, parallel=True)
    draws = predictive()
    assert draws["x"].shape[0] == 500
    # observed twice: variance of the noise and of what is not known about the latents
    assert ((draws["x"].reshape(500, 2).mean(0) - X).abs() < 0.3).all()
    trace = pyro.poutine.trace(posterior).get_trace()
    log_prob = sum(
        trace.nodes[name]["fn"].log_prob(trace.nodes[name]["value"])
        for name in trace
        if trace.nodes[name]["type"] == "sample"
    )
    values = {name: trace.nodes[name]["value"][None] for name in ("first", "second")}
    torch.testing.assert_close(log_prob, posterior.log_prob(values).squeeze())
