"""Simulators whose posteriors are known."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_ext import (
    NeuralLikelihoodEstimator,
    NeuralPosteriorEstimator,
    NeuralRatioEstimator,
    NeuralSplineFlow,
)
from pyro_ext.infer.contrastive.estimator import ContrastiveEstimator

__all__ = [
    "ESTIMATORS",
    "NOISE",
    "SMALL_FLOW",
    "WEIGHT",
    "Counting",
    "exact_linear_gaussian",
    "linear_gaussian",
    "make",
    "sites_of_all_kinds",
    "two_moons",
    "two_moons_log_posterior",
]

WEIGHT = torch.tensor([[1.0, 0.5], [-0.3, 1.2]], dtype=torch.float64)
NOISE = 0.6

SMALL_FLOW = partial(NeuralSplineFlow, transforms=2, hidden_features=24, residual_blocks=1)

ESTIMATORS: dict[str, Callable[..., ContrastiveEstimator]] = {
    "ratio": partial(NeuralRatioEstimator, hidden_features=32),
    "posterior": partial(NeuralPosteriorEstimator, flow=SMALL_FLOW),
    "likelihood": partial(NeuralLikelihoodEstimator, flow=SMALL_FLOW),
}


def make(kind: str, model: Callable[[], Any], **settings: Any) -> ContrastiveEstimator:
    """One of the three estimators, with a small network."""
    settings.setdefault("observed", ["x"])
    return ESTIMATORS[kind](model, **settings)


def linear_gaussian() -> None:
    """Two Gaussian latents in sites of their own, seen through a matrix and noise."""
    first = pyro.sample("first", dist.Normal(0.0, 1.0))
    second = pyro.sample("second", dist.Normal(0.5, 1.5))
    theta = torch.stack([first, second], -1)
    mean = (WEIGHT.to(theta) @ theta[..., None]).squeeze(-1)
    pyro.sample("x", dist.Normal(mean, NOISE).to_event(1))


def exact_linear_gaussian(x: Tensor) -> dist.MultivariateNormal:
    """Posterior of (first, second)."""
    prior_precision = torch.diag(torch.tensor([1.0, 1.5]) ** -2)
    precision = prior_precision + WEIGHT.T @ WEIGHT / NOISE**2
    shift = prior_precision @ torch.tensor([0.0, 0.5]) + WEIGHT.T @ x / NOISE**2
    return dist.MultivariateNormal(
        torch.linalg.solve(precision, shift), precision_matrix=precision
    )


def two_moons() -> None:
    """Two crescents; its noise is a latent to be left out (Greenberg et al. 2019)."""
    theta = pyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([2]).to_event(1))
    angle = pyro.sample("angle", dist.Uniform(-math.pi / 2, math.pi / 2))
    radius = pyro.sample("radius", dist.Normal(0.1, 0.01))
    crescent = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], -1)
    total = theta[..., 0] + theta[..., 1]
    shift = torch.stack([-total.abs(), theta[..., 1] - theta[..., 0]], -1) / math.sqrt(2)
    pyro.deterministic("x", crescent + shift, event_dim=1)


def two_moons_log_posterior(theta: Tensor) -> Tensor:
    """Given x = 0; exact but for what the edge of the prior cuts off."""
    along = (theta[..., 0] + theta[..., 1]).abs() / math.sqrt(2) - 0.25
    across = (theta[..., 0] - theta[..., 1]) / math.sqrt(2)
    radius = torch.hypot(along, across)
    log_prob = dist.Normal(0.1, 0.01).log_prob(radius) - (2 * math.pi * radius).log()
    return torch.where(along > 0, log_prob, -torch.inf)


def sites_of_all_kinds() -> None:
    """Latents on several supports, in a plate too, and two observed sites."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("groups", 2):
        level = pyro.sample("level", dist.Normal(0.0, rate))
        pyro.sample("noise", dist.Exponential(1.0))
        pyro.sample("count", dist.Poisson(level.exp()))
    pyro.sample("x", dist.Normal(weights, 0.1).to_event(1))


class Counting(nn.Module):
    """A network that counts the rows it has seen."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        """Linear."""
        self.rows += len(x)
        result: Tensor = self.linear(x.flatten(1))
        return result
