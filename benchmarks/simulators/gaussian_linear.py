r"""A linear map of normal parameters, seen with normal noise: the posterior is normal.

.. math:: \theta \sim N(0, I_3), \qquad x \mid \theta \sim N(A\theta, 0.3^2 I_4)
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .task import Reference, Task

__all__ = ["GAUSSIAN_LINEAR", "MATRIX", "NOISE", "model", "posterior"]

MATRIX = ((1.0, 0.5, 0.0), (0.0, 1.0, 0.5), (0.5, 0.0, 1.0), (1.0, 1.0, 1.0))
NOISE = 0.3


def model() -> Tensor:
    """Draw parameters and data."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    mean = theta @ torch.tensor(MATRIX).to(theta).T
    return pyro.sample("x", dist.Normal(mean, NOISE).to_event(1))


def posterior(x: Tensor) -> dist.MultivariateNormal:
    """
    The exact posterior.

    :param Tensor x: shape ``batch_shape + (4,)``.
    """
    matrix = torch.tensor(MATRIX).to(x)
    precision = torch.eye(3).to(x) + matrix.T @ matrix / NOISE**2
    loc = torch.linalg.solve(precision, (x @ matrix / NOISE**2).unsqueeze(-1)).squeeze(-1)
    return dist.MultivariateNormal(loc, precision_matrix=precision)


def _reference(x: Tensor, num_draws: int) -> Reference:
    return Reference(posterior(x).sample((num_draws,)), num_draws)


GAUSSIAN_LINEAR = Task(
    "gaussian_linear",
    model,
    lambda: torch.tensor([0.4, -0.9, 0.7, 0.2]),
    None,
    log_posterior=lambda theta, x: posterior(x).log_prob(theta),
    reference=_reference,
)
